package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Source hands out the current certificate of an identity. It may wait for one until ctx is done.
type Source interface {
	Bundle(ctx context.Context, id mesh.Identity) (*Bundle, error)
}

// Bundle is one certificate with its key, and the roots that peers must chain to. It is immutable.
type Bundle struct {
	ID        mesh.Identity
	NotBefore time.Time
	NotAfter  time.Time

	cert  tls.Certificate
	chain []*x509.Certificate // leaf first
	roots *Trust
}

// ErrBundle is wrapped by every error about material that does not make a Bundle.
var ErrBundle = errors.New("not a usable certificate")

// NewBundle makes a Bundle of a chain (PEM, leaf first) and its key. anchors are PEM certificates to trust.
// The leaf must be a certificate for that key with id as its only URI.
func NewBundle(id mesh.Identity, key crypto.Signer, chain, anchors []byte) (*Bundle, error) {
	certs, err := parseCerts(chain)
	if err != nil {
		return nil, err
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%w: the chain for %s is empty", ErrBundle, id)
	}
	trusted, err := parseCerts(anchors)
	if err != nil {
		return nil, err
	}
	if len(trusted) == 0 {
		return nil, fmt.Errorf("%w: there is no root for %s", ErrBundle, id)
	}
	return newBundle(id, key, certs, newRoots(trusted...))
}

func newBundle(id mesh.Identity, key crypto.Signer, chain []*x509.Certificate, anchors *Trust) (*Bundle, error) {
	leaf := chain[0]
	pub, ok := key.Public().(*ecdsa.PublicKey)
	if !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("%w: the certificate for %s is not for its key", ErrBundle, id)
	}
	uri, err := uriSAN(leaf)
	if err != nil {
		return nil, fmt.Errorf("%w: the certificate for %s: %w", ErrBundle, id, err)
	}
	if uri != id.String() {
		return nil, fmt.Errorf("%w: the certificate for %s is for %q", ErrBundle, id, uri)
	}
	b := &Bundle{ID: id, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, roots: anchors}
	b.cert = tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, c := range chain {
		if !anchors.has(c) { // a peer has its own roots
			b.cert.Certificate = append(b.cert.Certificate, c.Raw)
		}
	}
	if len(b.cert.Certificate) == 0 {
		return nil, fmt.Errorf("%w: the certificate for %s is a root itself", ErrBundle, id)
	}
	b.chain = chain
	return b, nil
}

// check says why peers that trust what this Bundle trusts would refuse its own certificate at a time.
func (b *Bundle) check(now time.Time) error {
	if now.Before(b.NotBefore) {
		return fmt.Errorf("%w: that of %s begins at %s, in %s by this node's clock; compare the clocks of the node and the CA",
			ErrBundle, b.ID, b.NotBefore.UTC().Format(time.RFC3339), b.NotBefore.Sub(now).Round(time.Second))
	}
	if !b.Valid(now) {
		return fmt.Errorf("%w: that of %s ended at %s, %s ago by this node's clock; compare the clocks of the node and the CA",
			ErrBundle, b.ID, b.NotAfter.UTC().Format(time.RFC3339), now.Sub(b.NotAfter).Round(time.Second))
	}
	if err := b.roots.Check(b.chain, now); err != nil {
		return fmt.Errorf("%w: that of %s does not lead to a trusted root: %w", ErrBundle, b.ID, err)
	}
	return nil
}

// withRoots is the same certificate under other roots.
func (b *Bundle) withRoots(anchors *Trust) *Bundle {
	c := *b
	c.roots = anchors
	return &c
}

// Serial is the certificate's serial number, in hex.
func (b *Bundle) Serial() string { return b.cert.Leaf.SerialNumber.Text(16) }

// Chain returns the certificates that are presented, leaf first, as DER. The caller must not change them.
func (b *Bundle) Chain() [][]byte { return b.cert.Certificate }

// Roots returns the trusted roots.
func (b *Bundle) Roots() []*x509.Certificate { return b.roots.certs }

// Trust returns what peers are checked against under this certificate.
func (b *Bundle) Trust() *Trust { return b.roots }

// Valid reports whether the certificate may be used at t.
func (b *Bundle) Valid(t time.Time) bool { return t.Before(b.NotAfter) }

// String tells which certificate it is; never the key.
func (b *Bundle) String() string {
	if b == nil {
		return "no certificate"
	}
	return fmt.Sprintf("certificate of %s until %s", b.ID, b.NotAfter.UTC().Format(time.RFC3339))
}

// GoString is String, so that %#v does not reach the key.
func (b *Bundle) GoString() string { return b.String() }

// LogValue is what slog prints.
func (b *Bundle) LogValue() slog.Value { return slog.StringValue(b.String()) }

// Format keeps every verb from the key.
func (b Bundle) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(b.String())) }

func parseCerts(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			return certs, nil
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: a PEM block of type %q among the certificates", ErrBundle, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrBundle, err)
		}
		certs = append(certs, c)
	}
}

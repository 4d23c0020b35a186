package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	rootTTL = 10 * 365 * 24 * time.Hour

	// clockSkew is how far a peer's clock may be behind ours: two clocks that are each five minutes off.
	clockSkew = 10 * time.Minute
)

// Signer holds the signing certificate and key. It is immutable.
type Signer struct {
	cert  *x509.Certificate
	key   crypto.Signer
	chain [][]byte // DER of the certificates between a leaf and the root: the signing one, unless it is the root
	roots []byte   // PEM of all trusted roots
	pool  *x509.CertPool
	// anchors are the trusted roots, leads those of them (by sum) to which the signing certificate leads.
	anchors []*x509.Certificate
	leads   map[string]bool
	lists   [][]byte // revocation lists of its own or of a CA above it, DER
	now     func() time.Time
}

// NewSelfSigned makes a root of the mesh's own. It returns the PEM of certificate and key.
func NewSelfSigned(trustDomain string, now time.Time) (certPEM, keyPEM []byte, err error) {
	return newRoot(trustDomain, now, rootTTL)
}

func newRoot(trustDomain string, now time.Time, life time.Duration) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a root key: %w", err)
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{Organization: []string{trustDomain}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the root: %w", err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("write the root key: %w", err)
	}
	return pemBlock("CERTIFICATE", der), pemBlock("PRIVATE KEY", k), nil
}

// NewSigner reads a signing certificate and its key. chain holds the certificates above it (PEM, may be empty),
// roots the trusted roots (PEM; empty: the signing certificate is the root).
func NewSigner(cert, key, chain, roots []byte) (*Signer, error) {
	signing, err := parseCertificates(cert)
	if err != nil {
		return nil, fmt.Errorf("signing certificate: %w", err)
	}
	s := &Signer{cert: signing[0], now: time.Now, roots: roots}
	if s.key, err = parseKey(key); err != nil {
		return nil, fmt.Errorf("signing key: %w", err)
	}
	pub, ok := s.cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(s.key.Public()) {
		return nil, errors.New("the signing key does not belong to the signing certificate")
	}
	if now := s.now(); now.After(s.cert.NotAfter) || now.Before(s.cert.NotBefore) {
		return nil, fmt.Errorf("the signing certificate is valid from %s to %s, now is %s",
			s.cert.NotBefore.UTC().Format(time.RFC3339), s.cert.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if k, ok := s.cert.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < 2048 {
		return nil, fmt.Errorf("the signing key is RSA with %d bits, at least 2048 are needed", k.N.BitLen())
	}
	if !s.cert.IsCA || s.cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, errors.New("the signing certificate may not sign certificates: basic constraints need CA, key usage needs certSign")
	}
	if len(bytes.TrimSpace(s.roots)) == 0 {
		s.roots = pemBlock("CERTIFICATE", s.cert.Raw)
	}
	trusted, err := parseCertificates(s.roots)
	if err != nil {
		return nil, fmt.Errorf("root certificates: %w", err)
	}
	s.pool, s.anchors, s.leads = x509.NewCertPool(), trusted, map[string]bool{}
	isRoot := map[string]bool{}
	for _, r := range trusted {
		s.pool.AddCert(r)
		isRoot[string(r.Raw)] = true
	}
	between := []*x509.Certificate{s.cert}
	if len(bytes.TrimSpace(chain)) > 0 {
		more, err := parseCertificates(chain)
		if err != nil {
			return nil, fmt.Errorf("certificate chain: %w", err)
		}
		between = append(between, more...)
	}
	intermediates := x509.NewCertPool()
	seen := map[string]bool{}
	for _, c := range between {
		if isRoot[string(c.Raw)] || seen[string(c.Raw)] {
			continue
		}
		seen[string(c.Raw)] = true
		intermediates.AddCert(c)
		s.chain = append(s.chain, c.Raw)
	}
	ways, err := s.cert.Verify(x509.VerifyOptions{
		Roots: s.pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err != nil {
		return nil, fmt.Errorf("the signing certificate does not lead to a trusted root: %w", err)
	}
	for _, way := range ways {
		s.leads[sumOf(way[len(way)-1])] = true
	}
	return s, nil
}

// sumOf names a certificate.
func sumOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

// revoke takes revocation lists (PEM). Each has to be signed by the signing certificate, one above it or a root.
func (s *Signer) revoke(lists []byte) error {
	issuers := append([]*x509.Certificate{s.cert}, s.anchors...)
	for _, der := range s.chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		issuers = append(issuers, c)
	}
	rest := lists
	for len(bytes.TrimSpace(rest)) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return errors.New("revocation lists: not in PEM form")
		}
		if block.Type != "X509 CRL" {
			return fmt.Errorf("revocation lists: PEM block %q where a list belongs", block.Type)
		}
		if _, err := identity.CheckRevocationList(block.Bytes, issuers); err != nil {
			return fmt.Errorf("revocation lists: %w", err)
		}
		s.lists = append(s.lists, block.Bytes)
	}
	return nil
}

// try issues a certificate to nobody and checks it as a peer will: a name constraint or a key usage above the
// signing certificate, or a revocation of it, shows only there.
func (s *Signer) try(trustDomain string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	id := mesh.Identity{TrustDomain: trustDomain, Namespace: "nobody", ServiceAccount: "nobody"}
	der, _, err := s.sign(key.Public(), leaf{identity: id, ttl: time.Minute})
	if err != nil {
		return err
	}
	var roots [][]byte
	for _, c := range s.anchors {
		roots = append(roots, c.Raw)
	}
	trust, err := identity.NewTrust(roots, s.lists)
	if err != nil {
		return err
	}
	var chain []*x509.Certificate
	for _, d := range append([][]byte{der}, s.chain...) {
		c, err := x509.ParseCertificate(d)
		if err != nil {
			return err
		}
		chain = append(chain, c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := trust.CheckFor(chain, s.now(), usage); err != nil {
			return fmt.Errorf("peers would refuse what it signs for %s: %w", id, err)
		}
	}
	return nil
}

// RootPEM is the roots that came with it.
func (s *Signer) RootPEM() []byte { return s.roots }

// Pool is what its own roots are, whatever else is published.
func (s *Signer) Pool() *x509.CertPool { return s.pool }

// NotAfter is when the signing certificate ends.
func (s *Signer) NotAfter() time.Time { return s.cert.NotAfter }

// Equal reports whether both sign with the same certificate and trust the same roots.
func (s *Signer) Equal(o *Signer) bool {
	return s != nil && o != nil && s.cert.Equal(o.cert) && bytes.Equal(s.roots, o.roots) &&
		slices.EqualFunc(s.lists, o.lists, bytes.Equal) && slices.EqualFunc(s.chain, o.chain, bytes.Equal)
}

// leaf is what a certificate is made out for: an identity, DNS names, or both.
type leaf struct {
	identity mesh.Identity
	dns      []string
	ttl      time.Duration
}

// sign makes a certificate. It never outlives the signing certificate.
func (s *Signer) sign(pub crypto.PublicKey, l leaf) (der []byte, notAfter time.Time, err error) {
	now := s.now()
	if !now.Before(s.cert.NotAfter) {
		return nil, time.Time{}, fmt.Errorf("the signing certificate expired at %s", s.cert.NotAfter.Format(time.RFC3339))
	}
	serial, err := serialNumber()
	if err != nil {
		return nil, time.Time{}, err
	}
	notAfter = now.Add(l.ttl)
	if s.cert.NotAfter.Before(notAfter) {
		notAfter = s.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		DNSNames:              l.dns,
	}
	if !l.identity.IsZero() {
		u, err := url.Parse(l.identity.String())
		if err != nil {
			return nil, time.Time{}, fmt.Errorf("identity %q: %w", l.identity, err)
		}
		template.URIs = []*url.URL{u}
	}
	der, err = x509.CreateCertificate(rand.Reader, template, s.cert, pub, s.key)
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("sign: %w", err)
	}
	return der, notAfter, nil
}

// chainPEM is the answer to a request: the leaf, what is between, and what peers are to trust.
func (s *Signer) chainPEM(der, roots []byte) []string {
	out := []string{string(pemBlock("CERTIFICATE", der))}
	for _, c := range s.chain {
		out = append(out, string(pemBlock("CERTIFICATE", c)))
	}
	return append(out, string(roots))
}

func serialNumber() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %q where a certificate belongs", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("no certificate in PEM form")
	}
	return out, nil
}

// parseKey reads the forms in which openssl and Istio write private keys.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			return nil, errors.New("no private key in PEM form")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		default:
			continue // "EC PARAMETERS" precedes the key in openssl's output
		}
		if err != nil {
			return nil, err
		}
		s, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a %T cannot sign", key)
		}
		return s, nil
	}
}

package identity

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	blockID   = "WARREN IDENTITY" // its bytes are the URI; begins a Bundle
	blockKey  = "PRIVATE KEY"
	blockCert = "CERTIFICATE"
	blockRoot = "TRUSTED CERTIFICATE"
	blockList = "X509 CRL"
)

// Marshal writes Bundles, keys included, for a process that takes over. The result is a secret: it belongs
// into sealed memory and nowhere else.
func Marshal(bundles []*Bundle) ([]byte, error) {
	var out bytes.Buffer
	for _, b := range bundles {
		key, err := x509.MarshalPKCS8PrivateKey(b.cert.PrivateKey)
		if err != nil {
			return nil, fmt.Errorf("writing the certificate of %s: %w", b.ID, err)
		}
		blocks := []*pem.Block{{Type: blockID, Bytes: []byte(b.ID.String())}, {Type: blockKey, Bytes: key}}
		for _, der := range b.cert.Certificate {
			blocks = append(blocks, &pem.Block{Type: blockCert, Bytes: der})
		}
		for _, c := range b.roots.certs {
			blocks = append(blocks, &pem.Block{Type: blockRoot, Bytes: c.Raw})
		}
		for _, der := range b.roots.lists {
			blocks = append(blocks, &pem.Block{Type: blockList, Bytes: der})
		}
		for _, block := range blocks {
			if err := pem.Encode(&out, block); err != nil {
				return nil, fmt.Errorf("writing the certificate of %s: %w", b.ID, err)
			}
		}
	}
	return out.Bytes(), nil
}

// PEM returns the certificate with its key and the roots, for a TLS implementation in another process of this pod. It is
// a secret: it must not reach a disk.
func (b *Bundle) PEM() (chain, key, roots []byte, err error) {
	der, err := x509.MarshalPKCS8PrivateKey(b.cert.PrivateKey)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("writing the certificate of %s: %w", b.ID, err)
	}
	for _, c := range b.cert.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: c})...)
	}
	for _, c := range b.roots.certs {
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: blockCert, Bytes: c.Raw})...)
	}
	return chain, pem.EncodeToMemory(&pem.Block{Type: blockKey, Bytes: der}), roots, nil
}

// Unmarshal reads what Marshal wrote. Every Bundle is checked as NewBundle does. Errors never quote a key.
func Unmarshal(data []byte) ([]*Bundle, error) {
	var bundles []*Bundle
	var id mesh.Identity
	var key crypto.Signer
	var chain, anchors []*x509.Certificate
	var lists [][]byte
	finish := func() error {
		if id.IsZero() {
			return nil
		}
		if key == nil || len(chain) == 0 || len(anchors) == 0 {
			return fmt.Errorf("%w: that of %s is not complete", ErrBundle, id)
		}
		trust := newRoots(anchors...)
		for _, der := range lists {
			if err := trust.revoke(der); err != nil {
				return err
			}
		}
		b, err := newBundle(id, key, chain, trust)
		if err != nil {
			return err
		}
		bundles = append(bundles, b)
		id, key, chain, anchors, lists = mesh.Identity{}, nil, nil, nil, nil
		return nil
	}
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil {
			return nil, fmt.Errorf("%w: %d bytes that are not PEM", ErrBundle, len(data))
		}
		data = rest
		if block.Type != blockID && id.IsZero() {
			return nil, fmt.Errorf("%w: a block %q before any identity", ErrBundle, block.Type)
		}
		switch block.Type {
		case blockID:
			if err := finish(); err != nil {
				return nil, err
			}
			var err error
			if id, err = mesh.ParseIdentity(string(block.Bytes)); err != nil {
				return nil, fmt.Errorf("%w: %w", ErrBundle, err)
			}
		case blockKey:
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%w: the key of %s cannot be read", ErrBundle, id)
			}
			s, ok := k.(crypto.Signer)
			if !ok {
				return nil, fmt.Errorf("%w: the key of %s cannot sign", ErrBundle, id)
			}
			key = s
		case blockList:
			lists = append(lists, block.Bytes)
		case blockCert, blockRoot:
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("%w: that of %s: %w", ErrBundle, id, err)
			}
			if block.Type == blockCert {
				chain = append(chain, c)
			} else {
				anchors = append(anchors, c)
			}
		default:
			return nil, fmt.Errorf("%w: an unknown block %q", ErrBundle, block.Type)
		}
	}
	if err := finish(); err != nil {
		return nil, err
	}
	return bundles, nil
}

package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/warrenmesh/warren/internal/mesh"
)

// maxRequest bounds what is parsed; a request with an RSA-4096 key has 2 KB.
const maxRequest = 16 << 10

// checkRequest reads a certificate signing request and returns its public key. The CA decides about everything
// else, but names in the request must not say anything other than the identity that is to be certified.
func checkRequest(data string, id mesh.Identity) (crypto.PublicKey, error) {
	if len(data) > maxRequest {
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", len(data), maxRequest)
	}
	block, rest := pem.Decode([]byte(data))
	if block == nil || (block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST") {
		return nil, errors.New("it is not a certificate request in PEM form")
	}
	if next, _ := pem.Decode(rest); next != nil {
		return nil, errors.New("it holds more than one PEM block")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("its signature: %w", err)
	}
	if n := len(csr.DNSNames) + len(csr.IPAddresses) + len(csr.EmailAddresses); n > 0 {
		return nil, fmt.Errorf("it asks for %d DNS, IP or mail names; an identity is a URI alone", n)
	}
	if len(csr.URIs) > 1 {
		return nil, fmt.Errorf("it asks for %d URI names, at most 1 is certified", len(csr.URIs))
	}
	for _, u := range csr.URIs {
		if u.String() != id.String() {
			return nil, fmt.Errorf("it asks for %q, the certificate would be for %q", u, id)
		}
	}
	switch k := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() {
			return nil, fmt.Errorf("its key is on the curve %s; use P-256 or P-384", k.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if k.N.BitLen() < 2048 {
			return nil, fmt.Errorf("its RSA key has %d bits, at least 2048 are needed", k.N.BitLen())
		}
	default:
		return nil, fmt.Errorf("keys of type %T are not certified", k)
	}
	return csr.PublicKey, nil
}

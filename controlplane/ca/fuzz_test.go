package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/url"
	"testing"

	"github.com/warrenmesh/warren/internal/mesh"
)

// FuzzRequest reads certificate signing requests. One that is accepted asks for nothing but the identity, proves
// that its sender has the key, and the key is one that the CA certifies.
func FuzzRequest(f *testing.F) {
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	mine, _ := url.Parse(id.String())
	other, _ := url.Parse("spiffe://cluster.local/ns/shop/sa/admin")
	for _, tmpl := range []x509.CertificateRequest{
		{URIs: []*url.URL{mine}}, {}, {URIs: []*url.URL{other}}, {URIs: []*url.URL{mine, mine}}, {URIs: []*url.URL{mine}, DNSNames: []string{"istiod"}},
		{URIs: []*url.URL{mine}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}},
	} {
		der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(der, true)
		f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), false)
	}
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"), false)
	f.Fuzz(func(t *testing.T, data []byte, der bool) {
		text := string(data)
		if der {
			text = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: data}))
		}
		pub, err := checkRequest(text, id)
		if err != nil {
			if pub != nil {
				t.Errorf("a key, and %v", err)
			}
			return
		}
		block, _ := pem.Decode([]byte(text))
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || csr.CheckSignature() != nil || len(text) > maxRequest {
			t.Fatalf("accepted without a proof of the key: %v", err)
		}
		if len(csr.DNSNames)+len(csr.EmailAddresses)+len(csr.IPAddresses) > 0 || len(csr.URIs) > 1 || len(csr.URIs) == 1 && csr.URIs[0].String() != id.String() {
			t.Errorf("accepted: %v %v", csr.URIs, csr.DNSNames)
		}
		switch k := pub.(type) {
		case *rsa.PublicKey:
			if k.N.BitLen() < 2048 {
				t.Errorf("accepted an RSA key of %d bits", k.N.BitLen())
			}
		case *ecdsa.PublicKey:
			if k.Curve.Params().BitSize < 256 {
				t.Errorf("accepted a key on %s", k.Curve.Params().Name)
			}
		}
	})
}

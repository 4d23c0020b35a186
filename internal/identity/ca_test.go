package identity

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// testCA signs what it is asked for, or fails as it is told.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	life time.Duration

	mu    sync.Mutex
	fail  error
	calls []mesh.Identity
}

func newTestCA(t testing.TB) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"test"}}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert: cert, key: key, life: 24 * time.Hour}
}

func (ca *testCA) rootPEM() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}))
}

// names is a subjectAltName with these URIs, byte for byte.
func names(uris ...string) pkix.Extension {
	var all []asn1.RawValue
	for _, u := range uris {
		all = append(all, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	value, err := asn1.Marshal(all)
	if err != nil {
		panic(err)
	}
	return pkix.Extension{Id: oidSAN, Value: value}
}

var bothUsages = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}

// issue signs a leaf as a template says.
func (ca *testCA) issue(pub crypto.PublicKey, f func(*x509.Certificate), uris ...string) string {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ca.life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: bothUsages,
	}
	if len(uris) > 0 {
		tmpl.ExtraExtensions = []pkix.Extension{names(uris...)}
	}
	if f != nil {
		f(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, pub, ca.key)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (ca *testCA) Sign(_ context.Context, id mesh.Identity, csr []byte, _ time.Duration) ([]string, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.calls = append(ca.calls, id)
	if ca.fail != nil {
		return nil, ca.fail
	}
	block, _ := pem.Decode(csr)
	if block == nil {
		return nil, errors.New("the CSR is not PEM")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := req.CheckSignature(); err != nil {
		return nil, err
	}
	if len(req.URIs) != 1 || req.URIs[0].String() != id.String() || len(req.Subject.Names) != 0 {
		return nil, errors.New("the CSR is not for that identity alone")
	}
	return []string{ca.issue(req.PublicKey, nil, id.String()), ca.rootPEM()}, nil
}

func (ca *testCA) setFail(err error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.fail = err
}

func (ca *testCA) asked() []mesh.Identity {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return append([]mesh.Identity(nil), ca.calls...)
}

var ui = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
var catalog = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "catalog"}

// bundle makes a Bundle as the CA would, or a wrong one past the checks of NewBundle.
func (ca *testCA) bundle(t testing.TB, id mesh.Identity, f func(*x509.Certificate), uris ...string) *Bundle {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if len(uris) == 0 && f == nil {
		uris = []string{id.String()}
	}
	block, _ := pem.Decode([]byte(ca.issue(key.Public(), f, uris...)))
	b := &Bundle{ID: id, roots: newRoots(ca.cert)}
	b.cert.PrivateKey, b.cert.Certificate = key, [][]byte{block.Bytes}
	if leaf, err := x509.ParseCertificate(block.Bytes); err == nil { // Go does not parse all that others could send
		b.cert.Leaf, b.NotBefore, b.NotAfter = leaf, leaf.NotBefore, leaf.NotAfter
	}
	return b
}

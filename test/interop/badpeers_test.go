package interop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
)

// pki signs what no CA of a mesh would.
type pki struct {
	t    *testing.T
	root *signer
}

// signer is a CA, or whatever poses as one.
type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
	up   *signer // nil for a root
}

// peer is what a peer presents.
type peer struct {
	chain [][]byte // DER, leaf first
	key   crypto.Signer
}

func (p peer) certificate() tls.Certificate {
	return tls.Certificate{Certificate: p.chain, PrivateKey: p.key}
}

func newPKI(t *testing.T) *pki {
	p := &pki{t: t}
	p.root = p.newRoot("interop")
	return p
}

func (p *pki) ecKey() crypto.Signer {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p.ok(err)
	return k
}

func (p *pki) rsaKey(bits int) crypto.Signer {
	k, err := rsa.GenerateKey(rand.Reader, bits)
	p.ok(err)
	return k
}

func (p *pki) ok(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *pki) newRoot(organization string) *signer {
	s := &signer{key: p.ecKey()}
	tmpl := caTemplate()
	tmpl.Subject.Organization = []string{organization}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, s.key.Public(), s.key)
	p.ok(err)
	s.cert, err = x509.ParseCertificate(der)
	p.ok(err)
	return s
}

func caTemplate() *x509.Certificate {
	return &x509.Certificate{SerialNumber: serial(), Subject: pkix.Name{CommonName: serial().Text(36)}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(48 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err)
	}
	return n
}

// intermediate makes a CA below up, as f says.
func (p *pki) intermediate(up *signer, f func(*x509.Certificate)) *signer {
	s := &signer{key: p.ecKey(), up: up}
	tmpl := caTemplate()
	if f != nil {
		f(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, up.cert, s.key.Public(), up.key)
	p.ok(err)
	s.cert, err = x509.ParseCertificate(der)
	p.ok(err)
	return s
}

// leaf makes a workload's certificate below up, as f says.
func (p *pki) leaf(up *signer, key crypto.Signer, f func(*x509.Certificate)) peer {
	tmpl := &x509.Certificate{SerialNumber: serial(), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	f(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, up.cert, key.Public(), up.key)
	p.ok(err)
	out := peer{chain: [][]byte{der}, key: key}
	for ; up.up != nil; up = up.up {
		out.chain = append(out.chain, up.cert.Raw)
	}
	return out
}

// good is a leaf for uri with nothing wrong with it but what f adds.
func (p *pki) good(uri string, f func(*x509.Certificate)) peer {
	return p.leaf(p.root, p.ecKey(), func(c *x509.Certificate) {
		san(uris(uri)...)(c)
		if f != nil {
			f(c)
		}
	})
}

// names is what goes into a subjectAltName, byte for byte: what x509 would not write.
type name struct {
	tag   int
	value string
}

func uris(values ...string) (out []name) {
	for _, v := range values {
		out = append(out, name{6, v})
	}
	return out
}

var oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}

func san(names ...name) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		var all []asn1.RawValue
		for _, n := range names {
			all = append(all, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: n.tag, Bytes: []byte(n.value)})
		}
		value, err := asn1.Marshal(all)
		if err != nil {
			panic(err)
		}
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oidSAN, Value: value})
	}
}

var (
	uiID      = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	catalogID = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "catalog"}
)

// bundle is what the agent holds for id: made by the agent's own reader, revocation lists included.
func (p *pki) bundle(id mesh.Identity, lists ...[]byte) *identity.Bundle {
	own := p.good(id.String(), nil)
	key, err := x509.MarshalPKCS8PrivateKey(own.key)
	p.ok(err)
	text := append(pemBlock("WARREN IDENTITY", []byte(id.String())), pemBlock("PRIVATE KEY", key)...)
	text = append(text, pemBlock("CERTIFICATE", own.chain[0])...)
	text = append(text, pemBlock("TRUSTED CERTIFICATE", p.root.cert.Raw)...)
	for _, l := range lists {
		text = append(text, pemBlock("X509 CRL", l)...)
	}
	all, err := identity.Unmarshal(text)
	p.ok(err)
	return all[0]
}

func (p *pki) revoke(by *signer, serials ...*big.Int) []byte {
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: s, RevocationTime: time.Now().Add(-time.Hour)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, by.cert, by.key)
	p.ok(err)
	return der
}

// badPeer is one class. The agent's server expects anybody of its trust domain, the agent's client expects
// catalog; what a peer presents would do but for the one thing.
type badPeer struct {
	name           string
	server, client string // the reason that our server and our client have to give; empty: not a case for that side
	peers          []peer // presented in turn
	tweak          func(*tls.Config)
	openssl        []string // further arguments to s_client and s_server; nil: openssl cannot do it
}

// plainOpenSSL: openssl can do it without further arguments.
var plainOpenSSL = []string{}

// identityKey is the peer's key as PEM.
func identityKey(p peer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	return pemBlock("PRIVATE KEY", der), err
}

func both(reason string) (string, string) { return reason, reason }

func (p *pki) badPeers() (classes []badPeer, lists [][]byte) {
	id := catalogID.String()
	add := func(name, server, client string, openssl []string, peers ...peer) {
		classes = append(classes, badPeer{name: name, server: server, client: client, openssl: openssl, peers: peers})
	}
	same := func(name, reason string, openssl []string, peers ...peer) {
		add(name, reason, reason, openssl, peers...)
	}
	good := p.good(id, nil)

	// Certificates that nobody vouches for.
	classes = append(classes, badPeer{name: "no certificate", server: identity.ReasonNoCertificate, client: identity.ReasonRefusedByPeer,
		peers: []peer{{}}, openssl: plainOpenSSL})
	own := p.ecKey()
	selfTmpl := &x509.Certificate{SerialNumber: serial(), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	san(uris(id)...)(selfTmpl)
	der, err := x509.CreateCertificate(rand.Reader, selfTmpl, selfTmpl, own.Public(), own)
	p.ok(err)
	same("self-signed", identity.ReasonSelfSigned, plainOpenSSL, peer{[][]byte{der}, own})
	foreign, namesake := p.newRoot("elsewhere"), p.newRoot("interop")
	namesake.cert.RawSubject, namesake.cert.Subject = p.root.cert.RawSubject, p.root.cert.Subject
	namesake.cert.SubjectKeyId = p.root.cert.SubjectKeyId
	same("foreign root", identity.ReasonUnknownCA, plainOpenSSL, p.leaf(foreign, p.ecKey(), san(uris(id)...)))
	same("foreign root under our root's name", identity.ReasonUnknownCA, plainOpenSSL, p.leaf(namesake, p.ecKey(), san(uris(id)...)))
	lost := p.leaf(p.intermediate(p.root, nil), p.ecKey(), san(uris(id)...))
	lost.chain = lost.chain[:1]
	same("intermediate left out", identity.ReasonUnknownCA, plainOpenSSL, lost)
	classes = append(classes, badPeer{name: "a good certificate without its key", server: identity.ReasonKeyNotPossessed, client: identity.ReasonKeyNotPossessed,
		peers: []peer{{good.chain, p.ecKey()}}})

	// Time.
	same("expired", identity.ReasonExpired, plainOpenSSL,
		p.good(id, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Second)
		}))
	same("not yet valid", identity.ReasonNotYetValid, plainOpenSSL, p.good(id, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }))
	same("intermediate expired", identity.ReasonExpired, plainOpenSSL, p.leaf(p.intermediate(p.root, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		p.ecKey(), san(uris(id)...)))

	// Names.
	add("another trust domain", identity.ReasonTrustDomain, identity.ReasonNotWanted, plainOpenSSL, p.good("spiffe://other.mesh/ns/shop/sa/catalog", nil),
		p.good("spiffe://Cluster.local/ns/shop/sa/catalog", nil), p.good("spiffe://cluster.local.evil/ns/shop/sa/catalog", nil))
	add("another identity of the mesh", "", identity.ReasonNotWanted, plainOpenSSL, p.good(uiID.String(), nil), p.good("spiffe://cluster.local/ns/shop/sa/Catalog", nil),
		p.good("spiffe://cluster.local/ns/shop2/sa/catalog", nil), p.good("spiffe://cluster.local/ns/shop/sa/catalog-v1", nil))
	same("two URI SANs", identity.ReasonSeveralURIs, plainOpenSSL, p.leaf(p.root, p.ecKey(), san(uris(id, uiID.String())...)), p.leaf(p.root, p.ecKey(), san(uris(id, id)...)))
	same("DNS SAN only", identity.ReasonNoURI, plainOpenSSL, p.leaf(p.root, p.ecKey(), san(name{2, "istiod.istio-system.svc"})))
	same("identity in the subject only", identity.ReasonNoURI, plainOpenSSL, p.leaf(p.root, p.ecKey(), func(c *x509.Certificate) { c.Subject.CommonName = id }))
	same("NUL in the SAN", identity.ReasonMalformed, plainOpenSSL, p.leaf(p.root, p.ecKey(), san(uris(id+"\x00.evil")...)))
	same("SAN that is not ASCII", identity.ReasonMalformed, plainOpenSSL, p.leaf(p.root, p.ecKey(), san(uris("spiffe://cluster.local/ns/shop/sa/cat\xc3\xa5log")...)))
	same("wildcard SPIFFE ID", identity.ReasonNotIdentity, plainOpenSSL, p.good("spiffe://cluster.local/ns/*/sa/*", nil), p.good("spiffe://*/ns/shop/sa/catalog", nil),
		p.good("spiffe://cluster.local/*", nil))
	var tricks []peer
	for _, uri := range []string{
		"spiffe://cluster.local/ns/../sa/catalog", "spiffe://cluster.local/ns/./sa/catalog", "spiffe://cluster.local/ns/x/../shop/sa/catalog",
		"spiffe://cluster.local//ns/shop/sa/catalog", id + "/", id + "/x", id + "?a=b", id + "#a", "spiffe://cluster.local/ns/shop/sa/catalo%67",
		"spiffe://cluster.local/ns/shop%2Fsa/catalog", "spiffe://user@cluster.local/ns/shop/sa/catalog", "spiffe://cluster.local:443/ns/shop/sa/catalog",
		"SPIFFE://cluster.local/ns/shop/sa/catalog", "https://cluster.local/ns/shop/sa/catalog", "spiffe://cluster.local/shop/catalog",
		"spiffe://cluster.local/ns//sa/catalog", "spiffe:///ns/shop/sa/catalog",
	} {
		tricks = append(tricks, p.good(uri, nil))
	}
	same("tricks with the path", identity.ReasonNotIdentity, plainOpenSSL, tricks...)

	// What a certificate is for.
	eku := func(u ...x509.ExtKeyUsage) peer {
		return p.good(id, func(c *x509.Certificate) { c.ExtKeyUsage = u })
	}
	add("for servers only, as a client", identity.ReasonUsage, "", plainOpenSSL, eku(x509.ExtKeyUsageServerAuth))
	add("for clients only, as a server", "", identity.ReasonUsage, plainOpenSSL, eku(x509.ExtKeyUsageClientAuth))
	same("for code signing", identity.ReasonUsage, plainOpenSSL, eku(x509.ExtKeyUsageCodeSigning))
	same("a CA's own certificate", identity.ReasonCA, plainOpenSSL, p.good(id, func(c *x509.Certificate) {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	}))
	workload := &signer{key: good.key}
	workload.cert, err = x509.ParseCertificate(good.chain[0])
	p.ok(err)
	workload.up = p.root
	same("signed by a workload", identity.ReasonIssuerNotCA, plainOpenSSL, p.leaf(workload, p.ecKey(), san(uris(id)...)))
	same("intermediate that may not sign", identity.ReasonIssuerNotCA, plainOpenSSL,
		p.leaf(p.intermediate(p.root, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), p.ecKey(), san(uris(id)...)))
	short := p.intermediate(p.root, func(c *x509.Certificate) { c.MaxPathLenZero = true })
	same("more intermediates than one of them allows", identity.ReasonIssuerNotCA, plainOpenSSL, p.leaf(p.intermediate(short, nil), p.ecKey(), san(uris(id)...)))
	same("name that its CA may not give", identity.ReasonNameConstraint, plainOpenSSL,
		p.leaf(p.intermediate(p.root, func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.mesh"}, true
		}), p.ecKey(), san(uris(id)...)),
		p.leaf(p.intermediate(p.root, func(c *x509.Certificate) {
			c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = []string{"cluster.local"}, true
		}), p.ecKey(), san(uris(id)...)))
	same("extension that nobody understands", identity.ReasonCritical, plainOpenSSL, p.good(id, func(c *x509.Certificate) {
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 99999, 1}, Critical: true, Value: []byte{5, 0}})
	}))

	// Weak cryptography.
	weak := []string{"-cipher", "DEFAULT@SECLEVEL=0"}
	same("SHA-1 signature", identity.ReasonWeakSignature, weak, p.good(id, func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA1 }))
	same("RSA of 1024 bits", identity.ReasonWeakKey, weak, p.leaf(p.root, p.rsaKey(1024), san(uris(id)...)))

	// Revocation.
	gone, goneCA := p.good(id, nil), p.intermediate(p.root, nil)
	leafSerial := func(pe peer) *big.Int {
		c, err := x509.ParseCertificate(pe.chain[0])
		p.ok(err)
		return c.SerialNumber
	}
	sub := p.intermediate(p.root, nil)
	below := p.leaf(sub, p.ecKey(), san(uris(id)...))
	lists = [][]byte{p.revoke(p.root, leafSerial(gone), goneCA.cert.SerialNumber), p.revoke(sub, leafSerial(below))}
	same("revoked", identity.ReasonRevoked, plainOpenSSL, gone, below)
	same("below a revoked CA", identity.ReasonRevoked, plainOpenSSL, p.leaf(goneCA, p.ecKey(), san(uris(id)...)))

	// TLS itself, under a good certificate.
	protocol := func(name, server, client string, openssl []string, tweak func(*tls.Config)) {
		classes = append(classes, badPeer{name: name, server: server, client: client, peers: []peer{good}, tweak: tweak, openssl: openssl})
	}
	v, w := both(identity.ReasonVersion)
	protocol("TLS 1.2", v, w, []string{"-tls1_2"}, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })
	v, w = both(identity.ReasonALPN)
	protocol("ALPN http/1.1", v, w, []string{"-alpn", "http/1.1"}, func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} })
	protocol("no ALPN", v, w, []string{"-noalpn"}, func(c *tls.Config) { c.NextProtos = nil })
	return classes, lists
}

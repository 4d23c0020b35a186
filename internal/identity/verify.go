package identity

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"slices"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Peers says whom a server lets in and by which clock.
type Peers struct {
	TrustDomains []string         // empty: that of the server's own identity
	Now          func() time.Time // nil: time.Now
}

// curves are the key exchanges: post-quantum with whoever can, X25519 with a ztunnel. A Go client sends a key
// share for both of the first two and a Go server takes the one that came, so neither costs a HelloRetryRequest.
// P-256 is for peers under FIPS.
var curves = []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256}

// alpn is what both ends of a tunnel speak; HTTP/2 over TLS must say so (RFC 9113, section 3.2).
const alpn = "h2"

func (b *Bundle) config() *tls.Config {
	return &tls.Config{
		MinVersion:                  tls.VersionTLS13,
		NextProtos:                  []string{alpn},
		CurvePreferences:            curves,
		Certificates:                []tls.Certificate{b.cert},
		SessionTicketsDisabled:      true, // every connection proves itself under the roots of its time
		DynamicRecordSizingDisabled: true, // a tunnel is written in batches; small records would only cost
	}
}

// ServerTLS is the configuration of a server that demands a certificate of its clients and lets in whom peers
// says. [PeerIdentity] then tells who it is.
func (b *Bundle) ServerTLS(peers Peers) *tls.Config {
	domains := peers.TrustDomains
	if len(domains) == 0 {
		domains = []string{b.ID.TrustDomain}
	}
	now := clock(peers.Now)
	c := b.config()
	c.Time = now
	c.ClientAuth = tls.RequireAnyClientCert // verified below, by our own rules
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := speaksHTTP2(cs); err != nil {
			return err
		}
		id, err := b.verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth, now())
		if err != nil {
			return err
		}
		if !slices.Contains(domains, id.TrustDomain) {
			return refuse(ReasonTrustDomain, "the trust domain of %s is none of %q", id, domains)
		}
		return nil
	}
	return c
}

// ClientTLS is the configuration of a client that talks to nobody but one of want (URI form).
func (b *Bundle) ClientTLS(want []string) *tls.Config { return b.ClientTLSAt(want, nil) }

// ClientTLSAt is ClientTLS by another clock; nil is time.Now.
func (b *Bundle) ClientTLSAt(want []string, at func() time.Time) *tls.Config {
	now := clock(at)
	c := b.config()
	c.Time = now
	c.InsecureSkipVerify = true // there is no host name to check; VerifyConnection checks the identity
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := speaksHTTP2(cs); err != nil {
			return err
		}
		id, err := b.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth, now())
		if err != nil {
			return err
		}
		if !slices.Contains(want, id.String()) {
			return refuse(ReasonNotWanted, "the server is %s, expected one of %q", id, want)
		}
		return nil
	}
	return c
}

// speaksHTTP2 refuses a peer that offers no protocol at all, whom crypto/tls lets in.
func speaksHTTP2(cs tls.ConnectionState) error {
	if cs.NegotiatedProtocol != alpn {
		return refuse(ReasonALPN, "its protocol is %q instead of %q", cs.NegotiatedProtocol, alpn)
	}
	return nil
}

func clock(now func() time.Time) func() time.Time {
	if now == nil {
		return time.Now
	}
	return now
}

// verify checks a peer's chain against the roots, at a time and for a usage, and returns whom it names.
func (b *Bundle) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) (mesh.Identity, error) {
	if len(chain) == 0 {
		return mesh.Identity{}, refuse(ReasonNoCertificate, "it has no certificate")
	}
	leaf := chain[0]
	chains, err := b.roots.chains(chain, now, usage)
	if err != nil {
		return mesh.Identity{}, &PeerError{chainReason(chain, err, now), err}
	}
	if !slices.ContainsFunc(chains, strong) {
		return mesh.Identity{}, refuse(ReasonWeakKey, "its key or that of an intermediate is too short: RSA needs %d bits", minRSA)
	}
	if leaf.IsCA {
		return mesh.Identity{}, refuse(ReasonCA, "its certificate is a CA's own")
	}
	uri, err := uriSAN(leaf)
	if err != nil {
		return mesh.Identity{}, err
	}
	id, err := mesh.ParseIdentity(uri)
	if err != nil {
		return mesh.Identity{}, &PeerError{ReasonNotIdentity, err}
	}
	return id, nil
}

func refuse(reason, format string, args ...any) error {
	return &PeerError{reason, fmt.Errorf(format, args...)}
}

// PeerIdentity returns who is at the other end of a connection that ServerTLS or ClientTLS has verified.
func PeerIdentity(cs tls.ConnectionState) (mesh.Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return mesh.Identity{}, refuse(ReasonNoCertificate, "it has no certificate")
	}
	uri, err := uriSAN(cs.PeerCertificates[0])
	if err != nil {
		return mesh.Identity{}, err
	}
	return mesh.ParseIdentity(uri)
}

var (
	oidSAN = asn1.ObjectIdentifier{2, 5, 29, 17}
	tagURI = 6 // uniformResourceIdentifier in GeneralName, RFC 5280 section 4.2.1.6
)

// uriSAN returns the one URI of a certificate, byte for byte: x509's own field went through a URL parser,
// which does not write back what it read.
func uriSAN(c *x509.Certificate) (string, error) {
	uri, found := "", false
	for _, ext := range c.Extensions {
		if !ext.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) > 0 {
			return "", refuse(ReasonNotIdentity, "its subjectAltName cannot be read")
		}
		for _, n := range names {
			if n.Class != asn1.ClassContextSpecific || n.Tag != tagURI {
				continue
			}
			if found {
				return "", refuse(ReasonSeveralURIs, "it has more than one URI")
			}
			uri, found = string(n.Bytes), true
		}
	}
	if !found {
		return "", refuse(ReasonNoURI, "it has no URI")
	}
	return uri, nil
}

package waypoint

import (
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// How TLS is spoken to applications: as a BackendTLSPolicy says, which is for gateways, or else as a DestinationRule does.

// encryption is how TLS is spoken to a target; nil where what is sent goes as it is.
func (b *builder) encryption(t target) *mesh.BackendTLS {
	if !t.http && !t.encrypt {
		return nil
	}
	if svc := b.lookup(t.service); svc != nil && b.ingress != nil {
		if e := svc.TLSFor(t.port); e != nil {
			return e
		}
	}
	return b.traffic(t).TLS
}

// byPolicy reports whether that is what a BackendTLSPolicy says.
func (b *builder) byPolicy(t target, e *mesh.BackendTLS) bool {
	svc := b.lookup(t.service)
	return svc != nil && svc.TLSFor(t.port) == e
}

// unreachable reports whether TLS that is to be spoken cannot be.
func (b *builder) unreachable(e *mesh.BackendTLS) bool {
	return e != nil && (e.Invalid != "" || e.Credential != "" && e.CredentialOf(b.self.Namespace) == nil)
}

// overTLS decides whether connections to a target get TLS on the way. What passes is TLS already, and a BackendTLSPolicy is about
// what has been taken out of TLS.
func (b *builder) overTLS(c chain, t target) target {
	passes, ended := c.port.App == mesh.AppTLS, false
	if c.ingress != nil {
		passes, ended = c.ingress.TLS == nil && len(c.ingress.Names) > 0, c.ingress.TLS != nil
	}
	if svc := b.lookup(t.service); svc != nil && c.ingress != nil && svc.TLSFor(t.port) != nil {
		t.encrypt = ended
	} else {
		t.encrypt = (!passes || b.asks(t) != nil) && b.traffic(t).TLS != nil // to a proxy, TLS is its own
	}
	return t
}

// application is the socket on which an application is spoken to, whatever carries it there.
func (b *builder) application(t target) *corev3.TransportSocket { return b.proxied(t, b.secured(t)) }

func (b *builder) secured(t target) *corev3.TransportSocket {
	e := b.encryption(t)
	if e == nil || b.unreachable(e) {
		return b.raw()
	}
	common := &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3},
	}
	switch {
	case (t.http || b.asks(t) != nil) && b.http2(t):
		common.AlpnProtocols = []string{"h2"}
	case t.http || b.asks(t) != nil:
		common.AlpnProtocols = []string{"http/1.1"}
	}
	host, names := e.Host, e.Names
	if svc := b.lookup(t.service); svc != nil {
		if host == "" && !strings.HasPrefix(svc.Name.Hostname, "*") {
			host = svc.Name.Hostname
		}
		if len(names) == 0 {
			names = mesh.CertificateNames(svc.SANs)
		}
		if len(names) == 0 {
			names = []mesh.CertificateName{{Name: host}}
		}
	}
	v := &tlsv3.CertificateValidationContext{}
	if e.Roots != "" {
		v.TrustedCa = inline(e.Roots)
	}
	for _, n := range names {
		kind := tlsv3.SubjectAltNameMatcher_DNS
		if n.URI {
			kind = tlsv3.SubjectAltNameMatcher_URI
		}
		v.MatchTypedSubjectAltNames = append(v.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{
			SanType: kind, Matcher: &envoymatcherv3.StringMatcher{MatchPattern: &envoymatcherv3.StringMatcher_Exact{Exact: n.Name}},
		})
	}
	shown := ""
	roots := &tlsv3.SdsSecretConfig{Name: PublicRootsSecret, SdsConfig: sdsSource()}
	switch {
	case e.Credential != "":
		c := e.CredentialOf(b.self.Namespace)
		b.credentials[c.Name] = c
		if e.Mutual {
			shown = c.Name
		}
		if !e.PublicRoots {
			roots = &tlsv3.SdsSecretConfig{Name: c.Name + rootsSuffix, SdsConfig: adsSource()}
		}
	case b.ingress != nil && b.byPolicy(t, e):
		shown = b.ingress.BackendCertificate
	}
	if shown != "" {
		common.TlsCertificateSdsSecretConfigs = []*tlsv3.SdsSecretConfig{{Name: shown, SdsConfig: adsSource()}}
	}
	switch {
	case e.Unchecked:
	case e.Roots != "":
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: v}
	default:
		common.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext: v, ValidationContextSdsSecretConfig: roots,
		}}
	}
	return b.transport("envoy.transport_sockets.tls", &tlsv3.UpstreamTlsContext{CommonTlsContext: common, Sni: host})
}

func inline(s string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: []byte(s)}}
}

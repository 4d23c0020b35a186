package waypoint

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// encryption is how a gateway speaks TLS to a target; nil where what it sends goes as it is.
func (b *builder) encryption(t target) *mesh.BackendTLS {
	if b.ingress == nil || !t.http && !t.encrypt {
		return nil
	}
	if svc := b.lookup(t.service); svc != nil {
		return svc.TLSFor(t.port)
	}
	return nil
}

// application is the socket on which an application is spoken to, whatever carries it there.
func (b *builder) application(t target) *corev3.TransportSocket {
	e := b.encryption(t)
	if e == nil || e.Invalid != "" {
		return b.raw()
	}
	common := &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3},
	}
	switch {
	case t.http && b.http2(t):
		common.AlpnProtocols = []string{"h2"}
	case t.http:
		common.AlpnProtocols = []string{"http/1.1"}
	}
	if name := b.ingress.BackendCertificate; name != "" {
		common.TlsCertificateSdsSecretConfigs = []*tlsv3.SdsSecretConfig{{Name: name, SdsConfig: adsSource()}}
	}
	v := &tlsv3.CertificateValidationContext{TrustedCa: inline(e.Roots)}
	for _, n := range e.Names {
		kind := tlsv3.SubjectAltNameMatcher_DNS
		if n.URI {
			kind = tlsv3.SubjectAltNameMatcher_URI
		}
		v.MatchTypedSubjectAltNames = append(v.MatchTypedSubjectAltNames, &tlsv3.SubjectAltNameMatcher{
			SanType: kind, Matcher: &envoymatcherv3.StringMatcher{MatchPattern: &envoymatcherv3.StringMatcher_Exact{Exact: n.Name}},
		})
	}
	common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContext{ValidationContext: v}
	return b.transport("envoy.transport_sockets.tls", &tlsv3.UpstreamTlsContext{CommonTlsContext: common, Sni: e.Host})
}

func inline(s string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: []byte(s)}}
}

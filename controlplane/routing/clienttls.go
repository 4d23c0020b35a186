package routing

import (
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// tls is the TLS that is spoken to endpoints beside that of the mesh; nil for none. What cannot be followed is not weakened:
// nothing is sent there then.
func (c *trafficConverter) tls(s *networking.ClientTLSSettings) *mesh.BackendTLS {
	if s == nil || s.Mode == networking.ClientTLSSettings_DISABLE || s.Mode == networking.ClientTLSSettings_ISTIO_MUTUAL {
		return nil // as otherwise: by the mesh's tunnel where there is one
	}
	t := &mesh.BackendTLS{
		Host: strings.ToLower(s.Sni), Names: mesh.CertificateNames(s.SubjectAltNames),
		Unchecked: s.InsecureSkipVerify.GetValue(), Mutual: s.Mode == networking.ClientTLSSettings_MUTUAL,
		Credential: strings.TrimPrefix(s.CredentialName, "kubernetes://"),
	}
	broken := func(field, text string) {
		c.say("tls."+field, text+": nothing is sent there")
		if t.Invalid == "" {
			t.Invalid = field + " " + text
		}
	}
	const files = "is a file, which is not read; put it into a Secret of the waypoint's or gateway's namespace and write credentialName"
	for _, f := range []struct{ field, value string }{{"clientCertificate", s.ClientCertificate}, {"privateKey", s.PrivateKey}, {"caCrl", s.CaCrl}} {
		if f.value != "" {
			broken(f.field, files)
		}
	}
	switch {
	case s.CaCertificates != "" && s.CaCertificates != "system":
		broken("caCertificates", files)
	case strings.ContainsAny(t.Credential, ":/"):
		broken("credentialName", "is not the name of a Secret")
	case t.Mutual && t.Credential == "" && t.Invalid == "":
		broken("credentialName", "is missing: which Secret has the certificate to show?")
	}
	t.PublicRoots = !t.Unchecked && (s.CaCertificates == "system" || t.Credential == "")
	return t
}

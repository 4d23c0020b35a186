package mesh

import "strings"

// BackendTLS is how gateways, or waypoints, speak TLS to the endpoints of a service, inside the mesh's tunnel where there is one.
type BackendTLS struct {
	Port    uint16            // of the service; 0: of those that have no BackendTLS of their own
	Host    string            // server name that is asked for; "": the service's own
	Names   []CertificateName // of which the endpoint's certificate has to have one; none: the service's SANs, or else Host
	Roots   string            // PEM; what that certificate is checked against
	Invalid string            // why nothing can be sent there

	// Other roots than Roots.
	PublicRoots bool // those that the waypoint's own image trusts
	Unchecked   bool // whatever certificate there is, of DestinationRules

	// Credential names the Secret that has roots, and where Mutual is set the certificate to show: one of each waypoint's or
	// gateway's own namespace. Credentials are those that are there.
	Credential  string
	Mutual      bool
	Credentials []Certificate // Name: namespace/Credential
}

// CertificateName is a subject alternative name.
type CertificateName struct {
	URI  bool // rather than a name of DNS
	Name string
}

// CertificateNames are names as Istio has them in lists: those of URIs, as identities are, and those of DNS.
func CertificateNames(list []string) (out []CertificateName) {
	for _, n := range list {
		out = append(out, CertificateName{URI: strings.Contains(n, "://"), Name: n})
	}
	return out
}

// CredentialOf is the one for the waypoints and gateways of a namespace; nil where it is not there or has not what is needed.
func (t *BackendTLS) CredentialOf(namespace string) *Certificate {
	for i := range t.Credentials {
		c := &t.Credentials[i]
		if c.Name == namespace+"/"+t.Credential && (!t.Mutual || c.Chain != "") && (c.Roots != "" || t.PublicRoots || t.Unchecked) {
			return c
		}
	}
	return nil
}

// TLSFor is how a gateway speaks TLS to a port of a service by a BackendTLSPolicy; nil where none says so.
func (s *Service) TLSFor(port uint16) *BackendTLS {
	var all *BackendTLS
	for i := range s.TLS {
		switch s.TLS[i].Port {
		case port:
			return &s.TLS[i]
		case 0:
			all = &s.TLS[i]
		}
	}
	return all
}

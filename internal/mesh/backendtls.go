package mesh

// BackendTLS is how gateways speak TLS to the endpoints of a service, inside the mesh's tunnel where there is one.
type BackendTLS struct {
	Port    uint16            // of the service; 0: of those that have no BackendTLS of their own
	Host    string            // server name that is asked for
	Names   []CertificateName // of which the endpoint's certificate has to have one
	Roots   string            // PEM; what that certificate is checked against
	Invalid string            // why nothing can be sent there
}

// CertificateName is a subject alternative name.
type CertificateName struct {
	URI  bool // rather than a name of DNS
	Name string
}

// TLSFor is how a gateway speaks TLS to a port of a service; nil where it does not.
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

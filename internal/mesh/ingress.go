package mesh

import (
	"iter"
	"reflect"
	"slices"
)

// Ingress is what the pods of a gateway serve: ways into the mesh, or out of it, on ports of their own. Nodes know nothing
// of it: it is for gateways. It is immutable once it is in a Snapshot.
type Ingress struct {
	Name         ServiceName // the gateway's pods: their namespace, and as a host name the name of their service account
	Workload     string      // their Deployment
	Listeners    []IngressListener
	Tunnels      bool           // its pods take the mesh's tunnel
	Certificates []Certificate  // by name
	Access       []AccessPolicy // by name
	Tokens       []TokenRule
	Limits       []RateLimit // by name
	Patches      []Patch     // in the order in which they are made
	Plugins      []Plugin    // in the order in which requests pass by those of a phase
	Telemetry    *Telemetry  // nil: the default

	BackendCertificate string // of Certificates, the one that is shown to applications with which it speaks TLS; "": none

	Revision uint64
}

// IngressListener is what is served on a port, or on one for connections that ask for certain server names.
type IngressListener struct {
	Name  string // of all listeners of an Ingress this one's alone
	Port  uint16
	Names []string     // server names in TLS, perhaps "*.domain" or "*", which is whatever else is asked for; empty: the same, without TLS too
	TLS   *ListenerTLS // nil: what comes is not TLS, or goes on as it comes

	Tunnelled bool // only what comes by the mesh's tunnel is served

	// One of these: requests are routed by the host that they are for, connections go to the backends.
	Hosts    []IngressHost
	Backends []HTTPBackend
}

// IngressHost are the rules for requests to certain hosts, which no other IngressHost of the listener has.
type IngressHost struct {
	Names      []string // perhaps "*.domain" or "*"; a port in a request plays no part
	Rules      []HTTPRule
	HTTPSOnly  bool // requests are sent to the same address with https
	Misdirects bool // another listener of the port serves the hosts, which the client should have asked
}

// ListenerTLS is how TLS ends at a gateway.
type ListenerTLS struct {
	Certificates []string // names of an Ingress' Certificates, of which the client's abilities choose
	ClientRoots  string   // name of the one against whose roots clients' certificates are checked; "": none is asked for
	Optional     bool     // a client may have none
	Untrusted    bool     // and one that no root has signed
	MinVersion   uint16   // of crypto/tls; 0: TLS 1.2
	MaxVersion   uint16   // 0: TLS 1.3
	Ciphers      []string // as Envoy names them; empty: its own choice
}

// Certificate is what a Secret holds: a chain and its key, roots for clients' certificates, or both.
type Certificate struct {
	Name  string
	Chain string // PEM
	Key   Redacted
	Roots string // PEM
	CRL   string // PEM
}

// Redacted is a text that is nobody's to read: it does not show where values are printed.
type Redacted string

const redacted = "[redacted]"

func (Redacted) String() string   { return redacted }
func (Redacted) GoString() string { return redacted }

// MarshalText has encoders write that something is there, and not what.
func (Redacted) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Equal reports whether two gateways serve the same.
func (g *Ingress) Equal(o *Ingress) bool {
	if g == nil || o == nil {
		return g == o
	}
	a, b := *g, *o
	a.Revision, b.Revision = 0, 0
	return reflect.DeepEqual(a, b)
}

// AddCertificate adds one that is not there yet, before the gateway is in a Snapshot.
func (g *Ingress) AddCertificate(c Certificate) {
	if !slices.ContainsFunc(g.Certificates, func(o Certificate) bool { return o.Name == c.Name }) {
		g.Certificates = append(g.Certificates, c)
	}
}

// Ingress returns what a gateway serves, or nil.
func (s *Snapshot) Ingress(n ServiceName) *Ingress {
	g, _ := s.ingresses.get(n)
	return g
}

// Ingresses yields what every gateway serves, in no particular order.
func (s *Snapshot) Ingresses() iter.Seq[*Ingress] { return values(s.ingresses) }

// PutIngress adds or replaces a gateway.
func (b *Builder) PutIngress(g *Ingress) {
	if old := b.next.Ingress(g.Name); old.Equal(g) {
		return
	}
	b.next.ingresses.set(b.ed, g.Name, g)
	b.ingresses[g.Name] = struct{}{}
	b.changed = true
}

// DeleteIngress removes a gateway; a missing one is fine.
func (b *Builder) DeleteIngress(n ServiceName) {
	if b.next.Ingress(n) == nil {
		return
	}
	b.next.ingresses.delete(b.ed, n)
	delete(b.ingresses, n)
	b.changed = true
}

package waypoint

import (
	"slices"
	"strconv"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Names that the bootstrap and the generated resources share.
const (
	AgentCluster      = "agent"        // the process beside Envoy: ADS and SDS over a unix socket
	CertSecret        = "default"      // the waypoint's certificate
	RootsSecret       = "ROOTCA"       // what peers are checked against
	PublicRootsSecret = "public-roots" // what servers outside of the mesh are checked against where nobody names roots
)

// Names of the listeners and clusters that every waypoint has.
const (
	connectTerminate = "connect_terminate"
	mainInternal     = "main_internal"
	connectOriginate = "connect_originate"
	hboneCluster     = "hbone"
	blackHole        = "black_hole" // no endpoint: what cannot be routed
	nowhere          = "nowhere"    // no cluster has the name: what is to fail
)

// Resources is everything that one waypoint is told, each kind by name in order.
type Resources struct {
	Listeners  []*listenerv3.Listener
	Routes     []*routev3.RouteConfiguration
	Clusters   []*clusterv3.Cluster
	Endpoints  []*endpointv3.ClusterLoadAssignment
	Extensions []*corev3.TypedExtensionConfig // filters whose configuration changes apart from their listener's
	Secrets    []*tlsv3.Secret                // what is shown to clients from outside and to applications, and their roots

	byType map[string]*collection
}

// Waypoints are the waypoints that something in the snapshot is bound to.
func Waypoints(s *mesh.Snapshot) []mesh.ServiceName {
	seen := map[mesh.ServiceName]bool{}
	var out []mesh.ServiceName
	for svc := range s.Services() {
		if g := svc.Waypoint; g != nil && g.Service != (mesh.ServiceName{}) && !seen[g.Service] {
			seen[g.Service] = true
			out = append(out, g.Service)
		}
	}
	slices.SortFunc(out, mesh.ServiceName.Compare)
	return out
}

// Bound are the services behind each waypoint, by name in order. A waypoint's own is not behind it.
func Bound(s *mesh.Snapshot) map[mesh.ServiceName][]*mesh.Service {
	out := map[mesh.ServiceName][]*mesh.Service{}
	for svc := range s.Services() {
		if g := svc.Waypoint; g != nil && svc.Name != g.Service {
			out[g.Service] = append(out[g.Service], svc)
		}
	}
	for _, l := range out {
		slices.SortFunc(l, func(x, y *mesh.Service) int { return x.Name.Compare(y.Name) })
	}
	return out
}

// Build writes the configuration of the waypoint, or the gateway, behind a service.
func Build(s *mesh.Snapshot, self mesh.ServiceName) (*Resources, error) {
	return NewWriter(self).Write(s, Bound(s)[self])
}

// builder writes one part of a configuration, and notes what it is written from.
type builder struct {
	s           *mesh.Snapshot
	self        mesh.ServiceName
	from        map[mesh.ServiceName]*mesh.Service // what was looked at, nil where there was nothing
	ingress     *mesh.Ingress                      // nil for a waypoint
	targets     map[target]bool                    // what routes refer to
	through     map[mesh.ServiceName]bool          // whose endpoints count beside those of targets: of waypoints that something is sent by, and the proxies
	credentials map[string]*mesh.Certificate       // that are shown to applications, or that those are checked against
	extensions  []*corev3.TypedExtensionConfig
	plugins     []*mesh.Plugin
	off         map[string]string // patches and plugins that are left off, by their keys
	patched     Made
	err         error
}

func newBuilder(s *mesh.Snapshot, self mesh.ServiceName) *builder {
	return &builder{s: s, self: self, from: map[mesh.ServiceName]*mesh.Service{}, targets: map[target]bool{}, through: map[mesh.ServiceName]bool{}, credentials: map[string]*mesh.Certificate{}, patched: Made{}}
}

// lookup finds a service.
func (b *builder) lookup(n mesh.ServiceName) *mesh.Service {
	svc := b.s.Service(n)
	b.from[n] = svc
	return svc
}

// chain is a port of a service and how it is served.
type chain struct {
	svc     *mesh.Service
	port    mesh.ServicePort
	ingress *mesh.IngressListener // of a gateway; nil for a waypoint's
}

func (c chain) http() bool { return c.port.App.HTTP() }

func (c chain) tcp() bool { return !c.http() || c.sniffed() }

// sniffed is a port that says nothing of its protocol: the first bytes do.
func (c chain) sniffed() bool { return c.port.App == mesh.AppUnknown }

func (c chain) name(kind string) string {
	if c.ingress != nil {
		return ingressPrefix + strconv.Itoa(int(c.port.Port)) + "|" + kind + "|" + c.ingress.Name
	}
	return "inbound-vip|" + strconv.Itoa(int(c.port.Port)) + "|" + kind + "|" + c.svc.Name.Hostname
}

// config wraps a message for Envoy.
func (b *builder) config(m proto.Message) *anypb.Any {
	a := &anypb.Any{}
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil && b.err == nil {
		b.err = err
	}
	return a
}

// target is a cluster: a service's port, all its endpoints or a subset of them, by requests or by connections.
type target struct {
	service mesh.ServiceName
	port    uint16
	subset  string
	from    string // namespace whose DestinationRule holds for it; "": the service's own
	http    bool
	grpc    bool // HTTP/2 whatever the port says: what spans and logs are sent to
	encrypt bool // connections that get TLS on the way
}

func (t target) name() string {
	kind := "tcp"
	if t.http {
		kind = "http"
	}
	if t.grpc {
		kind = "grpc"
	}
	if t.encrypt {
		kind = "tls"
	}
	if t.subset != "" {
		kind += "/" + t.subset
	}
	if t.from != "" {
		kind += "@" + t.from
	}
	return "outbound|" + strconv.Itoa(int(t.port)) + "|" + kind + "|" + t.service.Hostname
}

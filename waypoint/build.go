package waypoint

import (
	"cmp"
	"slices"
	"strconv"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Names that the bootstrap and the generated resources share.
const (
	AgentCluster = "agent"   // the process beside Envoy: ADS and SDS over a unix socket
	CertSecret   = "default" // the waypoint's certificate
	RootsSecret  = "ROOTCA"  // what peers are checked against
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

// Build writes the configuration of the waypoint behind a service.
func Build(s *mesh.Snapshot, self mesh.ServiceName) (*Resources, error) {
	b := &builder{s: s, self: self, targets: map[target]bool{}}
	for svc := range s.Services() {
		if svc.Waypoint != nil && svc.Waypoint.Service == self && svc.Name != self {
			b.services = append(b.services, svc)
		}
	}
	slices.SortFunc(b.services, func(x, y *mesh.Service) int { return x.Name.Compare(y.Name) })
	for _, svc := range b.services {
		for _, p := range svc.Ports {
			b.service(svc, p)
		}
	}
	b.listeners()
	b.clusters()
	if b.err != nil {
		return nil, b.err
	}
	return &b.out, nil
}

type builder struct {
	s        *mesh.Snapshot
	self     mesh.ServiceName
	services []*mesh.Service
	chains   []chain
	targets  map[target]bool // what routes refer to
	out      Resources
	err      error
}

// chain is a port of a service and how it is served.
type chain struct {
	svc  *mesh.Service
	port mesh.ServicePort
}

func (c chain) http() bool {
	return c.port.App == mesh.AppHTTP1 || c.port.App == mesh.AppHTTP2 || c.port.App == mesh.AppGRPC || c.port.App == mesh.AppUnknown
}

func (c chain) tcp() bool { return !c.http() || c.sniffed() }

// sniffed is a port that says nothing of its protocol: the first bytes do.
func (c chain) sniffed() bool { return c.port.App == mesh.AppUnknown }

func (c chain) name(kind string) string {
	return "inbound-vip|" + strconv.Itoa(int(c.port.Port)) + "|" + kind + "|" + c.svc.Name.Hostname
}

func (b *builder) service(svc *mesh.Service, p mesh.ServicePort) {
	c := chain{svc, p}
	b.chains = append(b.chains, c)
	own := target{svc.Name, p.Port, "", false}
	if c.http() {
		own.http = true
		b.out.Routes = append(b.out.Routes, b.routes(c))
		b.targets[own] = true
	}
	if c.tcp() {
		own.http = false
		b.targets[own] = true
	}
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
	http    bool
}

func (t target) name() string {
	kind := "tcp"
	if t.http {
		kind = "http"
	}
	if t.subset != "" {
		kind += "/" + t.subset
	}
	return "outbound|" + strconv.Itoa(int(t.port)) + "|" + kind + "|" + t.service.Hostname
}

func compareTargets(a, b target) int {
	return cmp.Or(a.service.Compare(b.service), cmp.Compare(a.port, b.port), cmp.Compare(a.name(), b.name()))
}

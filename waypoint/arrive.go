package waypoint

import (
	"slices"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What is of the mesh comes to a gateway by tunnel, as to a waypoint: connect_terminate ends it, and notes who comes. Which port it
// is for is the port that was asked for in the tunnel; there it meets the very filter chains that clients from outside meet, so
// that routes and policies are the same, only that policies know the client's identity.

// arrival is what is served on a port of a gateway.
type arrival struct {
	in    *mesh.IngressListener
	chain *listenerv3.FilterChain
}

// byTLS reports whether TLS, or what it asks for, decides whether the chain is for a connection.
func (a arrival) byTLS() bool { return a.in.TLS != nil || len(a.in.Names) > 0 }

// Ports of a gateway's pods that are no listener's: metrics and readiness, which are asked for by tunnel once there is one.
var ownPorts = []uint16{15020, 15021}

func ownPort(p uint16) string { return "own|" + strconv.Itoa(int(p)) }

// ownPorts are the clusters of the process beside Envoy.
func (b *builder) ownPorts() (out []*clusterv3.Cluster) {
	for _, p := range ownPorts {
		out = append(out, &clusterv3.Cluster{
			Name: ownPort(p), ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, ConnectTimeout: durationpb.New(connectTimeout),
			LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: ownPort(p), Endpoints: []*endpointv3.LocalityLbEndpoints{{
				LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socket("127.0.0.1", uint32(p))}}}},
			}}},
		})
	}
	return out
}

// arrive has what tunnels carry served as on the port that it is for.
func (b *builder) arrive(all []arrival) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name:              mainInternal,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		ListenerFilters:   []*listenerv3.ListenerFilter{b.listenerFilter("envoy.filters.listener.original_dst", &originaldstv3.OriginalDst{})},
	}
	at := func(f *listenerv3.FilterChain, port uint16) {
		if f.FilterChainMatch == nil {
			f.FilterChainMatch = &listenerv3.FilterChainMatch{}
		}
		f.FilterChainMatch.DestinationPort = wrapperspb.UInt32(uint32(port))
		l.FilterChains = append(l.FilterChains, f)
	}
	var inspected []uint16
	for _, a := range all {
		f := proto.Clone(a.chain).(*listenerv3.FilterChain)
		f.Name = strconv.Itoa(int(a.in.Port)) + "|" + f.Name
		at(f, a.in.Port)
		if a.byTLS() && !slices.Contains(inspected, a.in.Port) {
			inspected = append(inspected, a.in.Port)
		}
	}
	for _, p := range ownPorts {
		at(&listenerv3.FilterChain{Name: ownPort(p), Filters: []*listenerv3.Filter{b.networkFilter("envoy.filters.network.tcp_proxy",
			&tcpproxyv3.TcpProxy{StatPrefix: ownPort(p), ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: ownPort(p)}})}}, p)
	}
	if len(inspected) > 0 { // elsewhere nobody is waited for: on some ports the server speaks first
		inspector := b.listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspectorv3.TlsInspector{})
		inspector.FilterDisabled = &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_NotMatch{NotMatch: onPorts(inspected)}}
		l.ListenerFilters = append(l.ListenerFilters, inspector)
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = durationpb.New(5*time.Second), true
	}
	return l
}

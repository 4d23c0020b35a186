package waypoint

import (
	"cmp"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	internalupstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	rawbufferv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	metaOriginalDst = "envoy.filters.listener.original_dst"
	metaSubset      = "envoy.lb"
	metaTransport   = "envoy.transport_socket_match"
	httpOptions     = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	connectTimeout  = 10 * time.Second
)

// fixedClusters are those that every waypoint has.
func (b *builder) fixedClusters() []*clusterv3.Cluster {
	return []*clusterv3.Cluster{
		{
			Name: blackHole, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
			ConnectTimeout: durationpb.New(connectTimeout),
		},
		b.toMain(),
	}
}

// reach writes how a target is reached. Endpoints that are names are in the cluster, and do not come apart from it; for them near and
// far are the same.
func (b *builder) reach(t target) (*clusterv3.Cluster, *endpointv3.ClusterLoadAssignment, *nearness) {
	c := b.cluster(t)
	if b.dynamic(t.service) {
		b.followed(c, t)
		b.patchTarget(t, c)
		return c, nil, nil
	}
	b.patchTarget(t, c)
	e, near := b.endpoints(t)
	if b.resolves(t.service) {
		b.resolved(c, e, t)
		return c, nil, nil
	}
	c, e = b.discovered(c, e)
	return c, e, near
}

// discovered is a cluster of EDS with its endpoints. A cluster that changes waits for them, which nobody sends again unless
// they have another name.
func (b *builder) discovered(c *clusterv3.Cluster, e *endpointv3.ClusterLoadAssignment) (*clusterv3.Cluster, *endpointv3.ClusterLoadAssignment) {
	e.ClusterName = c.Name + "@" + b.hash(c)
	c.EdsClusterConfig.ServiceName = e.ClusterName
	return c, e
}

// toMain hands what a client's tunnel carries to the main listener.
func (b *builder) toMain() *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 mainInternal,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		CircuitBreakers:      limits(&mesh.Traffic{}),
		TransportSocket:      b.internal(b.raw()),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: mainInternal, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: internalAddress(mainInternal, ""),
			}}}},
		}}},
	}
}

// internal is the socket between two listeners of one Envoy, and what is spoken on it. What of an endpoint's metadata is named
// travels with it.
func (b *builder) internal(inner *corev3.TransportSocket, metadata ...string) *corev3.TransportSocket {
	out := &internalupstreamv3.InternalUpstreamTransport{TransportSocket: inner}
	for _, name := range metadata {
		out.PassthroughMetadata = append(out.PassthroughMetadata, &internalupstreamv3.InternalUpstreamTransport_MetadataValueSource{
			Kind: &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Host_{Host: &metadatav3.MetadataKind_Host{}}}, Name: name,
		})
	}
	return b.transport("envoy.transport_sockets.internal_upstream", out)
}

func (b *builder) raw() *corev3.TransportSocket {
	return b.transport("envoy.transport_sockets.raw_buffer", &rawbufferv3.RawBuffer{})
}

func (b *builder) protocol(o *upstreamhttpv3.HttpProtocolOptions) map[string]*anypb.Any {
	return map[string]*anypb.Any{httpOptions: b.config(o)}
}

// cluster reaches the endpoints of a target, each by its tunnel or in plaintext where it has none.
func (b *builder) cluster(t target) *clusterv3.Cluster {
	use := b.traffic(t)
	c := &clusterv3.Cluster{
		Name:                 t.name(),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		ConnectTimeout:       durationpb.New(cmp.Or(use.ConnectTimeout, connectTimeout)),
		LbPolicy:             clusterv3.Cluster_LEAST_REQUEST,
		CircuitBreakers:      limits(use),
		OutlierDetection:     outliers(use.Outliers),

		UpstreamConnectionOptions: keepalive(use.Keepalive),
		TransportSocketMatches: []*clusterv3.Cluster_TransportSocketMatch{
			{Name: "tunnel", Match: tunnelled(), TransportSocket: b.internal(b.application(t), metaOriginalDst, metaSubset)},
			{Name: "plaintext", Match: &structpb.Struct{}, TransportSocket: b.application(t)},
		},
		// Endpoints that are gone or unready are not waited for.
		CommonLbConfig: &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}},
	}
	balance(c, use, b.s.Config().Locality)
	if !t.http {
		if b.asks(t) != nil && b.http2(t) {
			c.TypedExtensionProtocolOptions = b.protocol(explicitHTTP2(use))
		}
		return c
	}
	o := &upstreamhttpv3.HttpProtocolOptions{CommonHttpProtocolOptions: connections(use)}
	switch {
	case b.http2(t) || use.Speak == mesh.SpeakHTTP2:
		o.UpstreamProtocolOptions = explicitHTTP2(use).UpstreamProtocolOptions
	case use.Speak != mesh.SpeakClient && (b.ingress != nil || b.encryption(t) != nil): // what the client speaks says nothing of the application; by TLS it would be asked
		o.UpstreamProtocolOptions = &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: &corev3.Http1ProtocolOptions{}},
		}}
	default:
		o.UpstreamProtocolOptions = &upstreamhttpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions: &corev3.Http1ProtocolOptions{}, Http2ProtocolOptions: http2Options(use),
			},
		}
	}
	o.OutlierDetection = failures(use.Outliers)
	c.TypedExtensionProtocolOptions = b.protocol(o)
	return c
}

func explicitHTTP2(use *mesh.Traffic) *upstreamhttpv3.HttpProtocolOptions {
	return &upstreamhttpv3.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
		ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: http2Options(use)},
	}}}
}

// calls is the cluster of what the proxy itself calls. A Service that is not there is sent nothing: a cluster that is not there would
// have Envoy refuse the listener.
func (b *builder) calls(t target) string {
	if b.lookup(t.service) == nil {
		return blackHole
	}
	b.targets[t] = true
	return t.name()
}

// hash tells states of a cluster apart.
func (b *builder) hash(c *clusterv3.Cluster) string {
	h := fnv.New64a()
	_, _ = h.Write(b.config(c).Value) // never fails
	return strconv.FormatUint(h.Sum64(), 36)
}

// http2 reports whether the port says that it is spoken there.
func (b *builder) http2(t target) bool {
	svc := b.lookup(t.service)
	return t.grpc || svc != nil && slices.ContainsFunc(svc.Ports, func(p mesh.ServicePort) bool {
		return p.Port == t.port && (p.App == mesh.AppHTTP2 || p.App == mesh.AppGRPC)
	})
}

// endpoints lists those of a target that have an address on this network, and says by what they are near or far: nil where all are alike.
func (b *builder) endpoints(t target) (*endpointv3.ClusterLoadAssignment, *nearness) {
	out := &endpointv3.ClusterLoadAssignment{ClusterName: t.name()}
	svc := b.lookup(t.service)
	if svc == nil {
		return out, nil
	}
	i := slices.IndexFunc(svc.Ports, func(p mesh.ServicePort) bool { return p.Port == t.port })
	labels, known := b.subsetLabels(svc, t)
	if e := b.encryption(t); i < 0 || !known || b.unreachable(e) {
		return out, nil
	}
	if b.goesThrough(svc) {
		out.Endpoints = b.throughWaypoint(svc, t.port)
		return out, nil
	}
	near := nearnessOf(svc, b.traffic(t), b.s.Config().Locality)
	b.countProxies(near)
	group := &endpointv3.LocalityLbEndpoints{LoadBalancingWeight: wrapperspb.UInt32(1)}
	names := b.resolves(t.service)
	for w, ports := range b.s.Endpoints(t.service) {
		if w.Network != b.s.Config().Network || !hasLabels(w.Labels, labels) {
			continue
		}
		port := svc.Ports[i].Target
		if j := slices.IndexFunc(ports, func(p mesh.ServicePort) bool { return p.Port == t.port }); j >= 0 {
			port = ports[j].Target
		}
		switch {
		case port == 0:
			continue
		case isNamed(w):
			group.LbEndpoints = append(group.LbEndpoints, namedEndpoint(w, port))
			continue
		case len(w.Addrs) == 0 || names && w.Tunnel == mesh.TunnelHBONE: // where there are names there are no tunnels
			continue
		}
		near.add(w)
		group.LbEndpoints = append(group.LbEndpoints, endpoint(w, netip.AddrPortFrom(w.Addrs[0], port), svc.LB.AllowUnhealthy))
	}
	if len(group.LbEndpoints) > 0 {
		out.Endpoints = []*endpointv3.LocalityLbEndpoints{group}
	}
	return out, near
}

func endpoint(w *mesh.Workload, at netip.AddrPort, unreadyToo bool) *endpointv3.LbEndpoint {
	e := &endpointv3.LbEndpoint{HealthStatus: corev3.HealthStatus_HEALTHY, LoadBalancingWeight: wrapperspb.UInt32(max(1, w.Capacity))}
	if !w.Healthy && !unreadyToo {
		e.HealthStatus = corev3.HealthStatus_UNHEALTHY
	}
	e.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metaPeer: describe(w)}}
	e.HostIdentifier = &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socket(at.Addr().String(), uint32(at.Port()))}}
	if w.Tunnel == mesh.TunnelHBONE {
		tunnel(e, at, w.Addrs[0])
	}
	return e
}

// subsetLabels returns what an endpoint of a target's subset must have; known is false where the service has no such subset.
func (b *builder) subsetLabels(svc *mesh.Service, t target) (_ map[string]string, known bool) {
	if t.subset == "" {
		return nil, true
	}
	if !svc.RuledFor(t.from, b.self.Namespace) {
		return nil, false
	}
	for _, s := range svc.Subsets {
		if s.Name == t.subset && s.From == t.from {
			return s.Labels, true
		}
	}
	return nil, false
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func socket(addr string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: addr, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

func internalAddress(listener, id string) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
		AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: listener}, EndpointId: id,
	}}}
}

func portRange(p uint16) *typev3.Int32Range {
	return &typev3.Int32Range{Start: int32(p), End: int32(p) + 1}
}

func adsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3, InitialFetchTimeout: durationpb.New(0),
	}
}

func sdsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType: corev3.ApiConfigSource_GRPC, TransportApiVersion: corev3.ApiVersion_V3,
			GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: AgentCluster},
			}}},
			SetNodeOnFirstMessageOnly: true,
		}},
		ResourceApiVersion: corev3.ApiVersion_V3, InitialFetchTimeout: durationpb.New(0),
	}
}

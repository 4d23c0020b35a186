package waypoint

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// The cluster hbone has every pod that something is sent to by tunnel. Which of them a connection is for says the metadata of
// the endpoint it was made for, which travels with it to connect_originate; a pod that hbone has not is not reached. A cluster
// that makes its hosts of the addresses it is asked for (ORIGINAL_DST) would need no list, but has every connection make a
// host, and with it a tunnel, until Envoy's main thread has noted the first.

// A tunnel whose peer has acknowledged nothing of what it was sent for this long is dead, and what it carries is sent elsewhere if it
// may be (tcp(7), TCP_USER_TIMEOUT). Nodes have the same bound for theirs.
const (
	silence        = 10 * time.Second
	ipprotoTCP     = 6
	tcpUserTimeout = 18
)

// subsetTunnel is the metadata that a pod is found by: its address with the port of tunnels.
const subsetTunnel = "tunnel"

// tunnel has an endpoint be at the end of a tunnel to a pod, which carries the connection on to an address.
func tunnel(e *endpointv3.LbEndpoint, to netip.AddrPort, pod netip.Addr) {
	by, id := netip.AddrPortFrom(pod, mesh.HBONEPort).String(), to.String()
	if pod != to.Addr() {
		id += " by " + by
	}
	e.GetEndpoint().Address = internalAddress(connectOriginate, id)
	e.Metadata.FilterMetadata[metaOriginalDst] = &structpb.Struct{Fields: map[string]*structpb.Value{"local": structpb.NewStringValue(to.String())}}
	e.Metadata.FilterMetadata[metaSubset] = &structpb.Struct{Fields: map[string]*structpb.Value{subsetTunnel: structpb.NewStringValue(by)}}
	e.Metadata.FilterMetadata[metaTransport] = tunnelled()
}

// tunnelled is the metadata of endpoints that have a tunnel.
func tunnelled() *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{"tunnel": structpb.NewStringValue("h2")}}
}

// pods are those that an assignment's endpoints are reached by.
func pods(e *endpointv3.ClusterLoadAssignment) (out []netip.AddrPort) {
	for _, group := range e.GetEndpoints() {
		for _, one := range group.LbEndpoints {
			if at, err := netip.ParseAddrPort(one.Metadata.GetFilterMetadata()[metaSubset].GetFields()[subsetTunnel].GetStringValue()); err == nil {
				out = append(out, at)
			}
		}
	}
	return out
}

// tunnels is what was last written of the cluster hbone.
type tunnels struct {
	pods               []netip.AddrPort // in order
	cluster, endpoints *item
}

// tunnelTo writes the cluster of these pods' tunnels, each of which may be named more than once.
func (w *Writer) tunnelTo(b *builder, pods []netip.AddrPort) *tunnels {
	slices.SortFunc(pods, netip.AddrPort.Compare)
	pods = slices.Compact(pods)
	was := cmp.Or(w.tunnels, &tunnels{})
	if was.cluster != nil && slices.Equal(pods, was.pods) {
		return was
	}
	c, e := b.hbone(pods)
	return &tunnels{pods, b.item([]*item{was.cluster}, c.Name, c), b.item(nil, e.ClusterName, e)}
}

func (b *builder) hbone(pods []netip.AddrPort) (*clusterv3.Cluster, *endpointv3.ClusterLoadAssignment) {
	group := &endpointv3.LocalityLbEndpoints{} // may stay empty
	for _, at := range pods {
		group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socket(at.Addr().String(), uint32(at.Port()))}},
			Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
				metaSubset: {Fields: map[string]*structpb.Value{subsetTunnel: structpb.NewStringValue(at.String())}},
			}},
		})
	}
	return b.discovered(&clusterv3.Cluster{
		Name:                 hboneCluster,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: adsSource()},
		ConnectTimeout:       durationpb.New(connectTimeout),
		UpstreamBindConfig: &corev3.BindConfig{SocketOptions: []*corev3.SocketOption{{
			Description: "TCP_USER_TIMEOUT", Level: ipprotoTCP, Name: tcpUserTimeout, State: corev3.SocketOption_STATE_PREBIND,
			Value: &corev3.SocketOption_IntValue{IntValue: silence.Milliseconds()},
		}}},
		CircuitBreakers: limits(&mesh.Traffic{}),
		LbSubsetConfig: &clusterv3.Cluster_LbSubsetConfig{
			FallbackPolicy:  clusterv3.Cluster_LbSubsetConfig_NO_FALLBACK,
			SubsetSelectors: []*clusterv3.Cluster_LbSubsetConfig_LbSubsetSelector{{Keys: []string{subsetTunnel}, SingleHostPerSubset: true}},
		},
		CommonLbConfig: &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}},
		TypedExtensionProtocolOptions: b.protocol(&upstreamhttpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &upstreamhttpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: b.tunnelOptions()},
			}},
		}),
		TransportSocket: b.transport("envoy.transport_sockets.tls", &tlsv3.UpstreamTlsContext{CommonTlsContext: b.tls()}),
	}, &endpointv3.ClusterLoadAssignment{Endpoints: []*endpointv3.LocalityLbEndpoints{group}})
}

package waypoint

import (
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	commondnsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/common/dns/v3"
	dnsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dns/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Endpoints of a ServiceEntry may be names, which Envoy resolves: what EDS brings are addresses. So the endpoints of such a
// cluster are in the cluster itself.

// How often a name is looked up whose answer does not say for how long it holds, and one that was not answered.
const (
	lookUpEvery   = time.Minute
	lookUpAgain   = time.Second
	lookUpAgainIn = 10 * time.Second // at most
)

// isNamed reports whether an endpoint is a name.
func isNamed(w *mesh.Workload) bool { return len(w.Addrs) == 0 && w.Hostname != "" }

// resolves reports whether a name has to be looked up to reach a service.
func (b *builder) resolves(n mesh.ServiceName) bool {
	if svc := b.lookup(n); svc != nil && b.goesThrough(svc) { // its waypoint does
		return false
	}
	for w := range b.s.Endpoints(n) {
		if isNamed(w) {
			return true
		}
	}
	return false
}

// resolved has a cluster look the names among its endpoints up. Where connections to a name are to outlive the answer that
// they were made by, a new answer is for new ones; that can be of one name alone.
func (b *builder) resolved(c *clusterv3.Cluster, e *endpointv3.ClusterLoadAssignment, t target) {
	n := 0
	for _, group := range e.Endpoints {
		n += len(group.LbEndpoints)
	}
	svc := b.lookup(t.service)
	c.EdsClusterConfig = nil
	c.LoadAssignment = e
	c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
		Name: "envoy.clusters.dns",
		TypedConfig: b.config(&dnsv3.DnsCluster{
			DnsRefreshRate: durationpb.New(lookUpEvery), RespectDnsTtl: true,
			DnsFailureRefreshRate: &dnsv3.DnsCluster_RefreshRate{BaseInterval: durationpb.New(lookUpAgain), MaxInterval: durationpb.New(lookUpAgainIn)},
			// IPv6 where there is nothing else: a pod that has none would try in vain.
			DnsLookupFamily:              commondnsv3.DnsLookupFamily_V4_PREFERRED,
			AllAddressesInSingleEndpoint: n == 1 && svc != nil && svc.OneAddress,
		}),
	}}
}

// namedEndpoint is an endpoint that is a name, on a port of its own.
func namedEndpoint(w *mesh.Workload, port uint16) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{
		HealthStatus: corev3.HealthStatus_HEALTHY, LoadBalancingWeight: wrapperspb.UInt32(max(1, w.Capacity)),
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metaPeer: describe(w)}},
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Hostname: w.Hostname, Address: socket(w.Hostname, uint32(port)),
		}},
	}
}

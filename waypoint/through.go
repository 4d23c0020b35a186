package waypoint

import (
	"net/netip"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A gateway sends by a Service's waypoint where the Service says so: to the Service's address, in a tunnel to a pod of the
// waypoint. Without such a pod it sends nothing.

// goesThrough reports whether what is sent to a service goes by its waypoint. Without an address there is none that has it.
func (b *builder) goesThrough(svc *mesh.Service) bool {
	return b.ingress != nil && svc.IngressUseWaypoint && svc.Waypoint != nil && len(svc.VIPs) > 0
}

// throughWaypoint are the pods of a service's waypoint, as the ways to a port of the service.
func (b *builder) throughWaypoint(svc *mesh.Service, port uint16) []*endpointv3.LocalityLbEndpoints {
	b.through[svc.Waypoint.Service] = true
	to := netip.AddrPortFrom(svc.VIPs[0].Addr, port)
	group := &endpointv3.LocalityLbEndpoints{LoadBalancingWeight: wrapperspb.UInt32(1)}
	for w := range b.s.Endpoints(svc.Waypoint.Service) {
		if w.Network != b.s.Config().Network || len(w.Addrs) == 0 {
			continue
		}
		at := netip.AddrPortFrom(w.Addrs[0], mesh.HBONEPort)
		e := endpoint(w, at, false)
		tunnel(e, to, w.Addrs[0])
		group.LbEndpoints = append(group.LbEndpoints, e)
	}
	if len(group.LbEndpoints) == 0 {
		return nil
	}
	return []*endpointv3.LocalityLbEndpoints{group}
}

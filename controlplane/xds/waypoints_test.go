package xds

import (
	"log/slog"
	"net/netip"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// What changes for waypoints alone makes no revision, and pods have not done it because they did what there was before.
func TestPodsHaveDoneOnlyWhatTheyDo(t *testing.T) {
	w := NewWaypoints(slog.New(slog.DiscardHandler), nil)
	way := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	me := &envoyPod{name: "way-1", nack: map[string]string{}}
	one := &told{writer: waypoint.NewWriter(way), pods: map[*envoyPod]struct{}{me: {}}}
	w.open[way] = one
	b := mesh.NewBuilder(nil)
	put := func(policies ...mesh.AccessPolicy) *mesh.Snapshot {
		b.PutService(&mesh.Service{
			Name: mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}},
			Ports: []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}}, Waypoint: &mesh.Gateway{Service: way}, Access: policies,
		})
		return b.Commit(1)
	}
	does := func() {
		heard{w, one, me, w.log}.active(&discovery.DeltaDiscoveryRequest{TypeUrl: waypoint.TypeActive, InitialResourceVersions: one.versions})
	}
	done := func(want bool, when string) {
		t.Helper()
		if at := w.Pods(way)["way-1"].Revision; at >= 7 != want {
			t.Errorf("%s the pod is at revision %d of 7", when, at)
		}
	}
	w.Update(put(), 7)
	done(false, "before it has said anything")
	does()
	done(true, "when it does what it was told")
	w.Update(put(mesh.AccessPolicy{Action: mesh.Deny, Rules: []mesh.AccessRule{{}}}), 7)
	done(false, "when a policy has changed")
	does()
	done(true, "when it does that too")
}

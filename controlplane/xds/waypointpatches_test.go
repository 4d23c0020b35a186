package xds

import (
	"log/slog"
	"net/netip"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// What an Envoy refuses is left off, and only that: patches that an Envoy does already stay, and one that is another is tried.
func TestPatchesThatAnEnvoyRefuses(t *testing.T) {
	w := NewWaypoints(slog.New(slog.DiscardHandler), nil)
	way := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	me := &envoyPod{name: "way-1", nack: map[string]string{}, told: map[string]TypeState{}}
	one := &told{writer: waypoint.NewWriter(way), pods: map[*envoyPod]struct{}{me: {}}, late: lateNames{}}
	w.open[way] = one
	h := heard{w, one, me, way, w.log}
	b := mesh.NewBuilder(nil)
	put := func(patches ...mesh.Patch) *mesh.Snapshot {
		b.PutService(&mesh.Service{
			Name: mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}},
			Ports: []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}}, Waypoint: &mesh.Gateway{Service: way}, Patches: patches,
		})
		return b.Commit(1)
	}
	patch := func(name, version string) mesh.Patch {
		return mesh.Patch{Object: "shop/" + name, Version: version, Op: mesh.PatchFirst,
			Value: `{"name":"` + name + `","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}}`}
	}
	refuse := func(kind string) {
		t.Helper()
		if err := h.OnStreamDeltaRequest(1, &discovery.DeltaDiscoveryRequest{TypeUrl: kind, ResponseNonce: "1", ErrorDetail: &rpcstatus.Status{Message: "no such thing"}}); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(want ...string) {
		t.Helper()
		got := w.Pods(way)["way-1"].Refused
		for _, k := range want {
			if got[k] != "no such thing" {
				t.Errorf("%s is not refused: %v", k, got)
			}
		}
		if len(got) != len(want) {
			t.Errorf("refused are %v, want %v", got, want)
		}
	}
	w.Update(put(patch("good", "1")), 7)
	h.active(&discovery.DeltaDiscoveryRequest{TypeUrl: waypoint.TypeActive, InitialResourceVersions: one.versions})
	w.Update(put(patch("good", "1"), patch("bad", "1")), 7)
	refuse(envoyresource.ClusterType) // of which no patch makes anything
	refused()
	with := one.versions
	refuse(envoyresource.ListenerType)
	refused("shop/bad@1")
	if _, ok := one.writer.Patched()["shop/good@1"]; !ok {
		t.Error("what an Envoy did is left off, too")
	}
	if one.versions["listener/main_internal"] == with["listener/main_internal"] {
		t.Error("the listener is what was refused")
	}
	h.active(&discovery.DeltaDiscoveryRequest{TypeUrl: waypoint.TypeActive, InitialResourceVersions: one.versions})
	if at := w.Pods(way)["way-1"].Revision; at != 7 {
		t.Errorf("without it the pod is at revision %d of 7", at)
	}
	w.Update(put(patch("good", "1"), patch("bad", "2")), 7)
	if _, ok := one.writer.Patched()["shop/bad@2"]; !ok {
		t.Error("a patch that is another one is not tried")
	}
	refuse(envoyresource.ListenerType)
	refused("shop/bad@2") // the other one is no more
	// Where all are done by an Envoy, and are refused nevertheless, all are left off.
	h.active(&discovery.DeltaDiscoveryRequest{TypeUrl: waypoint.TypeActive, InitialResourceVersions: one.versions})
	refuse(envoyresource.ListenerType)
	refused("shop/bad@2", "shop/good@1")
	// One that nothing can be written with is left off before it is sent.
	w.Update(put(mesh.Patch{Object: "shop/good", Version: "2", Op: mesh.PatchFirst, Value: "{"}, patch("other", "1")), 7)
	if why := w.Pods(way)["way-1"].Refused["shop/good@2"]; why == "" || one.failed != "" {
		t.Errorf("what cannot be written is not left off: %q %q", why, one.failed)
	}
	if _, ok := one.writer.Patched()["shop/other@1"]; !ok {
		t.Error("nothing else is written")
	}
}

package xds

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Routes come to an Envoy once it has the clusters that they name and these have endpoints, or after a while; what they named
// before goes when they have come.
func TestRoutesComeAfterTheirClusters(t *testing.T) {
	for _, answers := range []bool{true, false} {
		name := "an Envoy that takes its endpoints"
		if !answers {
			name = "an Envoy that never asks for any"
		}
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { routesAfterClusters(t, answers) }) })
	}
}

func routesAfterClusters(t *testing.T, answers bool) {
	w := NewWaypoints(slog.New(slog.DiscardHandler), nil)
	way := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	ui, db := mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}, mesh.ServiceName{Namespace: "shop", Hostname: "db.shop.svc.cluster.local"}
	ports := []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}}
	b := mesh.NewBuilder(nil)
	b.PutService(&mesh.Service{Name: db, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.2")}}, Ports: ports})
	put := func(revision uint64, rules ...mesh.HTTPRule) {
		b.PutService(&mesh.Service{
			Name: ui, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}, Ports: ports, Waypoint: &mesh.Gateway{Service: way}, HTTP: rules,
		})
		s := b.Commit(revision)
		b = mesh.NewBuilder(s)
		w.Update(s, revision)
	}
	put(1)
	ctx, stop := context.WithCancel(t.Context())
	s := stream{ctx: ctx, in: make(chan *discovery.DeltaDiscoveryRequest), out: make(chan *discovery.DeltaDiscoveryResponse)}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = w.serve(s, way, "way-1") }()
	defer func() { stop(); <-ended }()
	next := func(kind string) *discovery.DeltaDiscoveryResponse {
		t.Helper()
		select {
		case r := <-s.out:
			if r.TypeUrl != kind {
				t.Fatalf("%s is sent, want %s", r.TypeUrl, kind)
			}
			return r
		case <-time.After(10 * time.Second):
			t.Fatal("nothing is sent, want", kind)
			return nil
		}
	}
	nothing := func(when string) {
		t.Helper()
		select {
		case r := <-s.out:
			t.Fatalf("%s %s is sent: %v", when, r.TypeUrl, r)
		case <-time.After(100 * time.Millisecond):
		}
	}
	take := func(r *discovery.DeltaDiscoveryResponse) {
		s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	}
	ask := func(kind string, names ...string) *discovery.DeltaDiscoveryResponse {
		t.Helper()
		s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: kind, ResourceNamesSubscribe: names}
		return next(kind)
	}
	has := func(of mesh.ServiceName) string {
		w.mu.Lock()
		defer w.mu.Unlock()
		for name := range w.open[way].resources.ByName(envoyresource.EndpointType) {
			if strings.Contains(name, of.Hostname) {
				return name
			}
		}
		return ""
	}
	take(ask(envoyresource.ClusterType, "*"))
	w.mu.Lock()
	routes := slices.Collect(maps.Keys(w.open[way].resources.ByName(envoyresource.RouteType)))
	w.mu.Unlock()
	take(ask(envoyresource.EndpointType, has(ui)))
	take(ask(envoyresource.RouteType, routes...))

	began := time.Now()
	put(2, mesh.HTTPRule{Backends: []mesh.HTTPBackend{{Service: db, Port: 80, Weight: 1}}})
	clusters := next(envoyresource.ClusterType)
	if len(clusters.Resources) != 1 || !strings.Contains(clusters.Resources[0].Name, db.Hostname) || len(clusters.RemovedResources) > 0 {
		t.Fatalf("of clusters come %v and go %v, while routes name the old ones", clusters.Resources, clusters.RemovedResources)
	}
	take(clusters)
	if answers {
		nothing("before the Envoy has asked for endpoints")
		endpoints := ask(envoyresource.EndpointType, has(db))
		nothing("before the Envoy has taken the endpoints")
		take(endpoints)
	}
	// The cluster that nobody names any more may go before the routes have come, or not: that is one step for the cache.
	for {
		var r *discovery.DeltaDiscoveryResponse
		select {
		case r = <-s.out:
		case <-time.After(10 * time.Second):
			t.Fatal("no routes are sent")
		}
		if r.TypeUrl == envoyresource.RouteType {
			break
		}
		if len(r.Resources) > 0 {
			t.Fatalf("%s is sent again: %v", r.TypeUrl, r)
		}
	}
	if took := time.Since(began); answers && took >= arriveLimit || !answers && took != arriveLimit {
		t.Errorf("routes come after %s", took)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if one := w.open[way]; one.arriving != nil {
		t.Error("it is waited for more")
	} else {
		for p := range one.pods {
			if p.has != nil || p.gets != nil {
				t.Errorf("what a pod has taken is kept: %v %v", p.has, p.gets)
			}
		}
	}
}

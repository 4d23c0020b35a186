package xds

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Two pods of a waypoint that run in two zones are told of the same endpoints, each of those of its own zone first. One of which nobody
// knows yet where it runs is told of all alike, and comes again once that is known.
func TestPodsAreToldWhatIsNear(t *testing.T) {
	w := NewWaypoints(slog.New(slog.DiscardHandler), nil)
	way, ui := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}, mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}
	ports := []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}}
	b := mesh.NewBuilder(nil)
	b.PutService(&mesh.Service{
		Name: ui, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}, Ports: ports, Waypoint: &mesh.Gateway{Service: way},
		LB: mesh.LoadBalancing{Mode: mesh.LBFailover, Prefer: []mesh.LBScope{mesh.ScopeRegion, mesh.ScopeZone}},
	})
	pod := func(name, zone, addr string, backs ...mesh.ServiceName) {
		p := &mesh.Workload{UID: name, Name: name, Namespace: "shop", Healthy: true, Locality: mesh.Locality{Region: "eu", Zone: zone}, Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Services: map[mesh.ServiceName][]mesh.ServicePort{}}
		for _, n := range backs {
			p.Services[n] = ports
		}
		b.PutWorkload(p)
	}
	pod("ui-a", "a", "10.0.0.1", ui)
	pod("ui-b", "b", "10.0.0.2", ui)
	pod("way-a", "a", "10.0.1.1")
	pod("way-b", "b", "10.0.1.2")
	revision := uint64(0)
	update := func() {
		revision++
		s := b.Commit(revision)
		b = mesh.NewBuilder(s)
		w.Update(s, revision)
	}
	update()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	connect := func(peer string) (stream, chan error) {
		s := stream{ctx: ctx, in: make(chan *discovery.DeltaDiscoveryRequest), out: make(chan *discovery.DeltaDiscoveryResponse)}
		ended := make(chan error, 1)
		go func() { ended <- w.serve(s, way, peer) }()
		return s, ended
	}
	next := func(s stream) string {
		t.Helper()
		select {
		case r := <-s.out:
			s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: envoyresource.EndpointType, ResponseNonce: r.Nonce}
			for _, one := range r.Resources {
				e := &endpointv3.ClusterLoadAssignment{}
				if !strings.Contains(one.Name, "|http|"+ui.Hostname) {
					continue
				}
				if err := one.Resource.UnmarshalTo(e); err != nil {
					t.Fatal(err)
				}
				var out []string
				for _, g := range e.Endpoints {
					for _, l := range g.LbEndpoints {
						out = append(out, fmt.Sprint(g.Priority, " ", l.GetEndpoint().Address.GetSocketAddress().GetAddress()))
					}
				}
				return strings.Join(out, ", ")
			}
			t.Fatal("the service's endpoints are not in the answer")
		case <-time.After(10 * time.Second):
			t.Fatal("nothing is sent")
		}
		return ""
	}
	ask := func(s stream) string {
		s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: envoyresource.EndpointType, ResourceNamesSubscribe: []string{"*"}}
		return next(s)
	}
	far, _ := connect("10.0.1.1")
	near, _ := connect("10.0.1.2")
	again, _ := connect("10.0.1.2")
	late, ended := connect("10.0.1.3")
	for i, c := range []struct {
		s    stream
		want string
	}{
		{far, "0 10.0.0.1, 1 10.0.0.2"}, {near, "0 10.0.0.2, 1 10.0.0.1"}, {again, "0 10.0.0.2, 1 10.0.0.1"}, {late, "0 10.0.0.1, 0 10.0.0.2"},
	} {
		if got := ask(c.s); got != c.want {
			t.Errorf("pod %d: %s, want %s", i, got, c.want)
		}
	}
	pod("ui-c", "b", "10.0.0.3", ui)
	update()
	for i, c := range []struct {
		s    stream
		want string
	}{
		{far, "0 10.0.0.1, 1 10.0.0.2, 1 10.0.0.3"}, {near, "0 10.0.0.2, 0 10.0.0.3, 1 10.0.0.1"}, {again, "0 10.0.0.2, 0 10.0.0.3, 1 10.0.0.1"},
		{late, "0 10.0.0.1, 0 10.0.0.2, 0 10.0.0.3"},
	} {
		if got := next(c.s); got != c.want {
			t.Errorf("pod %d after a change: %s, want %s", i, got, c.want)
		}
	}
	pod("way-c", "b", "10.0.1.3")
	update()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("the stream of a pod that turns out to run in a zone goes on")
	}
	late, _ = connect("10.0.1.3")
	if got, want := ask(late), "0 10.0.0.2, 0 10.0.0.3, 1 10.0.0.1"; got != want {
		t.Errorf("once it is known where it runs: %s, want %s", got, want)
	}
}

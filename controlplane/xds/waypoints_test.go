package xds

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// What changes for waypoints alone makes no revision, and pods have not done it because they did what there was before.
func TestPodsHaveDoneOnlyWhatTheyDo(t *testing.T) {
	w := NewWaypoints(slog.New(slog.DiscardHandler), nil)
	way := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	me := &envoyPod{name: "way-1", nack: map[string]string{}}
	one := &told{writer: waypoint.NewWriter(way), pods: map[*envoyPod]struct{}{me: {}}, late: lateNames{}}
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
		heard{w, one, me, way, w.log}.active(&discovery.DeltaDiscoveryRequest{TypeUrl: waypoint.TypeActive, InitialResourceVersions: one.versions})
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

// stream is an Envoy's end of a stream.
type stream struct {
	grpc.ServerStream
	ctx context.Context
	in  chan *discovery.DeltaDiscoveryRequest
	out chan *discovery.DeltaDiscoveryResponse
}

func (s stream) Context() context.Context { return s.ctx }

func (s stream) Send(r *discovery.DeltaDiscoveryResponse) error {
	select {
	case s.out <- r:
		return nil
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
}

func (s stream) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	select {
	case r := <-s.in:
		return r, nil
	case <-s.ctx.Done():
		return nil, s.ctx.Err()
	}
}

// An Envoy that was told of a cluster, which has changed before it asked for the endpoints, gets those that there are: until then it
// acknowledges no clusters, and is told of no others.
func TestEndpointsOfAClusterThatChanged(t *testing.T) {
	w := NewWaypoints(slog.New(slog.DiscardHandler), nil)
	way, ui := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}, mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}
	b := mesh.NewBuilder(nil)
	put := func(traffic ...mesh.Traffic) *mesh.Snapshot {
		b.PutService(&mesh.Service{
			Name: ui, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}, Ports: []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}},
			Waypoint: &mesh.Gateway{Service: way}, Traffic: traffic,
		})
		b.PutWorkload(&mesh.Workload{UID: "ui", Name: "ui", Namespace: "shop", Healthy: true, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
			Services: map[mesh.ServiceName][]mesh.ServicePort{ui: {{Port: 80, Target: 8080}}}})
		return b.Commit(1)
	}
	w.Update(put(), 1)
	ctx, stop := context.WithCancel(t.Context())
	s := stream{ctx: ctx, in: make(chan *discovery.DeltaDiscoveryRequest), out: make(chan *discovery.DeltaDiscoveryResponse)}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = w.serve(s, way, "way-1") }()
	defer func() { stop(); <-ended }()
	next := func() *discovery.DeltaDiscoveryResponse {
		t.Helper()
		select {
		case r := <-s.out:
			return r
		case <-time.After(10 * time.Second):
			t.Fatal("nothing is sent")
			return nil
		}
	}
	s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: envoyresource.ClusterType, ResourceNamesSubscribe: []string{"*"}}
	next() // and not acknowledged
	was := ""
	for name := range w.open[way].resources.ByName(envoyresource.EndpointType) {
		if strings.Contains(name, ui.Hostname) {
			was = name
		}
	}
	b = mesh.NewBuilder(b.Commit(2))
	w.Update(put(mesh.Traffic{MaxConnections: 1}), 2)
	if was == "" || w.open[way].resources.ByName(envoyresource.EndpointType)[was] != nil {
		t.Fatalf("endpoints %q have not gone", was)
	}
	s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: envoyresource.EndpointType, ResourceNamesSubscribe: []string{was, "outbound|1|http|nobody@0"}}
	got := map[string]int{}
	for _, r := range next().Resources {
		e := &endpointv3.ClusterLoadAssignment{}
		if err := r.Resource.UnmarshalTo(e); err != nil || e.ClusterName != r.Name {
			t.Errorf("%s: %v %v", r.Name, e, err)
		}
		got[r.Name] = 0
		for _, l := range e.Endpoints {
			got[r.Name] += len(l.LbEndpoints)
		}
	}
	if n, ok := got["outbound|1|http|nobody@0"]; len(got) != 2 || got[was] != 1 || !ok || n != 0 {
		t.Errorf("%v, want an endpoint of what was told of, and none of nobody's", got)
	}
	s.in <- &discovery.DeltaDiscoveryRequest{TypeUrl: envoyresource.EndpointType, ResourceNamesUnsubscribe: []string{was, "outbound|1|http|nobody@0"}}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		w.mu.Lock()
		left := len(w.open[way].late)
		w.mu.Unlock()
		if left == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d names are kept that nobody wants", left)
		}
	}
}

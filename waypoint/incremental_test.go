package waypoint

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/internal/mesh"
)

var allTypes = []string{resource.ListenerType, resource.RouteType, resource.ClusterType, resource.EndpointType, resource.ExtensionConfigType}

// TestIncremental has a Writer that has seen any number of changes write what a new one writes.
func TestIncremental(t *testing.T) {
	for seed := range uint64(5) {
		r := rand.New(rand.NewPCG(seed, 0))
		b := mesh.NewBuilder(nil)
		b.SetConfig(mesh.Config{TrustDomain: "cluster.local"})
		w := NewWriter(gateway)
		for step := range 15 {
			for range 1 + r.IntN(3) {
				randomChange(r, b)
			}
			s := b.Commit(uint64(step + 1))
			got, err := w.Write(s, Bound(s)[gateway])
			if err != nil {
				t.Fatal(err)
			}
			fresh := NewWriter(gateway)
			want, err := fresh.Write(s, Bound(s)[gateway])
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(fresh.Patched(), w.Patched()); d != "" {
				t.Fatalf("seed %d, step %d: other patches are made: %s", seed, step, d)
			}
			for _, kind := range allTypes {
				if !maps.Equal(got.Versions(kind), want.Versions(kind)) {
					t.Fatalf("seed %d, step %d: versions of %s differ:\n%v\n%v", seed, step, kind, got.Versions(kind), want.Versions(kind))
				}
				for name, m := range want.ByName(kind) {
					if !proto.Equal(m, got.ByName(kind)[name]) {
						t.Fatalf("seed %d, step %d: %s %s is not what is written from nothing", seed, step, kind, name)
					}
				}
			}
			for i := range want.Clusters {
				if got.Clusters[i].Name != want.Clusters[i].Name {
					t.Fatalf("seed %d, step %d: another order of clusters", seed, step)
				}
			}
		}
	}
}

func randomChange(r *rand.Rand, b *mesh.Builder) {
	name := func() mesh.ServiceName {
		return mesh.ServiceName{Namespace: "shop", Hostname: fmt.Sprintf("s%d.shop.svc.cluster.local", r.IntN(6))}
	}
	switch n := name(); r.IntN(10) {
	case 0:
		b.DeleteService(n)
	case 1:
		b.DeleteWorkload(fmt.Sprint("w", r.IntN(8)))
	case 2, 3:
		b.PutWorkload(&mesh.Workload{
			UID: fmt.Sprint("w", r.IntN(8)), Namespace: "shop", Name: "w", Healthy: r.IntN(3) > 0, Tunnel: mesh.TunnelProtocol(r.IntN(2)),
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(20))})}, Labels: map[string]string{"version": fmt.Sprint("v", 1+r.IntN(2))},
			Services: map[mesh.ServiceName][]mesh.ServicePort{n: {{Port: 80, Target: 8080}}, name(): {{Port: 80, Target: 8081}}},
		})
	case 4:
		b.SetConfig(mesh.Config{TrustDomain: "cluster.local", TrustDomainAliases: []string{fmt.Sprint("old", r.IntN(2))}})
	case 5:
		b.PutService(&mesh.Service{Name: gateway, Short: fmt.Sprint("way", r.IntN(2)), Ports: []mesh.ServicePort{{Port: 15008}}})
	default:
		s := &mesh.Service{
			Name: n, Short: "s", VIPs: []mesh.NetAddr{{Addr: netip.AddrFrom4([4]byte{10, 96, 0, byte(r.IntN(8))})}},
			Ports:    []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppProtocol(r.IntN(5))}, {Port: uint16(81 + r.IntN(2)), Target: 8081, App: mesh.AppProtocol(r.IntN(5))}},
			Waypoint: &mesh.Gateway{Service: gateway, HBONEPort: mesh.HBONEPort}, Subsets: versions,
		}
		if r.IntN(4) == 0 {
			s.Waypoint = nil
		}
		for range r.IntN(3) {
			s.HTTP = append(s.HTTP, mesh.HTTPRule{
				Name: "r", Backends: []mesh.HTTPBackend{{Service: name(), Weight: 1}, {Service: name(), Subset: "v1", Weight: uint32(r.IntN(3))}},
				Mirrors: []mesh.HTTPMirror{{Backend: mesh.HTTPBackend{Service: name()}, Millionths: mesh.Million}},
			})
		}
		for range r.IntN(3) {
			s.Routed = append(s.Routed, mesh.Routed{
				Port: 80, Names: [][]string{nil, {"a.example"}, {"b.example"}}[r.IntN(3)], From: []string{"", "blog"}[r.IntN(2)], Beside: r.IntN(2) == 0,
				Backends: []mesh.HTTPBackend{{Service: name(), Port: 80, Weight: 1}},
			})
		}
		if r.IntN(3) == 0 {
			s.Traffic = []mesh.Traffic{{Hash: &mesh.HashKey{Header: fmt.Sprint("x-", r.IntN(2)), SourceIP: r.IntN(2) == 0}}}
		}
		if r.IntN(3) == 0 {
			s.Access = []mesh.AccessPolicy{
				{Name: mesh.PolicyName{Namespace: "shop", Name: "p"}, Action: mesh.Deny, Rules: []mesh.AccessRule{{}}},
				{Name: mesh.PolicyName{Namespace: "shop", Name: "q"}, Action: mesh.Custom, Rules: []mesh.AccessRule{{}}, Ask: &mesh.AuthProvider{Service: name(), Port: 80}},
			}
		}
		if r.IntN(3) == 0 {
			s.Patches = append(patched()[r.IntN(5):], mesh.Patch{Object: "shop/asks", Version: "1", Op: mesh.PatchFirst, Value: fmt.Sprintf(
				`{"name":"asks","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz","grpc_service":{"envoy_grpc":{"cluster_name":"outbound|80||%s"}}}}`, name().Hostname)})
		}
		if r.IntN(3) == 0 {
			s.Tokens = []mesh.TokenRule{{Issuer: fmt.Sprint("issuer", r.IntN(2))}}
		}
		b.PutService(s)
	}
}

// many are services with two routes and a pod each, behind one waypoint.
func many(n int) *mesh.Builder {
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local"})
	b.PutService(&mesh.Service{Name: gateway, Short: "way", Ports: []mesh.ServicePort{{Port: 15008}}})
	for i := range n {
		s := numbered(i)
		b.PutService(s)
		b.PutWorkload(&mesh.Workload{
			UID: fmt.Sprint("w", i), Namespace: "shop", Name: fmt.Sprint("w", i), WorkloadName: fmt.Sprint("w", i), Healthy: true, Tunnel: mesh.TunnelHBONE,
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})}, Services: map[mesh.ServiceName][]mesh.ServicePort{s.Name: {{Port: 80, Target: 8080}}},
		})
	}
	return b
}

func numbered(i int) *mesh.Service {
	n := mesh.ServiceName{Namespace: "shop", Hostname: fmt.Sprintf("s%d.shop.svc.cluster.local", i)}
	rule := func(path string) mesh.HTTPRule {
		return mesh.HTTPRule{Name: "shop/r" + path, Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, path)}}, Backends: []mesh.HTTPBackend{{Service: n, Weight: 1}}}
	}
	return &mesh.Service{
		Name: n, Short: fmt.Sprint("s", i), VIPs: []mesh.NetAddr{{Addr: netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}},
		Ports: []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}}, Waypoint: &mesh.Gateway{Service: gateway, HBONEPort: mesh.HBONEPort},
		HTTP: []mesh.HTTPRule{rule("/a"), rule("/b")},
	}
}

// TestOnlyWhatChanged counts what is written anew, and what is sent, where one object of many changes.
func TestOnlyWhatChanged(t *testing.T) {
	b := many(100)
	w := NewWriter(gateway)
	rev := uint64(0)
	write := func() (r *Resources) {
		rev++
		s := b.Commit(rev)
		r, err := w.Write(s, Bound(s)[gateway])
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	before := write()
	expect := func(what string, written int, changed map[string]int) {
		t.Helper()
		after := write()
		if w.written != written {
			t.Errorf("%s: %d parts written, want %d", what, w.written, written)
		}
		for _, kind := range allTypes {
			n := 0
			for name, v := range after.Versions(kind) {
				if before.Versions(kind)[name] != v {
					n++
				}
			}
			if n != changed[kind] {
				t.Errorf("%s: %d resources of %s, want %d", what, n, kind, changed[kind])
			}
		}
		if len(changed) == 0 && after != before {
			t.Errorf("%s: other resources", what)
		}
		before = after
	}
	expect("nothing", 0, nil)
	s := numbered(7)
	s.HTTP = s.HTTP[:1]
	b.PutService(s)
	expect("a route", 2, map[string]int{resource.RouteType: 1})
	s = numbered(7)
	s.Access = []mesh.AccessPolicy{{Action: mesh.Deny, Rules: []mesh.AccessRule{{}}}}
	b.PutService(s)
	expect("a policy", 2, map[string]int{resource.RouteType: 1})
	s = numbered(7)
	s.Access = []mesh.AccessPolicy{{Action: mesh.Deny, Rules: []mesh.AccessRule{{}}}}
	s.Limits = []mesh.RateLimit{{Name: "shop/l/0", Requests: 1, Per: time.Second, Burst: 1}}
	b.PutService(s)
	expect("a limit", 2, map[string]int{resource.ExtensionConfigType: 1})
	b.PutWorkload(&mesh.Workload{UID: "w7", Namespace: "shop", Name: "w7", Tunnel: mesh.TunnelHBONE, Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.7")},
		Services: map[mesh.ServiceName][]mesh.ServicePort{s.Name: {{Port: 80, Target: 8080}}}})
	expect("a pod", 1, map[string]int{resource.EndpointType: 1})
	b.PutService(numbered(100))
	expect("a service", 2, map[string]int{resource.ListenerType: 1, resource.RouteType: 1, resource.ClusterType: 1, resource.EndpointType: 1, resource.ExtensionConfigType: 2})
	b.PutService(&mesh.Service{Name: mesh.ServiceName{Namespace: "blog", Hostname: "other"}, Ports: []mesh.ServicePort{{Port: 80, App: mesh.AppHTTP1}}})
	expect("a service behind none", 0, nil)
}

func BenchmarkFull(b *testing.B) {
	s := many(1000).Commit(1)
	for b.Loop() {
		if _, err := Build(s, gateway); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOneRoute(b *testing.B) {
	m := many(1000)
	s := m.Commit(1)
	w := NewWriter(gateway)
	if _, err := w.Write(s, Bound(s)[gateway]); err != nil {
		b.Fatal(err)
	}
	i := uint64(1)
	for b.Loop() {
		i++
		svc := numbered(int(i) % 1000)
		svc.HTTP[0].Name = fmt.Sprint(i)
		m.PutService(svc)
		s = m.Commit(i)
		if _, err := w.Write(s, Bound(s)[gateway]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOneService(b *testing.B) {
	m := many(1000)
	s := m.Commit(1)
	w := NewWriter(gateway)
	if _, err := w.Write(s, Bound(s)[gateway]); err != nil {
		b.Fatal(err)
	}
	i := uint64(1)
	for b.Loop() {
		i++
		m.PutService(numbered(999 + int(i)))
		s = m.Commit(i)
		if _, err := w.Write(s, Bound(s)[gateway]); err != nil {
			b.Fatal(err)
		}
		m.DeleteService(numbered(999 + int(i)).Name)
	}
}

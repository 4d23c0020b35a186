package waypoint

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

func at(region, zone, node string) *mesh.Workload {
	return &mesh.Workload{Locality: mesh.Locality{Region: region, Zone: zone}, Node: node, Labels: map[string]string{"pool": zone, "version": "v1"}}
}

// spread is a catalog with pods in three zones of two regions, one of which is not ready.
func spread(change func(*mesh.Service)) *mesh.Snapshot {
	b := mesh.NewBuilder(shop(change))
	for i, w := range []*mesh.Workload{at("eu", "a", "n1"), at("eu", "a", "n2"), at("eu", "b", "n3"), at("us", "c", "n4"), at("us", "c", "n5")} {
		w.UID, w.Name, w.Namespace = fmt.Sprint("Kubernetes//Pod/shop/spread-", i+1), fmt.Sprint("spread-", i+1), "shop"
		w.Healthy = i != 4
		w.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i + 1)})}
		w.Services = map[mesh.ServiceName][]mesh.ServicePort{catalog: {{Port: 80, Target: 8080}}}
		b.PutWorkload(w)
	}
	for _, uid := range []string{"Kubernetes//Pod/shop/catalog-1", "Kubernetes//Pod/shop/catalog-2"} {
		b.DeleteWorkload(uid)
	}
	return b.Commit(2)
}

// arranged is what a pod of the waypoint gets of the catalog, "priority[*weight]:last bytes of addresses": "" for what all get.
func arranged(t *testing.T, s *mesh.Snapshot, from *mesh.Workload) string {
	t.Helper()
	r, err := Build(s, gateway)
	if err != nil {
		t.Fatal(err)
	}
	near := r.Nearby(PlaceOf(from), nil)
	for name, m := range near.ByName() {
		if r.ByName(resource.EndpointType)[name] == nil {
			t.Errorf("%s is not among the endpoints that all get", name)
		}
		if v := near.Versions()[name]; v == "" || v == r.Versions(resource.EndpointType)[name] {
			t.Errorf("%s has the version %q", name, v)
		}
		if !strings.HasPrefix(name, "outbound|80|http|catalog.") {
			continue
		}
		e := m.(*endpointv3.ClusterLoadAssignment)
		if err := e.ValidateAll(); err != nil || e.ClusterName != name {
			t.Errorf("%s: %s: %v", name, e.ClusterName, err)
		}
		var groups []string
		for _, g := range e.Endpoints {
			text := fmt.Sprint(g.Priority)
			if g.Locality != nil {
				text += fmt.Sprint("*", g.LoadBalancingWeight.Value)
			}
			for _, l := range g.LbEndpoints {
				a := l.GetEndpoint().Address.GetSocketAddress().GetAddress()
				text += ":" + a[strings.LastIndexByte(a, '.')+1:]
			}
			groups = append(groups, text)
		}
		slices.Sort(groups)
		return strings.Join(groups, " ")
	}
	return ""
}

// TestNear is who is near to a waypoint's pod, by what is said of that, as Istio has it.
func TestNear(t *testing.T) {
	rule := func(l *mesh.LocalityLB, o *mesh.Outliers) func(*mesh.Service) {
		return func(s *mesh.Service) { s.Traffic = []mesh.Traffic{{Locality: l, Outliers: o}} }
	}
	prefer := func(mode mesh.LBMode, scopes ...mesh.LBScope) func(*mesh.Service) {
		return func(s *mesh.Service) { s.LB = mesh.LoadBalancing{Mode: mode, Prefer: scopes} }
	}
	out := &mesh.Outliers{}
	shares := &mesh.LocalityLB{Distribute: []mesh.Distribution{
		{From: "eu/b", To: []mesh.LocalityShare{{Locality: "us/*", Percent: 30}, {Locality: "eu/*", Percent: 50}, {Locality: "eu/a", Percent: 20}}},
		{From: "eu/*", To: []mesh.LocalityShare{{Locality: "us", Percent: 100}, {Locality: "eu/a/*", Percent: 0}}},
	}}
	for _, c := range []struct {
		name   string
		change func(*mesh.Service)
		from   *mesh.Workload
		want   string
	}{
		{"nothing is said", nil, at("eu", "a", "n1"), ""},
		{"the Service prefers the zone", prefer(mesh.LBFailover, mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone), at("eu", "a", "n9"), "0:1:2 1:3 2:4"},
		{"the Service prefers the node", prefer(mesh.LBFailover, mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeNode), at("eu", "a", "n2"), "0:2 1:1 2:3 3:4"},
		{"a zone without a pod", prefer(mesh.LBFailover, mesh.ScopeRegion, mesh.ScopeZone), at("eu", "x", "n9"), "0:1:2:3 1:4"},
		{"what must be local is for clients, not for waypoints", prefer(mesh.LBStrict, mesh.ScopeNode), at("eu", "a", "n1"), ""},
		{"outlier detection alone fails over", rule(nil, out), at("eu", "b", "n9"), "0:3 1:1:2 2:4"},
		{"a pod nobody knows the place of", rule(nil, out), nil, ""},
		{"a node without labels", rule(nil, out), at("", "", "n1"), ""},
		{"switched off", rule(&mesh.LocalityLB{Off: true}, out), at("eu", "a", "n1"), ""},
		{"failing over takes outlier detection", rule(&mesh.LocalityLB{Failover: []mesh.RegionFailover{{From: "eu", To: "us"}}}, nil), at("eu", "a", "n1"), ""},
		{"the region that is next", rule(&mesh.LocalityLB{Failover: []mesh.RegionFailover{{From: "asia", To: "us"}}}, out), at("asia", "d", "n9"), "0:4 1:1:2:3"},
		{"by labels", rule(&mesh.LocalityLB{Labels: []string{"topology.kubernetes.io/region", "pool"}}, out), at("eu", "b", "n9"), "0:3 1:1:2 2:4"},
		{"by a label's value, whoever asks", rule(&mesh.LocalityLB{Labels: []string{"version=v1", "pool=c"}}, out), at("eu", "b", "n9"), "0:4 1:1:2:3"},
		{"shares, of which the most specific counts", rule(shares, nil), at("eu", "b", "n9"), "0*20:1:2 0*30:4:5 0*50:3"},
		{"what is not listed gets nothing, nor what has no share", rule(shares, nil), at("eu", "a", "n1"), "0*100:4:5"},
		{"shares are said of another place", rule(shares, nil), at("us", "c", "n4"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := arranged(t, spread(c.change), c.from); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestZones is how much of what a proxy sends stays in its zone. The catalog has three ready endpoints in eu, two of them in zone a.
func TestZones(t *testing.T) {
	zones := func(change func(*mesh.LocalityLB)) func(*mesh.Service) {
		l := &mesh.LocalityLB{Zones: true, Least: 3}
		if change != nil {
			change(l)
		}
		return func(s *mesh.Service) { s.Traffic = []mesh.Traffic{{Locality: l}} }
	}
	for _, c := range []struct {
		name    string
		change  func(*mesh.LocalityLB)
		proxies string // zones of the waypoint's pods in eu
		from    *mesh.Workload
		want    string
	}{
		{"enough in the zone", nil, "ab", at("eu", "a", "n9"), "0*10000:1:2 1*1:3 2:4"},
		{"too little in the zone", nil, "ab", at("eu", "b", "n9"), "0*3334:1:2 0*6666:3 1:4"},
		{"all proxies in one zone", nil, "bbb", at("eu", "b", "n9"), "0*3333:3 0*6667:1:2 1:4"},
		{"a zone without endpoints", nil, "abx", at("eu", "x", "n9"), "0:1:2:3 1:4"},
		{"too few endpoints", func(l *mesh.LocalityLB) { l.Least = 4 }, "ab", at("eu", "a", "n9"), "0:1:2:3 1:4"},
		{"the proxy is not among those that are known", nil, "b", at("eu", "a", "n9"), "0:1:2:3 1:4"},
		{"a node without labels", nil, "ab", at("", "", "n9"), ""},
		{"a region of its own", nil, "ab", at("asia", "z", "n9"), ""},
		{"a region to fail over to", func(l *mesh.LocalityLB) { l.Failover = []mesh.RegionFailover{{From: "asia", To: "us"}} }, "ab", at("asia", "z", "n9"), "0:4 1:1:2:3"},
		{"labels come before", func(l *mesh.LocalityLB) { l.Labels = []string{"pool=a"}; l.Least = 2 }, "ab", at("eu", "b", "n9"), "0:1:2 1:3 2:4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := mesh.NewBuilder(spread(zones(c.change)))
			for i, zone := range c.proxies {
				w := at("eu", string(zone), "n9")
				w.UID, w.Name, w.Namespace, w.Healthy = fmt.Sprint("Kubernetes//Pod/shop/way-", i), fmt.Sprint("way-", i), "shop", true
				w.Addrs, w.Services = []netip.Addr{netip.AddrFrom4([4]byte{10, 2, 0, byte(i + 1)})}, map[mesh.ServiceName][]mesh.ServicePort{gateway: {{Port: 15008, Target: 15008}}}
				b.PutWorkload(w)
			}
			if got := arranged(t, b.Commit(3), c.from); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}

	// How many proxies there are counts, too.
	w := NewWriter(gateway)
	s := spread(zones(nil))
	from := PlaceOf(at("eu", "a", "n9"))
	share := func() string {
		r, err := w.Write(s, Bound(s)[gateway])
		if err != nil {
			t.Fatal(err)
		}
		for name, v := range r.Nearby(from, nil).Versions() {
			if strings.HasPrefix(name, "outbound|80|http|catalog.") {
				return v
			}
		}
		return ""
	}
	before := share()
	b := mesh.NewBuilder(s)
	p := at("eu", "a", "n9")
	p.UID, p.Name, p.Namespace, p.Healthy, p.Addrs, p.Services = "Kubernetes//Pod/shop/way-1", "way-1", "shop", true, []netip.Addr{netip.MustParseAddr("10.2.0.1")}, map[mesh.ServiceName][]mesh.ServicePort{gateway: nil}
	b.PutWorkload(p)
	s = b.Commit(3)
	if after := share(); after == before || before == "" {
		t.Errorf("a proxy more changes nothing: %q and %q", before, after)
	}
}

// TestNearEverywhere is what the mesh says where nobody else does.
func TestNearEverywhere(t *testing.T) {
	for _, c := range []struct {
		everywhere *mesh.LocalityLB
		want       string
	}{
		{nil, "0:1:2 1:3 2:4"},
		{&mesh.LocalityLB{}, "0:1:2 1:3 2:4"},
		{&mesh.LocalityLB{Off: true}, ""},
		{&mesh.LocalityLB{Distribute: []mesh.Distribution{{From: "*", To: []mesh.LocalityShare{{Locality: "us/*", Percent: 100}}}}}, "0*100:4:5"},
	} {
		b := mesh.NewBuilder(spread(func(s *mesh.Service) { s.Traffic = []mesh.Traffic{{Outliers: &mesh.Outliers{}}} }))
		b.SetConfig(mesh.Config{Locality: c.everywhere})
		if got := arranged(t, b.Commit(3), at("eu", "a", "n1")); got != c.want {
			t.Errorf("%+v: %q, want %q", c.everywhere, got, c.want)
		}
	}
}

// TestNearbyIsTakenOver has what did not change be the same object, and a pod that moves to another zone be seen.
func TestNearbyIsTakenOver(t *testing.T) {
	w := NewWriter(gateway)
	s := spread(func(s *mesh.Service) { s.Traffic = []mesh.Traffic{{Outliers: &mesh.Outliers{}}} })
	write := func() *Resources {
		r, err := w.Write(s, Bound(s)[gateway])
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	from := PlaceOf(at("eu", "a", "n1"))
	first := write().Nearby(from, nil)
	b := mesh.NewBuilder(s)
	b.PutService(&mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Hostname: "other.shop.svc.cluster.local"}, Waypoint: &mesh.Gateway{Service: gateway}, Ports: []mesh.ServicePort{{Port: 80, App: mesh.AppHTTP1}}})
	s = b.Commit(3)
	second := write().Nearby(from, first)
	for name, m := range first.ByName() {
		if second.ByName()[name] != m {
			t.Errorf("%s was made again", name)
		}
	}
	b = mesh.NewBuilder(s)
	moved := *s.Workload("Kubernetes//Pod/shop/spread-3")
	moved.Locality.Zone = "a"
	b.PutWorkload(&moved)
	s = b.Commit(4)
	if got := arranged(t, s, at("eu", "a", "n1")); got != "0:1:2:3 1:4" {
		t.Errorf("after a pod has moved: %q", got)
	}
	third := write().Nearby(from, second)
	for name, v := range second.Versions() {
		if third.Versions()[name] == v {
			t.Errorf("%s is what it was", name)
		}
	}
}

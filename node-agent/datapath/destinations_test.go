package datapath

import (
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

type view struct {
	workloads []*mesh.Workload
	services  []*mesh.Service
	config    mesh.Config
}

func (v view) Workloads() iter.Seq[*mesh.Workload] { return slices.Values(v.workloads) }
func (v view) Services() iter.Seq[*mesh.Service]   { return slices.Values(v.services) }
func (v view) Config() mesh.Config                 { return v.config }
func (v view) Private(*mesh.Workload) bool         { return false }

func TestDesired(t *testing.T) {
	addr := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	backs := func(names ...string) map[mesh.ServiceName][]mesh.ServicePort {
		m := map[mesh.ServiceName][]mesh.ServicePort{}
		for _, n := range names {
			m[mesh.ServiceName{Namespace: "shop", Hostname: n}] = nil
		}
		return m
	}
	service := func(name string, vips ...string) *mesh.Service {
		s := &mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Hostname: name}}
		for _, v := range vips {
			s.VIPs = append(s.VIPs, mesh.NetAddr{Addr: addr(v)})
		}
		return s
	}
	waypointed := service("waypointed", "10.96.0.4")
	waypointed.Waypoint = &mesh.Gateway{}
	entry := service("entry")
	entry.Waypoint = &mesh.Gateway{}
	entry.VIPNets = []mesh.NetPrefix{{Prefix: netip.MustParsePrefix("192.0.2.9/24")}, {Network: "far", Prefix: netip.MustParsePrefix("198.51.100.0/24")}}
	far := service("far")
	far.VIPs = []mesh.NetAddr{{Network: "far", Addr: addr("10.96.0.9")}}

	got := Desired(view{
		workloads: []*mesh.Workload{
			{Addrs: []netip.Addr{addr("10.0.0.1"), addr("fd00::1")}, Tunnel: mesh.TunnelHBONE, Services: backs("mixed", "far")},
			{Addrs: []netip.Addr{addr("10.0.0.2")}, Services: backs("mixed", "plain")},
			{Addrs: []netip.Addr{addr("10.0.0.3")}, Waypoint: &mesh.Gateway{}, Services: backs("behind")},
			{Addrs: []netip.Addr{addr("10.0.0.4")}, Network: "far", Tunnel: mesh.TunnelHBONE},
			{Addrs: []netip.Addr{addr("::ffff:10.0.0.5")}, Tunnel: mesh.TunnelHBONE},
			{Addrs: []netip.Addr{addr("192.0.2.7")}, Services: backs("static")},
			{Hostname: "elsewhere.example", Services: backs("named")},
		},
		services: []*mesh.Service{
			service("mixed", "10.96.0.1", "fd96::1"), service("plain", "10.96.0.2"), service("behind", "10.96.0.3"),
			service("empty", "10.96.0.5"), waypointed, entry, far,
			service("static", "240.240.0.1", "2001:2::1"), service("named", "240.240.0.2"),
		},
	}, "")

	want := Destinations{Addrs: map[netip.Addr]bool{}, Prefixes: map[netip.Prefix]bool{netip.MustParsePrefix("192.0.2.0/24"): true}}
	for _, a := range []string{"10.0.0.1", "fd00::1", "10.0.0.3", "10.0.0.5", "10.96.0.1", "fd96::1", "10.96.0.3", "10.96.0.4", "240.240.0.1", "2001:2::1"} {
		want.Addrs[addr(a)] = true
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Error(d)
	}
}

// Under REGISTRY_ONLY the kernel leaves to itself what the agent would pass on unseen, and nothing that it would refuse: whatever
// the mesh, an address is captured if Resolve refuses it as unknown or has the connection go elsewhere than asked for.
func TestDesiredIsWhatResolveNeeds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := func(label string, most int) int { return rapid.IntRange(0, most).Draw(t, label) }
		b := mesh.NewBuilder(nil)
		b.SetConfig(mesh.Config{TrustDomain: "cluster.local", RegistryOnly: n("registry only", 3) > 0})
		services := []mesh.ServiceName{{Namespace: "a", Hostname: "s0"}, {Namespace: "b", Hostname: "s1"}, {Namespace: "b", Hostname: "s2"}}
		addr := func(label string) netip.Addr {
			return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(n(label+", net", 2)), byte(n(label, 4))}),
				netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(n(label+", net", 2)), 15: byte(n(label, 4))})}[n(label+", family", 1)]
		}
		for i := range n("workloads", 6) {
			w := &mesh.Workload{UID: string(rune('a' + i)), Namespace: []string{"a", "b"}[n("namespace", 1)], Node: []string{"", "n1"}[n("node", 1)], Healthy: true,
				Network: []string{"", "", "far"}[n("network", 2)], HostNetwork: n("host", 2) == 0, Addrs: []netip.Addr{addr("workload")},
				Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "x"}}
			if !w.HostNetwork && w.Node != "" {
				w.Tunnel = mesh.TunnelProtocol(n("tunnel", 1))
			}
			if k := n("backs", 3); k > 0 {
				w.Services = map[mesh.ServiceName][]mesh.ServicePort{services[k-1]: {{Port: 80, Target: 8080}}}
			}
			b.PutWorkload(w)
		}
		for _, name := range services {
			s := &mesh.Service{Name: name, Ports: []mesh.ServicePort{{Port: 80, Target: 8080}}}
			if n("vip", 2) > 0 {
				s.VIPs = []mesh.NetAddr{{Addr: addr("vip")}}
			}
			if n("nets", 2) == 0 {
				a := addr("prefix")
				s.VIPNets = []mesh.NetPrefix{{Prefix: netip.PrefixFrom(a, []int{0, a.BitLen() - 8, a.BitLen() - 1}[n("bits", 2)]).Masked()}}
			}
			if n("passthrough", 2) == 0 {
				s.LB.Mode = mesh.LBPassthrough
			}
			s.VisibleIn = [][]string{nil, nil, {s.Name.Namespace}, {"another"}}[n("visible", 3)]
			if n("waypoint", 4) == 0 {
				s.Waypoint = &mesh.Gateway{Service: services[0], HBONEPort: 15008}
			}
			b.PutService(s)
		}
		s := b.Commit(1)
		d := Desired(s, "")
		for range 60 {
			client := &mesh.Workload{UID: "client", Namespace: []string{"a", "b", "c"}[n("client", 2)], Node: "n1", Addrs: []netip.Addr{netip.MustParseAddr("10.9.9.9")}}
			dst := netip.AddrPortFrom(addr("destination"), 80)
			r := s.Resolve(client, dst, func(int) int { return 0 })
			captured := d.Captured(dst.Addr())
			switch {
			case r.Why == mesh.WhyNotInRegistry && !captured:
				t.Fatalf("%s is left alone, and the agent would refuse it", dst)
			case r.Why == mesh.WhyUnknown && captured && !s.Config().RegistryOnly && s.ServiceAt(mesh.NetAddr{Addr: dst.Addr()}) == nil:
				t.Fatalf("%s is captured, and the mesh does not know it", dst)
			case (r.Kind == mesh.RouteHBONE || r.Kind == mesh.RouteWaypoint) && !captured:
				t.Fatalf("%s is left alone, and its way is %d, %s", dst, r.Kind, r.Why)
			case (r.Why == mesh.WhyHostAddress || r.Why == mesh.WhyNotCaptured && r.Service == nil) && captured && s.ServiceAt(mesh.NetAddr{Addr: dst.Addr()}) == nil && plainOnly(s, dst.Addr()):
				t.Fatalf("%s is captured, and the agent would only pass it on: %s", dst, r.Why)
			}
		}
	})
}

// plainOnly reports whether nothing that is captured has the address, and nothing that is for one namespace alone.
func plainOnly(s *mesh.Snapshot, a netip.Addr) bool {
	for w := range s.Workloads() {
		if w.Network == "" && slices.Contains(w.Addrs, a) && (w.Tunnel == mesh.TunnelHBONE || s.Private(w)) {
			return false
		}
	}
	return true
}

// What the maps hold reads back as what was entered.
func TestKernelFormsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var a netip.Addr
		if rapid.Bool().Draw(t, "v4") {
			a = netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "bytes")))
		} else {
			a = netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "bytes"))).Unmap()
		}
		if back := goAddr(kernelAddr(a)); back != a {
			t.Errorf("%s reads back as %s", a, back)
		}
		p := netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(t, "bits")).Masked()
		if back := goPrefix(kernelPrefix(p)); back != p {
			t.Errorf("%s reads back as %s", p, back)
		}
	})
	if kernelAddr(netip.Addr{}) != (bpf.MeshAddr{}) {
		t.Error("no address is not zero")
	}
}

// The kernel holds exactly what was last set, prefixes included, also across a restart.
func TestDestinationsAreReconciled(t *testing.T) {
	l := newLab(t)
	set := func(addrs, prefixes string) {
		t.Helper()
		d := Destinations{Addrs: map[netip.Addr]bool{}, Prefixes: map[netip.Prefix]bool{}}
		for _, a := range strings.Fields(addrs) {
			d.Addrs[netip.MustParseAddr(a)] = true
		}
		for _, p := range strings.Fields(prefixes) {
			d.Prefixes[netip.MustParsePrefix(p)] = true
		}
		check(t, l.dp.SetDestinations(d))
		have, err := l.dp.readDestinations()
		check(t, err)
		if len(have.Addrs) != len(d.Addrs) || len(have.Prefixes) != len(d.Prefixes) {
			t.Errorf("have %v, want %v", have, d)
		}
		for a := range d.Addrs {
			if _, ok := have.Addrs[a]; !ok {
				t.Errorf("%s is missing", a)
			}
		}
		for p := range d.Prefixes {
			if _, ok := have.Prefixes[p]; !ok {
				t.Errorf("%s is missing", p)
			}
		}
	}
	set("10.0.0.1 fd00::1", "192.0.2.0/24")
	set("10.0.0.1 10.0.0.2", "192.0.2.0/25 fd01::/64")
	check(t, l.dp.Close())
	l.open()
	set("10.0.0.3", "0.0.0.0/0")
	set("", "")
}

// A ServiceEntry's prefix captures what is in it.
func TestPrefixIsCaptured(t *testing.T) {
	l := enrolled(t)
	d := l.destinations()
	d.Prefixes = map[netip.Prefix]bool{netip.MustParsePrefix("10.88.0.0/16"): true, netip.MustParsePrefix("fd88::/16"): true}
	check(t, l.dp.SetDestinations(d))
	for _, dst := range l.outside.addrs(appPort) {
		l.counted(map[string]int{"connect_captured": 1, "connect_vouched": 0, "guard_agent": -1}, func() {
			c, err := l.ui.dial(dst)
			check(t, err)
			_, _, err = seen(c)
			check(t, err)
			c.Close()
		})
	}
}

// Where pods may reach only what the mesh knows, everything else is captured, and what it knows is left alone as before: by
// its address, by the longest prefix, and through any order of changes.
func TestEverythingIsCapturedButWhatIsKnown(t *testing.T) {
	l := enrolled(t)
	reach := func(want string) {
		t.Helper()
		for _, dst := range l.outside.addrs(appPort) {
			l.counted(map[string]int{want: 1}, func() {
				c, err := l.ui.dial(dst)
				check(t, err)
				_, _, err = seen(c)
				check(t, err)
				c.Close()
			})
		}
	}
	set := func(addrs map[netip.Addr]bool, prefixes map[string]bool) {
		t.Helper()
		d := l.destinations()
		maps.Copy(d.Addrs, addrs)
		d.Prefixes = map[netip.Prefix]bool{}
		for p, captured := range prefixes {
			d.Prefixes[netip.MustParsePrefix(p)] = captured
		}
		check(t, l.dp.SetDestinations(d))
		for _, a := range []netip.Addr{l.outside.v4, l.outside.v6} {
			if captured, err := l.dp.readDestinations(); err != nil || captured.Captured(a) != d.Captured(a) {
				t.Errorf("%s: %v", a, err)
			}
		}
	}
	const all4, all6 = "0.0.0.0/0", "::/0"
	none := map[netip.Addr]bool{}
	known := map[netip.Addr]bool{l.outside.v4: false, l.outside.v6: false}
	reach("connect_vouched")
	set(none, map[string]bool{all4: true, all6: true})
	reach("connect_captured")
	set(known, map[string]bool{all4: true, all6: true})
	reach("connect_vouched")
	set(none, map[string]bool{all4: true, all6: true, "10.88.0.0/16": false, "fd88::/16": false})
	reach("connect_vouched")
	set(known, map[string]bool{all4: true, all6: true})
	for a := range known {
		check(t, l.dp.kernel.Destinations.Put(kernelAddr(a), uint32(1)))
	}
	if _, err := l.dp.Audit(); err != nil {
		t.Error(err)
	}
	reach("connect_vouched") // a row that says otherwise is found
	set(map[netip.Addr]bool{l.outside.v4: true, l.outside.v6: true}, nil)
	reach("connect_captured")
	set(none, nil)
	reach("connect_vouched")
}

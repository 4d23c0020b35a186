package datapath

import (
	"iter"
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
}

func (v view) Workloads() iter.Seq[*mesh.Workload] { return slices.Values(v.workloads) }
func (v view) Services() iter.Seq[*mesh.Service]   { return slices.Values(v.services) }

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
		},
		services: []*mesh.Service{
			service("mixed", "10.96.0.1", "fd96::1"), service("plain", "10.96.0.2"), service("behind", "10.96.0.3"),
			service("empty", "10.96.0.5"), waypointed, entry, far,
		},
	}, "")

	want := Destinations{Addrs: map[netip.Addr]struct{}{}, Prefixes: map[netip.Prefix]struct{}{netip.MustParsePrefix("192.0.2.0/24"): {}}}
	for _, a := range []string{"10.0.0.1", "fd00::1", "10.0.0.3", "10.0.0.5", "10.96.0.1", "fd96::1", "10.96.0.3", "10.96.0.4"} {
		want.Addrs[addr(a)] = struct{}{}
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Error(d)
	}
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
		d := Destinations{Addrs: map[netip.Addr]struct{}{}, Prefixes: map[netip.Prefix]struct{}{}}
		for _, a := range strings.Fields(addrs) {
			d.Addrs[netip.MustParseAddr(a)] = struct{}{}
		}
		for _, p := range strings.Fields(prefixes) {
			d.Prefixes[netip.MustParsePrefix(p)] = struct{}{}
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
	d.Prefixes = map[netip.Prefix]struct{}{netip.MustParsePrefix("10.88.0.0/16"): {}, netip.MustParsePrefix("fd88::/16"): {}}
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

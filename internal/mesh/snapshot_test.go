package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func at(s string) NetAddr { return NetAddr{Addr: ip(s)} }

func pod(name, addr string, services ...string) *Workload {
	w := &Workload{
		UID: "c//Pod/shop/" + name, Name: name, Namespace: "shop", Cluster: "c", Node: "n1", Healthy: true,
		Identity: Identity{"cluster.local", "shop", name}, Tunnel: TunnelHBONE,
	}
	for _, a := range strings.Fields(addr) {
		w.Addrs = append(w.Addrs, ip(a))
	}
	for _, s := range services {
		if w.Services == nil {
			w.Services = map[ServiceName][]ServicePort{}
		}
		w.Services[svcName(s)] = []ServicePort{{Port: 80, Target: 8080}}
	}
	return w
}

func svcName(s string) ServiceName { return ServiceName{"shop", s + ".shop.svc.cluster.local"} }

func svc(name string, vips ...string) *Service {
	s := &Service{Name: svcName(name), Short: name, Ports: []ServicePort{{Port: 80, Target: 8080}}}
	for _, v := range vips {
		s.VIPs = append(s.VIPs, at(v))
	}
	return s
}

func build(parts ...any) *Snapshot {
	b := NewBuilder(nil)
	for _, p := range parts {
		switch p := p.(type) {
		case *Workload:
			b.PutWorkload(p)
		case *Service:
			b.PutService(p)
		case *Policy:
			b.PutPolicy(p)
		case Config:
			b.SetConfig(p)
		}
	}
	return b.Commit(1)
}

func TestAddressGivenToAnotherPod(t *testing.T) {
	b := NewBuilder(nil)
	old := pod("old", "10.0.0.1 fd00::1", "api")
	b.PutService(svc("api", "10.96.0.1"))
	b.PutWorkload(old)
	before := b.Commit(1)
	b.PutWorkload(pod("new", "10.0.0.1", "api"))
	after := b.Commit(2)

	if got := after.WorkloadAt(at("10.0.0.1")); got == nil || got.Name != "new" {
		t.Errorf("10.0.0.1 is %v, want the new pod", got)
	}
	if got := after.WorkloadAt(at("fd00::1")); got != nil {
		t.Errorf("fd00::1 is still %s", got.UID)
	}
	if after.Workload(old.UID) != nil {
		t.Error("the old pod is still there by its UID")
	}
	for w := range after.Endpoints(svcName("api")) {
		if w.Name != "new" {
			t.Errorf("%s is still an endpoint", w.Name)
		}
	}
	if got := before.WorkloadAt(at("10.0.0.1")); got != old {
		t.Errorf("the earlier snapshot changed: %v", got)
	}
	// The late removal of the old one does no harm.
	b.DeleteWorkload(old.UID)
	if got := b.Commit(3).WorkloadAt(at("10.0.0.1")); got == nil || got.Name != "new" {
		t.Errorf("10.0.0.1 is %v after the removal of the old pod", got)
	}
}

func TestWorkloadsThatShareAnAddress(t *testing.T) {
	entry := func(uid string) *Workload { return &Workload{UID: uid, Addrs: []netip.Addr{ip("10.0.0.1")}} }
	host := pod("host", "10.0.0.1")
	host.HostNetwork = true
	s := build(entry("b"), entry("a"), host)
	if got := s.WorkloadAt(at("10.0.0.1")); got.UID != "a" {
		t.Errorf("the address is %s, want a", got.UID)
	}
	b := NewBuilder(s)
	b.PutWorkload(pod("p", "10.0.0.1"))
	s = b.Commit(2)
	if got := s.WorkloadAt(at("10.0.0.1")); got.Name != "p" {
		t.Errorf("the address is %s, want the pod", got.UID)
	}
	if n, _, _ := s.Len(); n != 4 {
		t.Errorf("%d workloads, want 4", n)
	}
}

func TestServicesThatShareAnAddress(t *testing.T) {
	a, b := svc("a", "10.96.0.1"), svc("b", "10.96.0.1")
	other := &Service{Name: ServiceName{"other", "x"}, VIPs: []NetAddr{at("10.96.0.1")}, VisibleIn: []string{"other"}}
	s := build(b, a, other)
	if got := s.ServiceAt(at("10.96.0.1")); got != other {
		t.Errorf("the address is %s", got.Name)
	}
	if got := s.serviceFor(at("10.96.0.1"), "third"); got != a {
		t.Errorf("a third namespace sees %s, want a: the first is private", got.Name)
	}
	if got := s.serviceFor(at("10.96.0.1"), "other"); got != other {
		t.Errorf("its own namespace sees %s", got.Name)
	}
	canonical := svc("b", "10.96.0.1")
	canonical.Canonical = true
	bld := NewBuilder(s)
	bld.PutService(canonical)
	bld.DeleteService(other.Name)
	if got := bld.Commit(2).ServiceAt(at("10.96.0.1")); got != canonical {
		t.Errorf("the address is %s, want the canonical one", got.Name)
	}
}

func TestServicePrefixes(t *testing.T) {
	net := func(name, prefix string) *Service {
		s := svc(name)
		s.VIPNets = []NetPrefix{{Prefix: netip.MustParsePrefix(prefix)}}
		return s
	}
	wide, narrow := net("wide", "192.168.0.0/16"), net("narrow", "192.168.7.0/24")
	private := net("private", "192.168.7.0/25")
	private.Name.Namespace, private.VisibleIn = "other", []string{"other"}
	s := build(wide, narrow, private)
	for addr, want := range map[string]*Service{"192.168.1.1": wide, "192.168.7.200": narrow, "10.0.0.1": nil} {
		if got := s.ServiceAt(at(addr)); got != want {
			t.Errorf("%s is %v, want %v", addr, got, want)
		}
	}
	if got := s.serviceByPrefix(at("192.168.7.1"), "shop"); got != narrow {
		t.Errorf("shop sees %v at 192.168.7.1, want narrow", got)
	}
	if got := s.serviceByPrefix(at("192.168.7.1"), "other"); got != private {
		t.Errorf("other sees %v at 192.168.7.1, want its own", got)
	}
}

func TestRevisions(t *testing.T) {
	b := NewBuilder(nil)
	b.PutWorkload(pod("a", "10.0.0.1"))
	b.PutWorkload(pod("b", "10.0.0.2"))
	b.Commit(7)
	b.PutWorkload(pod("a", "10.0.0.1")) // unchanged
	if b.Changed() {
		t.Error("putting what is there counts as a change")
	}
	b.PutWorkload(pod("b", "10.0.0.3"))
	s := b.Commit(8)
	if a, b := s.Workload("c//Pod/shop/a").Revision, s.Workload("c//Pod/shop/b").Revision; a != 7 || b != 8 || s.Revision() != 8 {
		t.Errorf("revisions a=%d b=%d snapshot=%d, want 7, 8, 8", a, b, s.Revision())
	}
}

func TestStoreWatch(t *testing.T) {
	var st Store
	if st.Load().Revision() != 0 {
		t.Fatal("the store begins with something")
	}
	w := st.Watch()
	st.Swap(build(pod("a", "10.0.0.1")))
	st.Swap(build(pod("b", "10.0.0.1")))
	<-w
	select {
	case <-w:
		t.Error("two swaps before a look are two wake-ups")
	default:
	}
	st.Unwatch(w)
	st.Swap(build())
	select {
	case <-w:
		t.Error("woken after Unwatch")
	default:
	}
}

// genParts draws operations on a small world, so that addresses, services and names collide often.
func genParts(t *rapid.T, b *Builder) {
	n := func(label string, most int) int { return rapid.IntRange(0, most).Draw(t, label) }
	switch n("op", 9) {
	case 0, 1, 2, 3:
		w := pod(fmt.Sprint("p", n("pod", 6)), fmt.Sprintf("10.0.0.%d", n("addr", 5)))
		if n("second", 2) == 0 {
			w.Addrs = append(w.Addrs, ip(fmt.Sprintf("fd00::%d", n("addr6", 4))))
		}
		w.Node = []string{"", "n1", "n2"}[n("node", 2)]
		w.HostNetwork = n("host", 4) == 0
		w.Healthy = n("healthy", 3) > 0
		w.Tunnel = TunnelProtocol(n("tunnel", 1))
		w.Capacity = uint32(n("capacity", 3))
		w.Network = []string{"", "", "", "far"}[n("network", 3)]
		for i := range n("services", 2) {
			if w.Services == nil {
				w.Services = map[ServiceName][]ServicePort{}
			}
			w.Services[svcName(fmt.Sprint("s", i+n("service", 2)))] = []ServicePort{{Port: 80, Target: uint16(n("target", 1)) * 8080}}
		}
		for i := range n("policies", 2) {
			w.Policies = append(w.Policies, PolicyName{"shop", fmt.Sprint("w", i)})
		}
		b.PutWorkload(w)
	case 4:
		b.DeleteWorkload(fmt.Sprint("c//Pod/shop/p", n("pod", 6)))
	case 5, 6:
		s := svc(fmt.Sprint("s", n("service", 3)), fmt.Sprintf("10.96.0.%d", n("vip", 2)))
		s.Canonical = n("canonical", 2) == 0
		s.VisibleIn = [][]string{nil, {s.Name.Namespace}, {"other", "third"}, {}}[n("visible", 3)]
		s.LB.Mode = LBMode(n("mode", 3))
		if s.LB.Mode == LBStrict || s.LB.Mode == LBFailover {
			s.LB.Prefer = [][]LBScope{{ScopeNode}, {ScopeNetwork, ScopeNode}, {ScopeZone}}[n("prefer", 2)]
		}
		s.LB.AllowUnhealthy = n("unhealthy", 3) == 0
		if n("net", 3) == 0 {
			s.VIPNets = []NetPrefix{{Prefix: netip.MustParsePrefix(fmt.Sprintf("192.168.%d.0/%d", n("net3", 1), 16+8*n("bits", 1))).Masked()}}
		}
		s.Ports[0].Target = uint16(n("target", 1)) * 8080
		b.PutService(s)
	case 7:
		b.DeleteService(svcName(fmt.Sprint("s", n("service", 3))))
	case 8:
		b.PutPolicy(genPolicy(t))
	case 9:
		b.DeletePolicy(PolicyName{"shop", fmt.Sprint([]string{"m", "n", "w"}[n("scope", 2)], n("policy", 1))})
	}
}

func genPolicy(t *rapid.T) *Policy {
	n := func(label string, most int) int { return rapid.IntRange(0, most).Draw(t, label) }
	scope := n("scope", 2)
	p := &Policy{
		Name:  PolicyName{"shop", fmt.Sprint([]string{"m", "n", "w"}[scope], n("policy", 1))},
		Scope: Scope(scope), Action: Action(n("action", 2)), DryRun: n("dry", 4) == 0,
	}
	for range n("rules", 2) {
		var r Rule
		for range n("clauses", 2) {
			var c Clause
			for range n("matches", 2) {
				c.Matches = append(c.Matches, genMatch(n))
			}
			r.Clauses = append(r.Clauses, c)
		}
		p.Rules = append(p.Rules, r)
	}
	return p
}

func genMatch(n func(string, int) int) Match {
	var m Match
	text := func() []StringMatch {
		return []StringMatch{{StringMatchKind(n("kind", 3)), []string{"", "shop", "cluster.local/ns/shop/sa/p0", "p1"}[n("value", 3)]}}
	}
	lists := []func(){
		func() { m.Namespaces = text() }, func() { m.NotNamespaces = text() },
		func() { m.Principals = text() }, func() { m.NotPrincipals = text() },
		func() { m.ServiceAccounts = []ServiceAccountMatch{{"shop", fmt.Sprint("p", n("sa", 1))}} },
		func() { m.NotServiceAccounts = []ServiceAccountMatch{{"shop", fmt.Sprint("p", n("sa", 1))}} },
		func() { m.SourceIPs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/31")} },
		func() { m.NotSourceIPs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/31")} },
		func() { m.DestinationIPs = []netip.Prefix{netip.MustParsePrefix("10.0.0.2/31")} },
		func() { m.NotDestinationIPs = []netip.Prefix{netip.MustParsePrefix("10.0.0.2/31")} },
		func() { m.DestinationPorts = []uint16{80} },
		func() { m.NotDestinationPorts = []uint16{80} },
	}
	for range n("fields", 2) {
		lists[n("field", len(lists)-1)]()
	}
	return m
}

// rebuilt is the same state built from nothing.
func rebuilt(s *Snapshot) *Snapshot {
	b := NewBuilder(nil)
	b.SetConfig(s.Config())
	for w := range s.Workloads() {
		b.PutWorkload(w)
	}
	for x := range s.Services() {
		b.PutService(x)
	}
	for p := range s.Policies() {
		b.PutPolicy(p)
	}
	return b.Commit(s.Revision())
}

// describe writes down everything that a lookup can return.
func describe(s *Snapshot) string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for w := range s.Workloads() {
		add("workload %s %v", w.UID, w.Addrs)
	}
	for a, m := range s.addrs.all() {
		for _, w := range m.list {
			add("addr %v %s", a, w.UID)
		}
	}
	for a, m := range s.hosts.all() {
		for _, w := range m.list {
			add("host %v %s", a, w.UID)
		}
	}
	for a, v := range s.vips.all() {
		for i, x := range v.list {
			add("vip %v %d %s", a, i, x.Name)
		}
	}
	for i, n := range s.nets {
		add("net %d %v %s", i, n.Prefix, n.service.Name)
	}
	for name, set := range s.endpoints.all() {
		for i, e := range set.list {
			add("endpoint %s %d %s %v", name, i, e.UID, e.ports)
		}
	}
	for node, on := range s.byNode.all() {
		for i, m := range on.list {
			add("node %s %d %s", node, i, m.UID)
		}
	}
	for scope, l := range s.byScope.all() {
		for i, p := range l.list {
			add("scope %q %d %s", scope, i, p.Name)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestIncrementalEqualsFromScratch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBuilder(nil)
		type version struct {
			s    *Snapshot
			text string
		}
		var history []version
		for rev := range uint64(rapid.IntRange(1, 6).Draw(t, "commits")) {
			for range rapid.IntRange(0, 12).Draw(t, "changes") {
				genParts(t, b)
			}
			s := b.Commit(rev + 1)
			history = append(history, version{s, describe(s)})
		}
		for i, v := range history {
			if now := describe(v.s); now != v.text {
				t.Fatalf("snapshot %d changed after it was made:\n%s\nwas\n%s", i, now, v.text)
			}
			if scratch := describe(rebuilt(v.s)); scratch != v.text {
				t.Fatalf("snapshot %d:\n%s\nfrom scratch:\n%s", i, v.text, scratch)
			}
		}
	})
}

package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/warrenmesh/warren/internal/mesh"
)

// crowd is a mesh with 10,000 policies in 100 namespaces, and the 110 pods of one of its nodes.
func crowd() (*mesh.Snapshot, []Pod) {
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local"})
	for i := range 10000 {
		p := rule(mesh.Allow, fmt.Sprint("p", i), account(fmt.Sprint("sa", i%40)), mesh.Match{
			SourceIPs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)}, DestinationPorts: []uint16{uint16(1 + i%100)}})
		p.Scope, p.Name.Namespace = mesh.ScopeNamespace, fmt.Sprint("ns", i%100)
		b.PutPolicy(p)
	}
	var pods []Pod
	for i := range 110 {
		p := Pod{UID: fmt.Sprint("uid", i), Workload: fmt.Sprint("w", i), Addrs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 200, 0, byte(i)}), netip.MustParseAddr(fmt.Sprintf("fd00::%x", i+1))},
			Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: fmt.Sprint("ns", i%20), ServiceAccount: fmt.Sprint("sa", i)}}
		b.PutWorkload(&mesh.Workload{UID: p.Workload, Name: p.UID, Namespace: p.Identity.Namespace, Addrs: p.Addrs, Identity: p.Identity,
			Tunnel: mesh.TunnelHBONE, Healthy: true})
		pods = append(pods, p)
	}
	return b.Commit(1), pods
}

// Pods under the same policies share their ruleset, and each ruleset knows each identity of the node.
func TestDesiredRules(t *testing.T) {
	if testing.Short() {
		t.Skip("computes only: the same on every kernel")
	}
	s, pods := crowd()
	r := newCompiler(s, nil).desired(pods, true)
	if len(r.problems) > 0 || len(r.sets) != 20 || len(r.pods) != 110 || len(r.identities) != 110 {
		t.Fatalf("%d rulesets, %d pods, %d identities; problems: %v", len(r.sets), len(r.pods), len(r.identities), r.problems)
	}
	for _, set := range r.sets {
		if len(set.compiled.Terms) != 200 || set.head.Words != 4 || len(set.identities) != 111 || len(set.sources) != 102 {
			t.Fatalf("%d terms in %d words, %d identities, %d prefixes", len(set.compiled.Terms), set.head.Words, len(set.identities), len(set.sources))
		}
	}
	again := newCompiler(s, nil).desired(pods, true)
	for uid, p := range r.pods {
		if again.pods[uid] != p || p.v4 == 0 || p.v4 != p.v6 {
			t.Fatalf("%s: %+v, then %+v", uid, p, again.pods[uid])
		}
	}
}

// What is not certain is left to the agent.
func TestDesiredLeavesDoubtToTheAgent(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	fine := mesh.Workload{UID: "w", Namespace: "shop", Addrs: []netip.Addr{a}, Identity: id, Tunnel: mesh.TunnelHBONE}
	for _, c := range []struct {
		name   string
		change func(w *mesh.Workload, p *Pod)
		v4     bool
		pods   bool // connections of other pods are decided
	}{
		{"nothing", func(*mesh.Workload, *Pod) {}, true, true},
		{"another's identity", func(w *mesh.Workload, _ *Pod) { w.Identity.ServiceAccount = "x" }, false, false},
		{"another address", func(w *mesh.Workload, _ *Pod) { w.Addrs = []netip.Addr{b} }, false, true},
		{"not known", func(_ *mesh.Workload, p *Pod) { p.Workload = "other" }, false, false},
		{"not captured", func(w *mesh.Workload, _ *Pod) { w.Tunnel = mesh.TunnelNone }, false, false},
		{"a tunnel of its own", func(w *mesh.Workload, _ *Pod) { w.NativeTunnel = true }, false, false},
		{"a waypoint", func(w *mesh.Workload, _ *Pod) { w.Waypoint = &mesh.Gateway{} }, true, false},
		{"PROXY protocol", func(w *mesh.Workload, _ *Pod) { w.AppTunnel.Proxy = true }, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, p := fine, Pod{UID: "p", Workload: "w", Identity: id, Addrs: []netip.Addr{a}}
			c.change(&w, &p)
			m := mesh.NewBuilder(nil)
			m.PutWorkload(&w)
			got := newCompiler(m.Commit(1), nil).desired([]Pod{p}, true).pods["p"]
			if (got.v4 != 0) != c.v4 || (got.flags != 0) != c.pods || got.identity != idOf(id) {
				t.Errorf("%+v", got)
			}
		})
	}
}

// A service at the pod's own address is the agent's to choose for.
func TestDesiredServiceAtThePodsAddress(t *testing.T) {
	a := netip.MustParseAddr("10.0.0.1")
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	m := mesh.NewBuilder(nil)
	m.PutWorkload(&mesh.Workload{UID: "w", Namespace: "shop", Addrs: []netip.Addr{a}, Identity: id, Tunnel: mesh.TunnelHBONE})
	m.PutService(&mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Hostname: "x"}, VIPs: []mesh.NetAddr{{Addr: a}}})
	if got := newCompiler(m.Commit(1), nil).desired([]Pod{{UID: "p", Workload: "w", Identity: id, Addrs: []netip.Addr{a}}}, true).pods["p"]; got.flags != 0 {
		t.Errorf("%+v", got)
	}
}

// What happens to other nodes' pods leaves the kernel's policies alone; what they depend on does not.
func TestUnaffected(t *testing.T) {
	if testing.Short() {
		t.Skip("computes only: the same on every kernel")
	}
	s, pods := crowd()
	d := &Datapath{given: map[string]Pod{}}
	for _, p := range pods {
		d.given[p.UID] = p
	}
	change := func(f func(b *mesh.Builder)) *mesh.Snapshot {
		b := mesh.NewBuilder(s)
		f(b)
		return b.Commit(2)
	}
	moved := *s.Workload("w1")
	moved.Policies = []mesh.PolicyName{{Namespace: "x", Name: "y"}}
	for _, c := range []struct {
		what string
		to   *mesh.Snapshot
		want bool
	}{
		{"nothing", change(func(*mesh.Builder) {}), true},
		{"another node's pod", change(func(b *mesh.Builder) { b.PutWorkload(&mesh.Workload{UID: "elsewhere"}) }), true},
		{"a pod of this node", change(func(b *mesh.Builder) { b.PutWorkload(&moved) }), false},
		{"a pod of this node is gone", change(func(b *mesh.Builder) { b.DeleteWorkload("w1") }), false},
		{"a policy", change(func(b *mesh.Builder) { b.PutPolicy(rule(mesh.Deny, "new")) }), false},
		{"a service", change(func(b *mesh.Builder) { b.PutService(&mesh.Service{Name: mesh.ServiceName{Hostname: "x"}}) }), false},
		{"the configuration", change(func(b *mesh.Builder) { b.SetConfig(mesh.Config{SameNode: mesh.SameNodeEncrypt}) }), false},
	} {
		if got := d.unaffected(s, c.to); got != c.want {
			t.Errorf("%s: unaffected %v, want %v", c.what, got, c.want)
		}
	}
}

func BenchmarkDesired(b *testing.B) {
	s, pods := crowd()
	b.Run("at first", func(b *testing.B) {
		for b.Loop() {
			newCompiler(s, nil).desired(pods, true)
		}
	})
	before := newCompiler(s, nil).desired(pods, true).sets
	b.Run("again", func(b *testing.B) {
		for b.Loop() {
			newCompiler(s, before).desired(pods, true)
		}
	})
}

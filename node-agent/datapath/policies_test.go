package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

func (h *host) identity() mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: h.name}
}

func (h *host) workload(policies ...mesh.PolicyName) *mesh.Workload {
	return &mesh.Workload{UID: "cluster//Pod/shop/" + h.name, Name: h.name, Namespace: "shop", Addrs: []netip.Addr{h.v4, h.v6},
		Identity: h.identity(), Tunnel: mesh.TunnelHBONE, Policies: policies, Healthy: true}
}

// snapshot is a mesh of both pods in which policies apply to the catalog.
func (l *lab) snapshot(mode mesh.SameNode, policies ...*mesh.Policy) *mesh.Snapshot {
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local", SameNode: mode})
	var bound []mesh.PolicyName
	for _, p := range policies {
		b.PutPolicy(p)
		if p.Scope == mesh.ScopeWorkload {
			bound = append(bound, p.Name)
		}
	}
	b.PutWorkload(l.ui.workload())
	b.PutWorkload(l.cat.workload(bound...))
	return b.Commit(1)
}

func (l *lab) setPolicies(mode mesh.SameNode, policies ...*mesh.Policy) *mesh.Snapshot {
	l.t.Helper()
	s := l.snapshot(mode, policies...)
	check(l.t, l.dp.SetPolicies(s))
	return s
}

func rule(action mesh.Action, name string, matches ...mesh.Match) *mesh.Policy {
	return &mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: name}, Scope: mesh.ScopeWorkload, Action: action,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: matches}}}}}
}

func account(name string) mesh.Match {
	return mesh.Match{ServiceAccounts: []mesh.ServiceAccountMatch{{Namespace: "shop", ServiceAccount: name}}}
}

var strictRule = rule(mesh.Deny, "strict", mesh.Match{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}})

// Between two pods of a node, the kernel's verdict at connect: direct, to the agent, or refused.
func TestSameNode(t *testing.T) {
	l := enrolled(t)
	for _, c := range []struct {
		name     string
		mode     mesh.SameNode
		policies []*mesh.Policy
		want     string // the counter
	}{
		{"nothing is said", mesh.SameNodeKernel, nil, "connect_direct"},
		{"auto", mesh.SameNodeAuto, nil, "connect_direct"},
		{"encrypt", mesh.SameNodeEncrypt, nil, "connect_captured"},
		{"STRICT, auto", mesh.SameNodeAuto, []*mesh.Policy{strictRule}, "connect_captured"},
		{"STRICT, kernel", mesh.SameNodeKernel, []*mesh.Policy{strictRule}, "connect_direct"},
		{"allowed by account", mesh.SameNodeAuto, []*mesh.Policy{rule(mesh.Allow, "a", account("ui"))}, "connect_direct"},
		{"another account", mesh.SameNodeAuto, []*mesh.Policy{rule(mesh.Allow, "a", account("x"))}, "connect_denied"},
		{"another account, encrypt", mesh.SameNodeEncrypt, []*mesh.Policy{rule(mesh.Allow, "a", account("x"))}, "connect_denied"},
		{"denied by account", mesh.SameNodeAuto, []*mesh.Policy{rule(mesh.Deny, "d", account("ui"))}, "connect_denied"},
		{"denied by port", mesh.SameNodeAuto, []*mesh.Policy{rule(mesh.Deny, "d", mesh.Match{DestinationPorts: []uint16{appPort}})}, "connect_denied"},
		{"denied by another port", mesh.SameNodeAuto, []*mesh.Policy{rule(mesh.Deny, "d", mesh.Match{DestinationPorts: []uint16{9}})}, "connect_direct"},
		{"denied by address", mesh.SameNodeAuto, []*mesh.Policy{rule(mesh.Deny, "d", mesh.Match{SourceIPs: []netip.Prefix{
			netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("fd77::/64")}})}, "connect_denied"},
		{"a policy that is missing", mesh.SameNodeAuto, nil, "connect_denied"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			s := l.snapshot(c.mode, c.policies...)
			if c.name == "a policy that is missing" {
				b := mesh.NewBuilder(s)
				b.PutWorkload(l.cat.workload(mesh.PolicyName{Namespace: "shop", Name: "gone"}))
				s = b.Commit(2)
			}
			check(t, l.dp.SetPolicies(s))
			for _, dst := range l.cat.addrs(appPort) {
				l.counted(map[string]int{c.want: 1, "guard_drop_direct": 0, "decide_unknown": 0}, func() {
					conn, err := l.ui.dial(dst)
					if c.want == "connect_denied" {
						if !errors.Is(err, unix.ECONNREFUSED) {
							t.Errorf("%v, want a refusal", err)
						}
						return
					}
					check(t, err)
					defer conn.Close()
					if local, remote, err := seen(conn); err != nil || local != dst || remote != addrOf(conn.LocalAddr()) {
						t.Errorf("server sees %s and itself as %s (%v), want %s and %s", remote, local, err, addrOf(conn.LocalAddr()), dst)
					}
				})
			}
		})
	}
}

// Plaintext from outside is refused by the kernel where policy says so; what it allows goes on to the agent.
func TestPlaintextVerdict(t *testing.T) {
	l := enrolled(t)
	for _, c := range []struct {
		name   string
		policy *mesh.Policy
		denied bool
	}{
		{"STRICT", strictRule, true},
		{"an account is asked for", rule(mesh.Allow, "a", account("ui")), true},
		{"its address may", rule(mesh.Allow, "a", mesh.Match{SourceIPs: []netip.Prefix{
			netip.MustParsePrefix("10.88.0.2/32"), netip.MustParsePrefix("fd88::/16")}}), false},
		{"another address may", rule(mesh.Allow, "a", mesh.Match{SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.88.0.3/32")}}), true},
		{"a mapped address may, which nobody has", rule(mesh.Allow, "a", mesh.Match{SourceIPs: []netip.Prefix{
			netip.MustParsePrefix("::ffff:10.88.0.2/128")}}), true},
		{"every other address may not", rule(mesh.Deny, "a", mesh.Match{NotSourceIPs: []netip.Prefix{
			netip.MustParsePrefix("10.88.0.2/32"), netip.MustParsePrefix("fd88::2/128")}}), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			l.setPolicies(mesh.SameNodeAuto, c.policy)
			for _, dst := range l.cat.addrs(appPort) {
				want := map[string]int{"lookup_inbound": -1, "lookup_denied": 0}
				if c.denied {
					want = map[string]int{"lookup_inbound": 0, "lookup_denied": 1}
				}
				l.counted(want, func() {
					conn, err := l.outside.dial(dst)
					if c.denied {
						if !errors.Is(err, unix.ECONNREFUSED) {
							t.Errorf("%v, want a refusal", err)
						}
						return
					}
					check(t, err)
					_, _, err = seen(conn)
					check(t, err)
					conn.Close()
				})
				// kubelet is not asked for an identity.
				conn, err := l.dialFromNode(dst)
				check(t, err)
				conn.Close()
			}
		})
	}
}

// What the kernel decides by itself, it tells the agent of.
func TestEvents(t *testing.T) {
	l := enrolled(t)
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan Event, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e, err := range l.dp.Events(ctx) {
			if err != nil {
				t.Error(err)
				return
			}
			events <- e
		}
	}()
	defer func() { cancel(); <-done }()
	next := func() Event {
		t.Helper()
		select {
		case e := <-events:
			return e
		case <-time.After(plenty):
			t.Fatal("no event")
			return Event{}
		}
	}
	l.setPolicies(mesh.SameNodeAuto)
	dst := l.cat.addrs(appPort)[0]
	conn, err := l.ui.dial(dst)
	check(t, err)
	local, _, err := seen(conn)
	check(t, err)
	start := time.Now()
	echoes(t, conn)
	me := addrOf(conn.LocalAddr())
	check(t, conn.CloseWrite())
	io.Copy(io.Discard, conn)
	conn.Close()
	opened, closed := next(), next()
	for _, e := range []Event{opened, closed} {
		if e.Client != me || e.Server != dst || e.ClientPod != "uid-ui" || e.ServerPod != "uid-catalog" || e.Source != l.ui.identity() {
			t.Errorf("%+v", e)
		}
	}
	greeting := uint64(len(local.String()) + 1 + len(me.String()) + 1)
	if opened.Kind != Opened || closed.Kind != Closed || closed.Sent != 4 || closed.Received != 4+greeting ||
		!closed.Opened.Before(closed.Time) || closed.Time.Sub(start).Abs() > plenty {
		t.Errorf("%+v\n%+v, want 4 bytes sent and %d received", opened, closed, 4+greeting)
	}

	denial := rule(mesh.Deny, "no-ui", account("ui"))
	l.setPolicies(mesh.SameNodeAuto, rule(mesh.Allow, "all", mesh.Match{DestinationPorts: []uint16{appPort}}), denial)
	if _, err := l.ui.dial(dst); !errors.Is(err, unix.ECONNREFUSED) {
		t.Error(err)
	}
	if e := next(); e.Kind != Denied || e.Verdict.By != denial.Name || e.Verdict.Why != mesh.WhyDenied || e.ClientPod != "uid-ui" ||
		e.Server != dst || e.Client.Addr() != l.ui.v4 || e.Source != l.ui.identity() {
		t.Errorf("%+v", e)
	}
	l.setPolicies(mesh.SameNodeAuto, rule(mesh.Allow, "ui", account("ui")))
	if _, err := l.outside.dial(dst); !errors.Is(err, unix.ECONNREFUSED) {
		t.Error(err)
	}
	if e := next(); e.Kind != Denied || e.Verdict.By != (mesh.PolicyName{}) || e.Verdict.Why != mesh.WhyNoAllow || e.ClientPod != "" ||
		e.ServerPod != "uid-catalog" || e.Client.Addr() != l.outside.v4 || !e.Source.IsZero() {
		t.Errorf("%+v", e)
	}
	fd := l.ui.deferred(dst) // allowed, and denied before its SYN
	l.setPolicies(mesh.SameNodeAuto, denial)
	check(t, unix.SetNonblock(fd, true))
	unix.Write(fd, []byte("x"))
	if e := next(); e.Kind != Denied || e.Verdict.By != denial.Name || e.ClientPod != "uid-ui" || e.Client.Port() == 0 || e.Source != l.ui.identity() {
		t.Errorf("%+v", e)
	}
}

// An open direct connection that a new policy denies is reset; the others go on.
func TestDirectConnectionsAreRechecked(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto)
	for _, dst := range l.cat.addrs(appPort) {
		l.setPolicies(mesh.SameNodeAuto)
		conn, err := l.ui.dial(dst)
		check(t, err)
		defer conn.Close()
		_, _, err = seen(conn)
		check(t, err)
		if open := must(l.dp.directs()); len(open) != 1 || open[0].server != dst {
			t.Fatalf("%+v", open)
		}
		if me := addrOf(conn.LocalAddr()); !l.dp.IsDirect(me, dst) || l.dp.IsDirect(dst, me) {
			t.Error("the direct connection is not known for one")
		}
		l.setPolicies(mesh.SameNodeAuto, rule(mesh.Deny, "d", account("x")))
		echoes(t, conn)
		l.setPolicies(mesh.SameNodeAuto, rule(mesh.Deny, "d", account("ui")))
		conn.SetReadDeadline(time.Now().Add(plenty))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("read: %v, want a reset", err)
		}
		eventually(t, "the connection is forgotten", func() bool { return len(must(l.dp.directs())) == 0 })
	}
}

// What somebody changes in the kernel's policies is found, put back and counted.
func TestAuditRepairsPolicies(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto, rule(mesh.Allow, "a", account("ui"), mesh.Match{DestinationPorts: []uint16{9}},
		mesh.Match{SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}}))
	if _, err := l.dp.Audit(); err != nil || len(l.dp.Drift()) != 0 {
		t.Fatalf("nothing was changed: drift %v, %v", l.dp.Drift(), err)
	}
	g, slot := l.dp.gates, l.dp.pods["uid-catalog"].pod.Slot
	for _, damage := range []struct {
		drift string
		do    func() error
	}{
		{"gates", func() error { return l.dp.kernel.Gates.Delete(slot) }},
		{"gates", func() error { return l.dp.kernel.Gates.Put(slot, bpf.MeshGate{Slot: slot}) }},
		{"rulesets", func() error { return l.dp.kernel.Rulesets.Put(firstKey(g.rulesets.have), bpf.MeshRuleset{}) }},
		{"rulesets", func() error { return l.dp.kernel.Rulesets.Put(uint64(77), bpf.MeshRuleset{}) }},
		{"rules_identities", func() error {
			return l.dp.kernel.RulesIdentities.Put(firstKey(g.identities.have), bpf.MeshWords{W: [8]uint64{0xff}})
		}},
		{"rules_ports", func() error { return l.dp.kernel.RulesPorts.Delete(firstKey(g.ports.have)) }},
		{"rules_sources", func() error { return l.dp.kernel.RulesSources.Delete(firstKey(g.sources.have)) }},
		{"identities", func() error {
			r := l.dp.pods["uid-ui"]
			r.pod.Identity++
			return l.dp.kernel.Pods.Put(r.cookie, r.pod)
		}},
		{"destinations", func() error { return l.dp.kernel.Destinations.Delete(kernelAddr(vip4)) }},
		{"destinations", func() error { return l.dp.kernel.Destinations.Put(kernelAddr(l.outside.v4), uint32(1)) }},
	} {
		before := l.dp.Drift()[damage.drift]
		check(t, damage.do())
		_, err := l.dp.Audit()
		check(t, err)
		if n := l.dp.Drift()[damage.drift] - before; n != 1 {
			t.Errorf("%s: drift rose by %d, want 1 (%v)", damage.drift, n, l.dp.Drift())
		}
		l.counted(map[string]int{"connect_direct": 1, "connect_captured": 1, "connect_vouched": 1, "decide_unknown": 0}, func() {
			for _, dst := range []netip.AddrPort{l.cat.addrs(appPort)[0], netip.AddrPortFrom(vip4, servicePort), l.outside.addrs(appPort)[0]} {
				conn, err := l.ui.dial(dst)
				check(t, err)
				conn.Close()
			}
		})
		if _, err := l.outside.dial(l.cat.addrs(appPort)[0]); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: plaintext: %v, want a refusal", damage.drift, err)
		}
	}
}

func firstKey[K comparable, V any](m map[K]V) K {
	for k := range m {
		return k
	}
	panic("empty")
}

// A successor takes the policies over as they are, and decides by its own Snapshot as soon as it has one.
func TestPoliciesOutliveTheProcess(t *testing.T) {
	l := enrolled(t)
	denied := []*mesh.Policy{rule(mesh.Deny, "d", account("ui"))}
	l.setPolicies(mesh.SameNodeAuto, denied...)
	refused := func(when string) {
		t.Helper()
		l.counted(map[string]int{"connect_denied": 1}, func() {
			if _, err := l.ui.dial(l.cat.addrs(appPort)[0]); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v", when, err)
			}
		})
	}
	l.up.Lock()
	check(t, l.dp.Close())
	l.open()
	l.up.Unlock()
	refused("without an agent's word")
	gates := must(l.dp.gates.gates.read())
	check(t, l.dp.Enroll(l.ui.pod()))
	check(t, l.dp.Enroll(l.cat.pod()))
	l.setPolicies(mesh.SameNodeAuto, denied...)
	refused("by the same policies")
	if now := must(l.dp.gates.gates.read()); len(gates) != 2 || !maps.Equal(now, gates) {
		t.Errorf("the successor has other gates: %v, %v", now, gates)
	}
	// A pod that this process does not know is left to the agent.
	l.up.Lock()
	check(t, l.dp.Close())
	l.open()
	l.up.Unlock()
	l.setPolicies(mesh.SameNodeAuto)
	l.counted(map[string]int{"connect_captured": 1}, func() {
		conn, err := l.ui.dial(l.cat.addrs(appPort)[0])
		check(t, err)
		conn.Close()
	})
}

// Rows that no gate needs any more go, and not before the programs that may still read them.
func TestOldRulesetsAreSwept(t *testing.T) {
	l := enrolled(t)
	for i := range 20 {
		l.setPolicies(mesh.SameNodeAuto, rule(mesh.Deny, "d", mesh.Match{DestinationPorts: []uint16{uint16(100 + i)}}))
	}
	if n := len(must(l.dp.gates.rulesets.read())); n < 20 {
		t.Errorf("%d rulesets are there within the grace, want 20 and more", n)
	}
	check(t, l.dp.gates.sweep(time.Now().Add(2*grace)))
	if n := len(must(l.dp.gates.rulesets.read())); n != 2 { // the catalog's and the ui's
		t.Errorf("%d rulesets are left, want 2", n)
	}
	if n := len(must(l.dp.gates.ports.read())); n != 2 {
		t.Errorf("%d rows of ports are left, want 2", n)
	}
}

// A pod's slot is given to another: nothing of the first one's policies is.
func TestReleaseClosesTheGate(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto, rule(mesh.Deny, "d", account("ui")))
	slot := l.dp.pods["uid-catalog"].pod.Slot
	check(t, l.dp.Release("uid-catalog"))
	if _, there := must(l.dp.gates.gates.read())[slot]; there {
		t.Error("the gate is still there")
	}
	check(t, l.dp.SetPolicies(l.snapshot(mesh.SameNodeAuto)))
	if _, there := must(l.dp.gates.gates.read())[slot]; there {
		t.Error("the gate came back")
	}
}

// Policies that the kernel does not take are the agent's to decide: nothing is let by.
func TestTooManyPoliciesAreLeftToTheAgent(t *testing.T) {
	l := enrolled(t)
	var many []mesh.Match
	for i := range mesh.MaxTerms + 1 {
		many = append(many, account(fmt.Sprint("x", i)))
	}
	l.setPolicies(mesh.SameNodeKernel, rule(mesh.Deny, "d", many...))
	l.counted(map[string]int{"connect_captured": 1, "lookup_inbound": -1}, func() {
		for _, from := range []*host{l.ui, l.outside} {
			conn, err := from.dial(l.cat.addrs(appPort)[0])
			check(t, err)
			conn.Close()
		}
	})
}

package datapath

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

var cases = flag.Int("cases", 5000, "random connections that TestPolicyDifferential makes")

// dice draws random policies over few names, addresses and ports, so that they often match.
type dice struct{ *rand.Rand }

func pick[T any](d dice, from ...T) T { return from[d.IntN(len(from))] }

func some[T any](d dice, likely float64, from ...T) (out []T) {
	if d.Float64() > likely {
		return nil
	}
	for range 1 + d.IntN(2) {
		out = append(out, pick(d, from...))
	}
	return out
}

var (
	diceIdentities = []mesh.Identity{
		{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"},
		{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "cart"},
		{TrustDomain: "cluster.local", Namespace: "other", ServiceAccount: "ui"},
		{TrustDomain: "cluster.local", Namespace: "shop-two", ServiceAccount: "x"},
		{TrustDomain: "old.domain", Namespace: "shop", ServiceAccount: "ui"},
	}
	diceNamespaces = []mesh.StringMatch{{Value: "shop"}, {Value: "other"}, {Kind: mesh.MatchPrefix, Value: "shop"},
		{Kind: mesh.MatchSuffix, Value: "two"}, {Kind: mesh.MatchPresence}, {Value: ""}, {Kind: mesh.MatchPrefix, Value: ""}}
	dicePrincipals = []mesh.StringMatch{{Value: "cluster.local/ns/shop/sa/ui"}, {Value: "cluster.local/ns/shop/sa/cart"},
		{Kind: mesh.MatchPrefix, Value: "cluster.local/ns/shop"}, {Kind: mesh.MatchSuffix, Value: "/sa/ui"},
		{Kind: mesh.MatchPresence}, {Kind: mesh.MatchPrefix, Value: "old"}}
	diceAccounts = []mesh.ServiceAccountMatch{{Namespace: "shop", ServiceAccount: "ui"}, {Namespace: "shop", ServiceAccount: "cart"},
		{Namespace: "other", ServiceAccount: "ui"}, {Namespace: "nobody", ServiceAccount: "x"}}
	diceSources = prefixes("10.77.0.2/32", "10.77.0.0/24", "10.64.0.0/10", "10.88.0.2/32", "10.88.0.2/31", "10.88.0.4/30", "10.88.0.0/16", "0.0.0.0/0",
		"fd77::2/128", "fd77::/64", "fd88::2/127", "fd88::/16", "fc00::/7", "::/0", "::ffff:10.77.0.2/128", "::ffff:10.88.0.0/112", "10.99.0.0/16", "::ffff:0:0/95")
	diceTargets = prefixes("10.77.0.3/32", "10.77.0.0/24", "fd77::3/128", "fd77::/16", "0.0.0.0/0", "::/0", "10.99.0.0/16")
	dicePorts   = []uint16{80, 81, 8080, 9}
)

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func (d dice) match() mesh.Match {
	const seldom = 0.15
	return mesh.Match{
		Namespaces: some(d, seldom, diceNamespaces...), NotNamespaces: some(d, seldom, diceNamespaces...),
		Principals: some(d, seldom, dicePrincipals...), NotPrincipals: some(d, seldom, dicePrincipals...),
		ServiceAccounts: some(d, seldom, diceAccounts...), NotServiceAccounts: some(d, seldom, diceAccounts...),
		SourceIPs: some(d, seldom, diceSources...), NotSourceIPs: some(d, seldom, diceSources...),
		DestinationIPs: some(d, seldom/2, diceTargets...), NotDestinationIPs: some(d, seldom/2, diceTargets...),
		DestinationPorts: some(d, seldom, dicePorts...), NotDestinationPorts: some(d, seldom, dicePorts...),
	}
}

func (d dice) policy(i int) *mesh.Policy {
	p := &mesh.Policy{Name: mesh.PolicyName{Namespace: pick(d, "shop", "shop", "other"), Name: fmt.Sprint("p", i)},
		Scope: pick(d, mesh.ScopeMesh, mesh.ScopeNamespace, mesh.ScopeWorkload), Action: pick(d, mesh.Allow, mesh.Allow, mesh.Deny, mesh.Deny, mesh.Audit),
		DryRun: d.IntN(8) == 0}
	if p.Scope == mesh.ScopeMesh && d.IntN(2) == 0 {
		p.Scope = mesh.ScopeNamespace
	}
	for range d.IntN(3) {
		var r mesh.Rule
		for range d.IntN(4) {
			var c mesh.Clause
			for range d.IntN(4) {
				c.Matches = append(c.Matches, d.match())
			}
			r.Clauses = append(r.Clauses, c)
		}
		p.Rules = append(p.Rules, r)
	}
	return p
}

// reference is the meaning of policies, written down without regard to anything else.
func reference(s *mesh.Snapshot, w *mesh.Workload, id mesh.Identity, src netip.Addr, dst netip.AddrPort) bool {
	str := func(m mesh.StringMatch, v string) bool {
		switch m.Kind {
		case mesh.MatchExact:
			return v == m.Value
		case mesh.MatchPrefix:
			return strings.HasPrefix(v, m.Value)
		case mesh.MatchSuffix:
			return strings.HasSuffix(v, m.Value)
		}
		return v != ""
	}
	known := id != mesh.Identity{}
	namespace := func(m mesh.StringMatch) bool { return str(m, id.Namespace) }
	principal := func(m mesh.StringMatch) bool { return known && str(m, id.Principal()) }
	account := func(m mesh.ServiceAccountMatch) bool {
		return known && m.Namespace == id.Namespace && m.ServiceAccount == id.ServiceAccount
	}
	from := func(p netip.Prefix) bool { return p.Contains(src) }
	to := func(p netip.Prefix) bool { return p.Contains(dst.Addr()) }
	port := func(p uint16) bool { return p == dst.Port() }
	matches := func(m mesh.Match) bool {
		said := false
		ok := fits(&said, m.Namespaces, m.NotNamespaces, namespace)
		ok = fits(&said, m.Principals, m.NotPrincipals, principal) && ok
		ok = fits(&said, m.ServiceAccounts, m.NotServiceAccounts, account) && ok
		ok = fits(&said, m.SourceIPs, m.NotSourceIPs, from) && ok
		ok = fits(&said, m.DestinationIPs, m.NotDestinationIPs, to) && ok
		ok = fits(&said, m.DestinationPorts, m.NotDestinationPorts, port) && ok
		return ok && said
	}
	closed, open := false, false
	for p := range s.Policies() {
		switch {
		case p.Action == mesh.Audit, p.DryRun,
			p.Scope == mesh.ScopeNamespace && p.Name.Namespace != w.Namespace,
			p.Scope == mesh.ScopeWorkload && !slices.Contains(w.Policies, p.Name):
			continue
		}
		hit := slices.ContainsFunc(p.Rules, func(r mesh.Rule) bool {
			for _, c := range r.Clauses {
				if len(c.Matches) > 0 && !slices.ContainsFunc(c.Matches, matches) {
					return false
				}
			}
			return true
		})
		if p.Action == mesh.Deny && hit {
			return false
		}
		closed = closed || p.Action == mesh.Allow
		open = open || p.Action == mesh.Allow && hit
	}
	return open || !closed
}

func fits[T any](said *bool, is, not []T, hit func(T) bool) bool {
	*said = *said || len(is)+len(not) > 0
	return (len(is) == 0 || slices.ContainsFunc(is, hit)) && !slices.ContainsFunc(not, hit)
}

// try connects without waiting: a refusal by the connect hook is known at once. An answer from the network is waited
// for, and the connection then ended hard.
func try(src netip.Addr, dst netip.AddrPort, wait bool) (refused bool, err error) {
	family := unix.AF_INET
	if dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return false, err
	}
	if src.IsValid() {
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 0))); err != nil {
			return false, err
		}
	}
	err = unix.Connect(fd, sockaddr(dst))
	if wait || errors.Is(err, unix.EINTR) {
		err = connected(fd, err)
	}
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return true, nil
	case err == nil, errors.Is(err, unix.EINPROGRESS):
		return false, nil
	}
	return false, err
}

// Random policies, by real connect() calls and arriving SYNs: what the kernel says is what the compiled form says, what
// Authorize says to the agent, and what the reference says.
func TestPolicyDifferential(t *testing.T) {
	l := newLab(t)
	for _, p := range dicePorts {
		l.cat.drain(p)
	}
	l.ui.enroll()
	l.cat.enroll()
	check(t, l.dp.SetDestinations(l.destinations()))
	outside := l.outside.spread(t, "10.88.0.3", "10.88.0.4", "10.88.0.9", "fd88::3", "fd88::9")
	for i, id := range diceIdentities { // pods that are only there to have the identities known
		uid := fmt.Sprint("identity", i)
		l.dp.given[uid] = Pod{UID: uid, Identity: id}
	}

	limit := *cases
	if testing.Short() {
		limit = min(limit, 1000)
	}
	seed := uint64(time.Now().UnixNano())
	d := dice{rand.New(rand.NewPCG(seed, 0))}
	done, wrong, denied, snapshots := 0, 0, 0, 0
	for ; done < limit && wrong < 10; snapshots++ {
		w, s := d.policies(l, mesh.Config{TrustDomain: "cluster.local", SameNode: mesh.SameNodeKernel})

		compiled := map[netip.Addr]*mesh.Compiled{}
		for _, a := range w.Addrs {
			compiled[a] = must(s.Compile(w.UID, a))
		}

		compare := func(refused bool, id mesh.Identity, src netip.Addr, dst netip.AddrPort) {
			done++
			if refused {
				denied++
			}
			kernel := !refused
			inCompiled := compiled[dst.Addr()].Decide(id, src, dst.Port()).Allow
			inAgent := s.Authorize(mesh.Conn{Source: id, SourceIP: src, Dst: dst, DstWorkload: w}).Allow
			if ref := reference(s, w, id, src, dst); kernel != ref || inCompiled != ref || inAgent != ref {
				if wrong++; wrong == 1 {
					for p := range s.Policies() {
						t.Logf("%+v", *p)
					}
				}
				t.Errorf("seed %d, snapshot %d: %q from %s to %s: allowed by the kernel %v, compiled %v, Authorize %v, the reference %v",
					seed, snapshots, id, src, dst, kernel, inCompiled, inAgent, ref)
			}
		}
		before := must(l.dp.Counters())
		start := done
		check(t, l.ui.as(func() error {
			for _, id := range diceIdentities {
				if err := l.dp.setIdentity("uid-ui", l.dp.pods["uid-ui"], idOf(id)); err != nil {
					return err
				}
				for _, port := range dicePorts {
					for i, a := range []netip.Addr{l.cat.v4, l.cat.v6} {
						dst := netip.AddrPortFrom(a, port)
						refused, err := try(netip.Addr{}, dst, false)
						if err != nil {
							return fmt.Errorf("connect to %s: %w", dst, err)
						}
						compare(refused, id, []netip.Addr{l.ui.v4, l.ui.v6}[i], dst)
					}
				}
			}
			return nil
		}))
		after := must(l.dp.Counters())
		if n := int(after["connect_direct"] + after["connect_denied"] - before["connect_direct"] - before["connect_denied"]); n != done-start {
			t.Fatalf("the kernel decided %d of %d connections itself: %d unknown, %d captured", n, done-start,
				after["decide_unknown"]-before["decide_unknown"], after["connect_captured"]-before["connect_captured"])
		}
		if snapshots%4 != 0 { // these cost ten times as much
			continue
		}
		check(t, l.outside.as(func() error {
			for _, src := range outside {
				dst := netip.AddrPortFrom(l.cat.v4, pick(d, dicePorts...))
				if src.Is6() {
					dst = netip.AddrPortFrom(l.cat.v6, dst.Port())
				}
				refused, err := try(src, dst, true)
				if err != nil {
					return fmt.Errorf("from %s to %s: %w", src, dst, err)
				}
				compare(refused, mesh.Identity{}, src, dst)
			}
			return nil
		}))
	}
	if done == 0 || denied == 0 || denied == done {
		t.Errorf("%d of %d were denied: that compares nothing", denied, done)
	}
	t.Logf("%d connections, %d denied, under %d random sets of policies", done, denied, snapshots)
	if err := results.Record("policy-differential", results.Row{Name: "policy-differential", Inputs: done, Failures: wrong,
		Figure: float64(wrong), Unit: "disagreements of the kernel, the compiled form, the agent and the reference"}); err != nil {
		t.Error(err)
	}
}

// policies puts random policies in force on lab l, and returns the workload that they are about.
func (d dice) policies(l *lab, cfg mesh.Config) (*mesh.Workload, *mesh.Snapshot) {
	l.t.Helper()
	b := mesh.NewBuilder(nil)
	b.SetConfig(cfg)
	var bound []mesh.PolicyName
	for i := range d.IntN(7) {
		p := d.policy(i)
		b.PutPolicy(p)
		if p.Scope == mesh.ScopeWorkload && d.IntN(4) > 0 {
			bound = append(bound, p.Name)
		}
	}
	w := l.cat.workload(bound...)
	b.PutWorkload(w)
	b.PutWorkload(l.ui.workload())
	s := b.Commit(1)
	check(l.t, l.dp.SetPolicies(s))
	return w, s
}

// drain accepts and closes.
func (h *host) drain(port uint16) {
	h.lab.t.Helper()
	var ln net.Listener
	check(h.lab.t, h.as(func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}))
	h.lab.t.Cleanup(func() { ln.Close() })
	h.lab.agents.Add(1)
	go func() {
		defer h.lab.agents.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

// spread gives the host more addresses and returns all that it has.
func (h *host) spread(t *testing.T, more ...string) []netip.Addr {
	t.Helper()
	all := []netip.Addr{h.v4, h.v6}
	for _, m := range more {
		all = append(all, netip.MustParseAddr(m))
	}
	check(t, h.ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range all[2:] {
			if err := addAddr(l, a); err != nil {
				return err
			}
		}
		return nil
	}))
	check(t, h.lab.node.Do(func() error {
		for _, a := range all[2:] {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: h.nodeIndex, Dst: hostNet(a), Scope: netlink.SCOPE_LINK}); err != nil {
				return err
			}
		}
		return nil
	}))
	return all
}

// What a verdict costs at connect, with 10,000 policies in the mesh: the kernel's own count of the time in the hook, for
// connections that are refused, so that nothing else is in it.
func TestKernelVerdictCost(t *testing.T) {
	l := enrolled(t)
	policies, connects := 10000, 20000
	if testing.Short() {
		policies, connects = 1000, 2000
	}
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local", SameNode: mesh.SameNodeAuto})
	var bound []mesh.PolicyName
	for i := range policies {
		p := rule(mesh.Allow, fmt.Sprint("p", i), account(fmt.Sprint("sa", i)), mesh.Match{
			SourceIPs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)}, DestinationPorts: []uint16{uint16(1 + i%1000)}})
		switch {
		case i%100 == 0: // 100 of them apply to the server
			bound = append(bound, p.Name)
		default:
			p.Scope, p.Name.Namespace = mesh.ScopeNamespace, fmt.Sprint("ns", i%500)
		}
		b.PutPolicy(p)
	}
	b.PutWorkload(l.ui.workload())
	b.PutWorkload(l.cat.workload(bound...))
	check(t, l.dp.SetPolicies(b.Commit(1)))
	set := l.dp.gates.wanted.sets[l.dp.gates.wanted.pods["uid-catalog"].v4]
	if set == nil || len(set.compiled.Terms) != 2*len(bound) {
		t.Fatal("the policies are not in the kernel")
	}

	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("this kernel does not count")
	}
	check(t, err)
	defer stats.Close()
	measure := func(n int) (ns float64) {
		before, err := l.dp.kernel.MeshConnect4.Stats()
		check(t, err)
		check(t, l.ui.as(func() error {
			for range n {
				if refused, err := try(netip.Addr{}, l.cat.addrs(appPort)[0], false); err != nil || !refused {
					return fmt.Errorf("refused %v, %w", refused, err)
				}
			}
			return nil
		}))
		after, err := l.dp.kernel.MeshConnect4.Stats()
		check(t, err)
		return float64(after.Runtime-before.Runtime) / float64(after.RunCount-before.RunCount)
	}
	measure(connects / 10)
	ns := measure(connects)
	t.Logf("%.0f ns at connect, all of the hook, with %d policies in the mesh, %d of them for the server", ns, policies, len(bound))
	failures := 0
	if ns > 2000 {
		failures = 1
	}
	if err := results.Record("kernel-verdict", results.Row{Name: "kernel-verdict", Inputs: connects,
		Failures: failures, Figure: ns / 1000, Unit: "µs, all of the hook at connect, 10,000 policies in the mesh"}); err != nil {
		t.Error(err)
	}
}

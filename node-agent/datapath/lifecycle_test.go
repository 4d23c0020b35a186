package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// load dials dst from a pod until it is stopped, and reports what the server saw.
type load struct {
	stop, done  chan struct{}
	made, wrong atomic.Int64
	mu          sync.Mutex
	first       error
}

func (h *host) load(dst netip.AddrPort, right func(c *net.TCPConn) error) *load {
	l := &load{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for {
			select {
			case <-l.stop:
				return
			default:
			}
			c, err := h.dial(dst)
			if err == nil {
				err = right(c)
				c.Close()
			}
			l.made.Add(1)
			if err != nil {
				l.wrong.Add(1)
				l.mu.Lock()
				if l.first == nil {
					l.first = err
				}
				l.mu.Unlock()
			}
		}
	}()
	return l
}

func (l *load) end() {
	close(l.stop)
	<-l.done
}

func clientIsSeen(c *net.TCPConn) error {
	_, remote, err := seen(c)
	if err == nil && remote != addrOf(c.LocalAddr()) {
		err = fmt.Errorf("server sees %s, want %s", remote, addrOf(c.LocalAddr()))
	}
	return err
}

// The agent is replaced again and again under load: every connection is captured and none fails.
func TestRestartOpensNoGap(t *testing.T) {
	l := enrolled(t)
	load := l.ui.load(netip.AddrPortFrom(vip4, servicePort), clientIsSeen)
	restarts := 20
	if testing.Short() {
		restarts = 5
	}
	for range restarts {
		l.up.Lock()
		check(t, l.dp.Close())
		time.Sleep(5 * time.Millisecond)
		l.open()
		l.up.Unlock()
		for _, s := range must(l.dp.Enrolled()) {
			if len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "not known to this process") {
				t.Errorf("after the restart: %+v", s)
			}
		}
		check(t, l.dp.Enroll(l.ui.pod()))
		check(t, l.dp.Enroll(l.cat.pod()))
		check(t, l.dp.SetDestinations(l.destinations()))
		time.Sleep(10 * time.Millisecond)
	}
	load.end()
	c, err := l.dp.Counters()
	check(t, err)
	if load.wrong.Load() != 0 || c["connect_captured"] != uint64(load.made.Load()) || c["connect_vouched"] != 0 {
		t.Errorf("%d of %d connections failed (first: %v), %d were captured, %d passed by", load.wrong.Load(), load.made.Load(),
			load.first, c["connect_captured"], c["connect_vouched"])
	}
	t.Logf("%d connections over %d restarts", load.made.Load(), restarts)
	for _, s := range must(l.dp.Enrolled()) {
		if !s.InForce() {
			t.Errorf("at the end: %+v", s)
		}
	}
}

// While no process has the data path open, pods stay captured.
func TestCaptureOutlivesTheProcess(t *testing.T) {
	l := enrolled(t)
	check(t, l.dp.Close())
	defer l.open()
	l.ui.closeListeners()
	if c, err := l.ui.dialWithin(patience, l.cat.addrs(appPort)[0]); err == nil {
		c.Close()
		t.Error("connected past the agent")
	}
}

func TestOnlyOneWriter(t *testing.T) {
	l := newLab(t)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if d, err := Open(ctx, l.cfg); err == nil {
		d.Close()
		t.Error("two writers")
	} else if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "another process is the writer") {
		t.Error(err)
	}
}

// After Yield a successor is the writer: the old process undoes nothing of its work, and still dials.
func TestYield(t *testing.T) {
	l := enrolled(t)
	old := l.dp
	check(t, old.Yield())
	l.open()
	defer old.Close()
	for what, err := range map[string]error{
		"enrol": old.Enroll(l.ui.pod()), "release": old.Release("uid-ui"), "set destinations": old.SetDestinations(Destinations{}),
		"prune": old.Prune(func(string) bool { return false }),
	} {
		if !errors.Is(err, ErrYielded) {
			t.Errorf("%s: %v, want %v", what, err, ErrYielded)
		}
	}
	if _, err := old.Audit(); !errors.Is(err, ErrYielded) {
		t.Errorf("audit: %v, want %v", err, ErrYielded)
	}
	c, err := polled(old.DialInbound(context.Background(), l.cat.ns, netip.AddrPortFrom(l.outside.v4, 5555), l.cat.addrs(appPort)[0]))
	check(t, err)
	c.Close()
}

// Release ends capture, and open connections do not notice.
func TestReleaseKeepsOpenConnections(t *testing.T) {
	l := enrolled(t)
	out, err := l.ui.dial(netip.AddrPortFrom(vip4, servicePort))
	check(t, err)
	in, err := l.outside.dial(l.ui.addrs(appPort)[1])
	check(t, err)
	for _, c := range []*net.TCPConn{out, in} {
		_, _, err = seen(c)
		check(t, err)
		defer c.Close()
	}
	check(t, l.dp.Release("uid-ui"))
	check(t, l.dp.Release("uid-ui"))
	for _, c := range []*net.TCPConn{out, in} {
		echoes(t, c)
	}
	// From now on it is an ordinary pod.
	l.counted(map[string]int{"connect_captured": 0, "connect_vouched": 0, "guard_drop_unvouched": 0, "lookup_inbound": 0}, func() {
		c, err := l.ui.dial(netip.AddrPortFrom(l.outside.v4, appPort))
		check(t, err)
		c.Close()
		c, err = l.outside.dial(l.ui.addrs(appPort)[0])
		check(t, err)
		check(t, clientIsSeen(c))
		c.Close()
	})
	if s := must(l.dp.Enrolled()); len(s) != 1 || s[0].UID != "uid-catalog" || !s[0].InForce() {
		t.Errorf("%+v", s)
	}
}

func echoes(t *testing.T, c *net.TCPConn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(plenty))
	b := make([]byte, 4)
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Error(err)
	} else if _, err := c.Read(b); err != nil || string(b) != "ping" {
		t.Errorf("read %q, %v", b, err)
	}
}

// Connections from before enrolment go on through it.
func TestEnrolKeepsOpenConnections(t *testing.T) {
	l := newLab(t)
	l.ui.serve(appPort)
	l.cat.serve(appPort)
	l.outside.serve(appPort)
	out, err := l.ui.dial(l.outside.addrs(appPort)[0])
	check(t, err)
	in, err := l.outside.dial(l.ui.addrs(appPort)[1])
	check(t, err)
	for _, c := range []*net.TCPConn{out, in} {
		_, _, err = seen(c)
		check(t, err)
		defer c.Close()
	}
	l.ui.enroll()
	for _, c := range []*net.TCPConn{out, in} {
		echoes(t, c)
	}
}

// Load runs through enrolment and release; nothing fails on either side of them.
func TestEnrolAndReleaseUnderLoad(t *testing.T) {
	l := newLab(t)
	l.cat.serve(appPort)
	l.cat.enroll()
	l.ui.listen()
	check(t, l.dp.SetDestinations(l.destinations()))
	load := l.ui.load(l.cat.addrs(appPort)[0], func(c *net.TCPConn) error { _, _, err := seen(c); return err })
	in := l.outside.load(l.cat.addrs(appPort)[1], func(c *net.TCPConn) error { _, _, err := seen(c); return err })
	var worst time.Duration
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		start := time.Now()
		check(t, l.dp.Enroll(l.ui.pod()))
		worst = max(worst, time.Since(start))
		time.Sleep(5 * time.Millisecond)
		check(t, l.dp.Release("uid-ui"))
	}
	load.end()
	in.end()
	if load.wrong.Load() != 0 || in.wrong.Load() != 0 {
		t.Errorf("%d of %d connections out failed (%v), %d of %d in (%v)", load.wrong.Load(), load.made.Load(), load.first,
			in.wrong.Load(), in.made.Load(), in.first)
	}
	t.Logf("%d connections; the slowest enrolment took %v", load.made.Load()+in.made.Load(), worst)
}

// A pod's address comes back at once with another pod: the old one's end does not touch the new one.
func TestAddressReuse(t *testing.T) {
	l := enrolled(t)
	old := l.dp.pods["uid-ui"]
	next := &host{lab: l, name: "next", v4: l.ui.v4, v6: l.ui.v6}
	check(t, l.node.Do(func() error {
		peer, err := netlink.LinkByIndex(l.ui.nodeIndex)
		if err != nil {
			return err
		}
		return netlink.LinkDel(peer)
	}))
	*next = *l.addHost("next", "10.77.0.2", "fd77::2")
	next.serve(appPort)
	next.enroll()
	check(t, l.dp.Release("uid-ui"))
	if l.dp.pods["uid-next"].pod.Slot == old.pod.Slot {
		t.Error("the new pod has the old one's slot while that is enrolled")
	}
	for _, s := range must(l.dp.Enrolled()) {
		if !s.InForce() {
			t.Errorf("%+v", s)
		}
	}
	c, err := l.outside.dial(next.addrs(appPort)[0])
	check(t, err)
	_, _, err = seen(c)
	check(t, err)
	c.Close()
}

// Pods that went while no agent ran are pruned; the others are not touched.
func TestPrune(t *testing.T) {
	l := enrolled(t)
	check(t, l.dp.Close())
	l.open()
	check(t, l.dp.Enroll(l.cat.pod()))
	check(t, l.dp.Prune(func(uid string) bool { return uid == "uid-catalog" }))
	if s := must(l.dp.Enrolled()); len(s) != 1 || s[0].UID != "uid-catalog" || !s[0].InForce() {
		t.Errorf("%+v", s)
	}
}

// Audit finds each piece that is taken away and puts it back.
func TestAuditRepairs(t *testing.T) {
	l := enrolled(t)
	dir := l.dp.podDir("uid-ui")
	for _, damage := range []struct {
		problem string
		do      func() error
	}{
		{"sk_lookup is not attached", func() error { return os.Remove(lookupPin(dir)) }},
		{"the guard is not attached, or not first", func() error { return l.dp.removeHook(guardHook, dir, l.ui.nodeIndex) }},
		{"connect4 is not attached", func() error { return os.Remove(filepath.Join(l.dp.dir, "connect4")) }},
		{"sockops is not attached", func() error { return os.Remove(filepath.Join(l.dp.dir, "sockops")) }},
		{"the guard does not know it", func() error { return l.dp.kernel.Guards.Delete(uint32(l.ui.nodeIndex)) }},
		{"the inbound listener is gone", func() error {
			return l.dp.kernel.Listeners.Delete(listenerKey(l.dp.pods["uid-ui"].pod.Slot, 1))
		}},
		{"address 10.77.0.2 is not entered for it", func() error { return l.dp.kernel.Owners.Delete(kernelAddr(l.ui.v4)) }},
		{"tcp_fwmark_accept is off", func() error {
			return l.ui.ns.Do(func() error { return writeSysctl("/proc", "net/ipv4/tcp_fwmark_accept", "0") })
		}},
		{"the rule for marked packets is missing (IPv4)", func() error {
			return l.ui.ns.Do(func() error { return netlink.RuleDel(markRule(netlink.FAMILY_V4)) })
		}},
		{"the rule for marked packets is missing (IPv6)", func() error {
			return l.ui.ns.Do(func() error { return netlink.RuleDel(markRule(netlink.FAMILY_V6)) })
		}},
		{"the local route is missing (IPv4)", func() error {
			return l.ui.ns.Do(func() error { return netlink.RouteDel(localRoute(netlink.FAMILY_V4, podIndex(l), l.ui.v4)) })
		}},
		{"the local route is missing (IPv6)", func() error { // and more has happened before than the kernel keeps
			return l.ui.ns.Do(func() error {
				eth0, err := netlink.LinkByName("eth0")
				if err != nil {
					return err
				}
				for i := range 200 {
					a := netip.AddrFrom4([4]byte{10, 99, 0, byte(i)})
					if err := addAddr(eth0, a); err != nil {
						return err
					}
					if i == 0 {
						err = netlink.RouteDel(localRoute(netlink.FAMILY_V6, eth0.Attrs().Index, l.ui.v6))
					}
					if err := errors.Join(err, netlink.AddrDel(eth0, &netlink.Addr{IPNet: hostNet(a)})); err != nil {
						return err
					}
				}
				return nil
			})
		}},
	} {
		check(t, damage.do())
		found, err := l.dp.Audit()
		check(t, err)
		i := slices.IndexFunc(found, func(s PodState) bool { return s.UID == "uid-ui" })
		if !slices.Equal(found[i].Problems, []string{damage.problem}) {
			t.Errorf("found %q, want %q", found[i].Problems, damage.problem)
		}
		for _, s := range must(l.dp.Enrolled()) {
			if !s.InForce() {
				t.Errorf("after repairing %q: %+v", damage.problem, s)
			}
		}
	}
}

// podIndex is the number of a pod's end of its veth.
func podIndex(l *lab) (index int) {
	check(l.t, l.ui.ns.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err == nil {
			index = eth0.Attrs().Index
		}
		return err
	}))
	return index
}

// While nothing changes, an audit goes to no pod's namespace; and what is not of the pod's doing is heard of too.
func TestAuditAsksOnlyWhereSomethingChanged(t *testing.T) {
	l := enrolled(t)
	right := func() (ui, cat bool) { return l.dp.watches["uid-ui"].right, l.dp.watches["uid-catalog"].right }
	audit := func() {
		t.Helper()
		for _, s := range must(l.dp.Audit()) {
			if !s.InForce() {
				t.Errorf("%+v", s)
			}
		}
	}
	audit()
	l.dp.hear()
	if ui, cat := right(); !ui || !cat {
		t.Errorf("found right: ui %v, catalog %v", ui, cat)
	}
	// The node's end of one pod's veth.
	check(t, l.node.Do(func() error { return netlink.LinkSetAlias(must(netlink.LinkByIndex(l.ui.nodeIndex)), "renamed") }))
	l.dp.hear()
	if ui, cat := right(); ui || !cat {
		t.Errorf("after a change to ui's interface found right: ui %v, catalog %v", ui, cat)
	}
	audit()
	// An address goes, and comes back.
	check(t, l.ui.ns.Do(func() error {
		return netlink.AddrDel(must(netlink.LinkByName("eth0")), &netlink.Addr{IPNet: hostNet(l.ui.v4)})
	}))
	for _, s := range must(l.dp.Enrolled()) {
		if s.InForce() != (s.UID != "uid-ui") {
			t.Errorf("without its address: %+v", s)
		}
	}
	check(t, l.ui.ns.Do(func() error { return addAddr(must(netlink.LinkByName("eth0")), l.ui.v4) }))
	if _, err := l.dp.Audit(); err != nil { // the routes went with the address
		t.Error(err)
	}
	audit()
}

// Another program at the head of the interface could let packets pass that the guard never sees.
func TestAuditPutsTheGuardFirst(t *testing.T) {
	l := enrolled(t)
	other := must(ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, // TC_ACT_OK
	}))
	defer other.Close()
	var front link.Link
	err := l.node.Do(func() (err error) {
		front, err = link.AttachTCX(link.TCXOptions{
			Interface: l.ui.nodeIndex, Program: other, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
		})
		return err
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("this kernel has no tcx")
	}
	check(t, err)
	defer front.Close()
	raw := tcpPacket(netip.AddrPortFrom(l.ui.v4, 5555), netip.AddrPortFrom(l.cat.v4, appPort), syn)
	l.counted(map[string]int{"guard_drop_unvouched": 0}, func() { check(t, l.ui.sendRaw(raw)) })
	found, err := l.dp.Audit()
	check(t, err)
	if len(found[1].Problems) != 1 || !strings.Contains(found[1].Problems[0], "not first") {
		t.Errorf("%+v", found)
	}
	l.counted(map[string]int{"guard_drop_unvouched": 1}, func() { check(t, l.ui.sendRaw(raw)) })
	for _, s := range must(l.dp.Enrolled()) {
		if !s.InForce() {
			t.Errorf("%+v", s)
		}
	}
}

// Pods are given instances of sk_lookup that were loaded before, each with the pod's own addresses in it.
func TestSparesBecomeThePods(t *testing.T) {
	l := newLab(t)
	check(t, l.dp.Close())
	l.cfg.Spares = 2
	l.open()
	ready := func() int {
		l.dp.spares.mu.Lock()
		defer l.dp.spares.mu.Unlock()
		return len(l.dp.spares.ready)
	}
	eventually(t, "two are ready", func() bool { return ready() == 2 })
	for _, h := range []*host{l.ui, l.cat} {
		h.serve(appPort)
		h.enroll()
	}
	check(t, l.dp.SetDestinations(l.destinations()))
	eventually(t, "two are ready for others", func() bool { return ready() == 2 })
	for _, dst := range []netip.AddrPort{netip.AddrPortFrom(vip4, servicePort), netip.AddrPortFrom(vip6, servicePort), l.cat.addrs(appPort)[0]} {
		c, err := l.ui.dial(dst)
		check(t, err)
		check(t, clientIsSeen(c))
		c.Close()
	}
	l.counted(map[string]int{"lookup_inbound": 1}, func() { // plaintext, which ui's instance must not take for its own
		c, err := l.outside.dial(l.ui.addrs(appPort)[0])
		check(t, err)
		c.Close()
	})
}

// An upgrade to another layout of the maps: the old pins go once every pod is enrolled in the new ones. No
// connection fails meanwhile, whether the old agent carries it or the new one.
func TestUpgradeToAnotherSchema(t *testing.T) {
	l := enrolled(t)
	var loads []*load
	for _, dst := range []netip.AddrPort{netip.AddrPortFrom(vip4, servicePort), netip.AddrPortFrom(vip6, servicePort)} {
		loads = append(loads, l.ui.load(dst, clientIsSeen))
	}
	agents := func(more int64) {
		t.Helper()
		for _, x := range loads {
			n := x.made.Load()
			eventually(t, "connections are made", func() bool { return x.made.Load() >= n+more })
		}
	}
	agents(5)
	predecessor := l.dp
	defer predecessor.Close()
	check(t, predecessor.Yield())
	old := filepath.Join(l.cfg.Dir, "v0")
	check(t, os.Rename(l.dp.dir, old))
	predecessor.schemas.mu.Lock()
	predecessor.schemas.own = "v0"
	predecessor.schemas.mu.Unlock()
	l.open()
	l.dialer.Store(predecessor) // which goes on accepting
	agents(20)
	l.ui.enroll()
	l.cat.enroll()
	agents(20)
	check(t, l.dp.SetDestinations(l.destinations()))
	agents(20)
	l.dialer.Store(l.dp)
	agents(20)
	check(t, l.dp.Prune(func(string) bool { return true }))
	agents(20)
	for _, x := range loads {
		x.end()
		if x.wrong.Load() > 0 {
			t.Errorf("%d of %d connections failed, the first: %v", x.wrong.Load(), x.made.Load(), x.first)
		}
	}
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", old, err)
	}
	for _, s := range must(l.dp.Enrolled()) {
		if !s.InForce() {
			t.Errorf("%+v", s)
		}
	}
	c, err := l.ui.dial(netip.AddrPortFrom(vip4, servicePort))
	check(t, err)
	check(t, clientIsSeen(c))
	c.Close()
}

// What no socket hook sees whole is refused with a reason and left alone.
func TestUnsupportedPods(t *testing.T) {
	l := newLab(t)
	before := l.traces(t)
	l.ui.listen()
	add := func(link netlink.Link) func() error {
		return func() error {
			return l.ui.ns.Do(func() error {
				if err := netlink.LinkAdd(link); err != nil {
					return err
				}
				return netlink.LinkSetUp(link)
			})
		}
	}
	for _, c := range []struct {
		want Unsupported
		pod  func(p *Pod)
		do   func() error
		undo string
	}{
		{want: NoAddress, pod: func(p *Pod) { p.Addrs = []netip.Addr{netip.MustParseAddr("10.77.0.99")} }},
		{want: NestedNetwork, do: add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}}), undo: "docker0"},
		{want: SecondInterface, do: add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "net1"}, PeerName: "net1p"}), undo: "net1"},
	} {
		t.Run(string(c.want), func(t *testing.T) {
			if c.do != nil {
				if err := c.do(); errors.Is(err, unix.EOPNOTSUPP) {
					t.Skip("this kernel has no such interface")
				} else {
					check(t, err)
				}
			}
			p := l.ui.pod()
			if c.pod != nil {
				c.pod(&p)
			}
			err := l.dp.Enroll(p)
			var u *UnsupportedError
			if !errors.As(err, &u) || u.Reason != c.want || u.UID != p.UID {
				t.Errorf("enrol: %v, want %s", err, c.want)
			}
			if c.undo != "" {
				check(t, l.ui.ns.Do(func() error {
					link, err := netlink.LinkByName(c.undo)
					if err != nil {
						return err
					}
					return netlink.LinkDel(link)
				}))
			}
		})
	}
	if after := l.traces(t); after != before {
		t.Errorf("refusals left traces: before\n%s\nafter\n%s", before, after)
	}
	check(t, l.dp.Enroll(l.ui.pod()))
}

// A pod that Istio's ztunnel captured is refused until it is a new one; what is captured stays so, whatever rules somebody adds.
func TestPodsOfAnotherMesh(t *testing.T) {
	l := newLab(t)
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rule := netlink.NewRule()
		mask := uint32(istioMask)
		rule.Family, rule.Table, rule.Mark, rule.Mask, rule.Priority = family, istioTable, istioMark, &mask, 32764
		before := l.traces(t)
		check(t, l.ui.ns.Do(func() error { return netlink.RuleAdd(rule) }))
		var u *UnsupportedError
		if err := l.dp.Enroll(l.ui.pod()); !errors.As(err, &u) || u.Reason != OtherMesh || !strings.Contains(err.Error(), "restart the pod") {
			t.Errorf("with Istio's rule: %v", err)
		}
		check(t, l.ui.ns.Do(func() error { return netlink.RuleDel(rule) }))
		if after := l.traces(t); after != before {
			t.Errorf("the refusal left traces: before\n%s\nafter\n%s", before, after)
		}
		l.cat.enroll()
		check(t, l.cat.ns.Do(func() error { return netlink.RuleAdd(rule) }))
		check(t, l.dp.Enroll(l.cat.pod()))
		check(t, l.cat.ns.Do(func() error { return netlink.RuleDel(rule) }))
	}
	l.ui.listen()
	check(t, l.dp.Enroll(l.ui.pod()))
}

// Uninstall leaves the machine as it was: no pin, link, rule, route, sysctl or filter.
func TestUninstallLeavesNothing(t *testing.T) {
	l := newLab(t)
	before := l.traces(t)
	l.ui.enroll()
	l.cat.enroll()
	check(t, l.dp.SetDestinations(l.destinations()))
	if during := l.traces(t); during == before {
		t.Error("enrolment left no traces to look for")
	}
	check(t, l.dp.Close())
	check(t, Uninstall(context.Background(), l.cfg))
	if _, err := os.Stat(l.cfg.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there (%v)", l.cfg.Dir, err)
	}
	l.open()
	if after := l.traces(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// traces lists what capture changes in the pods' and the node's namespaces.
func (l *lab) traces(t *testing.T) string {
	var b strings.Builder
	for _, h := range []*host{l.ui, l.cat} {
		check(t, h.ns.Do(func() error { return podTraces(&b) }))
	}
	check(t, l.node.Do(func() error {
		links, err := netlink.LinkList()
		for _, link := range links {
			q, _ := netlink.QdiscList(link)
			f, _ := netlink.FilterList(link, netlink.HANDLE_MIN_INGRESS)
			fmt.Fprintln(&b, link.Attrs().Name, len(q), len(f))
		}
		return err
	}))
	return b.String()
}

func podTraces(b *strings.Builder) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return err
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: Table}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		fmt.Fprintln(b, rules, routes)
	}
	for _, s := range sysctls {
		v, err := os.ReadFile(filepath.Join("/proc/sys", s.path))
		if err != nil {
			return err
		}
		fmt.Fprint(b, s.path, "=", string(v))
	}
	return nil
}

// A namespace that ended before its pod was released is no obstacle.
func TestReleaseOfADeadPod(t *testing.T) {
	l := enrolled(t)
	l.ui.closeListeners()
	check(t, l.ui.ns.Close())
	check(t, l.node.Do(func() error {
		peer, err := netlink.LinkByIndex(l.ui.nodeIndex)
		if err != nil {
			return err
		}
		return netlink.LinkDel(peer)
	}))
	check(t, l.dp.Close())
	l.open()
	check(t, l.dp.Release("uid-ui"))
	if s := must(l.dp.Enrolled()); len(s) != 1 {
		t.Errorf("%+v", s)
	}
}

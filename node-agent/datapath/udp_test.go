package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

const dnsPort = uint16(53)

// soon is how long a datagram may take that comes; none takes longer than that in a lab, however busy the machine, but
// those that must not come are waited for no longer than brief.
const (
	soon  = 20 * time.Second
	brief = 150 * time.Millisecond
)

// udpSnapshot is the lab's mesh where the namespace shop asks for policies to apply to UDP. There is a pod elsewhere, at
// the outside machine's address, of the service account "far".
func (l *lab) udpSnapshot(ask bool, policies ...*mesh.Policy) *mesh.Snapshot {
	b := mesh.NewBuilder(l.snapshot(mesh.SameNodeKernel, policies...))
	cfg := mesh.Config{TrustDomain: "cluster.local", SameNode: mesh.SameNodeKernel}
	if ask {
		cfg.UDPNamespaces = []string{"shop"}
	}
	b.SetConfig(cfg)
	far := l.outside.workload()
	far.Identity.ServiceAccount, far.Node = "far", "elsewhere"
	b.PutWorkload(far)
	return b.Commit(2)
}

func (l *lab) setUDP(policies ...*mesh.Policy) {
	l.t.Helper()
	check(l.t, l.dp.SetPolicies(l.udpSnapshot(true, policies...)))
}

// echo answers each datagram with what it was and who it came from, "TEXT FROM".
func (h *host) echo(port uint16) {
	h.lab.t.Helper()
	var c net.PacketConn
	check(h.lab.t, h.as(func() (err error) {
		c, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	}))
	h.lab.t.Cleanup(func() { c.Close() })
	h.lab.agents.Add(1)
	go func() {
		defer h.lab.agents.Done()
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(fmt.Appendf(nil, "%s %s", b[:min(n, 64)], from), from)
		}
	}()
}

// udpSocket is an unconnected socket of the host, as musl's resolver has.
func (h *host) udpSocket(local netip.AddrPort) *net.UDPConn {
	h.lab.t.Helper()
	var c *net.UDPConn
	check(h.lab.t, h.as(func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(local))
		return err
	}))
	h.lab.t.Cleanup(func() { c.Close() })
	return c
}

// ask sends a datagram to each server from one unconnected socket and returns who has answered it.
func ask(c *net.UDPConn, text string, within time.Duration, servers ...netip.AddrPort) (answered []netip.AddrPort) {
	for _, s := range servers {
		c.WriteToUDPAddrPort([]byte(text), s)
	}
	b := make([]byte, 65536)
	for end := time.Now().Add(within); len(answered) < len(servers); {
		c.SetReadDeadline(end)
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return answered
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		if strings.HasPrefix(string(b[:n]), text+" ") && !slices.Contains(answered, from) {
			answered = append(answered, from)
		}
	}
	return answered
}

// reaches sends a datagram and reports whether the server has answered. It repeats what should come, as a network may
// lose a datagram, and waits briefly for what should not.
func (h *host) reaches(server netip.AddrPort, want bool) bool {
	h.lab.t.Helper()
	c := h.udpSocket(netip.AddrPort{})
	defer c.Close()
	if !want {
		return len(ask(c, "hello", brief, server)) > 0
	}
	for end := time.Now().Add(soon); time.Now().Before(end); {
		if len(ask(c, "hello", time.Second, server)) > 0 {
			return true
		}
	}
	return false
}

func udpLab(t *testing.T) *lab {
	l := enrolled(t)
	for _, h := range []*host{l.ui, l.cat, l.outside} {
		h.echo(dnsPort)
	}
	return l
}

func sources(list ...string) mesh.Match { return mesh.Match{SourceIPs: prefixes(list...)} }

// What policies say about datagrams that arrive, by everything that they can look at, in both families: from a pod of
// this node, from one elsewhere, and from nobody's.
func TestUDPPolicies(t *testing.T) {
	l := udpLab(t)
	bare := l.outside.spread(t, "10.88.0.3", "fd88::3") // addresses that are no pod's
	inputs, wrong := 0, 0
	for _, c := range []struct {
		name            string
		policies        []*mesh.Policy
		ui, far, nobody bool
	}{
		{"no policy", nil, true, true, true},
		{"allowed by account", []*mesh.Policy{rule(mesh.Allow, "a", account("ui"))}, true, false, false},
		{"allowed by the account of a pod elsewhere", []*mesh.Policy{rule(mesh.Allow, "a", account("far"))}, false, true, false},
		{"allowed by principal", []*mesh.Policy{rule(mesh.Allow, "a", mesh.Match{Principals: []mesh.StringMatch{{Value: "cluster.local/ns/shop/sa/far"}}})}, false, true, false},
		{"allowed by namespace", []*mesh.Policy{rule(mesh.Allow, "a", mesh.Match{Namespaces: []mesh.StringMatch{{Value: "shop"}}})}, true, true, false},
		{"allowed by address", []*mesh.Policy{rule(mesh.Allow, "a", sources("10.88.0.3/32", "fd88::3/128"))}, false, false, true},
		{"allowed by port", []*mesh.Policy{rule(mesh.Allow, "a", mesh.Match{DestinationPorts: []uint16{dnsPort}})}, true, true, true},
		{"allowed by another port", []*mesh.Policy{rule(mesh.Allow, "a", mesh.Match{DestinationPorts: []uint16{54}})}, false, false, false},
		{"allows nothing", []*mesh.Policy{rule(mesh.Allow, "a", mesh.Match{})}, false, false, false},
		{"denied by account", []*mesh.Policy{rule(mesh.Deny, "d", account("ui"))}, false, true, true},
		{"denied who has no identity", []*mesh.Policy{rule(mesh.Deny, "d", mesh.Match{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}})}, true, true, false},
		{"STRICT", []*mesh.Policy{strictOf("istio_converted_static_strict")}, true, true, true},
		{"AUDIT", []*mesh.Policy{rule(mesh.Audit, "x", account("ui"))}, true, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			l.setUDP(c.policies...)
			for i, dst := range l.cat.addrs(dnsPort) {
				local := netip.AddrPortFrom(bare[2+i], 0)
				for _, from := range []struct {
					who  string
					want bool
					got  func() bool
				}{
					{"ui", c.ui, func() bool { return l.ui.in(l).reaches(dst, c.ui) }},
					{"far", c.far, func() bool {
						return l.outside.in(l).from(netip.AddrPortFrom([]netip.Addr{l.outside.v4, l.outside.v6}[i], 0), dst, c.far)
					}},
					{"nobody", c.nobody, func() bool { return l.outside.in(l).from(local, dst, c.nobody) }},
				} {
					inputs++
					name := "udp_denied"
					if from.want {
						name = "udp_allowed"
					}
					l.counted(map[string]int{name: -1, "udp_denied_unknown": 0}, func() {
						if got := from.got(); got != from.want {
							wrong++
							t.Errorf("%s reached %s: %v, want %v", from.who, dst, got, from.want)
						}
					})
				}
			}
		})
	}
	recordUDP(t, results.Row{Name: "udp-policy", Inputs: inputs, Failures: wrong, Figure: float64(wrong), Unit: "wrong verdicts about real datagrams"})
}

func recordUDP(t *testing.T, r results.Row) {
	t.Helper()
	if err := results.Record("udp-policy", r); err != nil {
		t.Error(err)
	}
}

func strictOf(name string) *mesh.Policy {
	p := *strictRule
	p.Name.Name = name
	return &p
}

// in is the host with another test's log.
func (h *host) in(l *lab) *host {
	c := *h
	c.lab = l
	return &c
}

// from is reaches, from an address of the host's.
func (h *host) from(local, dst netip.AddrPort, want bool) bool {
	c := h.udpSocket(local)
	defer c.Close()
	for end := time.Now().Add(soon); ; {
		within := brief
		if want {
			within = time.Second
		}
		if len(ask(c, "hello", within, dst)) > 0 {
			return true
		}
		if !want || time.Now().After(end) {
			return false
		}
	}
}

// Where nobody asks, UDP is left alone: no hook, no rows. Asking and not asking again take effect at once.
func TestUDPIsLeftAlone(t *testing.T) {
	l := udpLab(t)
	deny := rule(mesh.Allow, "a", account("nobody"))
	dst := l.cat.addrs(dnsPort)[0]
	state := func() (gates, sources int, hook bool) {
		g, err := l.dp.gates.udp.gates.read()
		check(t, err)
		s, err := l.dp.gates.udp.sources.read()
		check(t, err)
		return len(g), len(s), l.dp.udpInForce("uid-catalog", uint32(l.cat.nodeIndex))
	}
	for i, ask := range []bool{false, true, false, true} {
		check(t, l.dp.SetPolicies(l.udpSnapshot(ask, deny)))
		if got := l.ui.reaches(dst, !ask); got == ask {
			t.Errorf("step %d: reached %v, asked for %v", i, got, ask)
		}
		if ask {
			if gates, sources, hook := state(); gates != 2 || sources != 6 || !hook {
				t.Errorf("asked for, there are %d gates and %d sources, hook %v", gates, sources, hook)
			}
			continue
		}
		must(l.dp.Audit())
		if gates, sources, hook := state(); gates+sources != 0 || hook {
			t.Errorf("not asked for, there are %d gates and %d sources, hook %v", gates, sources, hook)
		}
	}
	check(t, l.dp.Release("uid-catalog"))
	if gates, _, hook := state(); gates != 1 || hook {
		t.Errorf("released, there are %d gates, hook %v", gates, hook)
	}
	if !l.ui.reaches(dst, true) {
		t.Error("a released pod is not reached")
	}
}

// What comes back to a pod that lets nobody in: to connected sockets, and to one that is not connected and asks two
// servers at once; from a service's address that the node translates; as an error by ICMP. A datagram of the same server
// from another port is none of it.
func TestUDPAnswers(t *testing.T) {
	l := udpLab(t)
	l.setUDP(rule(mesh.Allow, "a", account("nobody")), closed("shop"))
	for i, server := range l.outside.addrs(dnsPort) {
		if l.outside.reaches(l.ui.addrs(dnsPort)[i], false) {
			t.Fatal("the pod lets somebody in")
		}
		c := l.ui.udpSocket(netip.AddrPort{})
		both := []netip.AddrPort{server, l.cat.addrs(dnsPort)[i]}
		// The catalog lets nobody in either, so that one server is silent: the other's answer comes all the same.
		eventually(t, "the server that may answer does", func() bool {
			return slices.Equal(ask(c, "who", time.Second, both...), both[:1])
		})
		l.counted(map[string]int{"udp_answer": -1}, func() {
			check(t, l.ui.as(func() error { return exchange(server) }))
		})
		// Somebody at the server's address, from a port that the pod did not ask.
		l.counted(map[string]int{"udp_denied": 1}, func() {
			other := l.outside.udpSocket(netip.AddrPortFrom(server.Addr(), 0))
			defer other.Close()
			other.WriteToUDPAddrPort([]byte("unasked"), netip.AddrPortFrom(l.ui.addrs(0)[i].Addr(), uint16(c.LocalAddr().(*net.UDPAddr).Port)))
		})
		// An error comes back: nobody listens there.
		check(t, l.ui.as(func() error {
			u, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(server.Addr(), 9)))
			if err != nil {
				return err
			}
			defer u.Close()
			u.SetDeadline(time.Now().Add(soon))
			u.Write([]byte("x"))
			if _, err := u.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("no ICMP error: %v", err)
			}
			return nil
		}))
	}
}

// closed is a policy that lets nobody in to any pod of a namespace.
func closed(namespace string) *mesh.Policy {
	return &mesh.Policy{Name: mesh.PolicyName{Namespace: namespace, Name: "closed"}, Scope: mesh.ScopeNamespace}
}

// exchange is a question and its answer by a connected socket.
func exchange(server netip.AddrPort) error {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(soon))
	if _, err := c.Write([]byte("connected")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 100))
	return err
}

// A service's address is translated on the node, between the two hooks: what comes back has the service's address.
func TestUDPAnswersOfAService(t *testing.T) {
	l := udpLab(t)
	if !l.translate(vip4, netip.AddrPortFrom(l.outside.v4, dnsPort)) {
		t.Skip("no nft that translates addresses")
	}
	l.setUDP(closed("shop"))
	service := netip.AddrPortFrom(vip4, dnsPort)
	c := l.ui.udpSocket(netip.AddrPort{})
	eventually(t, "the service answers an unconnected socket", func() bool {
		return slices.Equal(ask(c, "service", time.Second, service), []netip.AddrPort{service})
	})
	check(t, l.ui.as(func() error { return exchange(service) }))
}

// An open exchange ends with the policy that allowed it, also where the server goes on answering, and comes back with it.
func TestUDPPolicyChanges(t *testing.T) {
	l := udpLab(t)
	allow, deny := rule(mesh.Allow, "a", account("ui")), rule(mesh.Allow, "a", account("nobody"))
	stale, changes := 0, 0
	for i, dst := range l.cat.addrs(dnsPort) {
		c := l.ui.udpSocket(netip.AddrPort{})
		for range 10 {
			l.setUDP(allow)
			eventually(t, "an exchange that is allowed", func() bool { return len(ask(c, "open", time.Second, dst)) == 1 })
			l.setUDP(deny)
			changes++
			if len(ask(c, fmt.Sprint("late", i, changes), brief, dst)) > 0 {
				stale++
			}
		}
	}
	if stale > 0 {
		t.Errorf("%d of %d exchanges went on", stale, changes)
	}
	recordUDP(t, results.Row{Name: "exchanges under way when policy denied them", Inputs: changes, Failures: stale, Figure: float64(stale), Unit: "went on"})
}

// A datagram from an address that is not the sender's: a captured pod's own veth drops it, and one that is not captured
// does not pass for a pod of this node.
func TestUDPSpoofedSource(t *testing.T) {
	l := udpLab(t)
	l.setUDP(rule(mesh.Allow, "a", account("ui")))
	cat := l.cat.addrs(dnsPort)
	tried, arrived := 0, 0
	spoof := func(h *host, from, to netip.AddrPort, counter string) {
		tried++
		before := must(l.dp.Counters())["udp_allowed"]
		l.counted(map[string]int{counter: 1}, func() { check(t, h.sendRaw(udpPacket(from, to, "spoofed"))) })
		if must(l.dp.Counters())["udp_allowed"] != before {
			arrived++
		}
	}
	for i := range cat {
		ui := netip.AddrPortFrom(l.ui.addrs(0)[i].Addr(), 4444)
		far := netip.AddrPortFrom(l.outside.addrs(0)[i].Addr(), 4444)
		l.counted(map[string]int{"udp_allowed": 1}, func() { check(t, l.ui.sendRaw(udpPacket(ui, cat[i], "its own"))) })
		spoof(l.ui, far, cat[i], "guard_drop_source")
		spoof(l.ui, netip.AddrPortFrom(cat[i].Addr(), 4444), far, "guard_drop_source")
		spoof(l.outside, ui, cat[i], "udp_denied_source")
	}
	if arrived > 0 {
		t.Errorf("%d of %d arrived", arrived, tried)
	}
	recordUDP(t, results.Row{Name: "datagrams from an address that is not the sender's", Inputs: tried, Failures: arrived, Figure: float64(arrived), Unit: "arrived"})
}

// Datagrams that do not fit one packet, both ways; and packets in which the ports cannot be seen.
func TestUDPFragments(t *testing.T) {
	l := udpLab(t)
	l.setUDP(rule(mesh.Allow, "a", account("ui")))
	for i, dst := range l.cat.addrs(dnsPort) {
		c := l.ui.udpSocket(netip.AddrPort{})
		long := strings.Repeat("long ", 2000)
		eventually(t, "a fragmented datagram arrives", func() bool {
			c.WriteToUDPAddrPort([]byte(long), dst)
			c.SetReadDeadline(time.Now().Add(time.Second))
			n, err := c.Read(make([]byte, 200))
			return err == nil && n > 60
		})
		stranger := l.outside.udpSocket(netip.AddrPortFrom(l.outside.addrs(0)[i].Addr(), 0))
		l.counted(map[string]int{"udp_denied": 1, "udp_allowed": 0}, func() {
			stranger.WriteToUDPAddrPort([]byte(long), dst)
		})
	}
	ui6, cat6 := netip.AddrPortFrom(l.ui.v6, 5555), netip.AddrPortFrom(l.cat.v6, dnsPort)
	pad := extension{protocol: 60, body: []byte{0, 0, 1, 4, 0, 0, 0, 0}}
	first := extension{protocol: 44, body: []byte{0, 0, 0, 1, 0, 0, 0, 7}}
	for _, p := range []struct {
		name, counter string
		packet        []byte
	}{
		{"behind an extension header", "udp_allowed", udpPacket(ui6, cat6, "x", pad)},
		{"behind three", "udp_allowed", udpPacket(ui6, cat6, "x", pad, pad, first)},
		{"behind too many", "guard_drop_malformed", udpPacket(ui6, cat6, "x", pad, pad, pad, pad, pad, pad, pad)},
		{"the header in a later fragment", "udp_drop_malformed", udpPacket(ui6, cat6, "x", first, pad)[:40+8+8]},
	} {
		t.Run(p.name, func(t *testing.T) {
			binary.BigEndian.PutUint16(p.packet[4:], uint16(len(p.packet)-40))
			l.in(t).counted(map[string]int{p.counter: 1}, func() { check(t, l.ui.sendRaw(p.packet)) })
		})
	}
}

// udpPacket is a datagram with its IP header; extension headers are for IPv6.
func udpPacket(src, dst netip.AddrPort, text string, ext ...extension) []byte {
	u := make([]byte, 8, 8+len(text))
	binary.BigEndian.PutUint16(u, src.Port())
	binary.BigEndian.PutUint16(u[2:], dst.Port())
	binary.BigEndian.PutUint16(u[4:], uint16(8+len(text)))
	u = append(u, text...)
	if src.Addr().Is4() {
		p := make([]byte, 20, 20+len(u))
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(u)))
		copy(p[12:], src.Addr().AsSlice())
		copy(p[16:], dst.Addr().AsSlice())
		return append(p, u...) // a checksum of 0 is none
	}
	p := make([]byte, 40)
	p[0], p[7] = 0x60, 64
	copy(p[8:], src.Addr().AsSlice())
	copy(p[24:], dst.Addr().AsSlice())
	next := &p[6]
	for _, e := range ext {
		*next = e.protocol
		at := len(p)
		p = append(p, e.body...)
		next = &p[at]
	}
	*next = unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40+len(u)))
	return append(p, u...)
}

// A pod that floods its own tables, by what it sends or by whom it lets in, takes nothing from its neighbours.
func TestUDPFloodQuota(t *testing.T) {
	l := udpLab(t)
	server := l.outside.addrs(dnsPort)[0]
	l.setUDP(closed("shop"))
	c := l.cat.udpSocket(netip.AddrPort{})
	eventually(t, "the neighbour is answered", func() bool { return len(ask(c, "before", time.Second, server)) == 1 })

	const flood = 20000
	before := must(l.dp.Counters())["udp_begun"]
	check(t, l.ui.as(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for i := range flood {
			to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 88, byte(1 + i/60000), 7}), uint16(1+i%60000))
			unix.Sendto(fd, []byte("flood"), 0, sockaddr(to))
		}
		return nil
	}))
	if n := must(l.dp.Counters())["udp_begun"] - before; n < flood*9/10 {
		t.Errorf("only %d of %d datagrams were noted", n, flood)
	}
	entries := func(h *host) (n int) {
		var table *ebpf.Map
		check(t, l.dp.kernel.UdpBegun.Lookup(l.dp.pods["uid-"+h.name].pod.Slot, &table))
		defer table.Close()
		var k, v [64]byte
		for it := table.Iterate(); it.Next(k[:table.KeySize()], v[:table.ValueSize()]); n++ {
		}
		return n
	}
	if n := entries(l.ui); n == 0 || n > 4096 {
		t.Errorf("the flood has %d entries", n)
	}
	// The answer to what the neighbour began before the flood is still one: nothing was sent since.
	l.counted(map[string]int{"udp_answer": 1, "udp_denied": 0}, func() {
		check(t, l.outside.sendRaw(udpPacket(server, netip.AddrPortFrom(l.cat.v4, uint16(c.LocalAddr().(*net.UDPAddr).Port)), "late answer")))
	})
	lost := 0
	if t.Failed() {
		lost = 1
	}
	recordUDP(t, results.Row{Name: "exchanges of a pod that flooded its own table, and the answer to its neighbour's", Inputs: flood, Failures: lost, Figure: float64(lost), Unit: "lost"})
}

// Verdicts go on while there is no agent, and a new one takes over what the kernel has: rules, flows, hook.
// Both are so for senders on the node and elsewhere.
func TestUDPSurvivesTheAgent(t *testing.T) {
	t.Run("sender here", func(t *testing.T) {
		l := udpLab(t)
		udpSurvives(l, l.ui, "ui", l.outside)
	})
	t.Run("sender elsewhere", func(t *testing.T) {
		l := udpLab(t)
		udpSurvives(l, l.outside, "far", l.ui)
	})
}

func udpSurvives(l *lab, friend *host, name string, other *host) {
	t := l.t
	friends := rule(mesh.Allow, "a", account(name))
	l.setUDP(friends)
	cat, server := l.cat.addrs(dnsPort)[0], l.outside.addrs(dnsPort)[0]
	c := l.cat.udpSocket(netip.AddrPort{})
	late := func() []byte {
		return udpPacket(server, netip.AddrPortFrom(l.cat.v4, uint16(c.LocalAddr().(*net.UDPAddr).Port)), "late answer")
	}
	eventually(t, "the pod is answered", func() bool { return len(ask(c, "before", time.Second, server)) == 1 })
	holds := func(when string) {
		t.Helper()
		if !friend.reaches(cat, true) {
			t.Errorf("%s: who is allowed is kept out", when)
		}
		if other.reaches(cat, false) {
			t.Errorf("%s: who is not allowed is let in", when)
		}
	}
	holds("before")
	l.up.Lock()
	check(t, l.dp.Close())
	holds("without an agent")
	l.open()
	l.up.Unlock()
	// A pod that has gone while there was no agent.
	gone := kernelAddr(netip.MustParseAddr("10.99.0.1"))
	check(t, l.dp.kernel.UdpSources.Put(gone, bpf.MeshUdpSource{Identity: 1}))
	holds("with a new agent that knows nothing")
	l.counted(map[string]int{"udp_answer": 1}, func() { check(t, l.outside.sendRaw(late())) })
	l.setUDP(friends) // before any pod is enrolled again
	holds("with a new agent that knows the policies")
	for _, h := range []*host{l.ui, l.cat} {
		check(t, l.dp.Enroll(h.pod()))
		holds("with " + h.name + " enrolled again")
	}
	l.counted(map[string]int{"udp_answer": 1}, func() { check(t, l.outside.sendRaw(late())) })
	if err := l.dp.kernel.UdpSources.Lookup(gone, new(bpf.MeshUdpSource)); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the address of a pod that has gone: %v", err)
	}
	l.setUDP(rule(mesh.Allow, "a", account("nobody")))
	if friend.reaches(cat, false) {
		t.Error("the new agent's policies do not hold")
	}
}

// An audit finds what somebody has done to the kernel's state and puts it right.
func TestUDPAudit(t *testing.T) {
	l := udpLab(t)
	l.setUDP(rule(mesh.Allow, "a", account("ui")))
	cat := l.cat.addrs(dnsPort)[0]
	ifindex := uint32(l.cat.nodeIndex)
	slot := l.dp.pods["uid-catalog"].pod.Slot
	for _, c := range []struct {
		drift  string
		damage func() error
	}{
		{"udp", func() error { return l.dp.removeHook(udpHook, l.dp.podDir("uid-catalog"), l.cat.nodeIndex) }},
		{"udp_gates", func() error { return l.dp.kernel.UdpGates.Delete(ifindex) }},
		{"udp_sources", func() error { return l.dp.kernel.UdpSources.Delete(kernelAddr(l.ui.v4)) }},
		{"udp_begun", func() error { return l.dp.kernel.UdpBegun.Delete(slot) }},
		{"udp_let_in", func() error { return l.dp.kernel.UdpLetIn.Delete(slot) }},
	} {
		t.Run(c.drift, func(t *testing.T) {
			before := l.dp.Drift()[c.drift]
			check(t, c.damage())
			must(l.dp.Audit())
			if n := l.dp.Drift()[c.drift] - before; n != 1 {
				t.Errorf("%d rows found wrong, want 1", n)
			}
			l := l.in(t)
			if !l.ui.in(l).reaches(cat, true) || l.outside.in(l).reaches(cat, false) {
				t.Error("it is not repaired")
			}
			if found := must(l.dp.Audit()); slices.ContainsFunc(found, func(s PodState) bool { return !s.InForce() }) {
				t.Errorf("found %+v", found)
			}
		})
	}
}

// A datagram that is dropped is told, with the policy and who sent it.
func TestUDPEvents(t *testing.T) {
	l := udpLab(t)
	l.setUDP(rule(mesh.Deny, "d", account("far")))
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	got := make(chan Event, 100)
	l.agents.Add(1)
	go func() {
		defer l.agents.Done()
		for e, err := range l.dp.Events(ctx) {
			if err == nil && e.Kind == Datagram {
				got <- e
			}
		}
	}()
	to := l.cat.addrs(dnsPort)[0]
	from := netip.AddrPortFrom(l.outside.v4, 4444)
	for {
		check(t, l.outside.sendRaw(udpPacket(from, to, "x")))
		select {
		case e := <-got:
			want := mesh.Verdict{By: mesh.PolicyName{Namespace: "shop", Name: "d"}, Why: mesh.WhyDenied}
			if e.Client != from || e.Server != to || e.ServerPod != "uid-catalog" || e.ClientPod != "" || e.Source.ServiceAccount != "far" ||
				e.Verdict.By != want.By || e.Verdict.Why != want.Why {
				t.Errorf("%+v", e)
			}
			cancel()
			return
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			t.Error("nothing was told")
			return
		}
	}
}

// On a bridge, what the node routes between two of its ports comes by the bridge; what comes by any other interface still
// does not pass for a pod's.
func TestUDPOnABridge(t *testing.T) {
	l := udpLab(t)
	check(t, l.node.Do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		if err := errors.Join(netlink.LinkAdd(bridge), netlink.LinkSetUp(bridge)); err != nil {
			return err
		}
		for _, h := range []*host{l.ui, l.cat} {
			veth, err := netlink.LinkByIndex(h.nodeIndex)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetMaster(veth, bridge); err != nil {
				return err
			}
			for _, a := range []netip.Addr{h.v4, h.v6} {
				if err := errors.Join(netlink.RouteDel(&netlink.Route{LinkIndex: h.nodeIndex, Dst: hostNet(a), Scope: netlink.SCOPE_LINK}),
					netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Index, Dst: hostNet(a), Scope: netlink.SCOPE_LINK})); err != nil {
					return err
				}
			}
		}
		return errors.Join(addAddr(bridge, gateway4), addAddr(bridge, gateway6))
	}))
	must(l.dp.Audit())
	l.setUDP(rule(mesh.Allow, "a", account("ui")))
	for i, dst := range l.cat.addrs(dnsPort) {
		if !l.ui.reaches(dst, true) {
			t.Errorf("%s is not reached over the bridge", dst)
		}
		ui := netip.AddrPortFrom(l.ui.addrs(0)[i].Addr(), 4444)
		l.counted(map[string]int{"udp_denied_source": 1}, func() { check(t, l.outside.sendRaw(udpPacket(ui, dst, "spoofed"))) })
	}
}

// translate has the node send what is for a service's address to one server, as kube-proxy does.
func (l *lab) translate(service netip.Addr, server netip.AddrPort) bool {
	l.t.Helper()
	script := fmt.Sprintf("table ip warren_test { chain out { type nat hook prerouting priority dstnat; ip daddr %s udp dport %d dnat to %s; }; }",
		service, server.Port(), server)
	return l.node.Do(func() error { return nft(script) }) == nil
}

func nft(script string) error {
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	return cmd.Run()
}

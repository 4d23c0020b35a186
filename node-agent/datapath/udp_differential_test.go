package datapath

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

// Random policies and real datagrams: what the kernel does with them is what the compiled form says, and the reference.
func TestUDPDifferential(t *testing.T) {
	l := enrolled(t)
	outside := l.outside.spread(t, "10.88.0.3", "10.88.0.4", "fd88::3", "fd88::9")
	for i, id := range diceIdentities { // pods that are only there to have the identities known
		uid := fmt.Sprint("identity", i)
		l.dp.given[uid] = Pod{UID: uid, Identity: id}
	}
	sockets := map[netip.Addr]int{}
	check(t, l.ui.as(func() error { return bindAll(sockets, l.ui.v4, l.ui.v6) }))
	check(t, l.outside.as(func() error { return bindAll(sockets, outside...) }))
	t.Cleanup(func() {
		for _, fd := range sockets {
			unix.Close(fd)
		}
	})

	limit := *cases / 5
	if testing.Short() {
		limit = min(limit, 400)
	}
	seed := uint64(time.Now().UnixNano())
	d := dice{rand.New(rand.NewPCG(seed, 0))}
	done, wrong, denied := 0, 0, 0
	for done < limit && wrong < 10 {
		w, s := d.policies(l, mesh.Config{TrustDomain: "cluster.local", UDPNamespaces: []string{"shop"}})
		compare := func(id mesh.Identity, src netip.Addr, dst netip.AddrPort) {
			done++
			before := verdicts(l)
			if err := unix.Sendto(sockets[src], []byte("x"), 0, sockaddr(dst)); err != nil {
				t.Fatalf("from %s to %s: %v", src, dst, err)
			}
			now := verdicts(l)
			for end := time.Now().Add(soon); now == before && time.Now().Before(end); now = verdicts(l) {
			}
			kernel := now[0] > before[0]
			if !kernel {
				denied++
			}
			inCompiled := must(s.CompileUDP(w.UID, dst.Addr())).Decide(id, src, dst.Port()).Allow
			if ref := reference(s, w, id, src, dst); kernel != ref || inCompiled != ref || now[0]+now[1] != before[0]+before[1]+1 {
				if wrong++; wrong == 1 {
					for p := range s.Policies() {
						t.Logf("%+v", *p)
					}
				}
				t.Errorf("seed %d: %q from %s to %s: allowed by the kernel %v (%v, then %v), compiled %v, the reference %v", seed, id, src, dst, kernel, before, now, inCompiled, ref)
			}
		}
		for _, port := range dicePorts {
			for i, a := range []netip.Addr{l.cat.v4, l.cat.v6} {
				dst := netip.AddrPortFrom(a, port)
				src := []netip.Addr{l.ui.v4, l.ui.v6}[i]
				id := pick(d, diceIdentities...)
				check(t, l.dp.kernel.UdpSources.Put(kernelAddr(src), bpf.MeshUdpSource{Identity: idOf(id), Ifindex: uint32(l.ui.nodeIndex)}))
				compare(id, src, dst)
				src = pick(d, outside...)
				if src.Is6() == a.Is6() {
					compare(mesh.Identity{}, src, dst)
				}
			}
		}
	}
	if denied == 0 || denied == done {
		t.Errorf("%d of %d were denied: that compares nothing", denied, done)
	}
	t.Logf("%d datagrams, %d denied", done, denied)
	if err := results.Record("policy-differential", results.Row{Name: "kernel against compiled form and reference, UDP", Inputs: done, Failures: wrong,
		Figure: float64(wrong), Unit: "disagreements"}); err != nil {
		t.Error(err)
	}
}

// verdicts are how many datagrams were allowed and denied.
func verdicts(l *lab) (out [2]uint64) {
	var perCPU []uint64
	for i, o := range []bpf.MeshOutcome{bpf.MeshOutcomeUDP_ALLOWED, bpf.MeshOutcomeUDP_DENIED} {
		check(l.t, l.dp.kernel.Outcomes.Lookup(o, &perCPU))
		for _, n := range perCPU {
			out[i] += n
		}
	}
	return out
}

// bindAll makes a socket for each address of the calling thread's namespace.
func bindAll(sockets map[netip.Addr]int, addrs ...netip.Addr) error {
	for _, a := range addrs {
		family := unix.AF_INET
		if a.Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		sockets[a] = fd
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(a, 0))); err != nil {
			return err
		}
	}
	return nil
}

// What a datagram costs where policies apply to it: the kernel's own count of the time in both hooks, one datagram of the
// pod's and one to it, which 100 policies decide.
func TestUDPVerdictCost(t *testing.T) {
	l := udpLab(t)
	var policies []*mesh.Policy
	for i := range 100 {
		policies = append(policies, rule(mesh.Allow, fmt.Sprint("p", i), account(fmt.Sprint("sa", i)), mesh.Match{DestinationPorts: []uint16{uint16(1000 + i)}}))
	}
	l.setUDP(append(policies, rule(mesh.Allow, "a", account("ui")))...)
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("this kernel does not count")
	}
	check(t, err)
	defer stats.Close()
	sockets := map[netip.Addr]int{}
	check(t, l.ui.as(func() error { return bindAll(sockets, l.ui.v4) }))
	defer unix.Close(sockets[l.ui.v4])
	datagrams := 20000
	if testing.Short() {
		datagrams = 1000
	}
	to := sockaddr(l.cat.addrs(dnsPort)[0])
	cost := func(p *ebpf.Program, f func()) float64 {
		before := must(p.Stats())
		f()
		after := must(p.Stats())
		return float64(after.Runtime-before.Runtime) / float64(after.RunCount-before.RunCount)
	}
	var out, in float64
	out = cost(l.dp.kernel.MeshGuard, func() {
		in = cost(l.dp.kernel.MeshUdp, func() {
			for range datagrams {
				check(t, unix.Sendto(sockets[l.ui.v4], []byte("x"), 0, to))
			}
		})
	})
	t.Logf("%.0f ns on the way out, %.0f ns on the way in", out, in)
	if err := results.Record("udp-policy", results.Row{Name: "both hooks, a datagram, 101 policies", Inputs: datagrams, Figure: (out + in) / 1000, Unit: "µs"}); err != nil {
		t.Error(err)
	}
}

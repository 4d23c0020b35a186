package datapath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/netns"
)

// enrolled is a lab with both pods captured and servers everywhere.
func enrolled(t *testing.T) *lab {
	l := newLab(t)
	l.cat.serve(appPort)
	l.ui.serve(appPort)
	l.outside.serve(appPort)
	l.ui.enroll()
	l.cat.enroll()
	check(t, l.dp.SetDestinations(l.destinations()))
	return l
}

func (h *host) addrs(port uint16) []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(h.v4, port), netip.AddrPortFrom(h.v6, port)}
}

// ticketsLeft counts the tickets in the kernel.
func (l *lab) ticketsLeft() (n int) {
	var f bpf.MeshFlow
	var k bpf.MeshTicket
	it := l.dp.kernel.Tickets.Iterate()
	for it.Next(&f, &k) {
		n++
	}
	check(l.t, it.Err())
	return n
}

func TestPlaintextFromOutsideReachesTheAgent(t *testing.T) {
	l := enrolled(t)
	for _, dst := range l.cat.addrs(appPort) {
		l.counted(map[string]int{"lookup_inbound": -1, "ticket_agent": 1, "ticket_used": 1, "lookup_ticket": -1}, func() {
			c, err := l.outside.dial(dst)
			check(t, err)
			defer c.Close()
			local, remote, err := seen(c)
			check(t, err)
			if me := addrOf(c.LocalAddr()); remote.Addr() != me.Addr() || remote.Port() == me.Port() || local != dst {
				t.Errorf("server sees %s as the client and %s as itself; client is %s, dialled %s", remote, local, me, dst)
			}
		})
	}
}

// kubelet's probes go straight to the application, under their own address and whatever the agent does.
func TestNodeProcessReachesTheApplication(t *testing.T) {
	l := enrolled(t)
	l.cat.listeners.Inbound.Close()
	for _, dst := range l.cat.addrs(appPort) {
		l.counted(map[string]int{"ticket_node": 1, "lookup_ticket": -1, "ticket_used": 1, "lookup_inbound": 0}, func() {
			c, err := l.dialFromNode(dst)
			check(t, err)
			defer c.Close()
			if _, remote, err := seen(c); err != nil || remote != addrOf(c.LocalAddr()) {
				t.Errorf("server sees %s, want %s (%v)", remote, addrOf(c.LocalAddr()), err)
			}
		})
	}
	if n := l.ticketsLeft(); n != 0 {
		t.Errorf("%d tickets are left", n)
	}
}

// A pod on the host network is in the node's namespace as kubelet is, and gets no free pass.
func TestHostNetworkPodGetsNoTicket(t *testing.T) {
	l := enrolled(t)
	for _, dst := range l.cat.addrs(appPort) {
		l.counted(map[string]int{"ticket_denied_host_pod": 1, "ticket_node": 0, "lookup_inbound": -1}, func() {
			check(t, l.node.Do(func() error {
				return l.asPodProcess(func() error {
					c, err := dialHere(plenty, dst)
					if err == nil {
						c.Close()
					}
					return err
				})
			}))
		})
	}
}

func TestAgentPortsCannotBeDialled(t *testing.T) {
	l := enrolled(t)
	for _, port := range []uint16{PortOutbound, PortInbound} {
		for _, from := range []struct {
			name string
			dial func(netip.AddrPort) (*net.TCPConn, error)
			to   []netip.AddrPort
		}{
			{"outside", func(d netip.AddrPort) (*net.TCPConn, error) { return l.outside.dial(d) }, l.cat.addrs(port)},
			{"the node", l.dialFromNode, l.cat.addrs(port)},
			{"the pod itself", func(d netip.AddrPort) (*net.TCPConn, error) { return l.cat.dial(d) }, l.cat.addrs(port)},
			{"the pod's loopback", func(d netip.AddrPort) (*net.TCPConn, error) { return l.cat.dial(d) },
				[]netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), netip.AddrPortFrom(netip.IPv6Loopback(), port)}},
		} {
			for _, dst := range from.to {
				l.counted(map[string]int{"lookup_drop_agent_port": -1, "lookup_outbound": 0, "lookup_inbound": 0}, func() {
					if c, err := from.dial(dst); err == nil {
						c.Close()
						t.Errorf("%s reached %s", from.name, dst)
					} else if !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("%s to %s: %v, want a refusal", from.name, dst, err)
					}
				})
			}
		}
	}
}

// The pod sends what comes in on to its own loopback (DNAT with route_localnet): around the agent, therefore
// nowhere. The packet is what such a rule makes of one.
func TestRedirectToLoopbackIsDropped(t *testing.T) {
	l := enrolled(t)
	check(t, l.cat.ns.Do(func() error {
		return errors.Join(writeSysctl("/proc", "net/ipv4/conf/all/route_localnet", "1"),
			writeSysctl("/proc", "net/ipv4/conf/eth0/route_localnet", "1"))
	}))
	packet := tcpPacket(netip.AddrPortFrom(l.outside.v4, 5555),
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), appPort), syn)
	setChecksums(packet)
	l.counted(map[string]int{"lookup_drop_redirected": -1, "lookup_self": 0}, func() {
		check(t, l.cat.receive(0x0800, packet))
	})
}

func TestTunnelPortReachesTheTunnelListener(t *testing.T) {
	l := enrolled(t)
	for _, dst := range l.cat.addrs(PortHBONE) {
		l.counted(map[string]int{"lookup_hbone": -1}, func() {
			c, err := l.outside.dial(dst)
			check(t, err)
			c.Close()
		})
	}
}

// The pod talks to itself without the agent.
func TestPodReachesItself(t *testing.T) {
	l := enrolled(t)
	for _, dst := range append(l.cat.addrs(appPort),
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), appPort), netip.AddrPortFrom(netip.IPv6Loopback(), appPort)) {
		l.counted(map[string]int{"connect_self": 1, "lookup_self": -1, "lookup_outbound": 0, "lookup_inbound": 0}, func() {
			c, err := l.cat.dial(dst)
			check(t, err)
			defer c.Close()
			if local, remote, err := seen(c); err != nil || local != dst || remote != addrOf(c.LocalAddr()) {
				t.Errorf("dial %s: %s %s %v", dst, local, remote, err)
			}
		})
	}
}

// A port nobody listens on answers at once, not after a time-out: the RST comes back over the local route.
func TestClosedPortIsRefusedAtOnce(t *testing.T) {
	l := enrolled(t)
	for _, src := range l.outside.addrs(34567) {
		dst := netip.AddrPortFrom(l.cat.v4, 9)
		if src.Addr().Is6() {
			dst = netip.AddrPortFrom(l.cat.v6, 9)
		}
		ctx, cancel := context.WithTimeout(context.Background(), plenty)
		start := time.Now()
		l.counted(map[string]int{"ticket_agent": 1, "ticket_unused": 1}, func() {
			if _, err := l.dp.DialInbound(ctx, l.cat.ns, src, dst); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s to %s: %v after %v", src, dst, err, time.Since(start))
			}
		})
		cancel()
	}
	if n := l.ticketsLeft(); n != 0 {
		t.Errorf("%d tickets are left", n)
	}
}

// The client's port is one that the application listens on: another is taken, the address stays.
func TestInboundPortInUse(t *testing.T) {
	l := enrolled(t)
	for _, src := range l.outside.addrs(appPort) {
		dst := l.cat.addrs(appPort)[0]
		if src.Addr().Is6() {
			dst = l.cat.addrs(appPort)[1]
		}
		c, err := polled(l.dp.DialInbound(context.Background(), l.cat.ns, src, dst))
		check(t, err)
		if _, remote, err := seen(c); err != nil || remote.Addr() != src.Addr() {
			t.Errorf("server sees %s, want %s (%v)", remote, src.Addr(), err)
		}
		c.Close()
	}
}

// One pod's flood of half-open connections uses up its own tickets, not its neighbour's.
func TestTicketsAreBoundedPerPod(t *testing.T) {
	l := enrolled(t)
	// A listener that accepts nothing: its queue fills, and the SYNs behind it stay without an answer.
	var ln int
	check(t, l.cat.as(func() (err error) {
		if ln, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(ln, &unix.SockaddrInet4{Port: 9000}), unix.Listen(ln, 0))
	}))
	defer unix.Close(ln)
	var fds []int
	l.counted(map[string]int{"ticket_denied_quota": -10}, func() {
		check(t, l.node.Do(func() error {
			for range 300 {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					return err
				}
				fds = append(fds, fd)
				if err := unix.Connect(fd, sockaddr(netip.AddrPortFrom(l.cat.v4, 9000))); err != nil && err != unix.EINPROGRESS {
					return err
				}
			}
			return nil
		}))
	})
	c, err := l.dialFromNode(l.ui.addrs(appPort)[0])
	check(t, err)
	if _, remote, err := seen(c); err != nil || remote != addrOf(c.LocalAddr()) {
		t.Errorf("a neighbour's probe came as %s (%v)", remote, err)
	}
	c.Close()
	for _, fd := range fds {
		unix.Close(fd)
	}
	eventually(t, "every ticket is gone with its connection, and off the pod's account", func() bool {
		var out int32
		check(t, l.dp.kernel.Handshakes.Lookup(l.dp.pods["uid-catalog"].pod.Slot, &out))
		return out == 0 && l.ticketsLeft() == 0
	})
}

func TestHalfCloseAndReset(t *testing.T) {
	l := enrolled(t)
	c, err := l.ui.dial(netip.AddrPortFrom(vip4, servicePort))
	check(t, err)
	defer c.Close()
	_, _, err = seen(c)
	check(t, err)
	go func() {
		c.Write(make([]byte, 1<<20))
		c.CloseWrite()
	}()
	c.SetReadDeadline(time.Now().Add(plenty))
	if n, err := io.Copy(io.Discard, c); n != 1<<20 || err != nil {
		t.Errorf("after our half-close the server still sent %d bytes (%v), want %d", n, err, 1<<20)
	}
}

// Without listeners nothing passes. A client outside is refused; a captured one waits, since the RST would
// have a source that is not local: its SYN is sent again, and answered should the listener come back.
func TestListenersGoneFailsClosed(t *testing.T) {
	l := enrolled(t)
	for _, h := range []*host{l.ui, l.cat} {
		h.closeListeners()
	}
	for _, try := range []struct {
		name string
		dial func() (*net.TCPConn, error)
		want error // nil: a time-out
	}{
		{"a captured client", func() (*net.TCPConn, error) { return l.ui.dialWithin(patience, netip.AddrPortFrom(l.cat.v4, appPort)) }, nil},
		{"a client outside", func() (*net.TCPConn, error) { return l.outside.dial(netip.AddrPortFrom(l.cat.v4, appPort)) }, unix.ECONNREFUSED},
	} {
		l.counted(map[string]int{"lookup_drop_no_listener": -1}, func() {
			if c, err := try.dial(); err == nil {
				c.Close()
				t.Errorf("%s got through", try.name)
			} else if !errors.Is(err, try.want) && !(try.want == nil && timedOut(err)) {
				t.Errorf("%s: %v, want %v", try.name, err, try.want)
			}
		})
	}
	c, err := l.ui.dial(netip.AddrPortFrom(l.outside.v4, appPort))
	check(t, err) // a destination outside the mesh needs no agent
	c.Close()
}

// Between the agent and an application of the same namespace nothing paces; between nodes the node's choice stands.
func TestSocketsOfApplicationsAreNotPaced(t *testing.T) {
	l := enrolled(t)
	control := func(fd uintptr) string {
		name, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		check(t, err)
		return name
	}
	c, err := polled(l.dp.DialInbound(context.Background(), l.cat.ns, l.outside.addrs(34569)[0], l.cat.addrs(appPort)[0]))
	check(t, err)
	defer c.Close()
	f, err := c.File()
	check(t, err)
	defer f.Close()
	if got := control(f.Fd()); got != "reno" {
		t.Errorf("to the application: %s", got)
	}
	ns, err := netns.New()
	check(t, err)
	defer ns.Close()
	own, err := Listen(ns)
	check(t, err)
	defer own.Close()
	if got := control(own.Outbound.Fd()); got != "reno" {
		t.Errorf("from the application: %s", got)
	}
	plain, err := ns.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	check(t, err)
	defer unix.Close(plain)
	for _, f := range []*os.File{own.Inbound, own.HBONE} {
		if got, want := control(f.Fd()), control(uintptr(plain)); got != want {
			t.Errorf("%s, from other nodes: %s, not %s", f.Name(), got, want)
		}
	}
}

// What an application has written to a peer that does not read is the node's memory: no more of it than towards a
// network, although an MSS of the loopback makes the kernel's buffer large. A lower bound of the application's stays.
func TestUnsentBytesAreBounded(t *testing.T) {
	l := enrolled(t)
	const own, most = 32 << 10, 512 << 10 // with what the peer's buffer takes
	stalls := func(what string, c *net.TCPConn) {
		t.Helper()
		check(t, c.SetWriteDeadline(time.Now().Add(time.Second)))
		if n, err := io.Copy(c, zeros{}); n == 0 || n > most || !timedOut(err) {
			t.Errorf("%s: %d bytes were taken: %v", what, n, err)
		}
	}
	for i, bound := range []int{0, own} {
		set := func(_, _ string, c syscall.RawConn) (err error) {
			if bound > 0 {
				err = c.Control(func(fd uintptr) {
					check(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, bound))
				})
			}
			return err
		}
		lowat := func(what string, c *net.TCPConn) {
			t.Helper()
			rc, err := c.SyscallConn()
			check(t, err)
			var n int
			check(t, rc.Control(func(fd uintptr) {
				n, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT)
				if cc, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION); cc != "reno" {
					t.Errorf("%s: congestion control is %s: %v", what, cc, err)
				}
			}))
			if err != nil || bound > 0 && n != bound || bound == 0 && (n <= own || n > most) {
				t.Errorf("%s: %d bytes may be unsent, where the application has said %d: %v", what, n, bound, err)
			}
		}
		for _, addr := range l.cat.addrs(appPort + 1 + uint16(i)) { // of one family with the client, and not
			var ln net.Listener
			check(t, l.cat.ns.Do(func() (err error) {
				lc := net.ListenConfig{Control: set}
				lc.SetMultipathTCP(bound == 0) // whose option MPTCP does not pass on
				ln, err = lc.Listen(t.Context(), "tcp", addr.String())
				return err
			}))
			defer ln.Close()
			agents, err := polled(l.dp.DialInbound(t.Context(), l.cat.ns, netip.AddrPortFrom(l.outside.v4, 0), addr))
			check(t, err)
			defer agents.Close()
			c, err := ln.Accept()
			check(t, err)
			defer c.Close()
			lowat("accepted", c.(*net.TCPConn))
			stalls("accepted", c.(*net.TCPConn))
		}
		var c net.Conn
		check(t, l.ui.as(func() (err error) {
			c, err = (&net.Dialer{Timeout: plenty, Control: set}).Dial("tcp", netip.AddrPortFrom(vip4, servicePort).String())
			return err
		}))
		defer c.Close()
		lowat("connected", c.(*net.TCPConn))
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Whatever way an application connects to another pod of the node, it goes there directly, and both ends see the true
// addresses.
func TestEveryKindOfDirectClient(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeKernel, rule(mesh.Allow, "a", account("ui")))
	for _, c := range clients {
		for _, dst := range l.cat.addrs(appPort) {
			t.Run(c.name+"/"+dst.Addr().String(), func(t *testing.T) {
				want := map[string]int{"connect_direct": 1, "connect_captured": 0, "lookup_direct": -1, "guard_direct": -1}
				if strings.Contains(c.name, "forged") { // takes itself to the agent
					want = map[string]int{"connect_direct": 1, "lookup_direct": 0, "lookup_outbound": -1}
				}
				l := l.in(t)
				l.counted(want, func() {
					fd, err := c.run(l.ui, dst)
					if fd > 0 {
						defer unix.Close(fd)
					}
					if errors.Is(err, unix.EPROTONOSUPPORT) {
						t.Skip("this kernel has no such protocol")
					}
					if err != nil {
						t.Fatalf("connect: %v", err)
					}
					local, remote, err := told(fd)
					if err != nil {
						t.Fatal(err)
					}
					me, _ := unix.Getsockname(fd)
					peer, _ := unix.Getpeername(fd)
					if fromSockaddr(peer) != dst || local != dst || remote != fromSockaddr(me) {
						t.Errorf("client: %s to %s; server: %s from %s; asked for %s", fromSockaddr(me), fromSockaddr(peer), local, remote, dst)
					}
				})
			})
		}
	}
	eventually(t, "no ticket and no direct connection is left", func() bool { return l.ticketsLeft() == 0 && len(must(l.dp.directs())) == 0 })
}

// What passes between two pods directly is what passes between any two: half-close, resets and back-pressure.
func TestDirectFidelity(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto)
	dial := func() *net.TCPConn {
		t.Helper()
		var c *net.TCPConn
		l.counted(map[string]int{"connect_direct": 1}, func() {
			var err error
			c, err = l.ui.dial(l.cat.addrs(appPort)[0])
			check(t, err)
			_, _, err = seen(c)
			check(t, err)
		})
		t.Cleanup(func() { c.Close() })
		return c
	}
	t.Run("half-close", func(t *testing.T) {
		c := dial()
		go func() {
			c.Write(make([]byte, 1<<20))
			c.CloseWrite()
		}()
		c.SetReadDeadline(time.Now().Add(plenty))
		if n, err := io.Copy(io.Discard, c); n != 1<<20 || err != nil {
			t.Errorf("after our half-close the server still sent %d bytes (%v), want %d", n, err, 1<<20)
		}
	})
	t.Run("back-pressure", func(t *testing.T) {
		c := dial() // the server echoes, and nobody reads
		c.SetWriteDeadline(time.Now().Add(patience))
		sent, err := 0, error(nil)
		for err == nil && sent < 1<<30 {
			var n int
			n, err = c.Write(make([]byte, 1<<20))
			sent += n
		}
		if !timedOut(err) {
			t.Errorf("after %d bytes that nobody took: %v", sent, err)
		}
	})
	t.Run("a closed port", func(t *testing.T) {
		l.counted(map[string]int{"connect_direct": 1, "ticket_unused": 1, "lookup_direct": -1}, func() {
			if _, err := l.ui.dial(l.cat.addrs(9)[0]); !errors.Is(err, unix.ECONNREFUSED) {
				t.Error(err)
			}
		})
	})
	t.Run("reset", func(t *testing.T) {
		var ln net.Listener
		check(t, l.cat.as(func() (err error) {
			ln, err = net.Listen("tcp", ":7000")
			return err
		}))
		defer ln.Close()
		for name, reset := range map[string]func(client, server *net.TCPConn) (other *net.TCPConn){
			"by the client": func(c, s *net.TCPConn) *net.TCPConn { c.SetLinger(0); c.Close(); return s },
			"by the server": func(c, s *net.TCPConn) *net.TCPConn { s.SetLinger(0); s.Close(); return c },
		} {
			c, err := l.ui.dial(l.cat.addrs(7000)[0])
			check(t, err)
			s, err := ln.Accept()
			check(t, err)
			other := reset(c, s.(*net.TCPConn))
			other.SetReadDeadline(time.Now().Add(plenty))
			if _, err := other.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: the other end reads %v, want a reset", name, err)
			}
			other.Close()
		}
	})
	eventually(t, "no ticket is left", func() bool { return l.ticketsLeft() == 0 })
}

// deferred is a socket whose connect() has been decided and whose SYN leaves with the first write.
func (h *host) deferred(dst netip.AddrPort) (fd int) {
	h.lab.t.Helper()
	check(h.lab.t, h.as(func() (err error) {
		if err := writeSysctl("/proc", "net/ipv4/tcp_fastopen", "5"); err != nil { // for clients, without a cookie
			return err
		}
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(patience))
		return errors.Join(unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv), unix.Connect(fd, sockaddr(dst)))
	}))
	h.lab.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// Between connect() and its SYN the policy changes: the SYN is decided by the new one.
func TestTicketOfAnOlderPolicy(t *testing.T) {
	l := enrolled(t)
	dst := l.cat.addrs(appPort)[0]
	for _, c := range []struct {
		name   string
		policy *mesh.Policy
		allow  bool
	}{
		{"another that allows", rule(mesh.Deny, "d", account("x")), true},
		{"one that denies", rule(mesh.Deny, "d", account("ui")), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			l.setPolicies(mesh.SameNodeAuto)
			fd := l.ui.deferred(dst)
			l.setPolicies(mesh.SameNodeAuto, c.policy)
			want := map[string]int{"lookup_direct": -1, "lookup_denied_late": 0}
			if !c.allow {
				want = map[string]int{"lookup_direct": 0, "lookup_denied_late": -1}
			}
			l.counted(want, func() {
				_, err := unix.Write(fd, []byte("x"))
				err = connected(fd, err)
				if c.allow && err != nil || !c.allow && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EPIPE) {
					t.Errorf("write: %v, want success %v", err, c.allow)
				}
			})
		})
	}
}

// The pod that a connection was let go to is not there any more: its address may be anybody's.
func TestDirectOnlyToItsPod(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto)
	fd := l.ui.deferred(l.cat.addrs(appPort)[0])
	check(t, l.dp.Release("uid-catalog"))
	l.counted(map[string]int{"guard_drop_direct": -1, "guard_direct": 0}, func() {
		check(t, unix.SetNonblock(fd, true))
		unix.Write(fd, []byte("x"))
	})
}

// A ticket is for one connection: the same four numbers, on the wire again, are plaintext of nobody known.
func TestTicketOfADirectConnectionIsUsedUp(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto, rule(mesh.Allow, "a", account("ui")))
	conn, err := l.ui.dial(l.cat.addrs(appPort)[0])
	check(t, err)
	_, _, err = seen(conn)
	check(t, err)
	me := addrOf(conn.LocalAddr())
	conn.SetLinger(0)
	conn.Close()
	eventually(t, "the connection is gone", func() bool { return len(must(l.dp.directs())) == 0 })
	packet := tcpPacket(me, l.cat.addrs(appPort)[0], syn)
	setChecksums(packet)
	l.counted(map[string]int{"lookup_denied": 1, "lookup_direct": 0}, func() { check(t, l.cat.receive(0x0800, packet)) })
}

// The identity is that of the pod whose namespace the socket is in. An address that a pod gives itself does not make it
// another pod.
func TestAddressIsNoIdentity(t *testing.T) {
	l := enrolled(t)
	l.outside.listen()
	check(t, l.dp.Enroll(l.outside.pod()))
	// The pod outside claims to be the ui, which may.
	b := mesh.NewBuilder(l.snapshot(mesh.SameNodeAuto, rule(mesh.Allow, "a", account("ui"))))
	b.PutWorkload(l.outside.workload())
	check(t, l.dp.SetPolicies(b.Commit(2)))
	check(t, l.outside.ns.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return addAddr(eth0, l.ui.v4)
	}))
	dst := l.cat.addrs(appPort)[0]
	for _, src := range []netip.Addr{{}, l.ui.v4} {
		l.counted(map[string]int{"connect_denied": 1, "connect_direct": 0}, func() {
			check(t, l.outside.as(func() error {
				refused, err := try(src, dst, true)
				if !refused || err != nil {
					t.Errorf("as %v: refused %v, %v", src, refused, err)
				}
				return nil
			}))
		})
	}
	// One that may go directly, and binds to its neighbour's address: no ticket, and the guard drops what it sends, its
	// question for the gateway's address before all.
	b = mesh.NewBuilder(l.snapshot(mesh.SameNodeAuto))
	b.PutWorkload(l.outside.workload())
	check(t, l.dp.SetPolicies(b.Commit(3)))
	l.counted(map[string]int{"guard_drop_neighbour": -1, "ticket_direct": 0, "lookup_direct": 0}, func() {
		check(t, l.outside.as(func() error {
			_, err := try(l.ui.v4, dst, false)
			return err
		}))
	})
}

// One client's half-open connections take neither its neighbours' tickets nor its server's; beyond its own they go by the
// agent.
func TestDirectQuota(t *testing.T) {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeAuto)
	var ln int
	check(t, l.cat.as(func() (err error) {
		if ln, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); err != nil {
			return err
		}
		return errors.Join(unix.Bind(ln, &unix.SockaddrInet4{Port: 9000}), unix.Listen(ln, 0))
	}))
	defer unix.Close(ln)
	var fds []int
	l.counted(map[string]int{"connect_captured": -20, "ticket_denied_quota": 0, "ticket_denied_full": 0}, func() {
		check(t, l.ui.as(func() error {
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
	l.counted(map[string]int{"ticket_node": 1}, func() {
		c, err := l.dialFromNode(l.cat.addrs(appPort)[0])
		check(t, err)
		c.Close()
	})
	for _, fd := range fds {
		unix.Close(fd)
	}
	eventually(t, "every ticket is gone with its connection, and off the client's account", func() bool {
		var out int32
		check(t, l.dp.kernel.Handshakes.Lookup(l.dp.kernel.Pods.MaxEntries()+l.dp.pods["uid-ui"].pod.Slot, &out))
		var k bpf.MeshFlow
		var v bpf.MeshDirect
		left := 0
		for it := l.dp.kernel.Directs.Iterate(); it.Next(&k, &v); {
			if v.Established == 0 {
				left++
			}
		}
		return out == 0 && left == 0
	})
}

// The policy is changed again and again under load: whatever is begun after SetPolicies has returned is decided by what
// it said, and nobody sees anything but that or a refusal.
func TestFlipsLeaveNothingStale(t *testing.T) {
	l := enrolled(t)
	dst := l.cat.addrs(appPort)[0]
	allow, deny := rule(mesh.Allow, "p", account("ui")), rule(mesh.Deny, "p", account("ui"))
	l.setPolicies(mesh.SameNodeAuto, allow)
	stop, done := make(chan struct{}), make(chan struct{})
	var odd atomic.Pointer[error]
	go func() {
		defer close(done)
		l.ui.as(func() error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				if _, err := try(netip.Addr{}, dst, true); err != nil && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
					odd.CompareAndSwap(nil, &err)
				}
			}
		})
	}()
	flips, stale := 400, 0
	if testing.Short() {
		flips = 50
	}
	check(t, l.ui.as(func() error {
		for i := range flips {
			p := allow
			if i%2 == 0 {
				p = deny
			}
			l.setPolicies(mesh.SameNodeAuto, p)
			for range 3 {
				refused, err := try(netip.Addr{}, dst, true)
				if err != nil {
					return fmt.Errorf("flip %d: %w", i, err)
				}
				if refused != (p == deny) {
					stale++
				}
			}
		}
		return nil
	}))
	close(stop)
	<-done
	if stale != 0 {
		t.Errorf("%d stale decisions in %d flips", stale, flips)
	}
	if err := odd.Load(); err != nil {
		t.Errorf("neither a connection nor a refusal nor a reset: %v", *err)
	}
	if c := must(l.dp.Counters()); c["decide_unknown"] != 0 || c["connect_captured"] != 0 {
		t.Errorf("%d were not decided, %d went by the agent", c["decide_unknown"], c["connect_captured"])
	}
}

package enroll

import (
	"errors"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// A connection from before enrolment is subject to policy as any other, also when the agent that saw it is gone.
func TestPoliciesHoldForConnectionsFromBeforeEnrolmentAlsoAfterARestart(t *testing.T) {
	l := newLab(t)
	d, h, path := l.pod(1)
	_, peer, path2 := l.pod(2)
	name, name2 := path[len("/run/netns/"):], path2[len("/run/netns/"):]
	run(t, "ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", name2)
	for ns, addr := range map[string]string{name: "10.78.1.1/24", name2: "10.78.1.2/24"} {
		run(t, "ip", "-n", ns, "link", "set", "eth0", "up")
		run(t, "ip", "-n", ns, "addr", "add", addr, "dev", "eth0")
	}
	d.Addrs = []netip.Addr{netip.MustParseAddr("10.78.1.1")}
	connect := map[uint16]net.Conn{}
	for _, port := range []uint16{8080, 8081} {
		at := netip.AddrPortFrom(d.Addrs[0], port)
		ln := listen(t, h, at)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				t.Cleanup(func() { c.Close() })
			}
		}()
		c, err := dial(t, peer, at.String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		connect[port] = c
	}

	var denied atomic.Uint32 // a port
	policy := func(c *Config) {
		c.Allowed = func(workload string, client, server netip.AddrPort) (string, bool) {
			if workload != d.WorkloadUID || client.Addr() != netip.MustParseAddr("10.78.1.2") || server.Addr() != d.Addrs[0] {
				t.Errorf("asked about %s to %s of %q", client, server, workload)
			}
			return "because", uint32(server.Port()) != denied.Load()
		}
	}
	n := l.start(policy)
	l.process(100, d, path)
	n.SetPods([]LocalPod{d}, true)
	l.eventually("two connections are counted", func() bool { s := n.status(d.UID); return s.Redirection == Enabled && s.OpenConnections == 2 })
	check := func(alive ...uint16) {
		t.Helper()
		if err := n.Recheck(); err != nil {
			t.Fatal(err)
		}
		for port, c := range connect {
			is := !gone(c)
			want := false
			for _, p := range alive {
				want = want || p == port
			}
			if is != want {
				t.Errorf("the connection to %d lives: %v, want %v", port, is, want)
			}
		}
	}
	check(8080, 8081)
	denied.Store(8080)
	check(8081)
	n.stop()
	n = l.start(policy)
	check(8081)
	l.becomes(n, d.UID, Enabled)
	denied.Store(8081)
	check()
	denied.Store(0)
	check()
}

// A captured connection is told by its mark, also where the mark says which endpoint of a Service was drawn.
func TestCapturedConnectionsAreNotFromBefore(t *testing.T) {
	l := newLab(t)
	_, h, path := l.pod(1)
	name := path[len("/run/netns/"):]
	run(t, "ip", "-n", name, "link", "set", "lo", "up")
	run(t, "ip", "-n", name, "addr", "add", "10.78.1.1/32", "dev", "lo")
	run(t, "ip", "-n", name, "addr", "add", "10.78.1.2/32", "dev", "lo")
	ln := listen(t, h, netip.MustParseAddrPort("10.78.1.2:8080"))
	marks := []int{0, datapath.Mark, datapath.Mark | 7<<12}
	for _, mark := range marks {
		err := h.Do(func() error {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 78, 1, 1)}, Control: func(_, _ string, c syscall.RawConn) (err error) {
				cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark) })
				return errors.Join(cerr, err)
			}}
			c, err := d.Dial("tcp", ln.Addr().String())
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		served, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { served.Close() })
	}
	ln.Close() // what listens would make the servers' ends count
	dg, err := netns.OpenDiag(h)
	if err != nil {
		t.Fatal(err)
	}
	defer dg.Close()
	server := netip.MustParseAddr("10.78.1.2")
	open, err := uncaptured(dg, func(a netip.Addr) bool { return a == server })
	if err != nil || len(open) != 1 || open[0].Mark != 0 {
		t.Fatalf("%v, %v: want the one without a mark of capture", open, err)
	}
}

func TestCookiesAreKeptWhole(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		cookies := map[uint64]bool{}
		for range rnd.IntN(1000) {
			cookies[rnd.Uint64()>>rnd.IntN(64)] = true
		}
		raw := encodeCookies(cookies)
		got, err := decodeCookies(raw)
		if err != nil || !maps.Equal(got, cookies) {
			t.Fatalf("%d of %d came back: %v", len(got), len(cookies), err)
		}
	}
	many := map[uint64]bool{}
	for i := range 100_000 {
		many[uint64(1<<30+7*i)] = true
	}
	if raw := encodeCookies(many); len(raw) > 100_010 {
		t.Errorf("%d bytes for 100,000 cookies", len(raw))
	}
	for _, bad := range []string{"\x80", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"} {
		if _, err := decodeCookies([]byte(bad)); err == nil {
			t.Errorf("%q was taken for cookies", bad)
		}
	}
}

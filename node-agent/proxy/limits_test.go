package proxy

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

// An agent that runs out of descriptors resets new connections at once, serves those it has, and takes new ones as
// soon as it can.
func TestWithoutDescriptorsNewConnectionsAreReset(t *testing.T) {
	var lim unix.Rlimit
	check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &lim))
	low := lim
	low.Cur = 800
	check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)
	l := newLab(t)
	cat := l.pods["catalog-1"]
	cat.listen(appPort, func(c *net.TCPConn) { io.WriteString(c, "!"); echo(c) })
	to := netip.AddrPortFrom(cat.v4, appPort)
	hello := func() *net.TCPConn {
		c, err := l.pods["ui"].dial(to)
		check(t, err)
		c.SetDeadline(time.Now().Add(plenty))
		_, err = io.ReadFull(c, make([]byte, 1))
		check(t, err)
		return c
	}
	var open []*net.TCPConn
	for range 20 {
		c := hello()
		defer c.Close()
		open = append(open, c)
	}
	before := leftover()

	const clients = 2000 // each of which takes three descriptors here
	crowd, err := l.pods["ui"].start(order{To: to.String(), Clients: clients})
	check(t, err)
	a, err := crowd.report()
	check(t, err)
	t.Logf("of %d clients %d were served and %d refused, the slowest after %s; %d descriptors of %d are open", clients, a.Served, a.Refused, a.Slowest, leftover().files, low.Cur)
	failures := 0
	if a.Served < 50 || a.Refused < clients/2 || a.Slowest > plenty {
		failures++
		t.Errorf("%+v, want some served and the others refused soon", a)
	}
	l.spared(open)
	_, err = crowd.end()
	check(t, err)
	eventually(t, "the descriptors are given back", func() bool { return leftover().files <= before.files+16 }) // tunnels stay for a while
	hello().Close()
	check(t, results.Record("limits",
		results.Row{Name: "too few descriptors: new connections refused, the slowest after", Inputs: a.Refused, Failures: failures, Figure: float64(a.Slowest.Milliseconds()), Unit: "ms"},
		results.Row{Name: "too few descriptors: open connections that go on", Inputs: len(open), Failures: 0, Figure: float64(len(open)), Unit: ""}))
}

// Who was cut off for a flood makes no new tunnels for a while, and longer each time; others at its address do.
func TestPenalties(t *testing.T) {
	p := penalties{of: map[party]penalty{}}
	addr := netip.MustParseAddr("10.0.0.1")
	now := time.Unix(1000, 0)
	bad, good := party{stranger, addr}, party{catalogID, addr}
	for _, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		p.impose(bad, now)
		if left := p.left(bad, now); left != want*time.Second {
			t.Errorf("refused for %s, want %d s", left, want)
		}
		now = now.Add(want * time.Second)
		if left := p.left(bad, now); left > 0 {
			t.Errorf("still refused for %s", left)
		}
	}
	if left := p.left(good, now.Add(-time.Second)); left > 0 {
		t.Errorf("another identity is refused for %s", left)
	}
	now = now.Add(penaltyOver + time.Second)
	p.impose(bad, now)
	if left := p.left(bad, now); left != penaltyFirst {
		t.Errorf("refused for %s after it was forgotten", left)
	}
	for i := range 2 * penaltyMax {
		p.impose(party{stranger, netip.AddrFrom4([4]byte{1, 2, byte(i >> 8), byte(i)})}, now)
	}
	if len(p.of) > penaltyMax {
		t.Errorf("%d are remembered", len(p.of))
	}
}

var catalogID = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "catalog"}

// When too many handshakes are under way, the oldest of whoever began most is ended.
func TestTooManyHandshakes(t *testing.T) {
	h := handshakes{from: map[netip.Addr][]*net.TCPConn{}}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer ln.Close()
	conn := func() *net.TCPConn {
		c, err := net.Dial("tcp", ln.Addr().String())
		check(t, err)
		t.Cleanup(func() { c.Close() })
		s, err := ln.Accept()
		check(t, err)
		t.Cleanup(func() { s.Close() })
		return s.(*net.TCPConn)
	}
	many, one := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	honest := conn()
	h.begin(one, honest)
	var all []*net.TCPConn
	for range maxHandshakes + 10 {
		c := conn()
		all = append(all, c)
		h.begin(many, c)
	}
	if !h.end(one, honest) {
		t.Error("the only handshake of a peer was ended")
	}
	for i, c := range all {
		if ended := !h.end(many, c); ended != (i <= 10) {
			t.Errorf("handshake %d of %d: ended %t", i, len(all), ended)
		}
	}
	if h.n != 0 || len(h.from) != 0 {
		t.Errorf("%d are left", h.n)
	}
}

// An agent whose memory for bytes on their way is used up resets the connections that hold most, and carries the
// others.
func TestWithoutMemoryWhatHoldsMostIsReset(t *testing.T) {
	const memory = 2 << 20
	l := newLab(t, configured(func(c *Config) { c.Memory = memory }))
	cat := l.pods["catalog-1"]
	cat.listen(appPort, func(c *net.TCPConn) { io.WriteString(c, "!"); echo(c) })
	deaf := make(chan struct{})
	cat.listen(deafPort, func(*net.TCPConn) { <-deaf })
	t.Cleanup(func() { close(deaf) })
	lively, err := l.pods["load"].dial(netip.AddrPortFrom(cat.v4, appPort))
	check(t, err)
	defer lively.Close()
	_, err = io.ReadFull(lively, make([]byte, 1))
	check(t, err)

	b := l.nodes["node-b"].proxy
	resets := 0
	ended := make(chan bool, 100)
	const n = 60
	for range n {
		c, err := l.pods["ui"].dial(netip.AddrPortFrom(cat.v4, deafPort))
		check(t, err)
		defer c.Close()
		go func() {
			c.SetDeadline(time.Now().Add(plenty))
			_, err := io.Copy(c, zeros{})
			ended <- err != nil && !isTimeout(err)
		}()
		time.Sleep(20 * time.Millisecond)
		if held := b.memory.Held(); held > 16*memory {
			t.Fatalf("%d bytes are held", held)
		}
	}
	for i := 0; i < n && resets == 0; i++ {
		if <-ended {
			resets++
		}
	}
	exchanges(t, lively, 100)
	t.Logf("%d connections stood still, the first was reset with %d bytes held", n, b.memory.Held())
	if resets == 0 {
		t.Error("no connection was reset")
	}
}

// spared holds that open connections go on while new ones are refused, and that these are counted.
func (l *lab) spared(open []*net.TCPConn) {
	l.t.Helper()
	for _, c := range open {
		exchanges(l.t, c, 3)
	}
	if n := l.nodes["node-a"].metric("warren_connections_total", map[string]string{"outcome": "overloaded"}); n < 1 {
		l.t.Error("no connection is counted as one too many")
	}
}

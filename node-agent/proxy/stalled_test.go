package proxy

import (
	"io"
	"net"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/results"
)

// exchanges are how long n exchanges of one byte take on one connection.
func exchanges(t *testing.T, c net.Conn, n int) []time.Duration {
	t.Helper()
	took := make([]time.Duration, n)
	b := make([]byte, 1)
	for i := range took {
		began := time.Now()
		c.SetDeadline(began.Add(plenty))
		_, err := c.Write(b)
		if err == nil {
			_, err = io.ReadFull(c, b)
		}
		check(t, err)
		took[i] = time.Since(began)
	}
	return took
}

func quantile(all []time.Duration, q float64) time.Duration {
	all = slices.Sorted(slices.Values(all))
	return all[int(q*float64(len(all)-1))]
}

// A connection whose reader has stopped does not hold up those that share its tunnel, in either direction.
func TestAStalledReaderHoldsUpNobody(t *testing.T) {
	n, turns := 500, 4
	if *long {
		n, turns = 20_000, 10
	}
	l := newLab(t)
	cat := l.pods["catalog-1"]
	cat.listen(appPort, echo)
	deaf := make(chan struct{})
	cat.listen(deafPort, func(*net.TCPConn) { <-deaf })
	cat.listen(sourcePort, func(c *net.TCPConn) { io.Copy(c, zeros{}) })
	t.Cleanup(func() { close(deaf) })
	open := func(port uint16) *net.TCPConn {
		c, err := l.pods["ui"].dial(netip.AddrPortFrom(cat.v4, port))
		check(t, err)
		return c
	}
	lively := open(appPort)
	defer lively.Close()
	exchanges(t, lively, 100)
	for _, tc := range []struct {
		name  string
		stall func() *net.TCPConn
	}{
		{"a server that does not read", func() *net.TCPConn {
			c := open(deafPort)
			c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			io.Copy(c, zeros{})
			return c
		}},
		{"a client that does not read", func() *net.TCPConn {
			c := open(sourcePort)
			time.Sleep(300 * time.Millisecond)
			return c
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var with, without []time.Duration
			limit := 20.0 // of a few thousand on a busy machine; who is held up waits for as long as the other stands still
			if *long {
				limit = 2
			}
			ratio := func() float64 { return float64(quantile(with, 0.99)) / float64(quantile(without, 0.99)) }
			for i := 0; i < turns || i < 5*turns && ratio() > limit; i++ {
				without = append(without, exchanges(t, lively, n)...)
				stalled := tc.stall()
				with = append(with, exchanges(t, lively, n)...)
				abort(stalled)
			}
			if conns, _ := l.nodes["node-a"].proxy.Tunnels(); conns != 1 {
				t.Errorf("%d tunnels: the connections do not share one", conns)
			}
			t.Logf("p50 %s with and %s without, p99 %s and %s", quantile(with, 0.5), quantile(without, 0.5), quantile(with, 0.99), quantile(without, 0.99))
			failures := 0
			if r := ratio(); r > limit {
				failures++
				t.Errorf("p99 beside it is %.1f times that without", r)
			}
			check(t, results.Record("stalled-streams",
				results.Row{Name: tc.name + ": p99 of an exchange on the same tunnel", Inputs: len(with), Failures: failures, Figure: ratio(), Unit: "times that without"}))
		})
	}
	l.calmBut(t, 1)
}

// Thousands of connections that stand still, in the middle of as much as they could send, cost no more memory than
// was set aside for them, and others go on.
func TestManyStalledConnectionsAreBounded(t *testing.T) {
	n := 200
	if *long {
		var lim unix.Rlimit
		check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &lim))
		n = min(5000, int(lim.Max-1000)/7)
	}
	const memory = 32 << 20
	for _, tc := range []struct {
		name string
		port uint16
	}{{"servers that do not read", deafPort}, {"clients that do not read", sourcePort}} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t, configured(func(c *Config) { c.Memory = memory }))
			cat := l.pods["catalog-1"]
			cat.listen(appPort, echo)
			deaf := make(chan struct{})
			cat.listen(deafPort, func(*net.TCPConn) { <-deaf })
			cat.listen(sourcePort, func(c *net.TCPConn) { io.Copy(c, zeros{}) })
			t.Cleanup(func() { close(deaf) })
			lively, err := l.pods["load"].dial(netip.AddrPortFrom(cat.v4, appPort))
			check(t, err)
			defer lively.Close()
			exchanges(t, lively, 100)

			settled := func() int64 {
				runtime.GC()
				debug.FreeOSMemory()
				return resident()
			}
			before := settled()
			var wg sync.WaitGroup
			conns := make([]*net.TCPConn, n)
			slots := make(chan struct{}, 16)
			for i := range conns {
				slots <- struct{}{}
				wg.Go(func() {
					defer func() { <-slots }()
					c, err := l.pods["ui"].dial(netip.AddrPortFrom(cat.v4, tc.port))
					if err != nil {
						t.Error(err)
						return
					}
					conns[i] = c
					if tc.port == deafPort { // as much as it takes
						buf := make([]byte, 256<<10)
						for {
							c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
							if _, err := c.Write(buf); err != nil {
								break
							}
						}
					}
				})
			}
			wg.Wait()
			time.Sleep(300 * time.Millisecond)
			peak := settled() - before
			latency := quantile(exchanges(t, lively, 300), 0.5)
			// Each has its goroutines and sockets: two of the agents', and those of the applications.
			per := (peak - 2*memory) / int64(n)
			t.Logf("%d connections: %d MiB, %d KiB each beyond what is set aside on both nodes; an exchange beside them takes %s", n, peak>>20, per>>10, latency)
			failures := 0
			if per > 48<<10 && !raceEnabled {
				failures++
				t.Errorf("%d MiB for %d connections that stand still", peak>>20, n)
			}
			for _, c := range conns {
				if c != nil {
					abort(c)
				}
			}
			l.calmBut(t, 1)
			check(t, results.Record("stalled-streams",
				results.Row{Name: tc.name + ": memory of both agents and the applications, 32 MiB set aside on each node", Inputs: n, Failures: failures, Figure: float64(peak >> 20), Unit: "MiB"}))
		})
	}
}

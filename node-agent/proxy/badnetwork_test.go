package proxy

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/results"
)

// Between nodes packets are lost, doubled, delayed and overtaken by others; what applications say arrives all the
// same, and everything ends.
func TestBytesArriveOverABadNetwork(t *testing.T) {
	n, parallel, most := 25, 8, 300_000
	switch {
	case *long:
		n, parallel, most = 1000, 16, 4<<20
	case raceEnabled:
		n = 12
	}
	b := &badLink{}
	l := newLab(t, overBadLink(b))
	p := newParlour(most, 90*time.Second)
	for _, name := range []string{"catalog-1", "catalog-2"} {
		l.pods[name].listen(appPort, p.host)
	}
	for _, tc := range []struct {
		name string
		weather
		mtu       bool // changes all the time
		breakdown bool // the link is down for up to a second now and then
	}{
		{name: "1 % loss", weather: weather{loss: 0.01, delay: time.Millisecond}},
		{name: "5 % loss", weather: weather{loss: 0.05, delay: time.Millisecond}},
		{name: "a quarter overtaken", weather: weather{reorder: 0.25, delay: time.Millisecond}},
		{name: "10 % doubled", weather: weather{duplicate: 0.1}},
		{name: "20 ms and up to 20 more", weather: weather{delay: 20 * time.Millisecond, jitter: 20 * time.Millisecond}},
		{name: "2 MB/s", weather: weather{rate: 2 << 20}},
		{name: "MTU changing from 1500 to 1280", mtu: true},
		{name: "interruptions of up to a second", breakdown: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b.set(tc.weather)
			defer b.set(weather{})
			stop := make(chan struct{})
			var changes sync.WaitGroup
			defer changes.Wait()
			defer close(stop)
			changes.Go(func() {
				pause := time.Second
				for i := 0; tc.mtu || tc.breakdown; i++ {
					select {
					case <-stop:
						if tc.mtu {
							_ = errors.Join(l.nodes["node-a"].setMTU(1500), l.nodes["node-b"].setMTU(1500))
						}
						return
					case <-time.After(pause):
					}
					if tc.mtu {
						mtu := []int{1280, 1500, 1400, 1500}[i%4]
						if err := errors.Join(l.nodes["node-a"].setMTU(mtu), l.nodes["node-b"].setMTU(mtu)); err != nil {
							t.Error(err)
						}
					} else {
						b.set(weather{down: i%2 == 0})
						// No rhythm: a retransmission after 1, 2 and 4 s would find the link down each time, and a peer
						// that nothing comes from for that long is given up.
						if pause = time.Second + rand.N(2*time.Second); i%2 == 0 {
							pause = 200*time.Millisecond + rand.N(800*time.Millisecond)
						}
					}
				}
			})
			passed, lost := b.counts()
			failed := l.talks(t, p, n, parallel)
			p2, l2 := b.counts()
			t.Logf("%d packets passed, %d were lost", p2-passed, l2-lost)
			l.calm(t)
			check(t, results.Record("bad-networks", results.Row{Name: "talks between nodes: " + tc.name, Inputs: n, Failures: failed, Figure: float64(l2 - lost), Unit: "packets lost"}))
		})
	}
}

// talks holds n talks between the nodes and returns how many were not as agreed.
func (l *lab) talks(t *testing.T, p *parlour, n, parallel int) int {
	var next, failed atomic.Int64
	first := rand.Uint64()
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				from := l.pods[[]string{"ui", "load"}[i%2]]
				if err := p.converse(from, service(i%3 == 0), first+uint64(i)); err != nil && failed.Add(1) <= 5 {
					t.Errorf("%v", err)
				}
			}
		})
	}
	wg.Wait()
	return int(failed.Load())
}

// A node that cannot be reached any more, or that only short packets reach and nobody says so: connections end, at
// both ends, instead of hanging, and when the way is free again new ones are served at once.
func TestConnectionsToALostNodeEnd(t *testing.T) {
	n := 20
	if *long {
		n = 500
	}
	b := &badLink{}
	l := newLab(t, overBadLink(b))
	ends := make(chan error, n)
	cat := l.pods["catalog-1"]
	cat.listen(appPort, func(c *net.TCPConn) {
		io.WriteString(c, "hello")
		_, err := io.Copy(io.Discard, c)
		ends <- err
	})
	open := func() []*net.TCPConn {
		conns := make([]*net.TCPConn, n)
		for i := range conns {
			c, err := l.pods["ui"].dial(netip.AddrPortFrom(cat.v4, appPort))
			check(t, err)
			c.SetReadDeadline(time.Now().Add(plenty))
			_, err = io.ReadFull(c, make([]byte, 5))
			check(t, err)
			conns[i] = c
		}
		return conns
	}
	const patience = 60 * time.Second
	for _, tc := range []struct {
		name string
		weather
		writing bool
	}{
		{"no packet passes, connections at rest", weather{down: true}, false},
		{"no packet passes, clients writing", weather{down: true}, true},
		{"packets over 600 bytes vanish, clients writing", weather{hole: 600}, true},
	} {
		if !*long && tc.hole == 0 { // ten seconds each
			continue
		}
		t.Run(tc.name, func(t *testing.T) {
			conns := open()
			b.set(tc.weather)
			defer b.set(weather{})
			began := time.Now()
			failures := 0
			var mu sync.Mutex
			var wg sync.WaitGroup
			for _, c := range conns {
				wg.Go(func() {
					defer c.Close()
					c.SetDeadline(began.Add(patience))
					said := make(chan error, 1)
					if tc.writing {
						go func() { _, err := io.Copy(c, zeros{}); said <- err }()
					} else {
						said <- nil
					}
					_, err := c.Read(make([]byte, 1))
					if e := <-said; e != nil { // a socket tells of its reset once
						err = e
					}
					if err == io.EOF || isTimeout(err) {
						mu.Lock()
						failures++
						mu.Unlock()
						t.Errorf("the client hears %v, want a reset", err)
					}
				})
			}
			wg.Wait()
			clients := time.Since(began)
			deadline := time.After(patience)
			for range conns {
				select {
				case err := <-ends:
					if err == nil {
						failures++
						t.Error("the server hears an end in order")
					}
				case <-deadline:
					t.Fatal("a server waits for ever")
				}
			}
			both := time.Since(began)
			t.Logf("the clients' connections ended within %s, the servers' within %s", clients, both)
			l.calm(t)
			b.set(weather{})
			for _, c := range open() {
				c.Close()
				<-ends
			}
			check(t, results.Record("bad-networks", results.Row{Name: fmt.Sprintf("%s: until the last connection has ended at both ends", tc.name), Inputs: n, Failures: failures, Figure: both.Seconds(), Unit: "s"}))
		})
	}
}

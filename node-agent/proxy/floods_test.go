package proxy

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/node-agent/hbone/attack"
	"github.com/warrenmesh/warren/results"
)

// Ports of the applications that attackers make use of.
const (
	sourcePort = 8081 // sends without end
	deafPort   = 8082 // never reads
)

// work is what well-behaved clients do meanwhile: each sends 1 KiB and waits for its echo, and after some of that
// makes a new connection.
type work struct {
	done   atomic.Int64
	failed atomic.Int64
	stop   chan struct{}
	wg     sync.WaitGroup
}

const perConnection = 50 // exchanges

func (l *lab) work(clients int) *work {
	w := &work{stop: make(chan struct{})}
	for range clients {
		w.wg.Go(func() {
			for {
				select {
				case <-w.stop:
					return
				default:
				}
				if err := w.converse(l); err != nil {
					w.failed.Add(1)
					l.t.Logf("a well-behaved client: %v", err)
				}
			}
		})
	}
	return w
}

func (w *work) converse(l *lab) error {
	c, err := l.pods["ui"].dial(netip.AddrPortFrom(l.pods["catalog-1"].v4, appPort))
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(plenty))
	said, heard := bytes.Repeat([]byte("well-behaved"), 86)[:1024], make([]byte, 1024)
	for range perConnection {
		select {
		case <-w.stop:
			return nil
		default:
		}
		if _, err := c.Write(said); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, heard); err != nil {
			return err
		}
		if !bytes.Equal(said, heard) {
			return fmt.Errorf("heard %q", heard)
		}
		w.done.Add(1)
	}
	return nil
}

// rate is how many exchanges a second there are for a while.
func (w *work) rate(d time.Duration) float64 {
	n, began := w.done.Load(), time.Now()
	time.Sleep(d)
	return float64(w.done.Load()-n) / time.Since(began).Seconds()
}

func (w *work) end() {
	close(w.stop)
	w.wg.Wait()
}

// resident is the memory of this process: of both agents, the applications and the well-behaved clients.
func resident() int64 {
	b, _ := os.ReadFile("/proc/self/statm")
	var size, pages int64
	fmt.Sscan(string(b), &size, &pages)
	return pages * int64(os.Getpagesize())
}

// peak follows resident until it is stopped.
func peak(stop <-chan struct{}) func() int64 {
	var most atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			most.Store(max(most.Load(), resident()))
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return func() int64 { <-done; return most.Load() }
}

// Whoever floods a pod's HBONE port, with a certificate of the mesh or without, is cut off, and takes neither the
// node's memory nor other clients' throughput.
//
// The attackers are another process, on the same two processors as everything else: four, which connect again
// 250 ms after they were cut, which does them no good for the first second. Throughput is that of clients whose connections pass both agents to the pod that is
// attacked, in turns with and without an attack.
func TestFloods(t *testing.T) {
	turn, turns := 300*time.Millisecond, 1
	if *long {
		turn, turns = time.Second, 3
	}
	l := newLab(t)
	cat := l.pods["catalog-1"]
	cat.listen(appPort, echo)
	cat.listen(sourcePort, func(c *net.TCPConn) { io.Copy(c, zeros{}) })
	deaf := make(chan struct{})
	cat.listen(deafPort, func(*net.TCPConn) { <-deaf })
	t.Cleanup(func() { close(deaf) })
	authority := func(port uint16) string { return netip.AddrPortFrom(cat.v4, port).String() }
	o := order{To: netip.AddrPortFrom(cat.v4, HBONEPort).String(), Attackers: 4, Pause: 250 * time.Millisecond,
		Authorities: attack.Addresses{Echo: authority(appPort), Source: authority(sourcePort), Deaf: authority(deafPort)}}
	w := l.work(4)
	defer w.end()
	w.rate(turn)
	type flood struct {
		name string
		held bool
	}
	var floods []flood
	for _, k := range attack.Kinds() {
		floods = append(floods, flood{k.Name, k.Held})
	}
	floods = append(floods, flood{halfOpen, true}, flood{brokenOff, true}, flood{garbage, false})
	for i, f := range floods {
		if raceEnabled && i%5 > 0 { // which is slow
			continue
		}
		for _, certified := range []bool{true, false} {
			overTLS := f.name != halfOpen && f.name != brokenOff && f.name != garbage
			if !overTLS && certified || overTLS && !certified && !*long && f.name != "PING" {
				continue // without a certificate none gets as far as HTTP/2
			}
			name := f.name + ", without a certificate"
			o := o
			o.Attack = f.name
			if certified {
				name = f.name + ", with a certificate"
			}
			turn := turn
			if f.held && *long { // what they are may take a second to build up
				turn *= 2
			}
			t.Run(name, func(t *testing.T) {
				var with, without []float64
				var total account
				var grown int64
				ratio := func() float64 {
					slices.Sort(with)
					slices.Sort(without)
					return with[len(with)/2] / without[len(without)/2]
				}
				least := 0.02 // nobody starves: an attack may last as long as a short turn, on a machine that does other things
				switch {
				case *long:
					least = 0.8
				case f.held: // until the kernel has taken what applications send to those who do not read, a short turn is over
					least = 0
				}
				for i := 0; i < turns || i < 4*turns && ratio() < least; i++ {
					if certified { // who was cut off before makes no new tunnels for a while
						id := stranger
						id.ServiceAccount = fmt.Sprintf("%s-%d", id.ServiceAccount, i)
						key, cert := l.ca.leaf(id, time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
						o.Cert, o.Key = cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must(x509.MarshalPKCS8PrivateKey(key))})
						for _, n := range l.nodes {
							n.proxy.penalty.mu.Lock()
							clear(n.proxy.penalty.of)
							n.proxy.penalty.mu.Unlock()
						}
					}
					without = append(without, w.rate(turn))
					runtime.GC()
					debug.FreeOSMemory()
					before := resident()
					stop := make(chan struct{})
					most := peak(stop)
					p, err := l.pods["outside"].start(o)
					check(t, err)
					with = append(with, w.rate(turn))
					cut := !f.held || !certified && overTLS
					if cut { // on a busy machine the attackers may only begin now
						kill := time.AfterFunc(time.Minute, func() { p.cmd.Process.Kill() })
						_, err := p.report()
						kill.Stop()
						check(t, err)
					}
					close(stop)
					grown = max(grown, most()-before)
					a, err := p.end()
					check(t, err)
					total.Connections += a.Connections
					total.Cut += a.Cut
					total.Frames += a.Frames
					total.Slowest = max(total.Slowest, a.Slowest)
				}
				t.Logf("%d connections, %d frames, %d cut, the slowest after %s; throughput of others %.2f; memory +%d MiB",
					total.Connections, total.Frames, total.Cut, total.Slowest, ratio(), grown>>20)
				failures := 0
				fail := func(format string, args ...any) {
					failures++
					t.Errorf(format, args...)
				}
				if cut := !f.held || !certified && overTLS; cut && (total.Cut == 0 || *long && total.Slowest > time.Second) {
					fail("%d of %d connections were cut, the slowest after %s", total.Cut, total.Connections, total.Slowest)
				}
				if grown > 64<<20 && !raceEnabled {
					fail("memory grew by %d MiB", grown>>20)
				}
				if r := ratio(); r < least {
					fail("others' throughput is %.2f of what it is without the attack", r)
				}
				if n := w.failed.Swap(0); n > 0 {
					fail("%d connections of well-behaved clients failed", n)
				}
				check(t, results.Record("h2-floods",
					results.Row{Name: name + ": throughput of others", Inputs: total.Connections, Failures: failures, Figure: ratio(), Unit: "of that without"},
					results.Row{Name: name + ": memory", Inputs: total.Connections, Failures: failures, Figure: float64(grown >> 20), Unit: "MiB more"},
					results.Row{Name: name + ": slowest to be cut", Inputs: total.Cut, Failures: failures, Figure: float64(total.Slowest.Milliseconds()), Unit: "ms"}))
			})
		}
	}
}

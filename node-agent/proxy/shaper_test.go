package proxy

import (
	"container/heap"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// weather is what a badLink does to packets.
type weather struct {
	loss, duplicate float64       // shares of all packets
	reorder         float64       // share that overtakes up to 10 ms of others
	delay           time.Duration // of each packet
	jitter          time.Duration // more, up to
	rate            int           // bytes a second; 0: no limit
	hole            int           // packets that are longer vanish and nobody is told; 0: none do
	down            bool
}

// badLink connects two nodes by TUN devices between which this process carries the packets, or does not. This is
// what netem does, on kernels that have none.
type badLink struct {
	ends [2]*os.File

	mu      sync.Mutex
	weather weather
	passed  int
	lost    int
}

const linkQueue = 2000 // packets that wait in one direction

func overBadLink(b *badLink) option {
	return func(l *lab) {
		l.between = func(x, y *netns.Handle) error {
			var wg sync.WaitGroup
			for i, ns := range []*netns.Handle{x, y} {
				err := ns.Do(func() (err error) {
					b.ends[i], err = openTUN("link")
					return err
				})
				if err != nil {
					return err
				}
			}
			for i := range b.ends {
				wg.Go(func() { b.carry(b.ends[1-i], b.ends[i]) })
			}
			l.t.Cleanup(func() {
				b.ends[0].Close()
				b.ends[1].Close()
				wg.Wait()
			})
			return nil
		}
	}
}

func openTUN(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	r, err := unix.NewIfreq(name)
	if err == nil {
		r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make TUN device %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// set changes the weather from the next packet on.
func (b *badLink) set(w weather) {
	b.mu.Lock()
	b.weather = w
	b.mu.Unlock()
}

func (b *badLink) counts() (passed, lost int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.passed, b.lost
}

// waiting is a packet on its way.
type waiting struct {
	due time.Time
	seq int
	p   []byte
}

type waitingHeap []waiting

func (h waitingHeap) Len() int { return len(h) }
func (h waitingHeap) Less(i, j int) bool {
	if h[i].due.Equal(h[j].due) {
		return h[i].seq < h[j].seq
	}
	return h[i].due.Before(h[j].due)
}
func (h waitingHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *waitingHeap) Push(x any)   { *h = append(*h, x.(waiting)) }
func (h *waitingHeap) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}

// carry moves the packets of one direction until either device is closed.
func (b *badLink) carry(dst io.Writer, src io.Reader) {
	var (
		mu    sync.Mutex
		queue waitingHeap
		wake  = make(chan struct{}, 1)
		done  = make(chan struct{})
		wg    sync.WaitGroup
	)
	wg.Go(func() {
		timer := time.NewTimer(time.Hour)
		defer timer.Stop()
		for {
			mu.Lock()
			var next []byte
			pause := time.Hour
			if len(queue) > 0 {
				if pause = time.Until(queue[0].due); pause <= 0 {
					next = heap.Pop(&queue).(waiting).p
				}
			}
			mu.Unlock()
			if next != nil {
				_, _ = dst.Write(next) // a device that is down takes nothing
				continue
			}
			timer.Reset(pause)
			select {
			case <-done:
				return
			case <-wake:
			case <-timer.C:
			}
		}
	})
	defer wg.Wait()
	defer close(done)
	buf := make([]byte, 64<<10)
	var last, free time.Time // when the packet before is due, and when the line is free
	for seq := 0; ; seq++ {
		n, err := src.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(time.Millisecond) // the device is not up yet
			continue
		}
		b.mu.Lock()
		w := b.weather
		lost := w.down || w.hole > 0 && n > w.hole || rand.Float64() < w.loss
		if lost {
			b.lost++
		} else {
			b.passed++
		}
		b.mu.Unlock()
		if lost {
			continue
		}
		now := time.Now()
		due := now.Add(w.delay)
		if w.jitter > 0 {
			due = due.Add(rand.N(w.jitter))
		}
		if w.rate > 0 {
			if free.Before(now) {
				free = now
			}
			free = free.Add(time.Duration(n) * time.Second / time.Duration(w.rate))
			due = due.Add(free.Sub(now))
		}
		if rand.Float64() < w.reorder {
			due = due.Add(rand.N(10 * time.Millisecond)) // those that follow do not wait for it
		} else {
			if due.Before(last) {
				due = last
			}
			last = due
		}
		copies := 1
		if rand.Float64() < w.duplicate {
			copies = 2
		}
		mu.Lock()
		for range copies {
			if len(queue) < linkQueue {
				heap.Push(&queue, waiting{due, seq, append([]byte(nil), buf[:n]...)})
			}
		}
		mu.Unlock()
		select {
		case wake <- struct{}{}:
		default:
		}
	}
}

// setMTU changes a node's end of the link.
func (n *labNode) setMTU(mtu int) error {
	return n.ns.Do(func() error {
		l, err := netlink.LinkByName("link")
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, mtu)
	})
}

// The link itself: what it loses and how long it takes is what was asked of it.
func TestBadLink(t *testing.T) {
	b := &badLink{}
	l := newLab(t, overBadLink(b))
	server, err := func() (c net.PacketConn, err error) {
		err = l.pods["outside"].ns.Do(func() error {
			c, err = net.ListenPacket("udp4", "10.71.9.2:9")
			return err
		})
		return c, err
	}()
	check(t, err)
	defer server.Close()
	var client net.Conn
	check(t, l.nodes["node-a"].ns.Do(func() (err error) {
		client, err = net.Dial("udp4", "10.71.9.2:9")
		return err
	}))
	defer client.Close()
	b.set(weather{loss: 0.3, delay: 20 * time.Millisecond})
	const n, portion = 1000, 200 // a portion is less than any queue on the way holds
	got := 0
	var first time.Duration
	p := make([]byte, 200)
	for sent := 0; sent < n; sent += portion {
		began := time.Now()
		for range portion {
			client.Write(make([]byte, 100))
		}
		for {
			server.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
			if _, _, err := server.ReadFrom(p); err != nil {
				break
			}
			if got++; got == 1 {
				first = time.Since(began)
			}
		}
	}
	if got < n/2 || got > n*85/100 || first < 20*time.Millisecond {
		t.Errorf("%d of %d packets came, the first after %s", got, n, first)
	}
}

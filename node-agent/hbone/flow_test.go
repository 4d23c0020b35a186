package hbone

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestStalledReaderStallsNobody: among streams of one connection some have readers that never read. The
// others go on at full speed, and what the stalled ones hold is bounded by their windows.
func TestStalledReaderStallsNobody(t *testing.T) {
	const stalled, lively, size = 80, 8, 8 << 20
	c := tunnel(t, func(ctx context.Context, s *ServerStream) {
		st, err := s.Accept()
		if err != nil {
			return
		}
		if s.Request.Authority == "stalled:1" {
			<-ctx.Done()
			return
		}
		io.Copy(struct{ io.Writer }{st}, struct{ io.Reader }{st})
		st.Close()
	})
	var wg, blocked sync.WaitGroup
	var held []*Stream
	for range stalled {
		st, _, err := c.Open(t.Context(), Request{Authority: "stalled:1"})
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, st)
		blocked.Go(func() {
			n, err := st.Write(make([]byte, 2*ownStreamWindow))
			if err == nil || n > ownStreamWindow {
				t.Errorf("a stalled stream took %d bytes, %v", n, err)
			}
		})
	}
	start := time.Now()
	for i := range lively {
		st := mustOpen(t, c)
		wg.Go(func() {
			src := rand.NewChaCha8([32]byte{byte(i)})
			sum := sha256.New()
			go func() {
				if _, err := io.CopyN(struct{ io.Writer }{st}, src, size); err != nil {
					t.Error(err)
				}
				st.CloseWrite()
			}()
			n, err := io.Copy(sum, struct{ io.Reader }{st})
			if err != nil || n != size {
				t.Errorf("got %d bytes, %v", n, err)
			}
			want := sha256.New()
			io.CopyN(want, rand.NewChaCha8([32]byte{byte(i)}), size)
			if !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
				t.Error("content differs")
			}
			st.Close()
		})
	}
	wg.Wait()
	c.mu.Lock()
	var sent int64
	for _, st := range held {
		sent += c.peerWindow - st.sendWin
	}
	window := c.peerWindow
	c.mu.Unlock()
	t.Logf("%d streams of %d MiB both ways beside %d stalled ones that hold %d MiB in %v", lively, size>>20, stalled, sent>>20, time.Since(start))
	if window != tightStreamWindow {
		t.Errorf("the server's stream window is %d under pressure", window)
	}
	for _, st := range held {
		st.Reset()
	}
	blocked.Wait()
}

// TestStalledApplicationIsHeldBack: back-pressure reaches the sender through both relays.
func TestStalledApplicationIsHeldBack(t *testing.T) {
	a, b, results := newRelayed(t)
	a.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	total := 0
	p := make([]byte, 1<<20)
	for {
		n, err := a.Write(p)
		total += n
		if err != nil {
			break
		}
		if total > 256<<20 {
			t.Fatal("nothing holds the sender back")
		}
	}
	t.Logf("%d KiB fit between an application that writes and one that does not read", total>>10)
	a.SetWriteDeadline(time.Time{})
	a.CloseWrite()
	n, err := io.Copy(io.Discard, struct{ io.Reader }{b})
	if err != nil || int(n) != total {
		t.Errorf("%d of %d bytes arrived, %v", n, total, err)
	}
	b.CloseWrite()
	if _, err := a.Read(p); err != io.EOF {
		t.Error(err)
	}
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// TestRelayProperty runs random conversations through two relays and a tunnel: writes of random sizes with
// pauses, FINs in either order, sometimes a reset.
func TestRelayProperty(t *testing.T) {
	accepted := make(chan *net.TCPConn, 1)
	results := make(chan error, 2)
	c := tunnel(t, relayServer(t, accepted, results))
	rapid.Check(t, func(r *rapid.T) {
		a, in := tcpPair(t)
		st := mustOpen(t, c)
		go func() { results <- Relay(in, st, new(RelayStats)) }()
		b := <-accepted
		resetAfter := -1
		if rapid.IntRange(0, 3).Draw(r, "reset") == 0 {
			resetAfter = rapid.IntRange(0, 3).Draw(r, "resetAfter")
		}
		type side struct{ from, to *net.TCPConn }
		var wg sync.WaitGroup
		for i, s := range []side{{a, b}, {b, a}} {
			sizes := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 100), rapid.IntRange(1, 200_000)), 0, 6).Draw(r, "sizes")
			seed := rapid.Uint64().Draw(r, "seed")
			pause := rapid.SliceOfN(rapid.IntRange(0, 2), 7, 7).Draw(r, "pauses")
			total := 0
			for _, n := range sizes {
				total += n
			}
			sent := make([]byte, total)
			rnd := rand.New(rand.NewPCG(seed, 1))
			for i := range sent {
				sent[i] = byte(rnd.Uint32())
			}
			wg.Go(func() {
				rest := sent
				for j, n := range sizes {
					if i == 0 && j == resetAfter {
						s.from.SetLinger(0)
						s.from.Close()
						return
					}
					if pause[j] == 0 {
						time.Sleep(time.Millisecond)
					}
					if _, err := s.from.Write(rest[:n]); err != nil {
						if resetAfter < 0 {
							t.Error("write:", err)
						}
						return
					}
					rest = rest[n:]
				}
				if i == 0 && resetAfter >= len(sizes) {
					s.from.SetLinger(0)
					s.from.Close()
					return
				}
				s.from.CloseWrite()
			})
			wg.Go(func() {
				s.to.SetReadDeadline(time.Now().Add(20 * time.Second))
				got, err := io.ReadAll(s.to)
				switch {
				case resetAfter >= 0:
					if errors.Is(err, context.DeadlineExceeded) || len(got) > len(sent) || !bytes.Equal(got, sent[:len(got)]) {
						t.Errorf("after a reset: %d bytes of %d, %v", len(got), len(sent), err)
					}
				case err != nil || !bytes.Equal(got, sent):
					t.Errorf("got %d bytes of %d, %v", len(got), len(sent), err)
				}
			})
		}
		wg.Wait()
		a.Close()
		b.Close()
		for range 2 {
			err := <-results
			if resetAfter < 0 && err != nil {
				t.Errorf("relay: %v", err)
			}
			if err != nil && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
				t.Errorf("relay: %v is no reset", err)
			}
		}
	})
	if n := c.Streams(); n != 0 {
		t.Errorf("%d streams left", n)
	}
}

// TestManySmallPackets: a database that sends many one-byte packets is not an attacker (S3).
func TestManySmallPackets(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n = 10_000
	}
	a, b := tcpPair(t)
	c := tunnelOver(t, a, b, echo)
	st := mustOpen(t, c)
	go func() {
		for range n {
			if _, err := st.Write([]byte{1}); err != nil {
				t.Error(err)
				return
			}
		}
		st.CloseWrite()
	}()
	got, err := io.Copy(io.Discard, struct{ io.Reader }{st})
	if err != nil || int(got) != n {
		t.Errorf("%d of %d, %v", got, n, err)
	}
	st.Close()
}

// TestManyShortStreams: opening, aborting and half-closing streams for long is no attack either.
func TestManyShortStreams(t *testing.T) {
	n := 20_000
	if testing.Short() {
		n = 2000
	}
	a, b := tcpPair(t)
	c := tunnelOver(t, a, b, func(ctx context.Context, s *ServerStream) {
		st, err := s.Accept()
		if err != nil {
			return
		}
		st.Write([]byte("hello"))
		io.Copy(io.Discard, struct{ io.Reader }{st})
		st.Close()
	})
	mustOpen(t, c).Reset() // both ends have all their goroutines
	before := runtime.NumGoroutine()
	for i := range n {
		st := mustOpen(t, c)
		if i%2 == 0 {
			st.Read(make([]byte, 1))
			st.Reset() // mid-response
		} else {
			st.CloseWrite()
			io.Copy(io.Discard, struct{ io.Reader }{st})
			st.Close()
		}
	}
	if c.Streams() != 0 {
		t.Errorf("%d streams left", c.Streams())
	}
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if runtime.NumGoroutine() <= before {
			return
		}
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), before)
}

// TestRelayBudget bounds what a stream costs while data flows and while it is idle.
func TestRelayBudget(t *testing.T) {
	accepted := make(chan *net.TCPConn, 1)
	results := make(chan error, 200)
	a, b := tcpPair(t) // without TLS: these are the codec's own allocations
	c := tunnelOver(t, a, b, relayServer(t, accepted, results))
	x, y := relayed(t, c, accepted, results)
	buf := make([]byte, 64<<10)
	round := func() {
		if _, err := x.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(y, buf); err != nil {
			t.Fatal(err)
		}
	}
	for range 50 {
		round()
	}
	if n := testing.AllocsPerRun(200, round); n > 2 { // a GC empties the pools now and then
		t.Errorf("%v allocations per 64 KiB relayed", n)
	}
	one := buf[:1]
	rr := func() {
		x.Write(one)
		io.ReadFull(y, one)
	}
	if n := testing.AllocsPerRun(500, rr); n > 0 {
		t.Errorf("%v allocations per byte relayed", n)
	}
	before := runtime.NumGoroutine()
	const more = 50
	for range more {
		relayed(t, c, accepted, results)
	}
	time.Sleep(50 * time.Millisecond)
	if per := float64(runtime.NumGoroutine()-before) / more; per > 2 {
		t.Errorf("%.1f goroutines per stream at both ends together; one each is enough", per)
	}
	c.Close()
}

// A socket tells of its reset once. Where a write has got the error, a read finds the end of the file, which must not
// be passed on as one.
func TestAResetThatAWriteHasTakenIsStillOne(t *testing.T) {
	app, in := tcpPair(t)
	app.SetLinger(0)
	app.Close()
	time.Sleep(10 * time.Millisecond)
	for range 2 { // the second has no error to get any more
		if _, err := in.Write([]byte("x")); err == nil {
			t.Fatal("a socket that was reset takes data")
		}
	}
	rc, err := in.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	r := &socketReader{rc: rc, shut: new(atomic.Bool)}
	r.try = r.tryOnce
	if _, _, err := r.read(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the reader gets %v", err)
	}
	// A FIN after ours is none.
	app, in = tcpPair(t)
	in.CloseWrite()
	app.Close()
	time.Sleep(10 * time.Millisecond)
	if rc, err = in.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	r = &socketReader{rc: rc, shut: new(atomic.Bool)}
	r.shut.Store(true)
	r.try = r.tryOnce
	if _, _, err := r.read(); err != io.EOF {
		t.Errorf("after a FIN the reader gets %v", err)
	}
}

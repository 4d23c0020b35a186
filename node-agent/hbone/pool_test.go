package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// poolServer is a pool whose dials end at a server in this process.
type poolServer struct {
	*Pool
	dials   atomic.Int32
	mu      sync.Mutex
	servers []net.Conn
	cancels []context.CancelFunc
	wg      sync.WaitGroup
}

func newPoolServer(t *testing.T, cfg PoolConfig, handler func(context.Context, *ServerStream)) *poolServer {
	s := &poolServer{}
	if cfg.Dial == nil {
		cfg.Dial = func(context.Context, Key) (net.Conn, error) {
			s.dials.Add(1)
			a, b := net.Pipe()
			ctx, cancel := context.WithCancel(context.Background())
			s.mu.Lock()
			s.servers = append(s.servers, b)
			s.cancels = append(s.cancels, cancel)
			s.mu.Unlock()
			s.wg.Go(func() { _ = Serve(ctx, b, ServerConfig{Handler: handler, DrainTimeout: time.Minute}) })
			return a, nil
		}
	}
	s.Pool = NewPool(cfg)
	t.Cleanup(func() {
		s.Close()
		for _, c := range s.cancels {
			c()
		}
		for _, c := range s.servers {
			c.Close()
		}
		s.wg.Wait()
	})
	return s
}

var testKey = Key{Src: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"},
	Want: "spiffe://cluster.local/ns/shop/sa/catalog", Addr: netip.MustParseAddrPort("10.0.0.1:15008")}

func (s *poolServer) open(t *testing.T) *Stream {
	t.Helper()
	st, _, err := s.Open(t.Context(), testKey, Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestPoolSharesConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{}, echo)
		var mu sync.Mutex
		var streams []*Stream
		var wg sync.WaitGroup
		for range 250 {
			wg.Go(func() {
				st := p.open(t)
				mu.Lock()
				streams = append(streams, st)
				mu.Unlock()
			})
		}
		wg.Wait()
		if n := p.dials.Load(); n != 3 {
			t.Errorf("%d connections for 250 streams of 100 each", n)
		}
		for _, st := range streams {
			st.Close()
		}
		synctest.Wait()
		if _, n := p.Stats(); n != 0 {
			t.Errorf("%d streams left", n)
		}
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if n, _ := p.Stats(); n != 0 {
			t.Errorf("%d connections left after the idle time", n)
		}
		if len(p.entries) != 0 {
			t.Error("the pool keeps an empty entry")
		}
	})
}

func TestPoolIdleConnectionIsReusedBeforeItCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{}, echo)
		for range 3 {
			st := p.open(t)
			st.Close()
			time.Sleep(4 * time.Minute)
		}
		if n := p.dials.Load(); n != 1 {
			t.Errorf("dialled %d times", n)
		}
	})
}

func TestPoolDialFailureIsSharedAndForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := errors.New("refused")
		var dials atomic.Int32
		p := newPoolServer(t, PoolConfig{Dial: func(context.Context, Key) (net.Conn, error) {
			dials.Add(1)
			time.Sleep(time.Second)
			return nil, refused
		}}, nil)
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				_, _, err := p.Open(t.Context(), testKey, Request{Authority: "10.0.0.1:80"})
				var oe *OpenError
				if !errors.As(err, &oe) || oe.Sent || !oe.Retryable() || !errors.Is(err, refused) {
					t.Errorf("got %v", err)
				}
			})
		}
		wg.Wait()
		if dials.Load() != 1 || len(p.entries) != 0 {
			t.Errorf("%d dials, %d entries", dials.Load(), len(p.entries))
		}
	})
}

func TestPoolCallerGivesUpWhileDialling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{Dial: func(ctx context.Context, _ Key) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := p.Open(ctx, testKey, Request{Authority: "10.0.0.1:80"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestPoolDrainOnRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{}, echo)
		old := p.open(t)
		if n := p.Drain(func(k Key) bool { return k.Src == testKey.Src }); n != 1 {
			t.Errorf("drained %d", n)
		}
		fresh := p.open(t)
		if p.dials.Load() != 2 {
			t.Error("a stream went onto a connection of the old certificate")
		}
		io.WriteString(old, "still here")
		b := make([]byte, 10)
		if _, err := io.ReadFull(old, b); err != nil || string(b) != "still here" {
			t.Errorf("old stream: %q, %v", b, err)
		}
		old.Close()
		synctest.Wait()
		time.Sleep(time.Second)
		if n, _ := p.Stats(); n != 1 {
			t.Errorf("%d connections after the old one's last stream", n)
		}
		fresh.Close()
	})
}

func TestPoolGracefulServerDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{}, echo)
		old := p.open(t)
		p.cancels[0]() // the peer's agent is being replaced
		time.Sleep(time.Second)
		st := p.open(t)
		defer st.Close()
		if p.dials.Load() != 2 {
			t.Error("a stream went onto a connection whose server goes away")
		}
		io.WriteString(old, "x")
		if _, err := io.ReadFull(old, make([]byte, 1)); err != nil {
			t.Errorf("stream of before: %v", err)
		}
		old.Close()
		time.Sleep(time.Second)
		if n, _ := p.Stats(); n != 1 {
			t.Errorf("%d connections", n)
		}
	})
}

// TestDeadPeerIsNoticed: the network swallows everything from some moment on.
func TestDeadPeerIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, quiet := range []time.Duration{0, time.Second, 2600 * time.Millisecond, time.Minute} {
			a, b := net.Pipe()
			hole := &blackhole{Conn: a, closed: make(chan struct{})}
			served := make(chan struct{})
			go func() {
				defer close(served)
				_ = Serve(t.Context(), b, ServerConfig{Handler: echo})
			}()
			c := NewClient(hole, ClientConfig{})
			st := mustOpen(t, c)
			time.Sleep(quiet)
			hole.on.Store(true)
			start := time.Now()
			if _, err := st.Read(make([]byte, 1)); !errors.Is(err, ErrPeerDead) {
				t.Errorf("read: %v", err)
			}
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("noticed after %v", d)
			}
			<-c.Done()
			if _, _, err := c.Open(t.Context(), Request{Authority: "10.0.0.1:80"}); !errors.Is(err, ErrDraining) {
				t.Errorf("open on a dead connection: %v", err)
			}
			b.Close()
			<-served
		}
	})
}

// TestSlowPeerIsNotDead: the peer gets no processor time for a while, or never again. Its kernel acknowledges what comes.
func TestSlowPeerIsNotDead(t *testing.T) {
	const wait = 100 * time.Millisecond
	for name, secured := range map[string]bool{"sockets of the loop": true, "sockets of Go": false} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Conn(nil), net.Conn(nil)
			if secured {
				a, b = tlsPair(t)
			} else {
				a, b = tcpPair(t)
			}
			var served sync.WaitGroup
			defer served.Wait()
			slow := &slowReader{Conn: b}
			served.Go(func() { _ = Serve(context.Background(), slow, ServerConfig{Handler: echo}) })
			defer b.Close()
			c := NewClient(a, ClientConfig{PingEvery: wait / 2, PingWait: wait})
			defer c.Close()
			st := mustOpen(t, c)
			ask := func() error {
				if _, err := io.WriteString(st, "x"); err != nil {
					return err
				}
				_, err := io.ReadFull(st, make([]byte, 1))
				return err
			}
			if err := ask(); err != nil {
				t.Fatal(err)
			}
			slow.mu.Lock()
			wakes := time.AfterFunc(4*wait, slow.mu.Unlock)
			defer wakes.Stop()
			if err := ask(); err != nil {
				t.Fatalf("a peer that slept for %v: %v", 4*wait, err)
			}
			slow.mu.Lock()
			defer slow.mu.Unlock()
			start := time.Now()
			err := ask()
			if d := time.Since(start); !errors.Is(err, ErrPeerDead) || d < slowPeer*wait {
				t.Errorf("a peer that sleeps for ever: %v after %v", err, d)
			}
		})
	}
}

// slowReader has nothing to read while its lock is held.
type slowReader struct {
	net.Conn
	mu sync.Mutex
}

func (r *slowReader) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	return n, err
}

// blackhole drops what is written and withholds what arrives once it is on.
type blackhole struct {
	net.Conn
	on     atomic.Bool
	closed chan struct{}
	once   sync.Once
}

func (h *blackhole) Write(p []byte) (int, error) {
	if h.on.Load() {
		return len(p), nil
	}
	return h.Conn.Write(p)
}

func (h *blackhole) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if h.on.Load() {
		<-h.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (h *blackhole) Close() error {
	h.once.Do(func() { close(h.closed) })
	return h.Conn.Close()
}

// TestPoolLeavesDeadIdleConnection: a pooled connection died silently while nobody used it, as when a pod is
// deleted. Whoever asks next gets a stream on a new one within a second or so.
func TestPoolLeavesDeadIdleConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var holes []*blackhole
		var served sync.WaitGroup
		p := newPoolServer(t, PoolConfig{Dial: func(context.Context, Key) (net.Conn, error) {
			a, b := net.Pipe()
			h := &blackhole{Conn: a, closed: make(chan struct{})}
			holes = append(holes, h)
			served.Go(func() { _ = Serve(context.Background(), b, ServerConfig{Handler: echo}) })
			return h, nil
		}}, nil)
		p.open(t).Close()
		time.Sleep(time.Minute)
		holes[0].on.Store(true)
		start := time.Now()
		st := p.open(t)
		if d := time.Since(start); d > 1500*time.Millisecond {
			t.Errorf("took %v", d)
		}
		st.Close()
		if len(holes) != 2 {
			t.Errorf("%d dials", len(holes))
		}
		p.Close()
		served.Wait()
	})
}

func TestServerThatClosesIsNotHandedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{}, echo)
		p.open(t).Close()
		p.servers[0].Close()
		synctest.Wait()
		p.open(t).Close()
		if p.dials.Load() != 2 {
			t.Error("the dead connection was used")
		}
	})
}

func TestConnectionLossResetsStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPoolServer(t, PoolConfig{}, echo)
		st := p.open(t)
		p.servers[0].Close()
		if _, err := st.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read: %v", err)
		}
		if _, err := st.Write(make([]byte, 1)); err == nil {
			t.Error("write succeeded")
		}
	})
}

func TestDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		p := newPoolServer(t, PoolConfig{}, func(_ context.Context, s *ServerStream) {
			st, err := s.Accept()
			if err != nil {
				return
			}
			<-release
			st.Reset()
		})
		st := p.open(t)
		var ne net.Error
		st.SetReadDeadline(time.Now().Add(time.Second))
		start := time.Now()
		if _, err := st.Read(make([]byte, 1)); !errors.As(err, &ne) || !ne.Timeout() || time.Since(start) != time.Second {
			t.Errorf("read: %v after %v", err, time.Since(start))
		}
		st.SetWriteDeadline(time.Now().Add(time.Second))
		start = time.Now()
		n, err := st.Write(make([]byte, ownStreamWindow+1))
		if !errors.As(err, &ne) || !ne.Timeout() || time.Since(start) != time.Second || n != ownStreamWindow {
			t.Errorf("write: %d, %v after %v", n, err, time.Since(start))
		}
		st.SetDeadline(time.Time{})
		close(release)
		if _, err := st.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read after deadlines were lifted: %v", err)
		}
		st.Close()
	})
}

func TestOpenCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := make(chan error, 1)
		p := newPoolServer(t, PoolConfig{}, func(ctx context.Context, s *ServerStream) {
			<-ctx.Done()
			_, err := s.Accept()
			gone <- err
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _, err := p.Open(ctx, testKey, Request{Authority: "10.0.0.1:80"})
		var oe *OpenError
		if !errors.As(err, &oe) || !oe.Sent || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := <-gone; err == nil {
			t.Error("the server accepted a stream whose client had gone")
		}
	})
}

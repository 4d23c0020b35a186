package interop

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// pool returns a pool that dials as ui.
func pool(t *testing.T, ui *identity.Bundle, dials *atomic.Int32) *hbone.Pool {
	p := hbone.NewPool(hbone.PoolConfig{Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
		dials.Add(1)
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", k.Addr.String())
		if err != nil {
			return nil, err
		}
		tc := hbone.TLSClient(c, ui.ClientTLS(k.Wanted()))
		if err := tc.HandshakeContext(ctx); err != nil {
			c.Close()
			return nil, err
		}
		return tc, nil
	}})
	t.Cleanup(func() { p.Close() })
	return p
}

// tunnelTo returns an application's socket that a Relay carries to authority through p.
func tunnelTo(t *testing.T, p *hbone.Pool, k hbone.Key, authority string) (*net.TCPConn, <-chan error) {
	t.Helper()
	st, _, err := p.Open(t.Context(), k, hbone.Request{Authority: authority,
		Header: hbone.Header{{Name: hbone.HeaderForwarded, Value: `for="10.0.0.2:41000"`}}})
	if err != nil {
		t.Fatal(err)
	}
	app, in := socketPair(t)
	done := make(chan error, 1)
	go func() { done <- hbone.Relay(in, st, new(hbone.RelayStats)) }()
	return app, done
}

func socketPair(t *testing.T) (*net.TCPConn, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// exchange sends size random bytes and a FIN, and wants them back after it.
func exchange(c *net.TCPConn, size int) error {
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	sent := make([]byte, size)
	_, _ = rand.Read(sent)
	if _, err := c.Write(sent); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return fmt.Errorf("read after %d bytes: %w", len(got), err)
	}
	if !bytes.Equal(got, sent) {
		return fmt.Errorf("%d bytes came back, not the %d that were sent", len(got), size)
	}
	return nil
}

func TestEnvoyServesOurConnect(t *testing.T) {
	ca := newAuthority(t)
	ui, catalog := ca.issue(t, "ui"), ca.issue(t, "catalog")
	mode := make(chan func(*net.TCPConn), 1)
	app := application(t, func(c *net.TCPConn) {
		select {
		case f := <-mode:
			f(c)
		default:
			echoLast(c)
		}
	})
	hboneAddr := freeAddr(t)
	admin := envoy(t, "server.yaml", map[string]string{"DIR": ca.dir, "HBONE_PORT": port(hboneAddr), "APP_PORT": port(app), "ABSENT_PORT": port(freeAddr(t))})
	var dials atomic.Int32
	p := pool(t, ui, &dials)
	k := hbone.Key{Src: ui.ID, Want: hbone.WantKey([]string{catalog.ID.String()}), Addr: netip.MustParseAddrPort(hboneAddr)}

	t.Run("half-close and content", func(t *testing.T) {
		for _, size := range []int{0, 1, 70_000, 8 << 20} {
			c, done := tunnelTo(t, p, k, "10.0.0.1:80")
			if err := exchange(c, size); err != nil {
				t.Errorf("%d bytes: %v", size, err)
			}
			if err := <-done; err != nil {
				t.Errorf("%d bytes: relay: %v", size, err)
			}
		}
	})
	t.Run("250 streams at once", func(t *testing.T) {
		var wg sync.WaitGroup
		start := make(chan struct{})
		for range 250 {
			c, done := tunnelTo(t, p, k, "10.0.0.1:80")
			wg.Go(func() {
				<-start
				if err := exchange(c, 40_000); err != nil {
					t.Error(err)
				}
				if err := <-done; err != nil {
					t.Error("relay:", err)
				}
			})
		}
		close(start)
		wg.Wait()
	})
	t.Run("application closes first", func(t *testing.T) {
		mode <- func(c *net.TCPConn) { io.WriteString(c, "banner"); c.CloseWrite(); io.Copy(io.Discard, c) }
		c, done := tunnelTo(t, p, k, "10.0.0.1:80")
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		if got, err := io.ReadAll(c); err != nil || string(got) != "banner" {
			t.Errorf("read %q, %v", got, err)
		}
		c.Close()
		if err := <-done; err != nil {
			t.Error("relay:", err)
		}
	})
	t.Run("application resets", func(t *testing.T) {
		mode <- func(c *net.TCPConn) { c.Read(make([]byte, 1)); c.SetLinger(0); c.Close() }
		c, done := tunnelTo(t, p, k, "10.0.0.1:80")
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		io.WriteString(c, "x")
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("client saw %v, want a reset", err)
		}
		if err := <-done; !errors.Is(err, syscall.ECONNRESET) {
			t.Error("relay:", err)
		}
	})
	t.Run("client resets", func(t *testing.T) {
		seen := make(chan error, 1)
		mode <- func(c *net.TCPConn) { c.Read(make([]byte, 1)); _, err := c.Read(make([]byte, 1)); seen <- err }
		c, done := tunnelTo(t, p, k, "10.0.0.1:80")
		io.WriteString(c, "x")
		time.Sleep(50 * time.Millisecond)
		c.SetLinger(0)
		c.Close()
		select {
		case err := <-seen: // Envoy turns the reset of a tunnel into a close of its upstream
			t.Logf("application saw %v", err)
		case <-time.After(30 * time.Second):
			t.Error("application never learned of the reset")
		}
		<-done
	})
	t.Run("refusals", func(t *testing.T) {
		for authority, want := range map[string]int{"10.0.0.9:80": 503, "10.0.0.4:80": 401} {
			_, _, err := p.Open(t.Context(), k, hbone.Request{Authority: authority})
			var oe *hbone.OpenError
			if !errors.As(err, &oe) || oe.Status != want {
				t.Errorf("%s: %v, want %d", authority, err, want)
			}
		}
	})
	if n := dials.Load(); n < 3 || n > 4 {
		t.Errorf("%d connections for at most 250 streams of 100 each", n)
	}
	waitZero(t, admin, "http.hbone.downstream_rq_active")
	if n := stat(t, admin, "http.hbone.downstream_cx_protocol_error"); n != "0" {
		t.Errorf("Envoy counted %s protocol errors", n)
	}
	t.Run("wrong identity", func(t *testing.T) {
		_, _, err := p.Open(t.Context(), hbone.Key{Src: ui.ID, Want: "spiffe://cluster.local/ns/shop/sa/other", Addr: k.Addr}, hbone.Request{Authority: "10.0.0.1:80"})
		if err == nil {
			t.Error("a peer with another identity was accepted")
		}
		mallory := ca.issue(t, "mallory")
		_, _, err = pool(t, mallory, &dials).Open(t.Context(), k, hbone.Request{Authority: "10.0.0.1:80"})
		if err == nil {
			t.Error("Envoy let mallory in")
		}
	})
}

func waitZero(t *testing.T, admin, name string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for stat(t, admin, name) != "0" {
		if time.Now().After(deadline) {
			t.Fatalf("%s stays at %s", name, stat(t, admin, name))
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestEnvoyConnectsToOurServer(t *testing.T) {
	ca := newAuthority(t)
	ui, catalog := ca.issue(t, "ui"), ca.issue(t, "catalog")
	mode := make(chan func(*net.TCPConn), 1)
	app := application(t, func(c *net.TCPConn) {
		select {
		case f := <-mode:
			f(c)
		default:
			echoLast(c)
		}
	})

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var (
		wg       sync.WaitGroup
		conns    atomic.Int32
		relayErr = make(chan error, 1000)
		requests = make(chan hbone.Request, 1000)
		refuse   atomic.Bool
	)
	ctx, stop := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			conns.Add(1)
			wg.Go(func() {
				defer raw.Close()
				tc := hbone.TLSServer(raw, catalog.ServerTLS(identity.Peers{}))
				if err := tc.Handshake(); err != nil {
					t.Error("handshake:", err)
					return
				}
				if id, err := identity.PeerIdentity(tc.ConnectionState()); err != nil || id != ui.ID {
					t.Errorf("peer is %v, %v", id, err)
				}
				if err := hbone.Serve(ctx, tc, hbone.ServerConfig{DrainTimeout: time.Second, Handler: func(_ context.Context, s *hbone.ServerStream) {
					requests <- s.Request
					if refuse.Load() {
						_ = s.Reject(401)
						return
					}
					up, err := net.Dial("tcp", app)
					if err != nil {
						_ = s.Reject(503)
						return
					}
					st, err := s.Accept()
					if err != nil {
						up.Close()
						return
					}
					relayErr <- hbone.Relay(st, up, new(hbone.RelayStats))
				}}); err != nil {
					t.Log("serve:", err)
				}
			})
		}
	})
	listen := freeAddr(t)
	admin := envoy(t, "client.yaml", map[string]string{"DIR": ca.dir, "HBONE_PORT": port(l.Addr().String()), "LISTEN_PORT": port(listen)})
	t.Cleanup(func() {
		stop()
		l.Close()
		wg.Wait()
	})
	dial := func(t *testing.T) *net.TCPConn {
		c, err := net.Dial("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}

	t.Run("half-close and content", func(t *testing.T) {
		for _, size := range []int{0, 1, 70_000, 8 << 20} {
			if err := exchange(dial(t), size); err != nil {
				t.Errorf("%d bytes: %v", size, err)
			}
			if err := <-relayErr; err != nil {
				t.Errorf("%d bytes: relay: %v", size, err)
			}
			r := <-requests
			b, err := hbone.ParseBaggage(r.Header.Get(hbone.HeaderBaggage))
			if r.Method != "CONNECT" || r.Authority != "10.0.0.1:80" || err != nil || b.Namespace != "shop" || b.Cluster != "Kubernetes" {
				t.Errorf("request %+v, baggage %+v, %v", r, b, err)
			}
		}
	})
	t.Run("250 streams at once", func(t *testing.T) {
		var clients sync.WaitGroup
		start := make(chan struct{})
		for range 250 {
			c := dial(t)
			clients.Go(func() {
				<-start
				if err := exchange(c, 40_000); err != nil {
					t.Error(err)
				}
			})
		}
		for range 250 {
			<-requests
		}
		close(start)
		clients.Wait()
		for range 250 {
			if err := <-relayErr; err != nil {
				t.Error("relay:", err)
			}
		}
	})
	t.Run("application resets", func(t *testing.T) {
		mode <- func(c *net.TCPConn) { c.Read(make([]byte, 1)); c.SetLinger(0); c.Close() }
		c := dial(t)
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		io.WriteString(c, "x")
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("client saw data")
		}
		if err := <-relayErr; !errors.Is(err, syscall.ECONNRESET) {
			t.Error("relay:", err)
		}
	})
	t.Run("client resets", func(t *testing.T) {
		seen := make(chan error, 1)
		mode <- func(c *net.TCPConn) { c.Read(make([]byte, 1)); _, err := c.Read(make([]byte, 1)); seen <- err }
		c := dial(t)
		io.WriteString(c, "x")
		time.Sleep(50 * time.Millisecond)
		c.SetLinger(0)
		c.Close()
		select {
		case err := <-seen:
			t.Logf("application saw %v", err)
		case <-time.After(30 * time.Second):
			t.Error("application never learned of the reset")
		}
		<-relayErr
	})
	t.Run("refused", func(t *testing.T) {
		refuse.Store(true)
		defer refuse.Store(false)
		c := dial(t)
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("client saw data")
		}
	})
	waitZero(t, admin, "cluster.hbone.upstream_rq_active")
	if n := stat(t, admin, "cluster.hbone.upstream_cx_protocol_error"); n != "0" {
		t.Errorf("Envoy counted %s protocol errors", n)
	}
	if n := conns.Load(); n != 2 {
		t.Errorf("%d tunnel connections for 250 streams of 200 each", n)
	}
}

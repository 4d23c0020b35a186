package hbone

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcpPair returns the two ends of a TCP connection.
func tcpPair(t testing.TB) (*net.TCPConn, *net.TCPConn) {
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

var testCert = sync.OnceValue(func() tls.Certificate {
	k, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &k.PublicKey, k)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
})

// tlsPair is tcpPair under TLS 1.3, each end in Wire.
func tlsPair(t testing.TB) (net.Conn, net.Conn) {
	t.Helper()
	a, b := tcpPair(t)
	cfg := &tls.Config{Certificates: []tls.Certificate{testCert()}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"}, DynamicRecordSizingDisabled: true, SessionTicketsDisabled: true, CurvePreferences: []tls.CurveID{tls.X25519}}
	client, server := TLSClient(a, cfg), TLSServer(b, cfg)
	errc := make(chan error, 1)
	go func() { errc <- server.Handshake() }()
	if err := client.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-errc; err != nil {
		t.Fatal(err)
	}
	return client, server
}

// tunnel starts a server with handler and returns a client connected to it.
func tunnel(t testing.TB, handler func(context.Context, *ServerStream)) *Client {
	t.Helper()
	a, b := tlsPair(t)
	return tunnelOver(t, a, b, handler)
}

func tunnelOver(t testing.TB, a, b net.Conn, handler func(context.Context, *ServerStream)) *Client {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := Serve(context.Background(), b, ServerConfig{Handler: handler}); err != nil {
			t.Log("server:", err)
		}
	}()
	c := NewClient(a, ClientConfig{})
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c
}

func mustOpen(t testing.TB, c *Client) *Stream {
	t.Helper()
	st, resp, err := c.Open(t.Context(), Request{Authority: "10.0.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	if resp.Status != 200 {
		t.Fatalf("status %d", resp.Status)
	}
	return st
}

func echo(_ context.Context, s *ServerStream) {
	st, err := s.Accept()
	if err != nil {
		return
	}
	if _, err := io.Copy(struct{ io.Writer }{st}, struct{ io.Reader }{st}); err != nil {
		st.Reset()
		return
	}
	st.Close()
}

func TestEcho(t *testing.T) {
	c := tunnel(t, echo)
	st := mustOpen(t, c)
	defer st.Close()
	sent := make([]byte, 3<<20)
	rand.Read(sent)
	go func() {
		if _, err := st.Write(sent); err != nil {
			t.Error(err)
		}
		if err := st.CloseWrite(); err != nil {
			t.Error(err)
		}
	}()
	got, err := io.ReadAll(st)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Fatal("echo differs")
	}
}

func TestRequestReachesHandler(t *testing.T) {
	got := make(chan Request, 1)
	c := tunnel(t, func(_ context.Context, s *ServerStream) {
		got <- s.Request
		st, err := s.Accept(Field{HeaderBaggage, "k8s.namespace.name=shop"})
		if err == nil {
			st.Close()
		}
	})
	st, resp, err := c.Open(t.Context(), Request{Authority: "[fd00::1]:443", Header: Header{{HeaderForwarded, Forwarded{For: netip.MustParseAddrPort("10.1.2.3:4567")}.String()}}})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	r := <-got
	if r.Method != "CONNECT" || r.Authority != "[fd00::1]:443" || r.Header.Get(HeaderForwarded) != `for="10.1.2.3:4567"` {
		t.Errorf("handler saw %+v", r)
	}
	if b := resp.Header.Get(HeaderBaggage); b != "k8s.namespace.name=shop" {
		t.Errorf("client saw baggage %q", b)
	}
	if _, err := st.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read after the server closed: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	for status, retry := range map[int]bool{400: false, 401: false, 503: true} {
		c := tunnel(t, func(_ context.Context, s *ServerStream) { s.Reject(status) })
		_, _, err := c.Open(t.Context(), Request{Authority: "10.0.0.1:80"})
		var oe *OpenError
		if !errors.As(err, &oe) || oe.Status != status || oe.Retryable() != retry || !oe.Sent {
			t.Errorf("%d: got %v", status, err)
		}
		if n := c.Streams(); n != 0 {
			t.Errorf("%d: %d streams left", status, n)
		}
	}
}

// relayed puts a tunnel between two application sockets: app1 ↔ Relay ↔ tunnel ↔ Relay ↔ app2.
func relayed(t testing.TB, c *Client, accepted chan *net.TCPConn, results chan<- error) (app1, app2 *net.TCPConn) {
	t.Helper()
	app1, in := tcpPair(t)
	st := mustOpen(t, c)
	go func() {
		err := Relay(in, st, new(RelayStats))
		results <- err
	}()
	return app1, <-accepted
}

// relayServer dials nothing: it hands out the far end of a socket pair per stream.
func relayServer(t testing.TB, accepted chan<- *net.TCPConn, results chan<- error) func(context.Context, *ServerStream) {
	return func(_ context.Context, s *ServerStream) {
		app, out := tcpPair(t)
		st, err := s.Accept()
		if err != nil {
			return
		}
		accepted <- app
		err = Relay(st, out, new(RelayStats))
		results <- err
	}
}

func newRelayed(t testing.TB) (app1, app2 *net.TCPConn, results chan error) {
	t.Helper()
	accepted := make(chan *net.TCPConn, 1)
	results = make(chan error, 2)
	c := tunnel(t, relayServer(t, accepted, results))
	app1, app2 = relayed(t, c, accepted, results)
	return app1, app2, results
}

func TestRelayHalfClose(t *testing.T) {
	a, b, results := newRelayed(t)
	io.WriteString(a, "question")
	a.CloseWrite()
	if got, err := io.ReadAll(b); err != nil || string(got) != "question" {
		t.Fatalf("server read %q, %v", got, err)
	}
	time.Sleep(20 * time.Millisecond)
	io.WriteString(b, "answer")
	b.CloseWrite()
	if got, err := io.ReadAll(a); err != nil || string(got) != "answer" {
		t.Fatalf("client read %q, %v", got, err)
	}
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func TestRelayReset(t *testing.T) {
	for name, prepare := range map[string]func(a, b *net.TCPConn){
		"open":        func(a, b *net.TCPConn) {},
		"after data":  func(a, b *net.TCPConn) { io.WriteString(a, "x"); b.Read(make([]byte, 1)) },
		"half-closed": func(a, b *net.TCPConn) { a.CloseWrite(); io.ReadAll(b) },
	} {
		for _, from := range []string{"client", "server"} {
			t.Run(name+" from "+from, func(t *testing.T) {
				a, b, results := newRelayed(t)
				prepare(a, b)
				if from == "server" {
					a, b = b, a
				}
				a.SetLinger(0)
				a.Close()
				b.SetReadDeadline(time.Now().Add(20 * time.Second))
				if name == "half-closed" && from == "client" {
					// b has read the FIN; the reset shows as an error on the socket.
					deadline := time.Now().Add(20 * time.Second)
					for {
						if _, err := b.Write([]byte("x")); err != nil {
							break
						}
						if time.Now().After(deadline) {
							t.Fatal("server never learned of the reset")
						}
						time.Sleep(time.Millisecond)
					}
				} else if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Fatalf("peer saw %v, want a reset", err)
				}
				for range 2 {
					if err := <-results; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
						t.Errorf("relay ended with %v", err)
					}
				}
			})
		}
	}
}

// TestRelaySockets: plaintext from outside and to it is relayed with the same manners.
func TestRelaySockets(t *testing.T) {
	open := func() (a, b *net.TCPConn, result chan error) {
		a, in := tcpPair(t)
		out, b := tcpPair(t)
		result = make(chan error, 1)
		go func() { result <- Relay(in, out, new(RelayStats)) }()
		return a, b, result
	}
	t.Run("half-close", func(t *testing.T) {
		a, b, result := open()
		io.WriteString(a, "question")
		a.CloseWrite()
		if got, err := io.ReadAll(b); err != nil || string(got) != "question" {
			t.Fatalf("server read %q, %v", got, err)
		}
		time.Sleep(20 * time.Millisecond)
		io.WriteString(b, "answer")
		b.CloseWrite()
		if got, err := io.ReadAll(a); err != nil || string(got) != "answer" {
			t.Fatalf("client read %q, %v", got, err)
		}
		if err := <-result; err != nil {
			t.Error(err)
		}
	})
	for _, half := range []bool{false, true} {
		a, b, result := open()
		if half {
			a.CloseWrite()
			io.ReadAll(b)
		}
		a.SetLinger(0)
		a.Close()
		if err := <-result; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("reset (half-closed before: %v): relay ended with %v", half, err)
		}
		b.SetDeadline(time.Now().Add(20 * time.Second))
		_, err := b.Read(make([]byte, 1))
		if half { // the FIN was read; the reset shows on the next write
			_, err = b.Write([]byte("x"))
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("reset (half-closed before: %v): peer saw %v", half, err)
		}
	}
}

func TestRelayBulkBothWays(t *testing.T) {
	const size = 64 << 20
	a, b, results := newRelayed(t)
	var wg sync.WaitGroup
	for _, c := range []*net.TCPConn{a, b} {
		wg.Add(2)
		go func() {
			defer wg.Done()
			p := make([]byte, 100<<10)
			for i := range p {
				p[i] = byte(i % 251)
			}
			left := size
			for left > 0 {
				n, err := c.Write(p[:min(left, len(p))])
				if err != nil {
					t.Error(err)
					return
				}
				left -= n
			}
			c.CloseWrite()
		}()
		go func() {
			defer wg.Done()
			p := make([]byte, 128<<10)
			off := 0
			for {
				n, err := c.Read(p)
				for i := range n {
					if p[i] != byte((off+i)%(100<<10)%251) {
						t.Errorf("byte %d is wrong", off+i)
						return
					}
				}
				off += n
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
			if off != size {
				t.Errorf("got %d bytes", off)
			}
		}()
	}
	wg.Wait()
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"
	"time"
)

// manyRelayed are n applications and their servers behind one tunnel whose ends share no loop.
func manyRelayed(t testing.TB, n int) (c *Client, clients, servers []*net.TCPConn) {
	accepted := make(chan *net.TCPConn, 1)
	results := make(chan error, 2*n)
	c = tunnel(t, relayServer(t, accepted, results))
	for range n {
		x, y := relayed(t, c, accepted, results)
		clients, servers = append(clients, x), append(servers, y)
	}
	return c, clients, servers
}

// What sixteen applications say at once costs no more than what each would say alone, and what they are answered
// together passes the tunnel together.
func TestWhatManySayAtOnceSharesSystemCalls(t *testing.T) {
	const n, runs = 16, 300
	p, q := make([]byte, 1000), make([]byte, 1000)
	round := func(from, to []*net.TCPConn) {
		for _, c := range from {
			if _, err := c.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range to {
			if _, err := io.ReadFull(c, q); err != nil {
				t.Fatal(err)
			}
		}
	}
	var x, y []*net.TCPConn
	for range n {
		a, b := tcpPair(t)
		x, y = append(x, a), append(y, b)
	}
	both := func() { round(x, y); round(y, x) }
	without, _ := cost(t, runs, both)
	_, x, y = manyRelayed(t, n)
	both()
	with, allocs := cost(t, runs, both)
	// Alone, each takes eight, and up to two in the application because an answer takes longer.
	if each := (with - without) / n; each > 10.5 {
		t.Errorf("a request takes %.1f system calls in the agents", each)
	} else {
		t.Logf("a request takes %.1f system calls in the agents and %.2f allocations", each, allocs/n)
	}
	if allocs > 1 && !raceEnabled {
		t.Errorf("%d requests take %.2f allocations", n, allocs)
	}
}

// holdUp is the owner of a socket that keeps a loop from its work.
type holdUp struct{ held, release chan struct{} }

func (h holdUp) ready(*loop, uint32) bool {
	close(h.held)
	<-h.release
	return false
}

// A loop that finds many applications ready makes one record of what they say, and one write.
func TestALoopWritesOnceForAllThatIsReady(t *testing.T) {
	c, x, y := manyRelayed(t, 16)
	records := func() uint64 {
		c.tls.mu.Lock()
		defer c.tls.mu.Unlock()
		return c.tls.out.seq
	}
	p := make([]byte, 100)
	for i := range 20 {
		h := holdUp{make(chan struct{}), make(chan struct{})}
		c.loop.post(&sock{l: c.loop, owner: h, slot: -1, fd: -1})
		<-h.held
		before := records()
		for _, app := range x {
			if _, err := app.Write(p); err != nil {
				t.Fatal(err)
			}
		}
		close(h.release)
		for _, app := range y {
			if _, err := io.ReadFull(app, p); err != nil {
				t.Fatal(err)
			}
		}
		if n := records() - before; n > 2 && i > 0 { // a PING may come between, and first the events of new sockets
			t.Errorf("what %d applications said at once went out in %d records", len(x), n)
		}
	}
}

// Connections that stand still have no goroutine but Relay's caller, and the loops end with the last of them.
func TestLoopsEndWithTheirLastSocket(t *testing.T) {
	loops, err := NewLoops()
	if err != nil {
		t.Fatal(err)
	}
	a, b := tlsPair(t)
	served := make(chan error, 1)
	go func() {
		served <- Serve(context.Background(), b, ServerConfig{Loops: loops, Handler: func(_ context.Context, s *ServerStream) {
			app, out := tcpPair(t)
			st, err := s.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(struct{ io.Writer }{app}, struct{ io.Reader }{app})
				app.CloseWrite()
			}()
			Relay(st, out, new(RelayStats))
		}})
	}()
	c := NewClient(a, ClientConfig{Loops: loops})
	app, in := tcpPair(t)
	st := mustOpen(t, c)
	relayed := make(chan error, 1)
	go func() { relayed <- Relay(in, st, new(RelayStats)) }()
	if _, err := io.WriteString(app, "hello"); err != nil {
		t.Fatal(err)
	}
	app.CloseWrite()
	if got, err := io.ReadAll(app); err != nil || string(got) != "hello" {
		t.Fatalf("%q, %v", got, err)
	}
	if err := <-relayed; err != nil {
		t.Error(err)
	}
	c.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); loops.Close() }()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		buf := make([]byte, 1<<16)
		t.Fatalf("loops go on without sockets\n%s", buf[:runtime.Stack(buf, true)])
	}
	if loops.take() != nil {
		t.Error("a loop that has ended takes connections")
	}
}

// A client that has said all and heard all may be gone long before the server reads: what is under way still arrives, and
// so does its end.
func TestAnEndBehindAFullWindowIsNoReset(t *testing.T) {
	c, x, y := manyRelayed(t, 1)
	client, server := x[0], y[0]
	read := func() (n int64, held bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, st := range c.streams {
			if st.sink != nil {
				n, held = st.sink.up.Load(), st.held
			}
		}
		return n, held
	}
	p := make([]byte, 64<<10)
	total := 0
	client.SetDeadline(time.Now().Add(20 * time.Second))
	for full := false; !full; {
		if _, err := client.Write(p); err != nil {
			t.Fatal(err)
		}
		total += len(p)
		for n := int64(0); n < int64(total) && !full; time.Sleep(time.Millisecond) {
			n, full = read()
		}
	}
	client.CloseWrite()
	server.CloseWrite()
	if n, err := io.Copy(io.Discard, struct{ io.Reader }{client}); n > 0 || err != nil {
		t.Fatal(n, err)
	}
	client.Close()
	time.Sleep(50 * time.Millisecond) // its FIN may wait behind what nobody reads; it need not
	server.SetDeadline(time.Now().Add(20 * time.Second))
	if n, err := io.Copy(io.Discard, struct{ io.Reader }{server}); err != nil || int(n) != total {
		t.Errorf("%d of %d bytes arrive, and then %v", n, total, err)
	}
}

// A client that resets while there is no room for what it says is not forgotten.
func TestAResetBehindAFullWindowIsOne(t *testing.T) {
	c, x, y := manyRelayed(t, 1)
	x[0].SetLinger(0)
	p := make([]byte, 64<<10)
	for full := false; !full; {
		x[0].SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		_, err := x[0].Write(p)
		full = err != nil
	}
	x[0].Close()
	for end := time.Now().Add(20 * time.Second); c.Streams() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the stream is still open")
		}
	}
	y[0].SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{y[0]}); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server hears %v", err)
	}
}

// A tunnel that is reset from outside ends with all it carries.
func TestResetTLS(t *testing.T) {
	a, b := tlsPair(t)
	accepted := make(chan *net.TCPConn, 1)
	results := make(chan error, 2)
	c := tunnelOver(t, a, b, relayServer(t, accepted, results))
	x, y := relayed(t, c, accepted, results)
	if _, err := io.WriteString(x, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(y, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	ResetTLS(a.(*tls.Conn))
	for _, app := range []*net.TCPConn{x, y} {
		app.SetReadDeadline(time.Now().Add(20 * time.Second))
		var timeout net.Error
		if _, err := app.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() || err == io.EOF {
			t.Errorf("an application reads %v", err)
		}
	}
	for range 2 {
		if err := <-results; err == nil {
			t.Error("a relay ended in order")
		}
	}
}

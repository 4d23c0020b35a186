package hbone

import (
	"context"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/warrenmesh/warren/internal/netns"
)

// sockPair is a connection one of whose ends nobody waits for.
func sockPair(t *testing.T) (app *net.TCPConn, s *netns.Sock) {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	rc, err := ln.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := rc.Control(func(fd uintptr) { s, failed = netns.Accept(int(fd)) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	return c.(*net.TCPConn), s
}

// A handler may return while RelaySocket copies: its stream goes on, and its context lives as long.
func TestARelayOutlivesItsHandler(t *testing.T) {
	t.Run("loop", func(t *testing.T) {
		a, b := tlsPair(t)
		outlive(t, a, b)
	})
	t.Run("no socket", func(t *testing.T) {
		a, b := net.Pipe()
		outlive(t, a, b)
	})
}

func outlive(t *testing.T, client, server net.Conn) {
	app, s := sockPair(t)
	var up, down atomic.Int64
	ended := make(chan error, 2)
	returned := make(chan context.Context, 1)
	c := tunnelOver(t, client, server, func(ctx context.Context, ss *ServerStream) {
		defer func() { returned <- ctx }()
		st, err := ss.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		RelaySocket(st, s, &up, &down, func(err error) { ended <- err })
	})
	st := mustOpen(t, c)
	ctx := <-returned
	say := func(from io.Writer, to io.Reader, what string) {
		t.Helper()
		if _, err := from.Write([]byte(what)); err != nil {
			t.Fatal(err)
		}
		heard := make([]byte, len(what))
		if _, err := io.ReadFull(to, heard); err != nil || string(heard) != what {
			t.Fatalf("%q came as %q, %v", what, heard, err)
		}
	}
	say(st, app, "there")
	say(app, st, "and back")
	if err := ctx.Err(); err != nil {
		t.Errorf("the context has ended while the stream is open: %v", err)
	}
	if err := app.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after FIN: %v", err)
	}
	if err := st.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the relay ended with %v", err)
	}
	<-ctx.Done()
	if up.Load() != 8 || down.Load() != 5 {
		t.Errorf("%d bytes up and %d down", up.Load(), down.Load())
	}
	if len(ended) > 0 {
		t.Error("the end was told twice")
	}
}

// What is reset before it has begun is told to have ended, once.
func TestARelayThatCannotBegin(t *testing.T) {
	_, s := sockPair(t)
	s.Abort()
	ended := make(chan error, 2)
	a, b := tlsPair(t)
	c := tunnelOver(t, a, b, func(_ context.Context, ss *ServerStream) {
		if st, err := ss.Accept(); err == nil {
			RelaySocket(st, s, new(atomic.Int64), new(atomic.Int64), func(err error) { ended <- err })
		}
	})
	st := mustOpen(t, c)
	if err := <-ended; err == nil {
		t.Error("a relay without a socket ended in order")
	}
	if _, err := st.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the stream ended with %v", err)
	}
}

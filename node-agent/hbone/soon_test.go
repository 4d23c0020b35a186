package hbone

import (
	"context"
	"io"
	"net"
	"sync/atomic"
	"testing"
)

// writes counts what is written to a connection.
type writes struct {
	net.Conn
	n atomic.Int64
}

func (w *writes) Write(b []byte) (int, error) {
	w.n.Add(1)
	return w.Conn.Write(b)
}

// Where connections come and go, the end of one that its peer has ended already goes with the beginning of the next;
// where nothing else is to be said, it goes by itself.
func TestTheEndOfAFinishedStreamGoesWithTheNext(t *testing.T) {
	ended := make(chan error, 1)
	a, b := tcpPair(t)
	counted := &writes{Conn: a}
	c := tunnelOver(t, counted, b, func(_ context.Context, s *ServerStream) {
		st, err := s.Accept()
		if err == nil {
			err = st.CloseWrite()
		}
		if err == nil {
			_, err = io.ReadAll(st)
		}
		ended <- err
	})
	const n = 40
	for i := range n {
		st := mustOpen(t, c)
		if i > 0 {
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
		}
		if _, err := io.ReadAll(st); err != nil {
			t.Fatal(err)
		}
		if err := st.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if err := st.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; err != nil { // with nothing that follows
		t.Fatal(err)
	}
	if got := counted.n.Load(); got > n+n/2 {
		t.Errorf("%d streams were opened and ended with %d writes", n, got)
	} else {
		t.Logf("%d streams were opened and ended with %d writes", n, got)
	}
}

package bootstrap

import (
	"context"
	"io"
	"net"
	"testing"
)

// All workers are waited for, the slowest too, and those of an Envoy that has gone are asked anew.
func TestWorkersAreWaitedFor(t *testing.T) {
	asked := make(chan net.Conn, 4)
	w := &workers{count: 2, dial: func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		go func() {
			if _, err := io.ReadFull(b, make([]byte, 1)); err == nil {
				asked <- b
			}
		}()
		return a, nil
	}}
	defer w.close()
	done := make(chan error, 1)
	go func() { done <- w.passed(t.Context()) }()
	answer := func(c net.Conn) {
		t.Helper()
		if _, err := c.Write([]byte{0}); err != nil {
			t.Error(err)
		}
	}
	first, second := <-asked, <-asked
	answered := make(chan struct{})
	go func() { answer(first); close(answered) }()
	select {
	case err := <-done:
		t.Fatalf("one worker has answered, and all have: %v", err)
	default:
	}
	answer(second)
	<-answered
	if err := <-done; err != nil || len(w.conns) != 2 {
		t.Fatal(err, len(w.conns))
	}
	first.Close()
	if err := w.passed(t.Context()); err == nil || len(w.conns) != 0 {
		t.Errorf("Envoy has gone, and its %d workers have answered: %v", len(w.conns), err)
	}
}

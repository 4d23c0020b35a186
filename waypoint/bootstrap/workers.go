package bootstrap

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"
)

// What Envoy's main thread says that it uses, its workers use when they come to it. So each of them is asked for a sign of
// life after that was read: they do what they are told in order. The listener balances connections exactly, so that of as
// many connections as there are workers each has one.
type workers struct {
	dial  func(context.Context) (net.Conn, error) // to a listener that sends back what it gets
	count int
	conns []net.Conn
}

// aWhile bounds what a worker may take; after that it is asked again.
const aWhile = 5 * time.Second

// passed returns once every worker has done what it was told before the call. It is for one goroutine.
func (w *workers) passed(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	for len(w.conns) < w.count {
		c, err := w.dial(ctx)
		if err != nil {
			return fmt.Errorf("ask Envoy's workers: %w", err)
		}
		w.conns = append(w.conns, c)
	}
	for _, ask := range []func(net.Conn) error{
		func(c net.Conn) error { _, err := c.Write([]byte{0}); return err },
		func(c net.Conn) error { _, err := io.ReadFull(c, make([]byte, 1)); return err },
	} {
		for _, c := range w.conns {
			if err := c.SetDeadline(time.Now().Add(aWhile)); err != nil {
				return err
			}
			if err := ask(c); err != nil {
				return fmt.Errorf("ask Envoy's workers: %w", err)
			}
		}
	}
	return nil
}

func (w *workers) close() {
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

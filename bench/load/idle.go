package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/bench"
)

// idle opens c connections, has each answer once, and holds them for a while. Those that have gone by then have
// failed.
func idle(ctx context.Context, j job) (*bench.Outcome, error) {
	conns := make([]net.Conn, j.clients)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	var (
		wg   sync.WaitGroup
		next atomic.Int64
		mu   sync.Mutex
		t    = newTally()
	)
	for range min(16, j.clients) {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(conns) {
					return
				}
				c, err := dialTCP(j, kindEcho)
				if err == nil {
					if err = c.SetReadDeadline(time.Now().Add(j.timeout)); err == nil {
						_, err = io.ReadFull(c, make([]byte, 1))
					}
				}
				if err != nil {
					mu.Lock()
					t.wrong(err)
					mu.Unlock()
					continue
				}
				conns[i] = c
			}
		})
	}
	start := time.Now()
	wg.Wait()
	select {
	case <-time.After(j.duration):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for i, c := range conns {
		if c == nil {
			continue
		}
		if err := alive(c); err != nil {
			t.wrong(fmt.Errorf("connection %d, idle for %s: %w", i, j.duration, err))
			continue
		}
		t.done++
	}
	return outcome([]*tally{t}, time.Since(start)), nil
}

// alive asks for one more byte.
func alive(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte{kindEcho}); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

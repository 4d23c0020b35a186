package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/warrenmesh/warren/bench"
)

// bulk sends on c connections for half the time and receives for the other half. What was sent counts once the
// server has said that it has it.
func bulk(ctx context.Context, j job) (*bench.Outcome, error) {
	j.duration /= 2
	sum := &bench.Outcome{}
	for _, direction := range []func(context.Context, job) (int64, error){upload, download} {
		var (
			wg    sync.WaitGroup
			mu    sync.Mutex
			bytes int64
			errs  error
			start = time.Now()
		)
		for range j.clients {
			wg.Go(func() {
				n, err := direction(ctx, j)
				mu.Lock()
				defer mu.Unlock()
				bytes += n
				errs = errors.Join(errs, err)
			})
		}
		wg.Wait()
		if errs != nil {
			return nil, errs
		}
		sum.Bytes += bytes
		sum.Seconds += time.Since(start).Seconds()
		sum.Done += int64(j.clients)
	}
	return sum, ctx.Err()
}

func upload(ctx context.Context, j job) (int64, error) {
	c, err := dialTCP(j, kindSink)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	b := make([]byte, chunk)
	var sent uint64
	for end := time.Now().Add(j.duration); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := c.Write(b)
		sent += uint64(n)
		if err != nil {
			return 0, fmt.Errorf("after %d bytes: %w", sent, err)
		}
	}
	if err := errors.Join(c.CloseWrite(), c.SetReadDeadline(time.Now().Add(j.timeout))); err != nil {
		return 0, err
	}
	var got [8]byte
	if _, err := io.ReadFull(c, got[:]); err != nil {
		return 0, fmt.Errorf("the server's count: %w", err)
	}
	if n := binary.BigEndian.Uint64(got[:]); n != sent {
		return 0, fmt.Errorf("sent %d bytes, the server has %d", sent, n)
	}
	return int64(sent), nil
}

func download(_ context.Context, j job) (int64, error) {
	c, err := dialTCP(j, binary.BigEndian.AppendUint64([]byte{kindSource}, uint64(j.duration))...)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(j.duration + j.timeout)); err != nil {
		return 0, err
	}
	b := make([]byte, chunk)
	var n int64
	for {
		m, err := c.Read(b)
		n += int64(m)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return 0, fmt.Errorf("after %d bytes: %w", n, err)
		}
	}
}

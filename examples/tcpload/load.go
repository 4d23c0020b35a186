package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// plan says what to send.
type plan struct {
	addr    string
	rate    int
	workers int
	total   int
	size    int
	timeout time.Duration
}

// outcome is what a run prints. Times are of one request, from its first byte written (of a new connection:
// from connect) to the last byte of the answer; a request that had to wait for its worker counts as Late.
type outcome struct {
	Requests      int
	OK            int
	NoPort        int // EADDRNOTAVAIL
	Refused       int
	Reset         int
	TimedOut      int
	Other         int
	Late          int // more than 10 ms behind the schedule
	PerSecond     float64
	P50, P90, P99 float64 // µs
	Slowest       float64 // µs
	Seconds       float64
	Examples      []string
	lasted        []time.Duration
}

// failed counts a request that was not answered.
func (o *outcome) failed(err error) {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		o.NoPort++
	case errors.Is(err, syscall.ECONNREFUSED):
		o.Refused++
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		o.Reset++
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		o.TimedOut++
	default:
		o.Other++
	}
	if len(o.Examples) < 8 {
		o.Examples = append(o.Examples, err.Error())
	}
}

// worker makes one request after the other; end closes what it holds.
type worker func() (request func() error, end func())

// run has the workers take turns: request i is due i/rate seconds after the start.
func (p plan) run(ctx context.Context, hire worker) *outcome {
	var (
		mu  sync.Mutex
		all outcome
		wg  sync.WaitGroup
	)
	// The first request of a connection pays for its set-up; keepAlive makes it before the clock starts.
	start := time.Now().Add(500 * time.Millisecond)
	for w := range p.workers {
		wg.Go(func() {
			var o outcome
			request, end := hire()
			defer end()
			for i := w; i < p.total && ctx.Err() == nil; i += p.workers {
				due := start.Add(time.Duration(i) * time.Second / time.Duration(p.rate))
				time.Sleep(time.Until(due))
				began := time.Now()
				o.Requests++
				if began.Sub(due) > 10*time.Millisecond {
					o.Late++
				}
				if err := request(); err != nil {
					o.failed(err)
					continue
				}
				o.OK++
				o.lasted = append(o.lasted, time.Since(began))
			}
			mu.Lock()
			defer mu.Unlock()
			all.add(&o)
		})
	}
	wg.Wait()
	all.Seconds = time.Since(start).Seconds()
	all.PerSecond = float64(all.OK) / all.Seconds
	if n := len(all.lasted); n > 0 {
		slices.Sort(all.lasted)
		at := func(q int) float64 { return float64(all.lasted[(n-1)*q/100]) / 1e3 }
		all.P50, all.P90, all.P99, all.Slowest = at(50), at(90), at(99), at(100)
	}
	return &all
}

func (o *outcome) add(b *outcome) {
	o.Requests += b.Requests
	o.OK += b.OK
	o.NoPort += b.NoPort
	o.Refused += b.Refused
	o.Reset += b.Reset
	o.TimedOut += b.TimedOut
	o.Other += b.Other
	o.Late += b.Late
	o.lasted = append(o.lasted, b.lasted...)
	o.Examples = append(o.Examples, b.Examples[:min(len(b.Examples), 8-min(8, len(o.Examples)))]...)
}

// message is one request as it goes over the wire: one write.
func (p plan) message() []byte {
	return append(fmt.Appendf(nil, "POST / HTTP/1.1\r\nHost: load\r\nContent-Length: %d\r\n\r\n", p.size), bytes.Repeat([]byte("w"), p.size)...)
}

// exchange sends the request and reads the whole answer.
func (p plan) exchange(c net.Conn, r *bufio.Reader, message []byte) error {
	if err := c.SetDeadline(time.Now().Add(p.timeout)); err != nil {
		return err
	}
	if _, err := c.Write(message); err != nil {
		return err
	}
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || n != int64(p.size)) {
		err = fmt.Errorf("the answer is %s with %d bytes", resp.Status, n)
	}
	return err
}

// keepAlive requests on one connection and opens another only after a failure.
func (p plan) keepAlive() (func() error, func()) {
	var (
		c       net.Conn
		r       *bufio.Reader
		message = p.message()
	)
	end := func() {
		if c != nil {
			c.Close()
			c = nil
		}
	}
	request := func() (err error) {
		if c == nil {
			if c, err = net.DialTimeout("tcp", p.addr, p.timeout); err != nil {
				c = nil
				return err
			}
			r = bufio.NewReader(c)
		}
		if err = p.exchange(c, r, message); err != nil {
			end()
		}
		return err
	}
	if err := request(); err != nil {
		end() // the first counted request says why
	}
	return request, end
}

// newEach opens a connection for every request and is the one that closes it.
func (p plan) newEach() (func() error, func()) {
	message := p.message()
	r := bufio.NewReader(nil)
	return func() error {
		c, err := net.DialTimeout("tcp", p.addr, p.timeout)
		if err != nil {
			return err
		}
		defer c.Close()
		r.Reset(c)
		return p.exchange(c, r, message)
	}, func() {}
}

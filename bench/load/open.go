package main

import (
	"context"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bench"
)

// openLoop sends request i at start + i/rate, whatever became of those before it; client k of c takes every c-th.
// A request that found its connection still waiting for an answer counts from when it was due. One that did not
// counts from when it was sent: by how much this program's own timer was late is not the path's doing, and is
// reported by itself.
func openLoop(ctx context.Context, j job) (*bench.Outcome, error) {
	var (
		wg      sync.WaitGroup
		tallies = make([]*tally, j.clients)
		every   = time.Second / time.Duration(j.rate)
		total   = int(j.duration / every)
		ready   sync.WaitGroup
		begin   = make(chan struct{})
		start   time.Time
	)
	ready.Add(j.clients)
	for k := range j.clients {
		t := newTally()
		tallies[k] = t
		wg.Go(func() {
			// The thread ends with its goroutine: its timer slack is not for others.
			runtime.LockOSThread()
			_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
			r := requester{job: j, buf: make([]byte, 4096)}
			defer r.close()
			if !j.each { // the first request on a connection pays for its set-up
				if err := r.request(); err != nil {
					t.wrong(err)
				}
			}
			ready.Done()
			<-begin
			for i := k; i < total && ctx.Err() == nil; i += j.clients {
				due := start.Add(time.Duration(i) * every)
				from := due
				if wait := time.Until(due); wait > 0 {
					sleep(wait)
					from = time.Now()
					_ = t.late.RecordValue(int64(max(from.Sub(due), 100)))
				}
				if err := r.request(); err != nil {
					t.wrong(err)
					continue
				}
				t.ok(time.Since(from))
			}
		})
	}
	ready.Wait()
	start = time.Now().Add(50 * time.Millisecond)
	close(begin)
	wg.Wait()
	return outcome(tallies, time.Since(start)), ctx.Err()
}

// sleep is the kernel's, which is woken by its own timer and not through the runtime's.
func sleep(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	for unix.Nanosleep(&ts, &ts) == unix.EINTR {
	}
}

// requester makes requests one after the other, on one connection or each on its own.
type requester struct {
	job
	buf  []byte
	s    socket
	open bool
}

var (
	keepRequest = []byte("GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
	eachRequest = []byte("GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
)

func (r *requester) request() (err error) {
	if !r.open {
		if r.s, err = dial(r.addr, r.timeout); err != nil {
			return err
		}
		r.open = true
	}
	message := keepRequest
	if r.each {
		message = eachRequest
	}
	if err = r.s.write(message); err == nil {
		err = r.s.answer(r.buf)
	}
	if err != nil || r.each {
		r.close()
	}
	return err
}

func (r *requester) close() {
	if r.open {
		r.s.close()
		r.open = false
	}
}

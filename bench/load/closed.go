package main

import (
	"context"
	"io"
	"runtime"
	"time"

	"fortio.org/fortio/fhttp"
	"fortio.org/fortio/periodic"
	"fortio.org/log"

	"github.com/warrenmesh/warren/bench"
)

// closedLoop has fortio make one request after the other on each of c connections. The times of a closed loop
// hide what a slow answer kept from being asked, so they are kept only for a single connection, where nothing is
// kept waiting.
func closedLoop(ctx context.Context, j job) (*bench.Outcome, error) {
	log.SetLogLevel(log.Critical)
	stop := periodic.NewAborter()
	defer context.AfterFunc(ctx, func() { stop.Abort(false) })()
	t := newTally()
	o := fhttp.HTTPRunnerOptions{
		RunnerOptions: periodic.RunnerOptions{QPS: -1, Duration: j.duration, NumThreads: j.clients, Out: io.Discard, Stop: stop},
		HTTPOptions:   fhttp.HTTPOptions{URL: "http://" + j.addr + "/", DisableKeepAlive: j.each, HTTPReqTimeOut: j.timeout},
	}
	if j.clients == 1 {
		o.AccessLogger = stopwatch{t}
	}
	o.Init(o.URL)
	r, err := fhttp.RunHTTPTest(&o)
	if err != nil {
		return nil, err
	}
	t.done = r.RetCodes[200]
	for _, n := range r.RetCodes {
		t.failed += n
	}
	t.failed -= t.done
	return outcome([]*tally{t}, r.ActualDuration), ctx.Err()
}

// stopwatch keeps the times that fortio takes.
type stopwatch struct{ t *tally }

func (s stopwatch) Start(ctx context.Context, _ periodic.ThreadID, _ int64, _ time.Time) context.Context {
	return ctx
}

func (s stopwatch) Report(_ context.Context, _ periodic.ThreadID, _ int64, _ time.Time, latency float64, ok bool, _ string) {
	if ok {
		s.t.ok(time.Duration(latency * float64(time.Second)))
	}
}

func (s stopwatch) Info() string { return "histogram" }

// requestResponse sends a byte and waits for one, on one connection.
func requestResponse(ctx context.Context, j job) (*bench.Outcome, error) {
	runtime.LockOSThread()
	s, err := dial(j.addr, j.timeout)
	if err != nil {
		return nil, err
	}
	defer s.close()
	t := newTally()
	b := []byte{kindEcho}
	exchange := func() error {
		if err := s.write(b); err != nil {
			return err
		}
		_, err := s.read(b)
		return err
	}
	for range 100 { // the path learns its round trip time
		if err := exchange(); err != nil {
			return nil, err
		}
	}
	start := time.Now()
	for now := start; now.Sub(start) < j.duration && ctx.Err() == nil; {
		if err := exchange(); err != nil {
			return nil, err
		}
		then := now
		now = time.Now()
		t.ok(now.Sub(then))
	}
	return outcome([]*tally{t}, time.Since(start)), ctx.Err()
}

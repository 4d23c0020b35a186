package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"testing"
	"time"
)

// servers runs both servers and returns their addresses.
func servers(t *testing.T) (http, tcp string) {
	t.Helper()
	http, tcp = freeAddr(t), freeAddr(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, http, tcp) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	for _, a := range []string{http, tcp} {
		for {
			c, err := net.Dial("tcp", a)
			if err == nil {
				c.Close()
				break
			}
			select {
			case err := <-ended:
				t.Fatal(err)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return http, tcp
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestClients(t *testing.T) {
	http, tcp := servers(t)
	quick := job{clients: 2, rate: 200, duration: 300 * time.Millisecond, timeout: 20 * time.Second}
	at := func(addr string, change func(*job)) job {
		j := quick
		j.addr = addr
		if change != nil {
			change(&j)
		}
		return j
	}
	each := func(j *job) { j.each = true }
	one := func(j *job) { j.clients = 1 }
	t.Run("closed loop", func(t *testing.T) {
		for _, j := range []job{at(http, nil), at(http, each), at(http, one)} {
			o, err := closedLoop(t.Context(), j)
			if err != nil || o.Done == 0 || o.Failed != 0 || (o.Latency != nil) != (j.clients == 1) {
				t.Errorf("%+v: %+v, %v", j, o, err)
			}
		}
	})
	t.Run("open loop", func(t *testing.T) {
		for _, j := range []job{at(http, nil), at(http, each)} {
			o, err := openLoop(t.Context(), j)
			if err != nil || o.Done != 60 || o.Failed != 0 || o.Latency == nil || o.Latency.P50 <= 0 || o.Latency.P999 < o.Latency.P50 {
				t.Errorf("%+v: %+v, %v", j, o, err)
			}
		}
	})
	t.Run("request and response", func(t *testing.T) {
		o, err := requestResponse(t.Context(), at(tcp, nil))
		if err != nil || o.Done == 0 || o.Latency == nil {
			t.Errorf("%+v, %v", o, err)
		}
	})
	t.Run("bulk", func(t *testing.T) {
		o, err := bulk(t.Context(), at(tcp, nil))
		if err != nil || o.Bytes == 0 || o.Seconds <= 0 {
			t.Errorf("%+v, %v", o, err)
		}
	})
	t.Run("relay", func(t *testing.T) {
		through := freeAddr(t)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- relay(ctx, []string{through + "=" + tcp}) }()
		defer func() {
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}()
		for {
			c, err := net.Dial("tcp", through)
			if err == nil {
				c.Close()
				break
			}
		}
		o, err := bulk(t.Context(), at(through, nil))
		if err != nil || o.Bytes == 0 {
			t.Errorf("%+v, %v", o, err)
		}
	})
	t.Run("encrypt", func(t *testing.T) {
		sealed, through := freeAddr(t), freeAddr(t)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 2)
		go func() { ended <- encrypting(ctx, []string{sealed + "=" + tcp}, true) }()
		go func() { ended <- encrypting(ctx, []string{through + "=" + sealed}, false) }()
		defer func() {
			stop()
			if err := errors.Join(<-ended, <-ended); err != nil {
				t.Error(err)
			}
		}()
		for _, addr := range []string{sealed, through} {
			for {
				c, err := net.Dial("tcp", addr)
				if err == nil {
					c.Close()
					break
				}
			}
		}
		o, err := bulk(t.Context(), at(through, nil))
		if err != nil || o.Bytes == 0 {
			t.Errorf("%+v, %v", o, err)
		}
	})
	t.Run("idle", func(t *testing.T) {
		o, err := idle(t.Context(), at(tcp, func(j *job) { j.clients = 50 }))
		if err != nil || o.Done != 50 || o.Failed != 0 {
			t.Errorf("%+v, %v", o, err)
		}
	})
	t.Run("nobody there", func(t *testing.T) {
		o, err := openLoop(t.Context(), at(freeAddr(t), nil))
		if err != nil || o.Done != 0 || o.Failed < 60 || len(o.Errors) == 0 {
			t.Errorf("%+v, %v", o, err)
		}
	})
}

// A server that stalls once is seen by every request that was due meanwhile, not by the one that it had at hand:
// that is what the open loop is for.
func TestStallIsNotOmitted(t *testing.T) {
	const stall = 500 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 4096)
		answer := []byte(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", bodySize, make([]byte, bodySize)))
		for i := 0; ; i++ {
			if _, err := c.Read(b); err != nil {
				return
			}
			if i == 20 {
				time.Sleep(stall)
			}
			if _, err := c.Write(answer); err != nil {
				return
			}
		}
	}()
	o, err := openLoop(t.Context(), job{addr: l.Addr().String(), clients: 1, rate: 200, duration: time.Second, timeout: 20 * time.Second})
	if err != nil || o.Done != 200 {
		t.Fatalf("%+v, %v", o, err)
	}
	// Half of the second's requests fell into the stall.
	if o.Latency.P90 < float64(stall.Microseconds())/2 {
		t.Errorf("p90 is %.0f µs: the requests that were due during the stall are missing", o.Latency.P90)
	}
}

func TestMeter(t *testing.T) {
	r, err := readMeter("/proc", []string{"no-such-name"})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Processes) != 0 || r.Busy == 0 || r.Switches == 0 {
		t.Errorf("%+v", r)
	}
	name, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	r, err = readMeter("/proc", []string{string(name[:len(name)-1])})
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, p := range r.Processes {
		found = found || p.PID == os.Getpid() && p.RSS > 1<<20 && p.RSSAnon > 0 && p.Files > 0
	}
	if !found {
		t.Errorf("this process is not among %+v (%s)", r.Processes, strconv.Itoa(os.Getpid()))
	}
	for _, bad := range []string{"", "cpu 1 2 3\n", "cpu a b c d e f g h\nbtime 1\n"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
}

package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// exchange is what one connection came to.
type exchange struct {
	Connected  time.Duration
	Local      string // getsockname in the client
	Peer       string // getpeername in the client
	ServerSaw  string // getpeername in the server
	ServerAddr string // getsockname in the server
	Server     string // its host name
}

// stages of an exchange, for the errors.
var (
	errConnect = errors.New("connecting")
	errCut     = errors.New("cut off after connecting")
)

// talk connects, sends a line and reads who the server is and the line back.
func talk(ctx context.Context, addr string) (exchange, error) {
	var d net.Dialer
	start := time.Now()
	c, err := d.DialContext(ctx, "tcp", addr)
	switch {
	case errors.Is(err, syscall.ECONNRESET): // connected, and cut before this was seen: a SYN's reset is ECONNREFUSED
		return exchange{}, fmt.Errorf("%w: %w", errCut, err)
	case err != nil:
		return exchange{}, fmt.Errorf("%w: %w", errConnect, err)
	}
	defer c.Close()
	x := exchange{Connected: time.Since(start)}
	if t, ok := ctx.Deadline(); ok {
		c.SetDeadline(t)
	}
	if err := x.speak(c); err != nil {
		return x, fmt.Errorf("%w: %w", errCut, err)
	}
	return x, nil
}

// speak does an echo exchange on an open connection.
func (x *exchange) speak(c net.Conn) error {
	x.Local, x.Peer = c.LocalAddr().String(), c.RemoteAddr().String()
	if _, err := fmt.Fprintf(c, "%s\n", marker); err != nil {
		return err
	}
	return x.listen(bufio.NewReader(c))
}

// listen reads the server's line and the echo of the marker.
func (x *exchange) listen(r *bufio.Reader) error {
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	for f := range strings.FieldsSeq(line) {
		k, v, _ := strings.Cut(f, "=")
		switch k {
		case "peer":
			x.ServerSaw = v
		case "local":
			x.ServerAddr = v
		case "name":
			x.Server = v
		}
	}
	back, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	if strings.TrimSpace(back) != marker {
		return fmt.Errorf("the echo is %q", back)
	}
	return nil
}

// first makes an exchange at once, and again when it was cut off: what a killed agent had already accepted ends
// with it, as a server's crash would end it. Attempts says how often that happened.
func first(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("first", flag.ContinueOnError)
	timeout := fs.Duration("timeout", 60*time.Second, "give up after this long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	for attempts := 1; ; attempts++ {
		x, err := talk(ctx, fs.Arg(0))
		switch {
		case err == nil && x.ServerSaw != x.Local:
			return fmt.Errorf("this is %s, the server saw %s", x.Local, x.ServerSaw)
		case err == nil:
			return report(struct {
				Attempts int
				exchange
			}{attempts, x})
		case ctx.Err() != nil || !errors.Is(err, errCut):
			return fmt.Errorf("attempt %d: %w", attempts, err)
		}
	}
}

func who(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("who", flag.ContinueOnError)
	timeout := fs.Duration("timeout", 3*time.Second, "give up after this long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	x, err := talk(ctx, fs.Arg(0))
	if err != nil {
		return err
	}
	fmt.Println(x.Server)
	return nil
}

// loadReport is what load prints.
type loadReport struct {
	Connections int            // started
	OK          int            // exchanged a line each way
	Refused     int            // connect() failed at once
	TimedOut    int            // connect() or the exchange took too long
	Cut         int            // ended after connect() had succeeded
	WrongSource int            // the server saw another address than the client has
	SlowestMS   int64          // of those that succeeded, whole exchange
	P99MS       int64          // the same
	Seconds     float64        // the whole run
	Servers     map[string]int // who answered
	Held        int            // connections that stayed open, an echo on each now and then
	HeldLost    int            // ended by an error
	HeldHung    int            // no echo within the timeout and no error
	HeldEnds    []int64        // when held connections were lost, in ms since 1970
	Examples    []string       // of errors
}

func load(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	rate := fs.Int("rate", 200, "new connections a second; 0 only holds")
	total := fs.Int("n", 0, "stop after this many; 0 means -for")
	dur := fs.Duration("for", 10*time.Second, "how long")
	hold := fs.Int("hold", 0, "connections that stay open meanwhile; without others the load ends with the last of them")
	every := fs.Duration("every", 100*time.Millisecond, "how often there is an echo on each that stays open")
	timeout := fs.Duration("timeout", 30*time.Second, "for each connection")
	until := fs.Bool("until-stdin-ends", false, "stop when standard input ends, if not before")
	if err := fs.Parse(args); err != nil {
		return err
	}
	addr := fs.Arg(0)
	if *until {
		told, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() { _, _ = io.Copy(io.Discard, os.Stdin); cancel() }()
		ctx = told
	}
	var (
		mu   sync.Mutex
		r    = loadReport{Servers: map[string]int{}, Held: *hold}
		took []int64
		wg   sync.WaitGroup
	)
	// Whoever waits for the load to be under way reads this line: the first exchange was made, and one on each
	// connection that stays open.
	var begun sync.WaitGroup
	begun.Add(*hold + min(*rate, 1))
	go func() {
		begun.Wait()
		fmt.Fprintln(os.Stderr, "begun")
	}()
	exchanged := sync.OnceFunc(begun.Done)
	start := time.Now()
	note := func(what string) {
		if len(r.Examples) < 12 {
			r.Examples = append(r.Examples, fmt.Sprintf("%.1fs %s", time.Since(start).Seconds(), what))
		}
	}
	one := func() {
		ctx, cancel := context.WithTimeout(context.Background(), *timeout)
		defer cancel()
		began := time.Now()
		x, err := talk(ctx, addr)
		ms := time.Since(began).Milliseconds()
		mu.Lock()
		defer mu.Unlock()
		r.Connections++
		switch {
		case err == nil && x.ServerSaw != x.Local:
			r.WrongSource++
			note(fmt.Sprintf("client %s, server saw %s", x.Local, x.ServerSaw))
		case err == nil:
			r.OK++
			exchanged()
			r.Servers[x.Server]++
			took = append(took, ms)
		case errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, syscall.ETIMEDOUT):
			r.TimedOut++
			note(err.Error())
		case errors.Is(err, errConnect):
			r.Refused++
			note(err.Error())
		default:
			r.Cut++
			note(fmt.Sprintf("from %s: %v", x.Local, err))
		}
	}
	stop, cancel := context.WithCancel(ctx)
	defer cancel()
	var held sync.WaitGroup
	opening := make(chan struct{}, 256) // at once
	for range *hold {
		held.Go(func() {
			if err := keep(stop, addr, *timeout, *every, opening, begun.Done); err != nil {
				mu.Lock()
				defer mu.Unlock()
				if errors.Is(err, os.ErrDeadlineExceeded) {
					r.HeldHung++
				} else {
					r.HeldLost++
				}
				r.HeldEnds = append(r.HeldEnds, time.Now().UnixMilli())
				note("held: " + err.Error())
			}
		})
	}
	ended := make(chan struct{}) // all that stay open, and nothing else is to be done
	if *hold > 0 && *rate == 0 {
		go func() { held.Wait(); close(ended) }()
	}
	// An open loop: a slow answer does not slow the asking.
	next := time.NewTicker(time.Second / time.Duration(cmp.Or(*rate, 1)))
	defer next.Stop()
	for n := 0; ctx.Err() == nil && (*total > 0 && n < *total || *total == 0 && time.Since(start) < *dur); n++ {
		if *rate > 0 {
			wg.Go(one)
		}
		select {
		case <-next.C:
			continue
		case <-ended:
		}
		break
	}
	wg.Wait()
	cancel()
	held.Wait()
	r.Seconds = time.Since(start).Seconds()
	r.SlowestMS, r.P99MS = rank(took)
	return report(r)
}

// rank returns the largest value and the 99th percentile.
func rank(v []int64) (largest, p99 int64) {
	if len(v) == 0 {
		return 0, 0
	}
	slices.Sort(v)
	return v[len(v)-1], v[(len(v)-1)*99/100]
}

// keep holds a connection open and exchanges a numbered line on it every so often until ctx ends. It calls begun after
// the first, and notices at once when the connection ends.
func keep(ctx context.Context, addr string, timeout, every time.Duration, opening chan struct{}, begun func()) error {
	opening <- struct{}{}
	opened := sync.OnceFunc(func() { <-opening })
	defer opened()
	c, err := net.DialTimeout("tcp", addr, timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for n := 0; ctx.Err() == nil; n++ {
		c.SetDeadline(time.Now().Add(timeout))
		line := fmt.Sprintf("%d %s\n", n, marker)
		if _, err := io.WriteString(c, line); err != nil {
			return fmt.Errorf("after %d lines: %w", n, err)
		}
		if n == 0 {
			if _, err := r.ReadString('\n'); err != nil {
				return fmt.Errorf("before the first line: %w", err)
			}
		}
		back, err := r.ReadString('\n')
		if err != nil {
			return fmt.Errorf("after %d lines: %w", n, err)
		}
		if back != line {
			return fmt.Errorf("line %d came back as %q", n, back)
		}
		if n == 0 {
			opened()
			begun()
		}
		if err := rest(ctx, c, r, every); err != nil {
			return fmt.Errorf("after %d lines: %w", n+1, err)
		}
	}
	return nil
}

// rest waits. Nothing comes meanwhile but the end of the connection, or of ctx.
func rest(ctx context.Context, c net.Conn, r *bufio.Reader, d time.Duration) error {
	c.SetReadDeadline(time.Now().Add(d))
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now()) })
	defer stop()
	_, err := r.Peek(1)
	switch {
	case err == nil:
		return errors.New("more came than was sent")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil
	}
	return err
}

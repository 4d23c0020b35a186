package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// serveTCP accepts until ctx ends and gives each connection to handle, which owns it.
func serveTCP(ctx context.Context, addr string, handle func(*net.TCPConn)) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			handle(c.(*net.TCPConn))
		}()
	}
}

// runEcho serves lines: the first one it sends says "peer=… local=…", everything received comes back.
// It sends that first line only when the client has sent something: this server does not speak first.
func runEcho(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("tcp-echo", flag.ContinueOnError)
	addr := fs.String("listen", ":9000", "address to listen on")
	if err := fs.Parse(args); err != nil {
		return err
	}
	return serveTCP(ctx, *addr, func(c *net.TCPConn) {
		var first [1]byte
		if _, err := io.ReadFull(c, first[:]); err != nil {
			return
		}
		if _, err := fmt.Fprintf(c, "peer=%s local=%s marker=%s\n", c.RemoteAddr(), c.LocalAddr(), marker); err != nil {
			return
		}
		if _, err := c.Write(first[:]); err != nil {
			return
		}
		if _, err := io.Copy(c, c); err == nil {
			c.CloseWrite()
		}
	})
}

// runGreet is a server that speaks first, as MySQL and SMTP do.
func runGreet(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("tcp-greet", flag.ContinueOnError)
	addr := fs.String("listen", ":9001", "address to listen on")
	if err := fs.Parse(args); err != nil {
		return err
	}
	return serveTCP(ctx, *addr, func(c *net.TCPConn) {
		if _, err := fmt.Fprintf(c, "220 hello %s\r\n", c.RemoteAddr()); err != nil {
			return
		}
		line, err := bufio.NewReader(c).ReadString('\n')
		if err != nil {
			return
		}
		fmt.Fprintf(c, "250 %s\r\n", strings.TrimSpace(line))
	})
}

// runHello is the client of runGreet: it says nothing before it was greeted.
func runHello(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("usage: demo tcp-hello HOST:PORT")
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	conn.SetDeadline(deadline)
	r := bufio.NewReader(conn)
	greeting, err := r.ReadString('\n')
	if err != nil {
		return fmt.Errorf("waiting for the greeting: %w", err)
	}
	if _, err := fmt.Fprintf(conn, "%s\n", marker); err != nil {
		return err
	}
	answer, err := r.ReadString('\n')
	fmt.Print(greeting, answer)
	return err
}

// observation is what one connection looked like from both of its ends.
type observation struct {
	Dialled       string `json:"dialled"`
	ClientLocal   string `json:"client_local"` // getsockname in the client
	ClientPeer    string `json:"client_peer"`  // getpeername in the client
	ServerPeer    string `json:"server_peer"`  // getpeername in the server
	ServerLocal   string `json:"server_local"` // getsockname in the server
	MillisConnect int64  `json:"millis_connect"`
}

// observe opens one connection to a tcp-echo server, exchanges a line and returns what both sides saw.
func observe(ctx context.Context, addr string) (observation, error) {
	var d net.Dialer
	start := time.Now()
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return observation{}, err
	}
	defer conn.Close()
	o := observation{Dialled: addr, ClientLocal: conn.LocalAddr().String(), ClientPeer: conn.RemoteAddr().String(),
		MillisConnect: time.Since(start).Milliseconds()}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if _, err := fmt.Fprintf(conn, "%s\n", marker); err != nil {
		return o, fmt.Errorf("sending: %w", err)
	}
	r := bufio.NewReader(conn)
	line, err := r.ReadString('\n')
	if err != nil {
		return o, fmt.Errorf("reading what the server saw: %w", err)
	}
	for _, f := range strings.Fields(line) {
		if v, ok := strings.CutPrefix(f, "peer="); ok {
			o.ServerPeer = v
		}
		if v, ok := strings.CutPrefix(f, "local="); ok {
			o.ServerLocal = v
		}
	}
	back, err := r.ReadString('\n')
	if err != nil {
		return o, fmt.Errorf("reading the echo: %w", err)
	}
	if strings.TrimSpace(back) != marker {
		return o, fmt.Errorf("the echo is %q", back)
	}
	return o, nil
}

func runDial(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("tcp-dial", flag.ContinueOnError)
	timeout := fs.Duration("timeout", 5*time.Second, "give up after this long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("usage: demo tcp-dial HOST:PORT")
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	o, err := observe(ctx, fs.Arg(0))
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(o)
}

// runHalfClose sends -bytes, shuts down its sending side and expects all of them back before the end.
func runHalfClose(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("tcp-halfclose", flag.ContinueOnError)
	size := fs.Int("bytes", 1<<20, "how much to send")
	timeout := fs.Duration("timeout", 20*time.Second, "give up after this long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("usage: demo tcp-halfclose HOST:PORT")
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", fs.Arg(0))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(*timeout))
	sent := make(chan error, 1)
	go func() {
		_, err := io.CopyN(conn, zeros{}, int64(*size))
		if err == nil {
			err = conn.(*net.TCPConn).CloseWrite()
		}
		sent <- err
	}()
	r := bufio.NewReader(conn)
	if _, err := r.ReadString('\n'); err != nil {
		return fmt.Errorf("reading what the server saw: %w", err)
	}
	n, err := io.Copy(io.Discard, r)
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if err := <-sent; err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	if n != int64(*size) {
		return fmt.Errorf("sent %d bytes, got %d back", *size, n)
	}
	fmt.Printf("sent %d bytes, shut down, got %d bytes and the end\n", *size, n)
	return nil
}

// zeros reads as an endless run of zero bytes.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// stormReport is what runStorm prints.
type stormReport struct {
	Connections int      `json:"connections"`
	Failed      int      `json:"failed"`
	Cut         int      `json:"cut"`          // of the failed: ended after they had been connected
	WrongSource int      `json:"wrong_source"` // the server's getpeername is not the client's getsockname
	WrongPeer   int      `json:"wrong_peer"`   // the client's getpeername is not what it dialled
	WrongTarget int      `json:"wrong_target"` // the server's getsockname is not one of -targets
	Seconds     float64  `json:"seconds"`
	Examples    []string `json:"examples,omitempty"`
}

// sameEnd compares two ends of a connection.
func sameEnd(a, b string, anyPort bool) bool {
	if !anyPort {
		return a == b
	}
	x, errX := netip.ParseAddrPort(a)
	y, errY := netip.ParseAddrPort(b)
	return errX == nil && errY == nil && x.Addr().Unmap() == y.Addr().Unmap()
}

// runStorm opens -n connections, -c at a time, and counts those whose addresses are not true on both sides.
func runStorm(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("tcp-storm", flag.ContinueOnError)
	n := fs.Int("n", 1000, "connections")
	c := fs.Int("c", 32, "at a time")
	targets := fs.String("targets", "", "comma-separated ip:port of which the server must report one")
	anyPort := fs.Bool("any-port", false, "the server need only see the client's address, whatever the port")
	timeout := fs.Duration("timeout", 10*time.Second, "for each connection")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("usage: demo tcp-storm [flags] IP:PORT")
	}
	allowed := map[string]bool{}
	for t := range strings.SplitSeq(*targets, ",") {
		if t != "" {
			allowed[t] = true
		}
	}
	var (
		mu     sync.Mutex
		report stormReport
		next   atomic.Int64
		wg     sync.WaitGroup
	)
	note := func(counter *int, what string) {
		mu.Lock()
		defer mu.Unlock()
		*counter++
		if len(report.Examples) < 5 {
			report.Examples = append(report.Examples, what)
		}
	}
	start := time.Now()
	for range *c {
		wg.Go(func() {
			for next.Add(1) <= int64(*n) && ctx.Err() == nil {
				one, cancel := context.WithTimeout(ctx, *timeout)
				o, err := observe(one, fs.Arg(0))
				cancel()
				switch {
				case err != nil:
					note(&report.Failed, err.Error())
					if o.Dialled != "" { // connected
						mu.Lock()
						report.Cut++
						mu.Unlock()
					}
					continue
				case !sameEnd(o.ServerPeer, o.ClientLocal, *anyPort):
					note(&report.WrongSource, fmt.Sprintf("client %s, server saw %s", o.ClientLocal, o.ServerPeer))
				}
				if o.ClientPeer != fs.Arg(0) {
					note(&report.WrongPeer, fmt.Sprintf("dialled %s, peer %s", fs.Arg(0), o.ClientPeer))
				}
				if len(allowed) > 0 && !allowed[o.ServerLocal] {
					note(&report.WrongTarget, "server was "+o.ServerLocal)
				}
			}
		})
	}
	wg.Wait()
	report.Connections, report.Seconds = *n, time.Since(start).Seconds()
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		return err
	}
	if bad := report.Failed + report.WrongSource + report.WrongPeer + report.WrongTarget; bad > 0 {
		return fmt.Errorf("%d of %d connections were not right", bad, *n)
	}
	return nil
}

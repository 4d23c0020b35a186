// Command tcpload puts a load on a TCP path and says how it fared, in JSON: requests at a steady rate on
// connections that stay open, or new connections at a steady rate that the client closes. It knows nothing of
// the mesh, so that the same run with and without one can be compared.
//
//	tcpload serve ADDR       HTTP echo
//	tcpload qps ADDR         requests on open connections
//	tcpload churn ADDR       a new connection for every request
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	fs := flag.NewFlagSet("tcpload", flag.ExitOnError)
	p := plan{}
	fs.IntVar(&p.rate, "rate", 1000, "requests a second")
	fs.IntVar(&p.workers, "c", 16, "connections at a time")
	fs.IntVar(&p.total, "n", 5000, "requests")
	fs.IntVar(&p.size, "bytes", 1024, "of every request and every answer")
	fs.DurationVar(&p.timeout, "timeout", 10*time.Second, "of one request")
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: tcpload serve|qps|churn [flags] ADDR")
		os.Exit(2)
	}
	if err := fs.Parse(os.Args[2:]); err != nil { // ExitOnError: it has ended the process
		os.Exit(2)
	}
	p.addr = fs.Arg(0)
	var err error
	switch os.Args[1] {
	case "serve":
		err = serve(ctx, p.addr)
	case "qps":
		err = json.NewEncoder(os.Stdout).Encode(p.run(ctx, p.keepAlive))
	case "churn":
		err = json.NewEncoder(os.Stdout).Encode(p.run(ctx, p.newEach))
	default:
		err = fmt.Errorf("no such verb: %s", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tcpload:", err)
		os.Exit(1)
	}
}

// serve answers every request with its body, until ctx ends.
func serve(ctx context.Context, addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return // the client has gone
		}
		if _, err := w.Write(b); err != nil {
			return
		}
	})}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return errors.Join(s.Close(), ignore(<-ended, http.ErrServerClosed))
	}
}

func ignore(err, what error) error {
	if errors.Is(err, what) {
		return nil
	}
	return err
}

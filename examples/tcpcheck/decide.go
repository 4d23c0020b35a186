package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// decide asks again and again whether connections are let in, until its standard input ends, and writes a line
// for each: which target, when the attempt began and when its outcome was known (ns since 1970), and the outcome.
// A connection is let in when the server has answered on it: before that, somebody on the way may have accepted. Of a
// target that is a URL it asks for requests, on one connection.
func decide(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("decide", flag.ContinueOnError)
	every := fs.Duration("every", 10*time.Millisecond, "begin the next attempt at a target this long after the last, or when that has ended")
	timeout := fs.Duration("timeout", 10*time.Second, "for each connection")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // its end is all that matters
		cancel()
	}()
	lines := make(chan string, 1024)
	var probers sync.WaitGroup
	for _, target := range fs.Args() {
		name, addr, ok := strings.Cut(target, "=")
		if !ok {
			return fmt.Errorf("a target is NAME=HOST:PORT, not %q", target)
		}
		try := func() string { return attempt(addr, *timeout) }
		if strings.HasPrefix(addr, "http://") {
			try = asker(addr, *timeout)
		} else if strings.Contains(addr, "/") {
			return fmt.Errorf("a target is NAME=HOST:PORT or NAME=http://HOST/PATH, not %q", target)
		}
		probers.Go(func() {
			next := time.NewTicker(*every)
			defer next.Stop()
			for ctx.Err() == nil {
				lines <- name + " " + try()
				select {
				case <-ctx.Done():
				case <-next.C:
				}
			}
		})
	}
	go func() { probers.Wait(); close(lines) }()
	out := bufio.NewWriter(os.Stdout)
	for l := range lines {
		if _, err := out.WriteString(l + "\n"); err != nil {
			return err
		}
		if len(lines) == 0 {
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
	return out.Flush()
}

// attempt is one connection: "<began> <ended> allowed|denied|hung".
func attempt(addr string, timeout time.Duration) string {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	began := time.Now()
	_, err := talk(ctx, addr)
	outcome := "denied"
	switch {
	case err == nil:
		outcome = "allowed"
	case errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil:
		outcome = "hung"
	}
	return fmt.Sprintf("%d %d %s", began.UnixNano(), time.Now().UnixNano(), outcome)
}

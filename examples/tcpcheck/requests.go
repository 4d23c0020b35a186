package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// requestReport is what requests prints.
type requestReport struct {
	Requests int // begun
	Failed   int // not answered with 200
	P99MS    int64
	Seconds  float64
	Examples []string // of failures
}

// requests asks an HTTP server at a steady rate until its standard input ends. Connections are kept, and no more than connections
// are made, as applications do: where all are taken a request waits for one, on its own time.
// It says "begun" once a request was answered.
func requests(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("requests", flag.ContinueOnError)
	rate := fs.Float64("rate", 100, "requests a second")
	timeout := fs.Duration("timeout", 20*time.Second, "for each")
	connections := fs.Int("connections", 256, "at most")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	client := &http.Client{Timeout: *timeout, Transport: &http.Transport{MaxConnsPerHost: *connections, MaxIdleConnsPerHost: *connections}}
	begun := sync.OnceFunc(func() { fmt.Fprintln(os.Stderr, "begun") })
	var (
		mu   sync.Mutex
		out  requestReport
		took []time.Duration
		all  sync.WaitGroup
	)
	start := time.Now()
	for n := 0; ; n++ {
		due := start.Add(time.Duration(float64(n) / *rate * float64(time.Second)))
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(due)):
		}
		if ctx.Err() != nil {
			break
		}
		all.Go(func() {
			began := time.Now()
			outcome := request(client, fs.Arg(0))
			mu.Lock()
			defer mu.Unlock()
			out.Requests++
			took = append(took, time.Since(began))
			if outcome == "200" {
				begun()
				return
			}
			out.Failed++
			if len(out.Examples) < 10 {
				out.Examples = append(out.Examples, began.Format("15:04:05.000")+" "+outcome)
			}
		})
	}
	all.Wait()
	out.Seconds = time.Since(start).Seconds()
	if slices.Sort(took); len(took) > 0 {
		out.P99MS = took[(len(took)-1)*99/100].Milliseconds()
	}
	return report(out)
}

// request is the status of one request, and what the answer says where it is not 200, or the error.
func request(client *http.Client, url string) string {
	res, err := client.Get(url)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return err.Error()
	case res.StatusCode != http.StatusOK:
		return fmt.Sprintf("%d %.100s", res.StatusCode, body)
	}
	return "200"
}

// asker makes attempts of requests, all on one connection as long as nobody ends it: "<began> <ended> allowed|denied|hung".
func asker(url string, timeout time.Duration) func() string {
	client := &http.Client{Timeout: timeout, Transport: &http.Transport{MaxConnsPerHost: 1}}
	return func() string {
		began := time.Now()
		outcome := "hung"
		switch said := request(client, url); {
		case said == "200":
			outcome = "allowed"
		case strings.HasPrefix(said, "403 "):
			outcome = "denied"
		default:
			fmt.Fprintln(os.Stderr, said)
		}
		return fmt.Sprintf("%d %d %s", began.UnixNano(), time.Now().UnixNano(), outcome)
	}
}

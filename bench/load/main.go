// Command load is the traffic of the benchmark, and its meter: servers, clients that print one JSON object, and
// what a node's kernel and chosen processes have used. It knows nothing of the meshes it goes through.
//
//	load serve                        HTTP on :8080, the TCP workloads on :8081
//	load http ADDR                    as many requests as c connections take, by fortio
//	load open ADDR                    requests at a steady rate, by the clock
//	load rr ADDR                      one byte there, one byte back
//	load bulk ADDR                    bytes in one direction, then in the other
//	load idle ADDR                    connections that do nothing
//	load sleep                        nothing at all
//	load relay LISTEN=TARGET...       copies, the floor for what a proxy costs
//	load encrypt LISTEN=TARGET...     copies to encrypted connections, and
//	load decrypt LISTEN=TARGET...     from such: the floor for what a proxy costs that encrypts
//	load meter MARK...                CPU and memory of the processes that a mark is of: a container, a number, a name
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/bench"
)

// job is one run of a client.
type job struct {
	addr     string
	clients  int
	rate     int
	each     bool // a new connection for every request
	duration time.Duration
	timeout  time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("say what to do: serve, http, open, rr, bulk, idle, sleep, relay, encrypt, decrypt or meter")
	}
	verb := args[0]
	j := job{}
	fs := flag.NewFlagSet(verb, flag.ContinueOnError)
	httpAddr := fs.String("http", ":8080", "where serve takes HTTP")
	tcpAddr := fs.String("tcp", ":8081", "where serve takes the TCP workloads")
	proc := fs.String("proc", "/proc", "what meter reads")
	fs.IntVar(&j.clients, "c", 1, "connections at a time")
	fs.IntVar(&j.rate, "rate", 1000, "requests a second of open")
	fs.BoolVar(&j.each, "each", false, "a new connection for every request")
	fs.DurationVar(&j.duration, "d", 5*time.Second, "how long")
	fs.DurationVar(&j.timeout, "timeout", 10*time.Second, "of one request")
	if err := fs.Parse(args[1:]); err != nil {
		return err
	}
	j.addr = fs.Arg(0)
	client := map[string]func(context.Context, job) (*bench.Outcome, error){
		"http": closedLoop, "open": openLoop, "rr": requestResponse, "bulk": bulk, "idle": idle}[verb]
	switch {
	case verb == "serve":
		return serve(ctx, *httpAddr, *tcpAddr)
	case verb == "relay":
		return relay(ctx, fs.Args())
	case verb == "encrypt" || verb == "decrypt":
		return encrypting(ctx, fs.Args(), verb == "decrypt")
	case verb == "sleep":
		<-ctx.Done()
		return nil
	case verb == "meter":
		r, err := readMeter(*proc, fs.Args())
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(r)
	case client == nil:
		return fmt.Errorf("%q is none of serve, http, open, rr, bulk, idle, sleep, relay, encrypt, decrypt, meter", verb)
	case j.addr == "" || j.clients < 1 || j.rate < 1 || j.duration <= 0:
		return fmt.Errorf("%s needs an address, at least one connection, a rate and a duration", verb)
	}
	o, err := client(ctx, j)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(o)
}

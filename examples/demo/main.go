// Command demo is the example application and, for the tests, a set of small TCP programs that show what
// a connection looks like from inside it. It knows nothing of the mesh.
//
//	ui         GET /        calls catalog, answers with the page
//	catalog    GET /items   calls inventory, answers with the items and their stock
//	inventory  GET /stock   answers with the stock
//	load       calls one URL at a steady rate and logs what came back
//	hook       see hook.go
//	tcp-*      see tcp.go
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// version is set at link time, or by VERSION in the environment so that one image can be two versions.
var version = "v1"

type command struct {
	name, about string
	run         func(ctx context.Context, args []string) error
}

var commands = []command{
	{"ui", "the shop's front page", runUI},
	{"catalog", "items, with their stock from inventory", runCatalog},
	{"inventory", "stock of each item", runInventory},
	{"load", "call a URL at a steady rate", runLoad},
	{"get", "call a URL once and print the answer", runGet},
	{"tcp-echo", "print both addresses of each connection on its first line, then echo", runEcho},
	{"tcp-dial", "connect, print getsockname and getpeername, exchange a line", runDial},
	{"tcp-greet", "a server that speaks first", runGreet},
	{"tcp-hello", "wait for the server's greeting, answer, print both its lines", runHello},
	{"tcp-halfclose", "send, shut down the sending side, then read to the end", runHalfClose},
	{"tcp-storm", "open many connections and compare the addresses that each side saw", runStorm},
	{"hook", "a webhook and an aggregated API for an API server", runHook},
	{"files", "serve the files of a directory", runFiles},
	{"sleep", "do nothing until told to stop", runSleep},
}

func main() {
	if v := os.Getenv("VERSION"); v != "" {
		version = v
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 {
		for _, c := range commands {
			if c.name == os.Args[1] {
				if err := c.run(ctx, os.Args[2:]); err != nil {
					slog.Error(c.name+" failed", "error", err)
					os.Exit(1)
				}
				return
			}
		}
	}
	var b strings.Builder
	for _, c := range commands {
		fmt.Fprintf(&b, "  %-14s %s\n", c.name, c.about)
	}
	fmt.Fprintf(os.Stderr, "usage: demo COMMAND [flags]\n%s", b.String())
	os.Exit(2)
}

func runSleep(ctx context.Context, _ []string) error {
	<-ctx.Done()
	return nil
}

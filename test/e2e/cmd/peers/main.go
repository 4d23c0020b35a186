// Command peers builds what tests run of other projects, from source and into the user's cache, and prints the directories that the
// programs are in.
//
//	go run ./cmd/peers            all that the tests of each run need
//	go run ./cmd/peers NAME...    only these
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	names := os.Args[1:]
	if len(names) == 0 {
		names = lab.Peers
	}
	failed := false
	for _, name := range names {
		dir, err := lab.BuildPeer(ctx, name, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
		if err != nil {
			fmt.Fprintln(os.Stderr, "peers:", err)
			failed = true // the others are wanted all the same
			continue
		}
		fmt.Println(dir)
	}
	if failed {
		os.Exit(1)
	}
}

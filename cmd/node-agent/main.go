// Command node-agent runs Warren's agent on a node.
//
//	node-agent            runs it, configured by the environment
//	node-agent uninstall  takes everything of Warren's off the node: capture, programs, CNI plugin, state
//	node-agent idle       waits until it is told to end: what a node's pod does once the node is clean
//	node-agent version    says which it is
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	nodeagent "github.com/warrenmesh/warren/node-agent"

	"github.com/warrenmesh/warren/internal/build"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "node-agent:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	command := "run"
	if len(args) > 0 {
		command = args[0]
	}
	if command == "version" {
		fmt.Println(build.Version)
		return nil
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if command == "idle" {
		<-ctx.Done()
		return nil
	}
	env := &environment{}
	cfg := env.config()
	defer env.flush()
	if err := env.Err(); err != nil {
		return err
	}
	switch command {
	case "run":
		return nodeagent.Run(ctx, cfg)
	case "uninstall":
		return nodeagent.Uninstall(ctx, cfg)
	default:
		return fmt.Errorf("command %q is none of run, uninstall, idle, version", command)
	}
}

// Command warren is the operator's view of the mesh. It also works as a kubectl plugin, when its binary is
// called kubectl-warren.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/warrenmesh/warren/internal/cli"
)

// version is set when the binary is linked.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(cli.Main(ctx, cli.Env{
		Program: os.Args[0], Args: os.Args[1:], Version: version,
		Out: os.Stdout, Err: os.Stderr, NoColor: os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb",
	}))
}

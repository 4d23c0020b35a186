// Command holder keeps the node agent's listeners and last-good state while the agent is away.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/warrenmesh/warren/internal/logformat"
	"github.com/warrenmesh/warren/node-agent/holder"
)

func main() {
	path := flag.String("socket", holder.DefaultPath, "Unix socket to listen on")
	items := flag.Int("max-items", 4096, "items to hold at most")
	files := flag.Int("max-files", 16384, "file descriptors to hold at most")
	blobs := flag.Int64("max-blob-mib", 256, "sealed memory to hold at most, in MiB")
	flag.Parse()

	log := slog.New(logformat.New(os.Stderr, true, slog.LevelInfo))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	err := holder.NewServer(holder.ServerConfig{
		Path: *path, Log: log,
		MaxItems: *items, MaxFiles: *files, MaxBlobBytes: *blobs << 20,
	}).Run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "holder:", err)
		os.Exit(1)
	}
}

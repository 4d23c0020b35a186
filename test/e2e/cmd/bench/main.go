// Command bench brings a cluster up on this machine, or takes the one that runs, installs Warren as it is in this
// checkout, and runs `warren bench` there. With WARREN_E2E_KUBECONFIG it uses that cluster as it is. Arguments go to
// `warren bench`.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	start := time.Now()
	l, err := lab.Open(ctx, os.Getenv("WARREN_E2E_KUBECONFIG"), func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	})
	if err != nil {
		return err
	}
	if l.Cluster != nil {
		if err := l.BuildImages(ctx); err != nil {
			return err
		}
		if err := l.Install(ctx); err != nil {
			return err
		}
		envoy, err := l.LoadEnvoy(ctx)
		if err != nil {
			return err
		}
		if err := l.LoadWaypoint(ctx); err != nil {
			return err
		}
		args = append([]string{"--sidecar-image", envoy}, args...)
	}
	cmd, err := l.Bench(ctx, args...)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

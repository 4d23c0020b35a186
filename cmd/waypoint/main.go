// Command waypoint runs the Envoy of a waypoint, configured by the environment.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/internal/logformat"
	"github.com/warrenmesh/warren/waypoint/bootstrap"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "waypoint:", err)
		os.Exit(1)
	}
}

func run() error {
	cfg, err := config(os.LookupEnv)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return bootstrap.Run(ctx, cfg)
}

func config(lookup func(string) (string, bool)) (bootstrap.Config, error) {
	var errs []error
	text := func(name, otherwise string) string {
		if v, ok := lookup(name); ok && v != "" {
			return v
		}
		return otherwise
	}
	number := func(name string, otherwise int) int {
		n, err := strconv.Atoi(text(name, strconv.Itoa(otherwise)))
		if err != nil || n < 0 {
			errs = append(errs, fmt.Errorf("%s=%q is no number", name, text(name, "")))
		}
		return n
	}
	return bootstrap.Config{
		PodName: text("POD_NAME", ""), PodNamespace: text("POD_NAMESPACE", ""), PodIP: text("POD_IP", ""),
		ServiceAccount: text("SERVICE_ACCOUNT", ""), TrustDomain: text("TRUST_DOMAIN", "cluster.local"), ClusterID: text("CLUSTER_ID", "Kubernetes"),
		ControlAddress: text("CONTROL_ADDRESS", "istiod.istio-system.svc:15012"),
		RootFile:       text("ROOT_FILE", "/var/run/secrets/istio/root-cert.pem"),
		TokenFile:      text("TOKEN_FILE", "/var/run/secrets/tokens/istio-token"),
		Envoy:          text("ENVOY", "/envoy"), RunDir: text("RUN_DIR", "/run/waypoint"),
		Concurrency: number("CONCURRENCY", 2), Drain: time.Duration(number("DRAIN_SECONDS", 30)) * time.Second,
		LogLevel: text("ENVOY_LOG_LEVEL", "warning"), StatusAddr: ":15021", TelemetryAddr: ":15020", AdminPort: 15000,
		Log: slog.New(logformat.New(os.Stdout, text("LOG_FORMAT", "") == "json", slog.LevelInfo)),
	}, errors.Join(errs...)
}

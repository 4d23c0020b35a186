// Command waypoint runs the Envoy of a waypoint, configured by the environment.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/internal/build"
	"github.com/warrenmesh/warren/internal/environ"
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
	var env environ.Reader
	cfg := config(&env)
	if err := env.Err(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return bootstrap.Run(ctx, cfg)
}

func config(e *environ.Reader) bootstrap.Config {
	return bootstrap.Config{
		PodName: e.Text("POD_NAME"), PodNamespace: e.Text("POD_NAMESPACE"), PodIP: e.Text("POD_IP"),
		ServiceAccount: e.Text("SERVICE_ACCOUNT"), TrustDomain: e.TextOr("TRUST_DOMAIN", "cluster.local"), ClusterID: e.TextOr("CLUSTER_ID", "Kubernetes"), Version: build.Version,
		ControlAddress: e.TextOr("CONTROL_ADDRESS", "istiod.istio-system.svc:15012"),
		RootFile:       e.TextOr("ROOT_FILE", "/var/run/secrets/istio/root-cert.pem"),
		TokenFile:      e.TextOr("TOKEN_FILE", "/var/run/secrets/tokens/istio-token"),
		Envoy:          e.TextOr("ENVOY", "/envoy"), RunDir: e.TextOr("RUN_DIR", "/run/waypoint"),
		Concurrency: e.Number("CONCURRENCY", 2), Drain: time.Duration(e.Number("DRAIN_SECONDS", 30)) * time.Second,
		LogLevel: e.TextOr("ENVOY_LOG_LEVEL", "warning"), StatusAddr: ":15021", TelemetryAddr: ":15020", AdminPort: 15000,
		Log: slog.New(logformat.New(os.Stdout, e.Text("LOG_FORMAT") == "json", slog.LevelInfo)),
	}
}

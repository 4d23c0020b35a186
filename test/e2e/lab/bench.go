package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/warrenmesh/warren/test/cluster"
)

// Bench is the command `warren bench` of this checkout for the lab's cluster, where the chart and Warren's images
// have to be.
func (l *Lab) Bench(ctx context.Context, args ...string) (*exec.Cmd, error) {
	bin := filepath.Join(l.root, "bin", "warren")
	build := exec.CommandContext(ctx, "go", "build", "-o", bin, "./cmd/warren")
	build.Dir = l.root
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the command line tool: %w: %s", err, bytes.TrimSpace(out))
	}
	all := []string{"bench", "--kubeconfig", l.kubeconfig}
	if out, err := exec.CommandContext(ctx, "git", "-C", l.root, "describe", "--always", "--dirty", "--exclude=*").Output(); err == nil {
		all = append(all, "--commit", string(bytes.TrimSpace(out)))
	}
	cmd := exec.CommandContext(ctx, bin, append(all, args...)...)
	// An interrupt lets it delete its pods.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd, nil
}

// LoadWaypoint loads the image of waypoints into our own cluster, once.
func (l *Lab) LoadWaypoint(ctx context.Context) error {
	if l.waypoint {
		return nil
	}
	dir, err := os.MkdirTemp("", "warren-waypoint-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	archive := filepath.Join(dir, "waypoint.tar")
	if _, err := cluster.WaypointArchive(ctx, archive, "dev"); err != nil {
		return err
	}
	err = l.Cluster.LoadImages(ctx, archive)
	l.waypoint = err == nil
	return err
}

// LoadEnvoy loads an image of Envoy into our own cluster and returns its name.
func (l *Lab) LoadEnvoy(ctx context.Context) (string, error) {
	dir, err := os.MkdirTemp("", "warren-envoy-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	archive := filepath.Join(dir, "envoy.tar")
	if err := cluster.EnvoyArchive(ctx, archive); err != nil {
		return "", err
	}
	return cluster.EnvoyImage, l.Cluster.LoadImages(ctx, archive)
}

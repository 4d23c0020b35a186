package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll/install"
)

// Uninstall takes everything of Warren's off the node, in the order in which nothing breaks: the CNI plugin
// first, so that no new pod waits for an agent; then capture, pod by pod, and the programs; then the state.
// The pods go on without a mesh. It waits for an agent that still runs here to end.
func Uninstall(ctx context.Context, cfg Config) error {
	if cfg.Node == "" {
		cfg.Node = "unknown" // nothing here depends on which node it is
	}
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var errs []error
	plugin := install.New(install.Config{Binary: cfg.CNIBinary, BinDir: cfg.CNIBinDir, ConfDir: cfg.CNIConfDir, Log: cfg.Log})
	if err := plugin.Uninstall(ctx); err != nil {
		errs = append(errs, fmt.Errorf("take out the CNI plugin: %w", err))
	}
	errs = append(errs, datapath.Uninstall(ctx, datapath.Config{Dir: cfg.BPFDir, CgroupRoot: cfg.CgroupRoot, Proc: cfg.Proc, Log: cfg.Log}))
	states, err := filepath.Glob(filepath.Join(cfg.StateDir, stateFile) + "*") // with its journals
	errs = append(errs, err)
	for _, f := range append(states, cfg.enrolledFile(), cfg.CNISocket) {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	cfg.Log.Info("nothing of Warren's is left on this node but the holder, which goes with its pod")
	return nil
}

// Package install puts the CNI plugin on the node and takes it off again.
//
// It owns the order in which that is safe. A network configuration that names a plugin whose binary is not
// there keeps every pod of the node from starting, so the binary comes first and goes last; and an agent that
// finds such a configuration repairs the binary before anything else. The agent itself is on the host network
// and starts regardless.
//
// It must not know pods or the control plane.
package install

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// Config says where things are, as the agent sees the node's directories.
type Config struct {
	Binary   string // the plugin in the agent's image
	BinDir   string // the node's plugins. Default /opt/cni/bin
	ConfDir  string // the node's network configurations. Default /etc/cni/net.d
	Settings cni.Settings
	// Replaces are types of plugins whose entries are taken out: of a mesh that captured on this node before, and whose plugin would
	// wait for its agent in vain.
	Replaces []string
	Log      *slog.Logger
	Interval time.Duration // between two looks at what is installed: 1 s
}

// Installer keeps the plugin installed.
type Installer struct {
	cfg Config

	compared bool        // the binary on the node has been compared with ours by content
	why      string      // last complaint, so that each is logged once
	chained  []time.Time // the last times that the entry was written
}

// New returns an Installer that has not touched the node yet.
func New(cfg Config) *Installer {
	cfg.BinDir = cmp.Or(cfg.BinDir, "/opt/cni/bin")
	cfg.ConfDir = cmp.Or(cfg.ConfDir, "/etc/cni/net.d")
	cfg.Interval = cmp.Or(cfg.Interval, time.Second)
	cfg.Settings.Type = cni.PluginType
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Installer{cfg: cfg}
}

func (i *Installer) target() string { return filepath.Join(i.cfg.BinDir, cni.PluginType) }

// Repair puts the binary in place if a network configuration already asks for it. It is called first thing,
// before there is any state: without it a node whose plugin directory was wiped could start no pod.
func (i *Installer) Repair() error {
	c, err := readConf(i.cfg.ConfDir)
	if errors.Is(err, errNoConf) || err == nil && !c.has() {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = i.binary()
	return err
}

// Install puts binary and entry in place. It may be called at any time; what is right already is not written.
func (i *Installer) Install() error {
	copied, err := i.binary()
	if err != nil {
		return err
	}
	c, err := readConf(i.cfg.ConfDir)
	if err != nil {
		return err
	}
	changed, err := c.insert(i.cfg.Settings, i.cfg.Replaces...)
	if err != nil || !changed {
		if err == nil && copied {
			i.cfg.Log.Info("CNI plugin written", "path", i.target())
		}
		return err
	}
	if err := c.write(); err != nil {
		return err
	}
	switch n := i.wrote(time.Now()); {
	case n < contested:
		i.cfg.Log.Info("CNI plugin chained", "configuration", c.path, "plugin", i.target())
	case n == contested:
		i.cfg.Log.Warn("somebody takes the CNI plugin out again and again; pods that start meanwhile are captured only after they have started. If it is Cilium: cni.exclusive=false",
			"configuration", c.path, "times", n, "within", contestedWithin)
	}
	return nil
}

// An entry that has to be written this many times in so long is one that somebody takes out on purpose.
const (
	contested       = 5
	contestedWithin = time.Minute
)

// wrote notes that the entry was written, and returns how many times it was lately; of many no more than one above contested.
func (i *Installer) wrote(now time.Time) int {
	i.chained = slices.DeleteFunc(i.chained, func(t time.Time) bool { return now.Sub(t) > contestedWithin })
	if len(i.chained) > contested {
		i.chained = i.chained[1:]
	}
	i.chained = append(i.chained, now)
	return len(i.chained)
}

// Run installs, and installs again when somebody else has rewritten the configuration or removed the binary,
// until ctx ends. What was started meanwhile without the plugin is found by the agent's scan.
func (i *Installer) Run(ctx context.Context) {
	t := time.NewTicker(i.cfg.Interval)
	defer t.Stop()
	for {
		err := i.Install()
		why := ""
		if err != nil {
			why = err.Error()
		}
		if why != "" && why != i.why {
			i.cfg.Log.Warn("CNI plugin is not installed; new pods are captured only after they have started", "err", err)
		}
		i.why = why
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// Uninstall takes the entry out of every configuration, and then removes the binary. Between the two it waits:
// the runtime notices the changed configuration within moments, and a pod that is being torn down by the old one
// still runs the binary.
func (i *Installer) Uninstall(ctx context.Context) error {
	all, err := readConfs(i.cfg.ConfDir)
	if err != nil && !errors.Is(err, errNoConf) {
		return err
	}
	for _, c := range all {
		if !c.remove() {
			continue
		}
		if err := c.restore(); err != nil {
			return err
		}
		i.cfg.Log.Info("CNI plugin taken out", "configuration", c.path)
	}
	select {
	case <-time.After(2 * time.Second):
	case <-ctx.Done():
	}
	err = os.Remove(i.target())
	// On a file system that is read-only unlink says so before it looks whether the file is there: in such a directory it never was.
	if _, there := os.Lstat(i.target()); err != nil && !errors.Is(there, fs.ErrNotExist) {
		return fmt.Errorf("remove the CNI plugin: %w", err)
	}
	return nil
}

// binary copies the plugin to the node unless the same one is there.
func (i *Installer) binary() (copied bool, err error) {
	src, err := os.Stat(i.cfg.Binary)
	if err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	// The copy carries the source's time, so that looking every second costs two stats. The first look compares the
	// content: in a reproducible image every version has the same time.
	if dst, err := os.Stat(i.target()); i.compared && err == nil && dst.Size() == src.Size() && dst.ModTime().Equal(src.ModTime()) && dst.Mode().Perm()&0o111 != 0 {
		return false, nil
	}
	b, err := os.ReadFile(i.cfg.Binary)
	if err != nil {
		return false, fmt.Errorf("install the CNI plugin: %w", err)
	}
	if have, err := os.ReadFile(i.target()); err != nil || !bytes.Equal(have, b) {
		if err := cni.WriteFile(i.target(), b, 0o755); err != nil {
			return false, fmt.Errorf("install the CNI plugin: %w", err)
		}
		copied = true
	}
	if err := errors.Join(os.Chmod(i.target(), 0o755), os.Chtimes(i.target(), src.ModTime(), src.ModTime())); err != nil {
		return copied, fmt.Errorf("install the CNI plugin: %w", err)
	}
	i.compared = true
	return copied, nil
}

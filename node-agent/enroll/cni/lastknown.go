package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// LastKnown is what the plugin may rely on while the agent is away: in which namespaces pods were enrolled,
// by the namespace's label or their own, when the agent last heard from the control plane. The agent is its only writer.
type LastKnown struct {
	Version    int      `json:"version"`
	Namespaces []string `json:"enrolledNamespaces"`
}

const lastKnownVersion = 1

// ErrNoState means that there is no state file. The agent installs the plugin only once the file is there, so
// it has been lost.
var ErrNoState = errors.New("no last known state")

// Enrolled tells whether pods of the namespace were to be captured.
func (l *LastKnown) Enrolled(namespace string) bool { return slices.Contains(l.Namespaces, namespace) }

// ReadLastKnown reads the state file.
func ReadLastKnown(path string) (*LastKnown, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNoState, path)
	}
	if err != nil {
		return nil, fmt.Errorf("read the last known state: %w", err)
	}
	var l LastKnown
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("read the last known state %s: %w", path, err)
	}
	if l.Version != lastKnownVersion {
		return nil, fmt.Errorf("read the last known state %s: version %d, want %d", path, l.Version, lastKnownVersion)
	}
	return &l, nil
}

// WriteLastKnown replaces the state file in one step and has it on the disk when it returns: a node that loses
// power comes up with the old file or the new one.
func WriteLastKnown(path string, namespaces []string) error {
	l := LastKnown{Version: lastKnownVersion, Namespaces: slices.Clone(namespaces)}
	slices.Sort(l.Namespaces)
	b, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if err := WriteFile(path, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the last known state: %w", err)
	}
	return nil
}

// WriteFile replaces path in one step: readers see all of the old content or all of the new, also after a
// crash. The name under which it is written first has an ending that no container runtime takes for a network
// configuration.
func WriteFile(path string, content []byte, mode fs.FileMode) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return err
	}
	if d, err := os.Open(dir); err == nil {
		d.Sync()
		d.Close()
	}
	return nil
}

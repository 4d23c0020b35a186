// Package host wraps the kernel objects a cluster is made of: cgroups, mounts,
// links, namespaces. It knows nothing of Kubernetes or of the cluster's plan.
package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Hierarchy is one mounted cgroup hierarchy: cgroup2, or one of cgroup v1.
type Hierarchy struct {
	// Controllers is empty for cgroup2, else "cpu,cpuacct" or "name=systemd".
	Controllers string
	// Self is the calling process's path in it.
	Self string
	// Mount is where MountHierarchies mounted it.
	Mount string
}

// V2 reports whether this is the unified hierarchy.
func (h Hierarchy) V2() bool { return h.Controllers == "" }

// Dir is the directory name the hierarchy traditionally has.
func (h Hierarchy) Dir() string {
	if h.V2() {
		return "unified"
	}
	return strings.TrimPrefix(h.Controllers, "name=")
}

// ParseHierarchies reads the format of /proc/PID/cgroup.
func ParseHierarchies(s string) ([]Hierarchy, error) {
	var l []Hierarchy
	for line := range strings.Lines(s) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			return nil, fmt.Errorf("cgroup line %q: want three fields", line)
		}
		l = append(l, Hierarchy{Controllers: f[1], Self: f[2]})
	}
	return l, nil
}

// MountHierarchies mounts every hierarchy the process is in below dir, for use
// inside a mount namespace of one's own. With a single cgroup2 hierarchy, dir
// itself becomes its mount point, as on a machine without cgroup v1.
func MountHierarchies(dir string) ([]Hierarchy, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	l, err := ParseHierarchies(string(b))
	if err != nil {
		return nil, err
	}
	if len(l) == 1 && l[0].V2() {
		l[0].Mount = dir
		return l, mountCgroup(&l[0])
	}
	if err := unix.Mount("cgroup", dir, "tmpfs", 0, "mode=755"); err != nil {
		return nil, fmt.Errorf("mount tmpfs on %s: %w", dir, err)
	}
	for i := range l {
		h := &l[i]
		h.Mount = filepath.Join(dir, h.Dir())
		if err := os.Mkdir(h.Mount, 0o755); err != nil {
			return nil, err
		}
		if err := mountCgroup(h); err != nil {
			return nil, err
		}
		// cpu,cpuacct is also found as cpu and as cpuacct.
		if names := strings.Split(h.Dir(), ","); len(names) > 1 {
			for _, n := range names {
				if err := os.Symlink(h.Dir(), filepath.Join(dir, n)); err != nil {
					return nil, err
				}
			}
		}
	}
	return l, nil
}

func mountCgroup(h *Hierarchy) error {
	kind, opts := "cgroup2", ""
	if !h.V2() {
		kind, opts = "cgroup", h.Controllers
		if strings.HasPrefix(opts, "name=") {
			opts = "none," + opts
		}
	}
	if err := unix.Mount(kind, h.Mount, kind, 0, opts); err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", kind, opts, h.Mount, err)
	}
	return nil
}

// Group is one cgroup, present in every hierarchy.
type Group []string

// NewGroup creates name below the calling process's own cgroup in every
// hierarchy. Where cgroup2 has controllers they must be passed down, which the
// kernel refuses for a group that holds processes; then the root of the
// hierarchy is used, and as a last resort the root's processes move to a leaf
// called "init", as container runtimes that nest do.
func NewGroup(hs []Hierarchy, name string) (Group, error) {
	var g Group
	for _, h := range hs {
		parent := filepath.Join(h.Mount, h.Self)
		if h.V2() && PassControllers(parent) != nil {
			parent = h.Mount
			if err := PassControllers(parent); errors.Is(err, unix.EBUSY) {
				if err := moveAll(parent, filepath.Join(parent, "init")); err != nil {
					return nil, err
				}
				if err := PassControllers(parent); err != nil {
					return nil, err
				}
			} else if err != nil {
				return nil, err
			}
		}
		d := filepath.Join(parent, name)
		if err := makeGroup(d); err != nil {
			return nil, err
		}
		g = append(g, d)
	}
	return g, nil
}

// Child creates a group below g.
func (g Group) Child(name string) (Group, error) {
	var c Group
	for _, d := range g {
		// A group whose parent has no controllers gets none: the error is the
		// child's to meet.
		_ = PassControllers(d)
		d = filepath.Join(d, name)
		if err := makeGroup(d); err != nil {
			return nil, err
		}
		c = append(c, d)
	}
	return c, nil
}

// Add moves a process (with all its threads) into the group.
func (g Group) Add(pid int) error {
	for _, d := range g {
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), fmt.Append(nil, pid), 0); err != nil {
			return fmt.Errorf("move process %d to cgroup: %w", pid, err)
		}
	}
	return nil
}

// Remove deletes the group and all below it. Processes that were just killed
// leave it a moment later, so it tries for a while.
func (g Group) Remove(patience time.Duration) error {
	var errs []error
	for _, d := range g {
		errs = append(errs, removeTree(d, patience))
	}
	return errors.Join(errs...)
}

func removeTree(top string, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		var dirs []string
		err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return nil // what disappears meanwhile is fine
		})
		if err != nil {
			return err
		}
		var last error
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := unix.Rmdir(dirs[i]); err != nil && err != unix.ENOENT {
				last = fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
			}
		}
		if last == nil || time.Now().After(deadline) {
			return last
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// SweepGroups removes every group of the given name, wherever it is below the
// mounted hierarchies.
func SweepGroups(hs []Hierarchy, name string) error {
	var errs []error
	for _, h := range hs {
		var found []string
		_ = filepath.WalkDir(h.Mount, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && d.Name() == name {
				found = append(found, p)
				return fs.SkipDir
			}
			return nil
		})
		for _, d := range found {
			errs = append(errs, removeTree(d, 10*time.Second))
		}
	}
	return errors.Join(errs...)
}

// PassControllers enables every available cgroup2 controller for the children
// of dir. It does nothing for cgroup v1.
func PassControllers(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return nil // cgroup v1
	}
	for _, c := range strings.Fields(string(b)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return fmt.Errorf("pass controller %s to the children of %s: %w", c, dir, err)
		}
	}
	return nil
}

func moveAll(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(from, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range strings.Fields(string(b)) {
		err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(pid), 0)
		// Kernel threads stay where they are; a process may have ended.
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %s to %s: %w", pid, to, err)
		}
	}
	return nil
}

// makeGroup creates one directory. A v1 cpuset must be told its CPUs and memory
// nodes before a process can enter.
func makeGroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("create cgroup: %w", err)
	}
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.controllers")); err == nil {
			break
		}
		b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), f))
		if err != nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
			return fmt.Errorf("fill %s of %s: %w", f, dir, err)
		}
	}
	return nil
}

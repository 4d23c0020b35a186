package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// cgroups are the two cgroup v2 directories that programs are attached to.
type cgroups struct {
	root string // sock_ops: sees every socket of the node
	pods string // connect and getpeername hooks: kubepods, or root where there is no such cgroup
}

// findCgroups finds them. Below the pods' cgroup the connect hooks run before a CNI's program at the root, so
// that they see the address the application asked for; and running there tells a pod's process on the host
// network from the node's own. In hybrid mode runc keeps the same tree under "unified".
func findCgroups(mount string) (cgroups, error) {
	root := ""
	for _, dir := range []string{mount, filepath.Join(mount, "unified")} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			root = dir
			break
		}
	}
	if root == "" {
		return cgroups{}, fmt.Errorf("neither %s nor %s/unified is a cgroup v2 file system", mount, mount)
	}
	found := cgroups{root: root, pods: root}
	const deepest = 3 // /kubelet.slice/kubelet-kubepods.slice, as kind has it, is at 2
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return nil // a cgroup that went away while we looked
		}
		if name := e.Name(); name == "kubepods" || name == "kubepods.slice" || strings.HasSuffix(name, "-kubepods.slice") {
			found.pods = path
			return fs.SkipAll
		}
		if rel, _ := filepath.Rel(root, path); strings.Count(rel, "/")+1 >= deepest {
			return fs.SkipDir
		}
		return nil
	})
	return found, err
}

// attachment is one program at one cgroup.
type attachment struct {
	name    string // of the pin
	cgroup  string
	program *ebpf.Program
	at      ebpf.AttachType
	behind  bool // the programs of others there, and only where there are any
}

func (d *Datapath) attachments() []attachment {
	return []attachment{
		// sock_ops first: a connect that is captured before tickets are written would be one whose inbound
		// leg comes back to the agent.
		{"sockops", d.cgroups.root, d.kernel.MeshSockops, ebpf.AttachCGroupSockOps, false},
		// What connect has sent elsewhere is told as what the application asked for: that comes first too.
		{"getpeername4", d.cgroups.pods, d.kernel.MeshGetpeername4, ebpf.AttachCgroupInet4GetPeername, false},
		{"getpeername6", d.cgroups.pods, d.kernel.MeshGetpeername6, ebpf.AttachCgroupInet6GetPeername, false},
		{"restore4", d.cgroups.root, d.kernel.MeshRestore4, ebpf.AttachCGroupInet4Connect, true},
		{"restore6", d.cgroups.root, d.kernel.MeshRestore6, ebpf.AttachCGroupInet6Connect, true},
		{"connect4", d.cgroups.pods, d.kernel.MeshConnect4, ebpf.AttachCGroupInet4Connect, false},
		{"connect6", d.cgroups.pods, d.kernel.MeshConnect6, ebpf.AttachCGroupInet6Connect, false},
	}
}

func (d *Datapath) attachCgroups() error {
	for _, a := range d.attachments() {
		if err := a.ensure(d.dir); err != nil {
			return fmt.Errorf("attach %s to %s: %w", a.name, a.cgroup, err)
		}
	}
	return nil
}

// ensure points the pinned link at the program, or attaches it where there is no such link or its cgroup is
// not the one any more (the pods' cgroup was made anew, or did not exist when the agent first ran).
func (a attachment) ensure(dir string) error {
	pin := filepath.Join(dir, a.name)
	old, err := link.LoadPinnedLink(pin, nil)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	stays := err == nil
	if stays {
		defer old.Close()
		if stays, err = a.sameCgroup(old); err != nil {
			return err
		}
	}
	if a.behind {
		others, last, err := a.order(dir, old)
		if err != nil {
			return err
		}
		if !others {
			return unpin(pin)
		}
		stays = stays && last
	}
	if stays {
		return old.Update(a.program)
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: a.cgroup, Attach: a.at, Program: a.program})
	if err != nil {
		return explain(err)
	}
	defer l.Close()
	return repin(l, pin)
}

func (a attachment) sameCgroup(l link.Link) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	// A cgroup's number is the inode of its directory.
	var st unix.Stat_t
	if err := unix.Stat(a.cgroup, &st); err != nil {
		return false, err
	}
	return info.Cgroup() != nil && info.Cgroup().CgroupId == st.Ino, nil
}

// order tells whether somebody else's programs are attached at the cgroup, and whether ours, of a link or nil, runs after them all.
// The kernel runs those of one cgroup in the order in which they were attached.
func (a attachment) order(dir string, l link.Link) (others, last bool, err error) {
	ours := map[ebpf.ProgramID]bool{}
	// Where there is no cgroup of the pods' the hooks that decide are at the root too.
	for _, name := range []string{"connect4", "connect6"} {
		if at, err := link.LoadPinnedLink(filepath.Join(dir, name), nil); err == nil {
			if info, err := at.Info(); err == nil {
				ours[info.Program] = true
			}
			at.Close()
		}
	}
	var own ebpf.ProgramID
	if l != nil {
		info, err := l.Info()
		if err != nil {
			return false, false, err
		}
		own = info.Program
		ours[own] = true
	}
	f, err := os.Open(a.cgroup)
	if err != nil {
		return false, false, err
	}
	defer f.Close()
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: a.at})
	if err != nil {
		return false, false, fmt.Errorf("ask which programs are attached to %s: %w", a.cgroup, err)
	}
	for _, p := range r.Programs {
		if !ours[p.ID] {
			others, last = true, false
		} else if p.ID == own {
			last = true
		}
	}
	return others, last, nil
}

// inForce reports whether the link is attached to its cgroup, where it has to be.
func (a attachment) inForce(dir string) bool {
	l, err := link.LoadPinnedLink(filepath.Join(dir, a.name), nil)
	if err != nil {
		if !a.behind {
			return false
		}
		others, _, err := a.order(dir, nil)
		return err == nil && !others
	}
	defer l.Close()
	if a.behind {
		if others, last, err := a.order(dir, l); err != nil || others && !last {
			return false
		}
	}
	same, err := a.sameCgroup(l)
	return err == nil && same
}

// repin pins a link in place of what is pinned there. The new one is attached before the old one goes: in
// between both see a connection, and the second finds that the first has done its work.
func repin(l link.Link, pin string) error {
	next := filepath.Join(filepath.Dir(pin), "next_"+filepath.Base(pin)) // bpffs reserves names with a dot
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := l.Pin(next); err != nil {
		return err
	}
	if err := os.Rename(next, pin); err != nil {
		return errors.Join(err, os.Remove(next))
	}
	return nil
}

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// residue lists what of Warren's is on the nodes: programs that the kernel runs for cgroups, network namespaces and links;
// pinned maps and links; plugin, files, rules.
func residue(t *testing.T) (found []string) {
	t.Helper()
	const look = `ls -d /sys/fs/bpf/warren /opt/cni/bin/warren-cni 2>/dev/null
grep -l warren-cni /etc/cni/net.d/* 2>/dev/null
find /var/lib/warren /run/warren -type f -o -type s 2>/dev/null
iptables-save 2>/dev/null | grep -i -e warren -e istio
true`
	for _, name := range nodes[:2] {
		n, err := mesh.Cluster.Node(name)
		must(t, err)
		say := func(format string, args ...any) { found = append(found, name+": "+fmt.Sprintf(format, args...)) }
		out, err := n.Exec(t.Context(), "sh", "-c", look)
		must(t, err)
		for line := range strings.Lines(out) {
			say("%s", strings.TrimSpace(line))
		}
		pid, err := n.PID()
		must(t, err)
		spaces := cgroupPrograms(t, fmt.Sprintf("/proc/%d/root/sys/fs/cgroup", pid), say)
		for space, pid := range spaces {
			f, err := os.Open(fmt.Sprintf("/proc/%s/ns/net", pid))
			if err != nil {
				continue // it has ended
			}
			if count, err := attached(uint32(f.Fd()), bpfSKLookup); err != nil || count > 0 {
				say("%d sk_lookup programs in %s, %v", count, space, err)
			}
			f.Close()
			for _, family := range []string{"-4", "-6"} {
				out, err := exec.CommandContext(t.Context(), "nsenter", "--net=/proc/"+pid+"/ns/net", "ip", family, "rule").Output()
				if err != nil {
					continue
				}
				for line := range strings.Lines(string(out)) {
					if f := strings.Fields(line); len(f) > 0 && !slices.Contains([]string{"local", "main", "default"}, f[len(f)-1]) {
						say("in %s the rule %s", space, strings.TrimSpace(line))
					}
				}
			}
		}
		must(t, n.InNetNS(func() error {
			links, err := net.Interfaces()
			for _, l := range links {
				for _, hook := range []uint32{bpfTCXIngress, bpfTCXEgress} {
					if count, err := attached(uint32(l.Index), hook); err != nil || count > 0 {
						say("%d programs at link %s, %v", count, l.Name, err)
					}
				}
			}
			return err
		}))
	}
	return found
}

// Attach types of the kernel's bpf.h.
const (
	bpfSockOps    = 3
	bpfSKLookup   = 36
	bpfTCXIngress = 46
	bpfTCXEgress  = 47
)

// Those of connect, bind, sendmsg, recvmsg, getpeername and getsockname for both families.
var bpfCgroup = []uint32{bpfSockOps, 8, 9, 10, 11, 14, 15, 19, 20, 29, 30, 31, 32}

// cgroupPrograms reports what is attached to a tree of cgroups, and returns a process for each network namespace of its
// processes.
func cgroupPrograms(t *testing.T, root string, say func(string, ...any)) map[string]string {
	t.Helper()
	spaces := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return nil // it has ended
		}
		defer f.Close()
		for _, hook := range bpfCgroup {
			if count, err := attached(uint32(f.Fd()), hook); err != nil || count > 0 {
				say("%d programs of attach type %d at cgroup %s, %v", count, hook, strings.TrimPrefix(path, root), err)
			}
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil
		}
		for _, pid := range strings.Fields(string(b)) {
			if space, err := os.Readlink("/proc/" + pid + "/ns/net"); err == nil {
				spaces[space] = pid
			}
		}
		return nil
	})
	must(t, err)
	if len(spaces) == 0 {
		t.Errorf("no process is in the cgroups under %s", root)
	}
	return spaces
}

// attached asks the kernel how many programs a cgroup, a network namespace or a link has.
func attached(target, hook uint32) (int, error) {
	attr := struct {
		target, hook, query, flags uint32
		ids                        uint64
		count, _                   uint32
		_, _, _, revision          uint64
	}{target: target, hook: hook}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 && errno != unix.ENOENT && errno != unix.EBADF { // a cgroup of version 1 has none
		return 0, errno
	}
	return int(attr.count), nil
}

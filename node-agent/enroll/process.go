package enroll

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// process is one process of a pod.
type process struct {
	pid   int
	start uint64 // clock ticks since boot
}

// processes maps the uid of each pod on the node to its processes, the oldest first: the sandbox's own
// ("pause") comes before any container.
type processes map[string][]process

var (
	errNoProcess   = errors.New("no process of the pod runs yet")
	errHostNetwork = errors.New("the pod uses the node's network")
)

// podUID finds the pod's uid in a cgroup path, as the cgroupfs driver (/pod1f7d5b5e-…) and the systemd driver
// (…-pod1f7d5b5e_….slice) write it. The first one counts: in a pod that runs a Kubernetes of its own, the inner pods'
// cgroups are below the outer one's. It is asked for every process of the node.
func podUID(cgroup []byte) string {
	const dashes = 1<<8 | 1<<13 | 1<<18 | 1<<23
	for {
		i := bytes.Index(cgroup, []byte("pod"))
		if i < 0 || i+3+36 > len(cgroup) {
			return ""
		}
		uid := []byte(nil)
		if i > 0 && (cgroup[i-1] == '/' || cgroup[i-1] == '-') {
			uid = cgroup[i+3 : i+3+36]
		}
		for at, c := range uid {
			if dash := c == '-' || c == '_'; dash != (dashes>>at&1 == 1) || !dash && (c < '0' || c > '9' && c < 'a' || c > 'f') {
				uid = nil
				break
			}
		}
		if uid != nil {
			return strings.ReplaceAll(string(uid), "_", "-")
		}
		cgroup = cgroup[i+3:]
	}
}

// scan reads the processes of all pods. Processes that end meanwhile are left out.
func scan(proc string) (processes, error) {
	dir, err := os.Open(proc)
	if err != nil {
		return nil, fmt.Errorf("look for the pods' processes: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("look for the pods' processes: %w", err)
	}
	found := processes{}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		uid := podOf(proc, pid)
		if uid == "" {
			continue
		}
		start, ok := startTime(proc, pid)
		if ok {
			found[uid] = append(found[uid], process{pid, start})
		}
	}
	for _, ps := range found {
		slices.SortFunc(ps, func(a, b process) int { return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.pid, b.pid)) })
	}
	return found, nil
}

func podOf(proc string, pid int) string {
	b, err := readProc(filepath.Join(proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return ""
	}
	return podUID(b)
}

// readProc reads a file of /proc. A node has hundreds of processes, and os.ReadFile would have each file waited for by Go's
// poller, which /proc allows: three system calls instead of ten.
func readProc(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for b := make([]byte, 0, 1024); ; b = slices.Grow(b, cap(b)) {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		for err == unix.EINTR {
			n, err = unix.Read(fd, b[len(b):cap(b)])
		}
		if err != nil {
			return nil, err
		}
		if b = b[:len(b)+n]; len(b) < cap(b) { // the kernel gives such a file whole
			return b, nil
		}
	}
}

// startTime reads field 22 of /proc/PID/stat. The command in field 2 may contain anything, so the count begins
// at its last parenthesis. A zombie, which has no network namespace any more, is not ok.
func startTime(proc string, pid int) (uint64, bool) {
	b, err := readProc(filepath.Join(proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, false
	}
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:]))
	if i < 0 || len(f) < 20 || f[0] == "Z" || f[0] == "X" {
		return 0, false
	}
	start, err := strconv.ParseUint(f[19], 10, 64)
	return start, err == nil
}

// namespaceOf opens the network namespace of a pod by its processes. Where addrs are known the namespace must
// have one of them: a container that made a namespace of its own is in the pod's cgroup too. The oldest
// process is asked first because a pod cannot choose where its sandbox lives.
func namespaceOf(proc string, uid string, ps []process, addrs []netip.Addr, node uint64) (*netns.Handle, error) {
	if len(ps) == 0 {
		return nil, errNoProcess
	}
	err := errNoProcess
	seen := map[string]bool{}
	for _, p := range ps {
		path := filepath.Join(proc, strconv.Itoa(p.pid), "ns/net")
		id, e := os.Readlink(path)
		if e != nil || seen[id] {
			continue
		}
		seen[id] = true
		h, e := netns.Open(path)
		if e != nil {
			continue
		}
		start, alive := startTime(proc, p.pid)
		switch {
		case !alive || start != p.start || podOf(proc, p.pid) != uid: // the number belongs to another process now
		case h.Cookie() == node:
			err = errHostNetwork
		default:
			if len(addrs) == 0 {
				return h, nil
			}
			have, e := addresses(h)
			if e == nil && slices.ContainsFunc(addrs, func(a netip.Addr) bool { return slices.Contains(have, a) }) {
				return h, nil
			}
			err = fmt.Errorf("the pod's network namespace has %v, not the pod's address %v", have, addrs)
		}
		h.Close()
	}
	return nil, err
}

// addresses lists the global unicast addresses of a namespace's interfaces.
func addresses(h *netns.Handle) ([]netip.Addr, error) {
	var out []netip.Addr
	err := h.Do(func() error {
		addrs, err := net.InterfaceAddrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok && ip.Unmap().IsGlobalUnicast() {
					out = append(out, ip.Unmap())
				}
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the addresses of network namespace %s: %w", h, err)
	}
	return out, nil
}

// byAddress finds which pod has one of the addresses, for a control plane that does not name pods by uid.
func byAddress(proc string, all processes, addrs []netip.Addr, node uint64) (uid string) {
	for uid, ps := range all {
		h, err := namespaceOf(proc, uid, ps, addrs, node)
		if err == nil {
			h.Close()
			return uid
		}
	}
	return ""
}

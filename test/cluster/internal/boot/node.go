package boot

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/test/cluster/internal/host"
	"github.com/warrenmesh/warren/test/cluster/internal/kubeapi"
	"github.com/warrenmesh/warren/test/cluster/internal/plan"
	"golang.org/x/sys/unix"
)

// systemLeaf holds a node's own processes: on cgroup2 so that the node's root
// group is free to pass controllers to the pods, and where processor time is
// shared out so that they are, as system.slice is, one party beside the pods,
// of which otherwise each of their threads would be.
const systemLeaf = "system"

const importAttempts = 3

// systemGroup is the group for processes of the node outside any pod.
func systemGroup(g host.Group) host.Group {
	var out host.Group
	for _, d := range g {
		leaf := filepath.Join(d, systemLeaf)
		if _, err := os.Stat(leaf); err == nil {
			d = leaf
		}
		out = append(out, d)
	}
	return out
}

// gate is the first stage of a node's PID 1. It waits until the supervisor has
// put it into its cgroup, makes that the root of a cgroup namespace and becomes
// the second stage: an exec is what carries a namespace from one thread to the
// whole process.
func gate(dir, name string) error {
	f := os.NewFile(gateFD, "gate")
	if _, err := io.ReadFull(f, make([]byte, 1)); err != nil {
		return fmt.Errorf("wait at the gate: %w", err)
	}
	f.Close()
	c, err := plan.Load(dir)
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("create cgroup namespace: %w", err)
	}
	return unix.Exec(c.Launcher, []string{c.Launcher, nodeCommand, dir, name}, os.Environ())
}

type machine struct {
	*initProcess
	c *plan.Cluster
	n plan.Node
}

// nodeInit is the second stage: machine first, then its services.
func nodeInit(dir, name string) error {
	c, err := plan.Load(dir)
	if err != nil {
		return err
	}
	n, err := c.Node(name)
	if err != nil {
		return err
	}
	if err := host.MakePrivate(); err != nil {
		return err
	}
	if err := answer(c.Path("nodes", name, "init.sock")); err != nil {
		return err
	}
	m := &machine{c: c, n: n}
	steps := []func() error{m.plugins, m.root, m.kernelFiles, m.cgroups, m.fakeSysctls, host.MakeShared, m.network, m.cni}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	m.initProcess = newInit(plan.NodeMount+"/bin", plan.NodeMount+"/log")
	m.services()
	select {}
}

// answer listens on a socket whose only use is that the kernel tells whoever
// connects the pid of this process, in the pid namespace of the one who asks.
func answer(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return nil
}

// fromHost lists what a node takes from the machine, read-only: the programs and
// the few files of /etc that these read.
var fromHost = []string{
	"/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin", "/usr",
	"/etc/alternatives", "/etc/ca-certificates", "/etc/ethertypes", "/etc/group", "/etc/iproute2",
	"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/nsswitch.conf", "/etc/passwd",
	"/etc/protocols", "/etc/services", "/etc/ssl", "/etc/timezone",
}

// onDisk lists what is the node's own and survives a reboot.
var onDisk = []string{"/etc/cni", "/opt", "/root", "/var"}

// root builds the node's file system and moves into it. All else in it is
// memory and gone with the mount namespace.
func (m *machine) root() error {
	top := m.c.Path("nodes", m.n.Name, "root")
	if err := host.Mount("tmpfs", top, "mode=755"); err != nil {
		return err
	}
	in := func(p string) string { return filepath.Join(top, p) }
	for _, p := range fromHost {
		fi, err := os.Lstat(p)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case fi.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			if err := errors.Join(os.MkdirAll(filepath.Dir(in(p)), 0o755), os.Symlink(to, in(p))); err != nil {
				return err
			}
		default:
			if err := host.BindReadOnly(p, in(p)); err != nil {
				return err
			}
		}
	}
	for _, p := range onDisk {
		d := filepath.Join(m.c.Disk(m.n), p)
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		if err := host.Bind(d, in(p)); err != nil {
			return err
		}
	}
	if err := host.Bind("/dev", in("/dev")); err != nil {
		return err
	}
	for sub, src := range map[string]string{
		"bin": m.c.Binaries, "pki": m.c.Path("pki"), "images": m.c.Path("images"),
	} {
		if err := host.BindReadOnly(src, in(filepath.Join(plan.NodeMount, sub))); err != nil {
			return err
		}
	}
	if err := host.Bind(m.c.Path("log", m.n.Name), in(plan.NodeMount+"/log")); err != nil {
		return err
	}
	for _, d := range []string{"/proc", "/sys", "/run", "/tmp", "/mnt", "/home", "/var/lib", "/var/tmp", "/var/log"} {
		if err := os.MkdirAll(in(d), 0o755); err != nil {
			return err
		}
	}
	for link, to := range map[string]string{"/var/run": "/run", "/var/lock": "/run/lock"} {
		if err := os.Symlink(to, in(link)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if err := m.etc(in("/etc")); err != nil {
		return err
	}
	return host.PivotRoot(top)
}

func (m *machine) etc(dir string) error {
	kubelet, err := m.c.KubeletConfig(m.n)
	if err != nil {
		return err
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	for _, a := range m.c.Addrs(m.n) {
		hosts += a.String() + " " + m.n.Name + "\n"
	}
	id := sha256.Sum256([]byte(m.c.ID() + m.n.Name))
	for name, content := range map[string]string{
		"hostname":        m.n.Name + "\n",
		"hosts":           hosts,
		"resolv.conf":     "nameserver " + m.c.APIAddr().Addr().String() + "\n",
		"machine-id":      fmt.Sprintf("%x\n", id[:16]),
		"containerd.toml": m.c.ContainerdConfig(runc),
		"kubelet.json":    string(kubelet),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// kernelFiles mounts the kernel's file systems afresh: each shows this node's
// namespaces, and the BPF file system is the node's own.
func (m *machine) kernelFiles() error {
	for _, f := range []struct{ kind, at, opts string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"bpf", "/sys/fs/bpf", "mode=700"},
		{"tmpfs", "/run", "mode=755"},
		{"tmpfs", "/tmp", "mode=1777"},
	} {
		if err := host.Mount(f.kind, f.at, f.opts); err != nil {
			return err
		}
	}
	// Good to have for whoever debugs BPF; not every kernel has it.
	_ = unix.Mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, "")
	for _, d := range []string{"/run/netns", "/run/lock"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// cgroups mounts the node's own view of every hierarchy.
func (m *machine) cgroups() error {
	hs, err := host.MountHierarchies("/sys/fs/cgroup")
	if err != nil {
		return err
	}
	for _, h := range hs {
		if !h.V2() && !slices.Contains(strings.Split(h.Controllers, ","), "cpu") {
			continue
		}
		leaf := filepath.Join(h.Mount, systemLeaf)
		if err := os.Mkdir(leaf, 0o755); err != nil {
			return err
		}
		if err := (host.Group{leaf}).Add(os.Getpid()); err != nil {
			return err
		}
		if !h.V2() {
			continue
		}
		if err := host.PassControllers(h.Mount); err != nil {
			return err
		}
	}
	return nil
}

// fakeSysctls shows kubelet the kernel-wide values it insists on without setting
// them for the whole machine, and a boot id that changes with every boot.
func (m *machine) fakeSysctls() error {
	boot := make([]byte, 16)
	_, _ = rand.Read(boot)
	for name, value := range map[string]string{
		"kernel/panic":              "10",
		"kernel/panic_on_oops":      "1",
		"vm/overcommit_memory":      "1",
		"vm/panic_on_oom":           "0",
		"kernel/keys/root_maxkeys":  "1000000",
		"kernel/keys/root_maxbytes": "25000000",
		"kernel/random/boot_id":     fmt.Sprintf("%x-%x-%x-%x-%x", boot[:4], boot[4:6], boot[6:8], boot[8:10], boot[10:]),
	} {
		at := filepath.Join("/proc/sys", name)
		if _, err := os.Stat(at); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		f := filepath.Join("/run/sysctl", strings.ReplaceAll(name, "/", "."))
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(f, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(f, at, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("cover %s: %w", at, err)
		}
	}
	return nil
}

func (m *machine) network() error {
	if err := unix.Sethostname([]byte(m.n.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := host.BringUpLoopback(); err != nil {
		return err
	}
	if err := host.Forwarding(); err != nil {
		return err
	}
	var addrs []netip.Prefix
	for _, f := range m.c.Families() {
		addrs = append(addrs, f.Node(m.n.Index))
	}
	if err := host.ConfigureLink("eth0", addrs); err != nil {
		return err
	}
	for i, f := range m.c.Families() {
		zero := netip.PrefixFrom(f.Host.Addr(), 0).Masked()
		if err := host.AddRoute(zero, f.Host.Addr()); err != nil {
			return err
		}
		for _, o := range m.c.NodeList() {
			if o == m.n {
				continue
			}
			if err := host.AddRoute(m.c.PodCIDRs(o)[i], m.c.Addrs(o)[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// plugins copies the CNI plugins from the machine to the node's disk.
func (m *machine) plugins() error {
	dir := filepath.Join(m.c.Disk(m.n), plan.CNIBinDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, p := range m.c.CNIPlugins() {
		src, err := host.CNIPlugin(p)
		if err != nil {
			return err
		}
		if err := copyFile(src, filepath.Join(dir, p)); err != nil {
			return err
		}
	}
	return nil
}

// cni writes the plugin list. A list that is there stays: another plugin may
// have been chained to it before a reboot.
func (m *machine) cni() error {
	if err := os.MkdirAll(plan.CNIConfDir, 0o755); err != nil {
		return err
	}
	name, list, err := m.c.CNIConf(m.n)
	if err != nil {
		return err
	}
	found, err := filepath.Glob(plan.CNIConfDir + "/*.conf*")
	if err != nil || len(found) > 0 {
		return err
	}
	return os.WriteFile(filepath.Join(plan.CNIConfDir, name), list, 0o644)
}

func copyFile(src, dst string) error {
	b, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	return os.WriteFile(dst, b, 0o755)
}

// services starts the node's programs in the order in which they need each
// other.
func (m *machine) services() {
	m.keep(m.c.Containerd())
	err := until("containerd", func() error {
		c, err := net.Dial("unix", plan.ContainerdSocket)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err != nil {
		slog.Error("containerd does not answer", "error", err)
	}
	m.importImages()
	api, err := kubeapi.New(plan.NodeMount+"/pki", m.c.APIAddr().String())
	if err == nil {
		err = until("this node's object", func() error {
			return api.Get(context.Background(), "/api/v1/nodes/"+m.n.Name, new(struct{}))
		})
	}
	if err != nil {
		// kubelet and kube-proxy keep trying on their own.
		slog.Error("API server does not answer", "error", err)
	}
	m.keep(m.c.Kubelet(m.n))
	m.keep(m.c.KubeProxy(m.n))
}

// importImages brings every archive of the cluster into containerd that this
// disk has not seen. An import that hangs is given up and tried again.
func (m *machine) importImages() {
	archives, _ := filepath.Glob(plan.NodeMount + "/images/*.tar")
	for _, a := range archives {
		seen, err := plan.ImportMarker(a)
		if err != nil {
			continue
		}
		if _, err := os.Stat(seen); err == nil {
			continue
		}
		for range importAttempts {
			if err = m.run(plan.Process{Name: "ctr", Args: plan.ImportArgs(a)}, plan.ImportLimit); err == nil {
				break
			}
			slog.Error("cannot import image, trying again", "archive", a, "error", err)
		}
		if err == nil {
			err = errors.Join(os.MkdirAll(filepath.Dir(seen), 0o755), os.WriteFile(seen, nil, 0o644))
		}
		if err != nil {
			slog.Error("cannot import image", "archive", a, "error", err)
		}
	}
}

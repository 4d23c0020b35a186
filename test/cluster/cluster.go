// Package cluster runs a real Kubernetes on one Linux machine, as one tree of
// processes: every node has its own network, mount, pid, cgroup, uts and ipc
// namespaces, its own BPF file system and cgroup root, and its own disk. No
// container engine, registry or init system takes part.
//
// It owns the cluster's life and what tests do to it: boot, power cuts, images,
// packet capture. It must not know Warren, except for the list of its images.
package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/test/cluster/internal/boot"
	"github.com/warrenmesh/warren/test/cluster/internal/host"
	"github.com/warrenmesh/warren/test/cluster/internal/kubeapi"
	"github.com/warrenmesh/warren/test/cluster/internal/plan"
	"golang.org/x/sys/unix"
)

const (
	// ProbeImage is a small workload every node has: see images/probe.
	ProbeImage = "warren.local/probe:1"
	// SandboxImage is what pod sandboxes run.
	SandboxImage = plan.SandboxImage

	defaultDir = "/var/lib/warren-cluster"
	dirEnv     = "WARREN_CLUSTER_DIR"
	// A Unix socket's path has 108 bytes; the longest below the directory is
	// nodes/nodeNNN/init.sock.
	maxDir = 80

	// Generous: with an emulated or very busy processor a boot takes minutes.
	readyPatience = 5 * time.Minute
)

// Dir is where the cluster lives: $WARREN_CLUSTER_DIR, or the default. Clusters
// in different directories do not see each other.
func Dir() string {
	if d := os.Getenv(dirEnv); d != "" {
		return d
	}
	return defaultDir
}

// Options of Start.
type Options struct {
	Dir        string   // empty means Dir()
	Nodes      int      // 0 means 2
	SingleIPv4 bool     // no IPv6
	CNI        string   // "bridge", "ptp", or empty for what the kernel can do
	Images     []string // archives every node imports before its kubelet starts
	Log        func(string)
	// IsLauncher says that the running program is cmd/cluster itself.
	IsLauncher bool
}

// Cluster is a handle on a running cluster.
type Cluster struct {
	plan *plan.Cluster
	pid  int // the supervisor, in the caller's pid namespace
	http *http.Client
}

// ErrNotRunning is returned by Attach.
var ErrNotRunning = errors.New("no cluster is running")

// Start boots a cluster and returns when every node is Ready.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	if o.Dir == "" {
		o.Dir = Dir()
	}
	if o.Nodes == 0 {
		o.Nodes = 2
	}
	if o.Log == nil {
		o.Log = func(string) {}
	}
	if o.CNI == "" {
		o.CNI = host.DefaultCNI()
	}
	p := &plan.Cluster{Spec: plan.Spec{Nodes: o.Nodes, DualStack: !o.SingleIPv4, CNI: o.CNI}, Dir: o.Dir}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if err := o.check(p); err != nil {
		return nil, err
	}
	bin, err := Binaries(ctx, o.Log)
	if err != nil {
		return nil, err
	}
	p.Binaries = bin
	// What a crashed cluster left would be in the way.
	if err := Remove(ctx, o.Dir, o.IsLauncher); err != nil {
		return nil, err
	}
	if err := o.fill(ctx, p); err != nil {
		return nil, err
	}
	if err := host.RaiseLimits(o.Nodes, o.Log); err != nil {
		return nil, err
	}
	if err := launch(p); err != nil {
		return nil, err
	}
	c, err := awaitAttach(ctx, p)
	if err == nil {
		err = c.WaitReady(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("start cluster in %s (logs in %s): %w", p.Dir, p.Path("log"), err)
	}
	return c, nil
}

// check reports everything that would make the start fail, before anything is
// changed.
func (o *Options) check(p *plan.Cluster) error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root")
	}
	if !filepath.IsAbs(o.Dir) || len(o.Dir) > maxDir {
		return fmt.Errorf("directory %q: use an absolute path of at most %d characters", o.Dir, maxDir)
	}
	if _, err := Attach(o.Dir); err == nil {
		return fmt.Errorf("a cluster is already running in %s: use it, stop it with `cluster down`, or set %s to another directory", o.Dir, dirEnv)
	}
	if l := host.MissingPackages(p.CNIPlugins()); len(l) > 0 {
		return fmt.Errorf("programs are missing: run `cluster deps`, or on Debian `apt-get install --no-install-recommends %s`", strings.Join(l, " "))
	}
	return nil
}

// Deps installs what the machine lacks, with apt-get.
func Deps(ctx context.Context, out io.Writer) error {
	p := &plan.Cluster{Spec: plan.Spec{CNI: host.DefaultCNI()}}
	l := host.MissingPackages(p.CNIPlugins())
	if len(l) == 0 {
		return nil
	}
	for _, args := range [][]string{{"update", "-q"}, append([]string{"install", "-q", "-y", "--no-install-recommends"}, l...)} {
		cmd := exec.CommandContext(ctx, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("apt-get %s: %w", strings.Join(args, " "), err)
		}
	}
	return nil
}

// fill writes the cluster's directory.
func (o *Options) fill(ctx context.Context, p *plan.Cluster) error {
	dirs := []string{p.Dir, p.Path("log"), p.Path("images")}
	for _, n := range p.NodeList() {
		dirs = append(dirs, p.Disk(n))
	}
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	// From here on the directory is recognized as a cluster's.
	if err := p.Save(); err != nil {
		return err
	}
	own, err := ownImages(ctx)
	if err != nil {
		return err
	}
	if err := copyFiles(own, p.Path("images"), "*.tar"); err != nil {
		return err
	}
	for _, im := range o.Images {
		if err := copyFile(im, p.Path("images", filepath.Base(im)), 0o644); err != nil {
			return err
		}
	}
	l, err := launcher(ctx, o.IsLauncher)
	if err != nil {
		return err
	}
	// A copy: `go run` deletes its program, and nodes are booted from it later.
	p.Launcher = p.Path("launcher")
	return copyFile(l, p.Launcher, 0o755)
}

// launch starts the supervisor with a listener of the host's network namespace.
func launch(p *plan.Cluster) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	p.HostPort = l.Addr().(*net.TCPAddr).Port
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer f.Close()
	if err := errors.Join(p.WritePKI(), p.Save()); err != nil {
		return err
	}
	out, err := os.OpenFile(p.Path("log", "supervisor.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(p.Launcher, boot.SupervisorCommand, p.Dir)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: boot.CloneFlags}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	go func() { _ = cmd.Wait() }() // reap it, should it die before us
	return nil
}

func awaitAttach(ctx context.Context, p *plan.Cluster) (*Cluster, error) {
	deadline := time.Now().Add(10 * time.Second)
	for {
		c, err := Attach(p.Dir)
		if err == nil || time.Now().After(deadline) {
			return c, err
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
}

// Attach returns a handle on the cluster running in dir; empty means Dir().
func Attach(dir string) (*Cluster, error) {
	if dir == "" {
		dir = Dir()
	}
	p, err := plan.Load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: start one with `cluster up`", ErrNotRunning, dir)
	}
	if err != nil {
		return nil, err
	}
	sock := p.Path("control.sock")
	pid, err := host.PeerPID(sock)
	if err != nil {
		return nil, fmt.Errorf("%w in %s: start one with `cluster up`", ErrNotRunning, dir)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", sock)
	}
	return &Cluster{plan: p, pid: pid, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}, nil
}

// Remove ends the cluster in dir, running or crashed, and deletes everything it
// left: processes, cgroups, files. Mounts, links and network namespaces live in
// the supervisor's namespaces and go with it. With nothing there it does
// nothing.
func Remove(ctx context.Context, dir string, isLauncher bool) error {
	if c, err := Attach(dir); err == nil {
		if err := unix.Kill(c.pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
			return fmt.Errorf("kill supervisor: %w", err)
		}
		for host.Alive(c.pid) {
			if err := sleep(ctx, 10*time.Millisecond); err != nil {
				return err
			}
		}
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if _, err := os.Stat(filepath.Join(dir, "cluster.json")); err != nil {
		if l, _ := os.ReadDir(dir); len(l) > 0 {
			return fmt.Errorf("%s is not a cluster's directory: move it away, or set %s", dir, dirEnv)
		}
	}
	if err := sweep(ctx, dir, isLauncher); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// sweep removes cgroups in a process with a mount namespace of its own, where it
// can mount every hierarchy whatever the host has mounted.
func sweep(ctx context.Context, dir string, isLauncher bool) error {
	l := filepath.Join(dir, "launcher")
	if _, err := os.Stat(l); err != nil {
		if l, err = launcher(ctx, isLauncher); err != nil {
			return err
		}
	}
	cmd := exec.CommandContext(ctx, l, boot.SweepCommand, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("remove cgroups: %w: %s", err, out)
	}
	return nil
}

// Down ends the cluster and deletes its directory.
func (c *Cluster) Down(ctx context.Context) error { return Remove(ctx, c.plan.Dir, false) }

// Dir is the cluster's directory.
func (c *Cluster) Dir() string { return c.plan.Dir }

// Kubeconfig is the path of an administrator's kubeconfig that works on the
// host.
func (c *Cluster) Kubeconfig() string { return c.plan.Path("kubeconfig") }

// Program is the path of one of the cluster's programs: kubectl, helm, ctr.
func (c *Cluster) Program(name string) string { return filepath.Join(c.plan.Binaries, name) }

// Command prepares kubectl or helm with the cluster's kubeconfig.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.Program(name), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig())
	return cmd
}

// Kubectl runs kubectl and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return output(c.Command(ctx, "kubectl", args...))
}

// Helm runs helm and returns its standard output.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	return output(c.Command(ctx, "helm", args...))
}

func output(cmd *exec.Cmd) (string, error) {
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return string(out), nil
}

// Outside runs f with its thread in the network namespace of the inter-node link,
// where no node is: sockets made there are clients and servers outside the
// cluster, at 172.30.0.1 and fd00:172:30::1, with routes to nodes and pods but
// not to Services.
func (c *Cluster) Outside(f func() error) error { return host.InNetNS(c.pid, f) }

// OutsideCommand prepares a program of the host to run there.
func (c *Cluster) OutsideCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.plan.Launcher, append([]string{OutsideCommand, c.plan.Dir}, args...)...)
}

// WaitReady waits until every running node is Ready and no stopped one is.
func (c *Cluster) WaitReady(ctx context.Context) error {
	api, err := kubeapi.New(c.plan.Path("pki"), fmt.Sprintf("127.0.0.1:%d", c.plan.HostPort))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyPatience)
	defer cancel()
	for {
		missing, err := c.unready(ctx, api)
		if err == nil && len(missing) == 0 {
			return nil
		}
		if e := sleep(ctx, 50*time.Millisecond); e != nil {
			return fmt.Errorf("wait for nodes to be ready: missing %v, last error %v: %w", missing, err, e)
		}
	}
}

func (c *Cluster) unready(ctx context.Context, api *kubeapi.Client) ([]string, error) {
	st, err := c.Status(ctx)
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, n := range st {
		if !n.Running {
			continue
		}
		var obj struct {
			Spec   struct{ Taints []struct{ Key string } }
			Status struct {
				Conditions []struct{ Type, Status string }
				NodeInfo   struct{ BootID string }
			}
		}
		if err := api.Get(ctx, "/api/v1/nodes/"+n.Name, &obj); err != nil {
			return append(missing, n.Name), err
		}
		ready := false
		for _, cond := range obj.Status.Conditions {
			ready = ready || (cond.Type == "Ready" && cond.Status == "True")
		}
		// Right after a boot the conditions are still those of the life before.
		if !ready || len(obj.Spec.Taints) > 0 || obj.Status.NodeInfo.BootID != c.bootID(n.Name) {
			missing = append(missing, n.Name)
		}
	}
	return missing, nil
}

// bootID is what the node's kernel claims to be this boot's id.
func (c *Cluster) bootID(node string) string {
	n, err := c.Node(node)
	if err != nil {
		return ""
	}
	pid, err := n.PID()
	if err != nil {
		return ""
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/root/proc/sys/kernel/random/boot_id", pid))
	return strings.TrimSpace(string(b))
}

// NodeStatus is a node's state as the supervisor sees it.
type NodeStatus = boot.NodeStatus

// Status asks the supervisor.
func (c *Cluster) Status(ctx context.Context) ([]NodeStatus, error) {
	b, err := c.control(ctx, "GET", "/status")
	if err != nil {
		return nil, err
	}
	var st boot.Status
	return st.Nodes, json.Unmarshal(b, &st)
}

func (c *Cluster) control(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = errors.New(strings.TrimSpace(string(b)))
	}
	return b, err
}

// LoadImages copies image archives into the cluster and imports them on every
// running node; a stopped one imports them when it boots.
func (c *Cluster) LoadImages(ctx context.Context, archives ...string) error {
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	for _, a := range archives {
		dst := c.plan.Path("images", filepath.Base(a))
		if err := copyFile(a, dst, 0o644); err != nil {
			return err
		}
		marker, err := plan.ImportMarker(dst)
		if err != nil {
			return err
		}
		errs := make([]error, len(st))
		var wg sync.WaitGroup
		for i, n := range st {
			if !n.Running {
				continue
			}
			wg.Go(func() { errs[i] = c.importOn(ctx, n.Name, filepath.Base(a), marker) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return fmt.Errorf("load %s: %w", a, err)
		}
	}
	return nil
}

func (c *Cluster) importOn(ctx context.Context, node, archive, marker string) error {
	n, err := c.Node(node)
	if err != nil {
		return err
	}
	args := append([]string{"ctr"}, plan.ImportArgs(filepath.Join(plan.NodeMount, "images", archive))...)
	for attempt := 1; ; attempt++ {
		limited, cancel := context.WithTimeout(ctx, plan.ImportLimit)
		_, err := n.Exec(limited, args...)
		expired := limited.Err() != nil && ctx.Err() == nil
		cancel()
		if err == nil {
			break
		}
		if !expired || attempt == 3 {
			return err
		}
	}
	m := filepath.Join(c.plan.Disk(n.plan), marker)
	if err := os.MkdirAll(filepath.Dir(m), 0o755); err != nil {
		return err
	}
	return os.WriteFile(m, nil, 0o644)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

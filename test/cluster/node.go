package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/warrenmesh/warren/test/cluster/internal/host"
	"github.com/warrenmesh/warren/test/cluster/internal/plan"
	"golang.org/x/sys/unix"
)

// Hidden commands of cmd/cluster: EnterCommand DIR NODE PROGRAM [ARGUMENT...]
// runs a program on a node, OutsideCommand DIR PROGRAM [ARGUMENT...] beside them.
const (
	EnterCommand   = "__enter"
	OutsideCommand = "__outside"
)

// Node is one machine of the cluster.
type Node struct {
	cluster *Cluster
	plan    plan.Node
}

// Node finds a node by name: node1, node2, ...
func (c *Cluster) Node(name string) (*Node, error) {
	n, err := c.plan.Node(name)
	if err != nil {
		return nil, err
	}
	return &Node{c, n}, nil
}

// Nodes lists all nodes.
func (c *Cluster) Nodes() []*Node {
	var l []*Node
	for _, n := range c.plan.NodeList() {
		l = append(l, &Node{c, n})
	}
	return l
}

// Name is the node's name in Kubernetes.
func (n *Node) Name() string { return n.plan.Name }

// Addrs are the node's addresses, IPv4 first.
func (n *Node) Addrs() []netip.Addr { return n.cluster.plan.Addrs(n.plan) }

// Disk is the host's path of what survives the node's reboot: etc/cni, opt,
// root, var.
func (n *Node) Disk() string { return n.cluster.plan.Disk(n.plan) }

// PID is the node's first process, in the caller's pid namespace.
func (n *Node) PID() (int, error) {
	pid, err := host.PeerPID(n.cluster.plan.Path("nodes", n.Name(), "init.sock"))
	if err != nil {
		return 0, fmt.Errorf("node %s is not running: %w", n.Name(), err)
	}
	return pid, nil
}

// Command prepares a program to run on the node, in all its namespaces and its
// cgroup, as if started there. The caller may set the standard streams.
func (n *Node) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, n.cluster.plan.Launcher, append([]string{EnterCommand, n.cluster.plan.Dir, n.Name()}, args...)...)
	// Killed outright, the helper could not end what it started.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	return cmd
}

// APIServer prepares one more API server of the cluster, which serves on the node's addresses. The caller has to bring
// etcd's port to the node's loopback.
func (n *Node) APIServer(ctx context.Context) *exec.Cmd {
	p := n.cluster.plan.APIServerOn(n.plan)
	return n.Command(ctx, append([]string{p.Name}, p.Args...)...)
}

// Exec runs a program on the node and returns its standard output.
func (n *Node) Exec(ctx context.Context, args ...string) (string, error) {
	return output(n.Command(ctx, args...))
}

// InNetNS runs f with its thread in the node's network namespace.
func (n *Node) InNetNS(f func() error) error {
	pid, err := n.PID()
	if err != nil {
		return err
	}
	return host.InNetNS(pid, f)
}

// Kill cuts the node's power: its link and every process vanish at once.
func (n *Node) Kill(ctx context.Context) error {
	_, err := n.cluster.control(ctx, "POST", "/nodes/"+n.Name()+"/kill")
	return err
}

// Start boots a stopped node from its disk. It does not wait for it to be Ready;
// see WaitReady.
func (n *Node) Start(ctx context.Context) error {
	_, err := n.cluster.control(ctx, "POST", "/nodes/"+n.Name()+"/start")
	return err
}

// Reboot is Kill and Start: processes, /run, the BPF file system, cgroups and
// network namespaces are gone, the disk is kept.
func (n *Node) Reboot(ctx context.Context) error {
	if err := n.Kill(ctx); err != nil {
		return err
	}
	return n.Start(ctx)
}

// Enter runs a program on a node with this process's standard streams and
// returns when it has ended.
func Enter(dir, name string, args []string) error {
	c, err := Attach(dir)
	if err != nil {
		return err
	}
	n, err := c.Node(name)
	if err != nil {
		return err
	}
	pid, err := n.PID()
	if err != nil {
		return err
	}
	st, err := c.Status(context.Background())
	if err != nil {
		return err
	}
	for _, s := range st {
		if s.Name != name {
			continue
		}
		var g host.Group
		for _, d := range s.Cgroups {
			g = append(g, filepath.Join(fmt.Sprintf("/proc/%d/root", c.pid), d))
		}
		if err := g.Add(os.Getpid()); err != nil {
			return err
		}
	}
	os.Setenv("PATH", plan.NodeMount+"/bin:/opt/cni/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	os.Setenv("CONTAINERD_NAMESPACE", "k8s.io")
	return host.RunInside(pid, args, os.Stdin, os.Stdout, os.Stderr)
}

// EnterOutside becomes a program of the host in the network namespace of the
// inter-node link.
func EnterOutside(dir string, args []string) error {
	c, err := Attach(dir)
	if err != nil {
		return err
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	return host.InNetNS(c.pid, func() error { return unix.Exec(path, args, os.Environ()) })
}

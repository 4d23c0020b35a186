package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/test/cluster/internal/host"
	"github.com/warrenmesh/warren/test/cluster/internal/kubeapi"
	"github.com/warrenmesh/warren/test/cluster/internal/plan"
	"golang.org/x/sys/unix"
)

// Names of the hidden commands, and of the listener handed down to the
// supervisor as its first extra file.
const (
	SupervisorCommand = "__supervisor"
	SweepCommand      = "__sweep"
	gateCommand       = "__node-gate"
	nodeCommand       = "__node-init"
	listenerFD        = 3
	gateFD            = 3
)

// CloneFlags are the namespaces the supervisor must be started in.
const CloneFlags = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET

// Main runs the hidden command in args, if it is one. It returns only if not.
func Main(args []string) {
	if len(args) < 2 {
		return
	}
	var err error
	switch args[0] {
	case SupervisorCommand:
		err = supervise(args[1])
	case SweepCommand:
		if err = sweep(args[1]); err == nil {
			os.Exit(0)
		}
	case gateCommand:
		err = gate(args[1], args[2])
	case nodeCommand:
		err = nodeInit(args[1], args[2])
	default:
		return
	}
	slog.Error("cannot continue", "command", args[0], "error", err)
	os.Exit(1)
}

type supervisor struct {
	*initProcess
	c *plan.Cluster

	mu    sync.Mutex
	group host.Group
	nodes map[string]*node
}

// node is one running or stopped node.
type node struct {
	plan  plan.Node
	group host.Group
	proc  *os.Process // nil while stopped
	child *child
}

// Status is what the control socket answers.
type Status struct {
	Nodes []NodeStatus `json:"nodes"`
}

// NodeStatus is one node's state. Cgroups are paths in the supervisor's mount
// namespace where processes of the node belong.
type NodeStatus struct {
	Name    string   `json:"name"`
	Running bool     `json:"running"`
	Cgroups []string `json:"cgroups,omitempty"`
}

func supervise(dir string) error {
	c, err := plan.Load(dir)
	if err != nil {
		return err
	}
	s := &supervisor{initProcess: newInit(c.Binaries, c.Path("log")), c: c, nodes: map[string]*node{}}
	if err := s.prepare(); err != nil {
		return err
	}
	if err := s.forwardAPI(); err != nil {
		return err
	}
	control, err := net.Listen("unix", c.Path("control.sock"))
	if err != nil {
		return err
	}
	s.keep(c.Etcd())
	s.keep(c.APIServer())
	for _, n := range c.NodeList() {
		if err := s.startNode(n); err != nil {
			return err
		}
	}
	go s.controlPlane()
	return http.Serve(control, s.handler())
}

// prepare makes the supervisor's surroundings: mounts, cgroups, the bridge.
func (s *supervisor) prepare() error {
	if err := host.MakePrivate(); err != nil {
		return err
	}
	if err := host.Mount("proc", "/proc", ""); err != nil {
		return err
	}
	cg := s.c.Path("cgroup")
	if err := os.MkdirAll(cg, 0o755); err != nil {
		return err
	}
	hs, err := host.MountHierarchies(cg)
	if err != nil {
		return err
	}
	if s.group, err = host.NewGroup(hs, s.c.ID()); err != nil {
		return err
	}
	control, err := s.group.Child("control")
	if err != nil {
		return err
	}
	if err := control.Add(os.Getpid()); err != nil {
		return err
	}
	if err := host.BringUpLoopback(); err != nil {
		return err
	}
	if err := host.Forwarding(); err != nil {
		return err
	}
	var addrs []netip.Prefix
	for _, f := range s.c.Families() {
		addrs = append(addrs, f.Host)
	}
	if err := host.NewBridge(plan.Bridge, plan.BridgeMAC(), addrs); err != nil {
		return err
	}
	for _, n := range s.c.NodeList() {
		for i, p := range s.c.PodCIDRs(n) {
			if err := host.AddRoute(p, s.c.Addrs(n)[i]); err != nil {
				return err
			}
		}
	}
	return os.WriteFile(s.c.Path("Corefile"), []byte(s.c.Corefile()), 0o644)
}

// forwardAPI serves the API server on the listener that the launcher made in the
// host's network namespace: a socket stays where it was created.
func (s *supervisor) forwardAPI() error {
	f := os.NewFile(listenerFD, "listener")
	l, err := net.FileListener(f)
	f.Close() // children must not inherit it
	if err != nil {
		return fmt.Errorf("take over the listener: %w", err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				slog.Error("accept on the host", "error", err)
				return
			}
			go func() {
				defer c.Close()
				up, err := net.Dial("tcp", s.c.APIAddr().String())
				if err != nil {
					return // the client sees what a stopped API server looks like
				}
				defer up.Close()
				pipe(c.(*net.TCPConn), up.(*net.TCPConn))
			}()
		}
	}()
	return nil
}

func pipe(a, b *net.TCPConn) {
	var wg sync.WaitGroup
	for _, d := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		wg.Go(func() {
			_, _ = io.Copy(d[0], d[1])
			_ = d[0].CloseWrite()
		})
	}
	wg.Wait()
}

// controlPlane starts what needs a ready API server: the scheduler and the
// controller manager exit while its RBAC objects are not there.
func (s *supervisor) controlPlane() {
	err := func() error {
		api, err := kubeapi.New(s.c.Path("pki"), s.c.APIAddr().String())
		if err != nil {
			return err
		}
		if err := until("the API server", func() error { return api.Ready(context.Background()) }); err != nil {
			return err
		}
		s.keep(s.c.ControllerManager())
		s.keep(s.c.Scheduler())
		s.keep(s.c.CoreDNS())
		for _, o := range s.c.Objects() {
			err := until("creation below "+o.Path, func() error {
				if err := api.Create(context.Background(), o.Path, o.Body); err != nil || o.Status == nil {
					return err
				}
				return api.PatchStatus(context.Background(), o.Path+"/"+o.Name, o.Status)
			})
			if err != nil {
				return err
			}
		}
		return nil
	}()
	if err != nil {
		slog.Error("control plane is incomplete", "error", err)
	}
}

// startNode boots a node: its PID 1 waits at a gate until cgroup and link exist.
func (s *supervisor) startNode(n plan.Node) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.nodes[n.Name]; st != nil && st.proc != nil {
		return fmt.Errorf("node %s is running", n.Name)
	}
	if err := os.MkdirAll(s.c.Path("log", n.Name), 0o755); err != nil {
		return err
	}
	g, err := s.group.Child(n.Name)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	out, err := os.OpenFile(s.c.Path("log", n.Name, "init.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(s.c.Launcher, gateCommand, s.c.Dir, n.Name)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
	}
	started, err := s.start(cmd)
	r.Close()
	if err != nil {
		return fmt.Errorf("start node %s: %w", n.Name, err)
	}
	st := &node{plan: n, group: g, proc: cmd.Process, child: started}
	s.nodes[n.Name] = st
	if err := errors.Join(g.Add(cmd.Process.Pid), host.NewPort(plan.Bridge, n.Port(), cmd.Process.Pid, n.MAC())); err != nil {
		return errors.Join(fmt.Errorf("start node %s: %w", n.Name, err), s.stop(st))
	}
	if _, err := w.Write([]byte{1}); err != nil {
		return fmt.Errorf("open the gate of node %s: %w", n.Name, err)
	}
	slog.Info("node started", "node", n.Name)
	return nil
}

// killNode pulls the plug: the link first, then every process.
func (s *supervisor) killNode(n plan.Node) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.nodes[n.Name]
	if st == nil || st.proc == nil {
		return fmt.Errorf("node %s is not running", n.Name)
	}
	return s.stop(st)
}

func (s *supervisor) stop(st *node) error {
	errLink := host.DeleteLink(st.plan.Port())
	if err := st.proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill node %s: %w", st.plan.Name, err)
	}
	<-st.child.done
	st.proc = nil
	slog.Info("node stopped", "node", st.plan.Name)
	return errors.Join(errLink, st.group.Remove(10*time.Second))
}

func (s *supervisor) status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	var st Status
	for _, n := range s.c.NodeList() {
		ns := NodeStatus{Name: n.Name}
		if r := s.nodes[n.Name]; r != nil && r.proc != nil {
			select {
			case <-r.child.done: // died on its own
			default:
				ns.Running, ns.Cgroups = true, systemGroup(r.group)
			}
		}
		st.Nodes = append(st.Nodes, ns)
	}
	return st
}

// handler is the control socket: GET /status, POST /nodes/NAME/{kill,start}.
func (s *supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(s.status())
	})
	act := func(f func(plan.Node) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			n, err := s.c.Node(r.PathValue("name"))
			if err == nil {
				err = f(n)
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
			}
		}
	}
	mux.HandleFunc("POST /nodes/{name}/kill", act(s.killNode))
	mux.HandleFunc("POST /nodes/{name}/start", act(s.startNode))
	return mux
}

// sweep removes every cgroup of the cluster in dir. It runs in a mount namespace
// of its own.
func sweep(dir string) error {
	if err := host.MakePrivate(); err != nil {
		return err
	}
	at := filepath.Join(dir, "cgroup")
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	hs, err := host.MountHierarchies(at)
	if err != nil {
		return err
	}
	return host.SweepGroups(hs, (&plan.Cluster{Dir: dir}).ID())
}

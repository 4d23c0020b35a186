package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bench"
	"github.com/warrenmesh/warren/internal/netns"
)

// Nodes: a pair, and one whose agent encrypts what stays on it.
const (
	clientNode  = "client"
	serverNode  = "server"
	encryptNode = "encrypt"
)

// wire is the floor for two pods on one node: their packets meet nothing but the stacks at both ends. Kubernetes has no such
// pods.
var wire = &bench.Variant{Name: "wire", About: "No mesh and no node: a veth from pod to pod", SameNode: true}

// site runs every variant in namespaces of this machine.
type site struct {
	dir, load, envoy string
	self             string // this program
	topology         *topology
	stages           map[string]*stage
	agents           map[string]*exec.Cmd
	ends             []func() error
}

// stage is a variant's two pods.
type stage struct {
	site           *site
	variant        *bench.Variant
	client, server *pod
	http, tcp      string
	proxies        []string // process numbers
}

func meshed(v *bench.Variant) bool { return v.Proxies.Process != "" }

// open makes the namespaces of all variants, and the agents, which are told of all pods at once.
func open(ctx context.Context, dir, load, envoy string, variants []*bench.Variant) (s *site, err error) {
	s = &site{dir: dir, load: load, envoy: envoy, stages: map[string]*stage{}, agents: map[string]*exec.Cmd{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.self, err = os.Executable(); err != nil {
		return s, err
	}
	if s.topology, err = build("warren-bench-"+strconv.Itoa(os.Getpid()), clientNode, serverNode, encryptNode); err != nil {
		return s, err
	}
	s.ends = append(s.ends, s.topology.close)
	var refs []podRef
	for _, v := range variants {
		st := &stage{site: s, variant: v}
		s.stages[v.Name] = st
		from, to := clientNode, serverNode
		if v.SameNode {
			to = clientNode
			if v.Name == "same-node-encrypt" {
				from, to = encryptNode, encryptNode
			}
		}
		if v == wire {
			st.client, st.server, err = s.topology.addPair(from)
		} else if st.client, err = s.topology.addPod(from); err == nil {
			st.server, err = s.topology.addPod(to)
		}
		if err != nil {
			return s, fmt.Errorf("variant %s: %w", v.Name, err)
		}
		if meshed(v) {
			for role, p := range map[string]*pod{"client": st.client, "server": st.server} {
				f, err := p.ns.File()
				if err != nil {
					return s, err
				}
				s.ends = append(s.ends, f.Close)
				refs = append(refs, podRef{Name: v.Name + "-" + role, Node: p.node.name, Addr: p.addr, NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())})
			}
		}
	}
	key, cert, err := newRoot()
	if err != nil {
		return s, err
	}
	for name, n := range s.topology.nodes {
		if err := s.startAgent(ctx, n, agentConfig{Node: name, Encrypt: name == encryptNode, CAKey: key, CACert: cert, Pods: refs}); err != nil {
			return s, fmt.Errorf("agent of node %s: %w", name, err)
		}
	}
	return s, nil
}

// startAgent starts an agent in a node's namespace and waits until it is ready.
func (s *site) startAgent(ctx context.Context, n *node, cfg agentConfig) error {
	bpffs := filepath.Join(s.dir, "bpf-"+n.name)
	if err := os.Mkdir(bpffs, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount a BPF file system: %w", err)
	}
	s.ends = append(s.ends, func() error { return unix.Unmount(bpffs, unix.MNT_DETACH) })
	cfg.CgroupRoot, cfg.BPFDir = n.cgroup, filepath.Join(bpffs, "warren")
	cmd := exec.CommandContext(ctx, s.self, "agent")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(s.dir, "agent-"+n.name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	if err := start(cmd, n.ns, n.cgroup); err != nil {
		return err
	}
	s.agents[n.name] = cmd
	s.ends = append(s.ends, func() error {
		in.Close() // its end
		timer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		if err := cmd.Wait(); err != nil && ctx.Err() == nil {
			return fmt.Errorf("agent of node %s: %w", n.name, err)
		}
		return nil
	})
	if err := json.NewEncoder(in).Encode(cfg); err != nil {
		return err
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		b, _ := os.ReadFile(log.Name())
		return fmt.Errorf("it did not become ready: %v %s", err, b)
	}
	return nil
}

// start begins a program in a network namespace and a cgroup.
func start(cmd *exec.Cmd, ns *netns.Handle, cgroup string) error {
	fd, err := unix.Open(cgroup, unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	// A child has the namespace of the thread that made it.
	return ns.Do(cmd.Start)
}

func (p *pod) start(cmd *exec.Cmd) error {
	return start(cmd, p.ns, filepath.Join(p.node.cgroup, "kubepods"))
}

// background runs a program of a pod until the site is closed.
func (s *site) background(p *pod, log string, args ...string) (pid int, err error) {
	cmd := exec.Command(args[0], args[1:]...)
	f, err := os.Create(filepath.Join(s.dir, log))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	if err := p.start(cmd); err != nil {
		return 0, err
	}
	s.ends = append(s.ends, func() error {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		return nil
	})
	return cmd.Process.Pid, nil
}

// Stage starts the variant's server and sidecars; its pods are there, and captured.
func (s *site) Stage(_ context.Context, v *bench.Variant) (bench.Stage, error) {
	st := s.stages[v.Name]
	if _, err := s.background(st.server, v.Name+"-server.log", s.load, "serve"); err != nil {
		return nil, err
	}
	place := bench.Place{Server: st.server.addr.String(), Namespace: "bench"}
	if v.Sidecar != nil {
		if err := s.sidecars(st, place); err != nil {
			return nil, err
		}
	}
	if meshed(v) {
		for _, n := range []string{st.client.node.name, st.server.node.name} {
			if pid := strconv.Itoa(s.agents[n].Process.Pid); len(st.proxies) == 0 || st.proxies[0] != pid {
				st.proxies = append(st.proxies, pid)
			}
		}
	}
	var err error
	st.http, st.tcp, err = v.Targets(place)
	return st, err
}

func (s *site) sidecars(st *stage, place bench.Place) error {
	v := st.variant
	certs, err := bench.Certificates("client", "server")
	if err != nil {
		return err
	}
	for role, p := range map[string]*pod{"client": st.client, "server": st.server} {
		place.Role, place.Dir = role, filepath.Join(s.dir, v.Name+"-"+role)
		if err := os.Mkdir(place.Dir, 0o700); err != nil {
			return err
		}
		files, err := v.SidecarFiles(place)
		if err != nil {
			return err
		}
		for name, b := range certs[role] {
			files[name] = string(b)
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(place.Dir, name), []byte(text), 0o600); err != nil {
				return err
			}
		}
		command, err := v.SidecarCommand(place)
		if err != nil {
			return err
		}
		switch command[0] {
		case "envoy":
			command[0] = s.envoy
		case "load":
			command[0] = s.load
		}
		pid, err := s.background(p, v.Name+"-"+role+".log", command...)
		if err != nil {
			return err
		}
		st.proxies = append(st.proxies, strconv.Itoa(pid))
	}
	return nil
}

func (st *stage) Targets() (http, tcp string) { return st.http, st.tcp }

func (st *stage) Load(ctx context.Context, args ...string) (*bench.Outcome, error) {
	o := &bench.Outcome{}
	return o, st.run(ctx, o, args...)
}

func (st *stage) Meter(ctx context.Context) ([]bench.Reading, error) {
	r := bench.Reading{}
	if err := st.run(ctx, &r, append([]string{"meter"}, st.proxies...)...); err != nil {
		return nil, err
	}
	if len(r.Processes) != len(st.proxies) {
		return nil, fmt.Errorf("%d of %d proxies run: see the logs in %s", len(r.Processes), len(st.proxies), st.site.dir)
	}
	return []bench.Reading{r}, nil
}

// run runs the load program as the client.
func (st *stage) run(ctx context.Context, into any, args ...string) error {
	cmd := exec.CommandContext(ctx, st.site.load, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := st.client.start(cmd); err != nil {
		return err
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("load %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return json.Unmarshal(out.Bytes(), into)
}

// Rest is for Kubernetes: pods without one have nothing around them that would wake an agent.
func (s *site) Rest(context.Context, *bench.Variant, int) (func(context.Context) error, error) {
	return nil, errors.New("pods at rest are measured on Kubernetes")
}

// Machine describes this one.
func (s *site) Machine(context.Context) (bench.Machine, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return bench.Machine{}, err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return bench.Machine{}, err
	}
	cpus, model := 0, "unknown processor"
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return bench.Machine{}, err
	}
	for line := range strings.Lines(string(b)) {
		switch name, v, _ := strings.Cut(line, ":"); strings.TrimSpace(name) {
		case "processor":
			cpus++
		case "model name":
			model = strings.TrimSpace(v)
		}
	}
	return bench.Machine{Kernel: unix.ByteSliceToString(u.Release[:]),
		Name: fmt.Sprintf("Network namespaces on one machine: %d cores (%s), %.0f GB: rates that use all cores compare costs of CPU", cpus, model, float64(info.Totalram)*float64(info.Unit)/1e9)}, nil
}

// close ends everything, the last first.
func (s *site) close() error {
	var errs []error
	for i := len(s.ends) - 1; i >= 0; i-- {
		errs = append(errs, s.ends[i]())
	}
	return errors.Join(errs...)
}

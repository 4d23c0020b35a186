// Command machine is /init of a virtual machine that is a node of a cluster: a kernel of its own, the agent and
// the holder as processes, and one pod, which is a network namespace and a cgroup. There is no kubelet: whoever
// started the machine has told the API server about the node and the pod.
//
// It listens on port 7000 of the node: POST /run?arg=PROGRAM&arg=... runs a program in the pod and answers what
// it said, with status 500 when it failed.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// config is /etc/machine.json.
type config struct {
	Name   string
	Addrs  []netip.Prefix        // of eth0
	Routes map[string]netip.Addr // prefix to gateway
	Agent  []string              // environment of the agent
	Pod    struct {
		UID     string
		Addrs   []netip.Prefix
		Gateway []netip.Prefix // the node's end of the pod's link
		Command []string
	}
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "in-pod" { // waits at the gate, then becomes the program
		gate := os.NewFile(3, "gate")
		_, _ = gate.Read(make([]byte, 1))
		gate.Close()
		err := syscall.Exec(os.Args[2], os.Args[2:], os.Environ())
		fmt.Fprintln(os.Stderr, "machine:", err)
		os.Exit(1)
	}
	if err := run(); err != nil {
		fmt.Println("machine:", err)
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
}

func run() error {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"tmpfs", "/var"},
		{"cgroup2", "/sys/fs/cgroup"}, {"bpf", "/sys/fs/bpf"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	b, err := os.ReadFile("/etc/machine.json")
	if err != nil {
		return err
	}
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		return fmt.Errorf("read /etc/machine.json: %w", err)
	}
	var u unix.Utsname
	if err := errors.Join(unix.Uname(&u), unix.Sethostname([]byte(c.Name))); err != nil {
		return err
	}
	fmt.Println("machine: Linux", unix.ByteSliceToString(u.Release[:]))
	list, err := os.ReadFile("/modules.list")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(list)) {
		if err := load("/modules/" + name); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	if err := c.network(); err != nil {
		return err
	}
	p, err := newPod(&c)
	if err != nil {
		return fmt.Errorf("start the pod: %w", err)
	}
	for _, d := range []string{"/run/warren", "/run/netns", "/var/lib/warren", "/opt/cni/bin", "/etc/cni/net.d"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := follow("holder", exec.Command("/bin/holder", "-socket", "/run/warren/holder.sock")); err != nil {
		return err
	}
	agent := exec.Command("/bin/node-agent")
	agent.Env = c.Agent
	if err := follow("agent", agent); err != nil {
		return err
	}
	http.HandleFunc("POST /run", p.serve)
	fmt.Println("machine: ready")
	return http.ListenAndServe(":7000", nil)
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// network gives the node its addresses and makes it a router.
func (c *config) network() error {
	for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+f, []byte("1"), 0); err != nil {
			return err
		}
	}
	if err := errors.Join(configure("lo", nil), configure("eth0", c.Addrs)); err != nil {
		return err
	}
	for to, via := range c.Routes {
		p, err := netip.ParsePrefix(to)
		if err != nil {
			return err
		}
		if err := netlink.RouteReplace(&netlink.Route{Dst: ipNet(p), Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("add a route to %s via %s: %w", to, via, err)
		}
	}
	return nil
}

func configure(link string, addrs []netip.Prefix) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return fmt.Errorf("find %s: %w", link, err)
	}
	for _, p := range addrs {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("add %s to %s: %w", p, link, err)
		}
	}
	return netlink.LinkSetUp(l)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// follow starts a program and prints what it says, with its name. The machine does not outlive it.
func follow(name string, cmd *exec.Cmd) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	w.Close()
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			fmt.Printf("%s: %s\n", name, s.Text())
		}
		fmt.Printf("machine: %s ended: %v\n", name, cmd.Wait())
	}()
	return nil
}

// pod is the machine's only one.
type pod struct {
	pid    int
	cgroup *os.File
	mu     sync.Mutex
}

func newPod(c *config) (*pod, error) {
	dir := filepath.Join("/sys/fs/cgroup/kubepods/besteffort/pod"+c.Pod.UID, "main")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	group, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	gate, open, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/init", append([]string{"in-pod"}, c.Pod.Command...)...)
	cmd.ExtraFiles = []*os.File{gate}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, UseCgroupFD: true, CgroupFD: int(group.Fd())}
	if err := follow("pod", cmd); err != nil {
		return nil, err
	}
	p := &pod{pid: cmd.Process.Pid, cgroup: group}
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod0"}, PeerName: "eth0", PeerNamespace: netlink.NsPid(p.pid)}
	if err := netlink.LinkAdd(link); err != nil {
		return nil, fmt.Errorf("create the pod's link: %w", err)
	}
	if err := configure("pod0", c.Pod.Gateway); err != nil {
		return nil, err
	}
	err = p.inside(func() error {
		if err := errors.Join(configure("lo", nil), configure("eth0", c.Pod.Addrs)); err != nil {
			return err
		}
		for _, g := range c.Pod.Gateway {
			zero := netip.PrefixFrom(g.Addr(), 0).Masked()
			if err := netlink.RouteReplace(&netlink.Route{Dst: ipNet(zero), Gw: g.Addr().AsSlice()}); err != nil {
				return fmt.Errorf("add the pod's route via %s: %w", g, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	_, err = open.Write([]byte{1})
	return p, err
}

// inside runs f in the pod's network namespace, on a thread that ends with it.
func (p *pod) inside(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", p.pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = unix.Setns(fd, unix.CLONE_NEWNET)
			unix.Close(fd)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (p *pod) serve(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	args := r.URL.Query()["arg"]
	if len(args) == 0 {
		http.Error(w, "arg is missing", http.StatusBadRequest)
		return
	}
	var out []byte
	err := p.inside(func() error {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(p.cgroup.Fd())}
		var err error
		out, err = cmd.Output()
		if e := new(exec.ExitError); errors.As(err, &e) {
			err = fmt.Errorf("%w: %s", err, e.Stderr)
		}
		return err
	})
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprintln(w, err)
	}
	_, _ = w.Write(out)
}

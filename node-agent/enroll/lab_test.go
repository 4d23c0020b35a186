package enroll

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
	"github.com/warrenmesh/warren/node-agent/holder"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const plenty = 30 * time.Second // for what has to come about, on a machine that does other things

// lab is a node without a kernel side: real network namespaces, processes, sockets and holder; the datapath is
// a record of what it was asked, so that its failures can be played.
type lab struct {
	t       *testing.T
	dir     string
	proc    string
	holder  *holder.Server
	plumber *plumber
	served  *acceptor
	certs   *certs
}

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	l := &lab{t: t, dir: t.TempDir(), plumber: &plumber{enrolled: map[string]datapath.Pod{}}, served: &acceptor{pods: map[string]Pod{}}, certs: &certs{}}
	l.proc = filepath.Join(l.dir, "proc")
	if err := os.Mkdir(l.proc, 0o755); err != nil {
		t.Fatal(err)
	}
	l.holder = holder.NewServer(holder.ServerConfig{Path: filepath.Join(l.dir, "holder.sock")})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); l.holder.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	l.eventually("the holder listens", func() bool { _, err := os.Stat(filepath.Join(l.dir, "holder.sock")); return err == nil })
	return l
}

func (l *lab) eventually(what string, ok func() bool) {
	l.t.Helper()
	for end := time.Now().Add(plenty); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			l.t.Fatalf("not within %s: %s", plenty, what)
		}
	}
}

// node runs a Registry; stop ends it as kill -9 would: nothing is undone.
type node struct {
	*Registry
	keeper *holder.Keeper
	stop   func()
}

func (l *lab) start(edit ...func(*Config)) *node {
	l.t.Helper()
	k := holder.NewKeeper(holder.KeeperConfig{Path: filepath.Join(l.dir, "holder.sock"), Interval: 20 * time.Millisecond})
	held, err := k.Restore(context.Background())
	if err != nil {
		l.t.Fatal(err)
	}
	cfg := Config{
		Exempt: []string{"kube-system"}, Plumber: l.plumber, Acceptor: l.served, Certs: l.certs, Keeper: k, Held: held,
		Socket: filepath.Join(l.dir, "cni.sock"), StateFile: filepath.Join(l.dir, "enrolled.json"), Proc: l.proc,
		AddWait: 2 * time.Second, CertWait: 100 * time.Millisecond, Resync: 100 * time.Millisecond,
		Linger: 50 * time.Millisecond, Drain: time.Second, Log: slog.New(slog.NewTextHandler(testWriter{l.t}, nil)),
	}
	for _, e := range edit {
		e(&cfg)
	}
	r, err := New(cfg)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { k.Run(ctx) })
	wg.Go(func() {
		if err := r.Run(ctx); err != nil {
			l.t.Error(err)
		}
	})
	n := &node{Registry: r, keeper: k}
	n.stop = sync.OnceFunc(func() { cancel(); wg.Wait(); r.Close() })
	l.t.Cleanup(n.stop)
	l.eventually("the CNI socket is there", func() bool {
		c, err := net.Dial("unix", cfg.Socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return n
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// pod makes a network namespace with an address on a dummy-like loopback, and a process in it that the lab's
// /proc shows in the pod's cgroup.
func (l *lab) pod(i int) (LocalPod, *netns.Handle, string) {
	l.t.Helper()
	uid := fmt.Sprintf("00000000-0000-0000-0000-%012d", i)
	addr := netip.AddrFrom4([4]byte{10, 77, byte(i >> 8), byte(i)})
	name := fmt.Sprintf("warren-enroll-%d-%d", os.Getpid(), i)
	path := "/run/netns/" + name
	run(l.t, "ip", "netns", "add", name)
	l.t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	run(l.t, "ip", "-n", name, "link", "set", "lo", "up")
	run(l.t, "ip", "-n", name, "addr", "add", addr.String()+"/32", "dev", "lo")
	h, err := netns.Open(path)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { h.Close() })
	return LocalPod{
		UID: uid, Namespace: "shop", Name: fmt.Sprintf("p%d", i), WorkloadUID: fmt.Sprintf("w%d", i), Addrs: []netip.Addr{addr},
		Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "default"}, Enrolled: true, Reason: "namespace",
	}, h, path
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// process shows a process of the pod, living in a namespace, in the lab's /proc.
func (l *lab) process(pid int, d LocalPod, ns string) {
	l.t.Helper()
	dir := filepath.Join(l.proc, fmt.Sprint(pid))
	stat := fmt.Sprintf("%d (a) b) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 0 0", pid, 1000+pid)
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o755),
		os.WriteFile(filepath.Join(dir, "cgroup"), []byte("0::/kubepods/pod"+d.UID+"/x\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "stat"), []byte(stat), 0o644),
		os.Symlink(ns, filepath.Join(dir, "ns/net")))
	if err != nil {
		l.t.Fatal(err)
	}
}

func (n *node) status(uid string) PodStatus {
	for _, s := range n.Statuses() {
		if s.UID == uid {
			return s
		}
	}
	return PodStatus{}
}

func (l *lab) becomes(n *node, uid string, want Redirection) PodStatus {
	l.t.Helper()
	var s PodStatus
	l.eventually(fmt.Sprintf("pod %s is %s", uid, want), func() bool { s = n.status(uid); return s.Redirection == want })
	return s
}

// plumber plays the kernel side.
type plumber struct {
	mu       sync.Mutex
	enrolled map[string]datapath.Pod
	fail     error
	log      []string
}

func (p *plumber) Enroll(pod datapath.Pod) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = append(p.log, "enrol "+pod.UID)
	if p.fail != nil {
		return p.fail
	}
	p.enrolled[pod.UID] = pod
	return nil
}

func (p *plumber) Release(uid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = append(p.log, "release "+uid)
	delete(p.enrolled, uid)
	return nil
}

func (p *plumber) Prune(keep func(string) bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for uid := range p.enrolled {
		if !keep(uid) {
			p.log = append(p.log, "prune "+uid)
			delete(p.enrolled, uid)
		}
	}
	return nil
}

func (p *plumber) Audit() ([]datapath.PodState, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []datapath.PodState
	for uid := range p.enrolled {
		out = append(out, datapath.PodState{UID: uid})
	}
	return out, nil
}

func (p *plumber) set(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail = err
}

func (p *plumber) has(uid string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.enrolled[uid]
	return ok
}

func (p *plumber) count(entry string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(p.log), func(s string) bool { return s != entry }))
}

// acceptor serves each connection with the pod's name.
type acceptor struct {
	mu   sync.Mutex
	pods map[string]Pod
	hold chan struct{} // set before a pod is added: its connections end when it is closed
}

type accepting struct {
	a    *acceptor
	uid  string
	ls   []net.Listener
	stop func()
	wg   sync.WaitGroup
}

func (a *acceptor) AddPod(p Pod, l datapath.Listeners) (Accepting, error) {
	x := &accepting{a: a, uid: p.UID}
	for _, f := range []*os.File{l.Outbound, l.Inbound, l.HBONE} {
		ln, err := net.FileListener(f)
		if err != nil {
			return nil, err
		}
		x.ls = append(x.ls, ln)
		x.wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, p.Name)
				c.Close()
			}
		})
	}
	x.stop = sync.OnceFunc(func() {
		for _, ln := range x.ls {
			ln.Close()
		}
		x.wg.Wait()
		a.mu.Lock()
		delete(a.pods, p.UID)
		a.mu.Unlock()
	})
	a.mu.Lock()
	a.pods[p.UID] = p
	a.mu.Unlock()
	return x, nil
}

func (x *accepting) StopAccepting() { x.stop() }

func (x *accepting) Close(ctx context.Context) {
	x.stop()
	if hold := x.a.hold; hold != nil { // connections that are open
		select {
		case <-hold:
		case <-ctx.Done():
		}
	}
}

func (a *acceptor) has(uid string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, ok := a.pods[uid]
	return ok
}

// certs plays the certificate source.
type certs struct {
	mu        sync.Mutex
	away      bool
	forgotten []mesh.Identity
}

func (c *certs) Warm(ctx context.Context, _ mesh.Identity) error {
	c.mu.Lock()
	away := c.away
	c.mu.Unlock()
	if away {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (c *certs) Forget(id mesh.Identity) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgotten = append(c.forgotten, id)
}

// dial connects from inside a namespace.
func dial(t *testing.T, h *netns.Handle, addr string) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), plenty)
	defer cancel()
	s, err := h.Connect(ctx, netip.MustParseAddrPort(addr), nil)
	if err != nil {
		return nil, err
	}
	return s.TCPConn()
}

// listen listens inside a namespace, as the application would.
func listen(t *testing.T, h *netns.Handle, addr netip.AddrPort) net.Listener {
	t.Helper()
	fd, err := h.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	err = control(f, func(fd int) error {
		return errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}), unix.Listen(fd, 128))
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func add(n *node, d LocalPod, path, container string) (cni.Response, error) {
	return cni.Client{Socket: n.cfg.Socket}.Do(context.Background(), cni.PathAdd, cni.Request{
		UID: d.UID, Namespace: d.Namespace, Name: d.Name, ContainerID: container, NetNS: path, IfName: "eth0", Addrs: d.Addrs,
	})
}

func del(t *testing.T, n *node, d LocalPod, path, container string) {
	t.Helper()
	_, err := cni.Client{Socket: n.cfg.Socket}.Do(context.Background(), cni.PathDel, cni.Request{
		UID: d.UID, Namespace: d.Namespace, Name: d.Name, ContainerID: container, NetNS: path,
	})
	if err != nil {
		t.Fatal(err)
	}
}

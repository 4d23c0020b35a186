package datapath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// lab is a node with pods on veths and a machine outside, each a network namespace:
//
//	ui       10.77.0.2  fd77::2 ─ veth ┐
//	catalog  10.77.0.3  fd77::3 ─ veth ┤ node 10.77.0.1 fd77::1
//	outside  10.88.0.2  fd88::2 ─ veth ┘
//
// The test process is in a cgroup of its own whose child kubepods is a threaded cgroup: a thread that acts for
// a pod moves there, a thread outside it is a process of the node.
type lab struct {
	t                *testing.T
	node             *netns.Handle
	ui, cat, outside *host
	root             string // cgroup
	cfg              Config
	up               *sync.RWMutex // held by the agent's dials; for writing while there is no agent
	dp               *Datapath
	dialer           *atomic.Pointer[Datapath] // dp, for the relay's goroutines: a restart replaces it under load
	agents           *sync.WaitGroup
	conns            *conns                    // of servers and agents
	drawn            *atomic.Pointer[chan int] // where the agent tells what the kernel has drawn, nil: nowhere
}

// host is a namespace with one address of each family on eth0.
type host struct {
	lab       *lab
	name      string
	ns        *netns.Handle
	v4, v6    netip.Addr
	nodeIndex int
	listeners Listeners
	accepting []net.Listener
}

var gateway4, gateway6 = netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")

// Addresses that nobody has: services.
var (
	vip4, vip6  = netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd96::10")
	servicePort = uint16(80)
	appPort     = uint16(8080)
)

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces, cgroups and BPF")
	}
	l := &lab{t: t, up: new(sync.RWMutex), agents: new(sync.WaitGroup), conns: new(conns), drawn: new(atomic.Pointer[chan int])}
	l.node = must(netns.New())
	t.Cleanup(func() { l.node.Close() })
	l.makeCgroups()
	check(t, l.node.Do(func() error {
		writeProc(t, "/proc/sys/net/ipv4/ip_forward", "1")
		writeProc(t, "/proc/sys/net/ipv6/conf/all/forwarding", "1")
		noDAD(t)
		return linkUp("lo")
	}))
	l.ui = l.addHost("ui", "10.77.0.2", "fd77::2")
	l.cat = l.addHost("catalog", "10.77.0.3", "fd77::3")
	l.outside = l.addHost("outside", "10.88.0.2", "fd88::2")
	bpffs := t.TempDir()
	check(t, unix.Mount("bpf", bpffs, "bpf", 0, ""))
	t.Cleanup(func() { unix.Unmount(bpffs, unix.MNT_DETACH) })
	l.cfg = Config{Dir: filepath.Join(bpffs, "warren"), CgroupRoot: l.root, Node: l.node}
	l.open()
	t.Cleanup(l.agents.Wait)
	t.Cleanup(func() {
		if t.Failed() {
			l.describe()
		}
		l.up.Lock()
		defer l.up.Unlock()
		l.dp.Close()
		check(t, Uninstall(context.Background(), l.cfg))
		l.conns.reset()
	})
	return l
}

// conns are connections that a test may leave hanging.
type conns struct {
	mu   sync.Mutex
	open []*net.TCPConn
}

func (s *conns) add(c ...*net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = append(s.open, c...)
}

func (s *conns) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.open {
		c.SetLinger(0)
		c.Close()
	}
}

func (l *lab) open() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var err error
	l.dp, err = Open(ctx, l.cfg)
	check(l.t, err)
	if l.dialer == nil {
		l.dialer = new(atomic.Pointer[Datapath])
	}
	l.dialer.Store(l.dp)
}

// describe prints what a failed test may be understood by.
func (l *lab) describe() {
	all, _ := l.dp.Counters()
	for name, n := range all {
		if n > 0 {
			l.t.Logf("%-28s %d", name, n)
		}
	}
	states, err := l.dp.Enrolled()
	l.t.Logf("%+v %v", states, err)
}

// makeCgroups makes <v2 root>/warren-<pid>-<n> with this process in it, and a threaded child kubepods.
func (l *lab) makeCgroups() {
	found, err := findCgroups("/sys/fs/cgroup")
	check(l.t, err)
	l.root, err = os.MkdirTemp(found.root, "warren-test-")
	check(l.t, err)
	own := []byte(strconv.Itoa(os.Getpid()))
	home := found.root
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		for _, line := range strings.Split(string(b), "\n") {
			if p, ok := strings.CutPrefix(line, "0::"); ok {
				home = filepath.Join(found.root, p)
			}
		}
	}
	pods := filepath.Join(l.root, "kubepods")
	check(l.t, os.Mkdir(pods, 0o755))
	check(l.t, os.WriteFile(filepath.Join(pods, "cgroup.type"), []byte("threaded"), 0))
	check(l.t, os.WriteFile(filepath.Join(l.root, "cgroup.procs"), own, 0))
	l.t.Cleanup(func() {
		check(l.t, os.WriteFile(filepath.Join(home, "cgroup.procs"), own, 0))
		eventually(l.t, "cgroups are removed", func() bool {
			os.Remove(pods)
			return os.Remove(l.root) == nil
		})
	})
}

func (l *lab) addHost(name, v4, v6 string) *host {
	l.t.Helper()
	h := &host{lab: l, name: name, v4: netip.MustParseAddr(v4), v6: netip.MustParseAddr(v6), ns: must(netns.New())}
	l.t.Cleanup(func() { h.ns.Close() })
	check(l.t, h.ns.Do(func() error { noDAD(l.t); return nil }))
	check(l.t, l.node.Do(func() error {
		return h.ns.WithFD(func(fd int) error {
			veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v" + name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}
			if err := netlink.LinkAdd(veth); err != nil {
				return err
			}
			peer, err := netlink.LinkByName(veth.Name)
			if err != nil {
				return err
			}
			h.nodeIndex = peer.Attrs().Index
			if err := netlink.LinkSetUp(peer); err != nil {
				return err
			}
			for _, a := range []netip.Addr{gateway4, gateway6} {
				if err := addAddr(peer, a); err != nil {
					return err
				}
			}
			for _, a := range []netip.Addr{h.v4, h.v6} {
				if err := netlink.RouteAdd(&netlink.Route{LinkIndex: h.nodeIndex, Dst: hostNet(a), Scope: netlink.SCOPE_LINK}); err != nil {
					return err
				}
			}
			return nil
		})
	}))
	check(l.t, h.ns.Do(func() error {
		if err := errors.Join(linkUp("lo"), linkUp("eth0")); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for i, a := range []netip.Addr{h.v4, h.v6} {
			gw := []netip.Addr{gateway4, gateway6}[i]
			if err := addAddr(eth0, a); err != nil {
				return err
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: hostNet(gw), Scope: netlink.SCOPE_LINK}); err != nil {
				return err
			}
			all := &net.IPNet{IP: make(net.IP, a.BitLen()/8), Mask: net.CIDRMask(0, a.BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: all, Gw: gw.AsSlice()}); err != nil {
				return err
			}
		}
		return nil
	}))
	return h
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func addAddr(l netlink.Link, a netip.Addr) error {
	addr := &netlink.Addr{IPNet: hostNet(a)}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(l, addr)
}

// noDAD spares new interfaces the second that a link-local address is tentative.
func noDAD(t *testing.T) {
	writeProc(t, "/proc/sys/net/ipv6/conf/all/accept_dad", "0")
	writeProc(t, "/proc/sys/net/ipv6/conf/default/accept_dad", "0")
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

// as runs f on a thread that is in the host's namespace and in the pods' cgroup.
func (h *host) as(f func() error) error {
	return h.ns.Do(func() error { return h.lab.asPodProcess(f) })
}

// asPodProcess moves the calling, locked thread into the pods' cgroup for f.
func (l *lab) asPodProcess(f func() error) error {
	move := func(cgroup string) error {
		return os.WriteFile(filepath.Join(cgroup, "cgroup.threads"), []byte(strconv.Itoa(unix.Gettid())), 0)
	}
	if err := move(filepath.Join(l.root, "kubepods")); err != nil {
		return err
	}
	err := f()
	return errors.Join(err, move(l.root))
}

// dial connects as a process of the host's pod.
func (h *host) dial(dst netip.AddrPort) (c *net.TCPConn, err error) {
	return h.dialWithin(plenty, dst)
}

// How long a connection may take: plenty where it must come about, also in an emulated machine; patience where
// it must not.
const (
	plenty    = 30 * time.Second
	agentDial = 5 * time.Second
	patience  = 1500 * time.Millisecond
)

func (h *host) dialWithin(limit time.Duration, dst netip.AddrPort) (c *net.TCPConn, err error) {
	err = h.as(func() error {
		c, err = dialHere(limit, dst)
		return err
	})
	return c, err
}

// dialFromNode connects as a process of the node, such as kubelet.
func (l *lab) dialFromNode(dst netip.AddrPort) (c *net.TCPConn, err error) {
	err = l.node.Do(func() error {
		c, err = dialHere(plenty, dst)
		return err
	})
	return c, err
}

func dialHere(limit time.Duration, dst netip.AddrPort) (*net.TCPConn, error) {
	c, err := (&net.Dialer{Timeout: limit}).Dial("tcp", dst.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// serve answers each connection with the addresses it sees, "LOCAL REMOTE\n", and then echoes.
func (h *host) serve(port uint16) {
	h.lab.t.Helper()
	var ln net.Listener
	check(h.lab.t, h.as(func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}))
	h.lab.agents.Add(1)
	go func() {
		defer h.lab.agents.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			h.lab.agents.Add(1)
			go func() {
				defer h.lab.agents.Done()
				defer c.Close()
				h.lab.conns.add(c.(*net.TCPConn))
				fmt.Fprintf(c, "%s %s\n", addrOf(c.LocalAddr()), addrOf(c.RemoteAddr()))
				io.Copy(c, c)
			}()
		}
	}()
	h.lab.t.Cleanup(func() { ln.Close() })
}

func addrOf(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// seen reads what the server says it sees.
func seen(c net.Conn) (local, remote netip.AddrPort, err error) {
	c.SetReadDeadline(time.Now().Add(plenty))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	l, r, _ := strings.Cut(strings.TrimSpace(line), " ")
	return netip.MustParseAddrPort(l), netip.MustParseAddrPort(r), nil
}

// in is the lab with another test's log, for a subtest.
func (l *lab) in(t *testing.T) *lab {
	c := *l
	c.t = t
	return &c
}

// pod is the host as Enroll takes it.
func (h *host) pod() Pod {
	return Pod{UID: "uid-" + h.name, Workload: "cluster//Pod/shop/" + h.name, Identity: h.identity(), NetNS: h.ns,
		Addrs: []netip.Addr{h.v4, h.v6}, Listeners: h.listeners}
}

// enroll makes the listeners, starts a stand-in for the agent on them and enrols the pod.
func (h *host) enroll() {
	h.lab.t.Helper()
	if h.listeners == (Listeners{}) {
		h.listen()
	}
	check(h.lab.t, h.lab.dp.Enroll(h.pod()))
}

func (h *host) listen() {
	h.lab.t.Helper()
	var err error
	h.listeners, err = Listen(h.ns)
	check(h.lab.t, err)
	h.lab.t.Cleanup(h.closeListeners)
	h.accept(h.listeners.Outbound, h.lab.outbound)
	h.accept(h.listeners.Inbound, h.lab.inbound)
}

// closeListeners is the end of the agent and of the holder.
func (h *host) closeListeners() {
	for _, ln := range h.accepting {
		ln.Close()
	}
	h.accepting = nil
	h.listeners.Close()
}

func (h *host) accept(f *os.File, carry func(from *host, c *net.TCPConn) (*net.TCPConn, error)) {
	h.lab.t.Helper()
	ln, err := net.FileListener(f)
	check(h.lab.t, err)
	h.accepting = append(h.accepting, ln)
	h.lab.agents.Add(1)
	go func() {
		defer h.lab.agents.Done()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			h.lab.agents.Add(1)
			go func() {
				defer h.lab.agents.Done()
				in := c.(*net.TCPConn)
				out, err := carry(h, in)
				if err != nil {
					in.SetLinger(0)
					in.Close()
					return
				}
				h.lab.conns.add(in, out)
				relay(in, out)
			}()
		}
	}()
}

// outbound stands in for resolve, tunnel and the peer's agent: a service's address is the catalog's.
func (l *lab) outbound(from *host, c *net.TCPConn) (*net.TCPConn, error) {
	l.up.RLock()
	defer l.up.RUnlock()
	ctx, cancel := context.WithTimeout(context.Background(), agentDial)
	defer cancel()
	dst, src := addrOf(c.LocalAddr()), addrOf(c.RemoteAddr())
	if tell := l.drawn.Swap(nil); tell != nil {
		rc, err := c.SyscallConn()
		check(l.t, err)
		check(l.t, rc.Control(func(fd uintptr) { *tell <- drawn(int(fd)) }))
	}
	switch dst.Addr() {
	case vip4:
		dst = netip.AddrPortFrom(l.cat.v4, appPort)
	case vip6:
		dst = netip.AddrPortFrom(l.cat.v6, appPort)
	}
	for _, h := range []*host{l.ui, l.cat} {
		if dst.Addr() == h.v4 || dst.Addr() == h.v6 {
			return polled(l.dialer.Load().DialInbound(ctx, h.ns, src, dst))
		}
	}
	return l.dialer.Load().Dial(ctx, from.ns, dst)
}

func (l *lab) inbound(to *host, c *net.TCPConn) (*net.TCPConn, error) {
	l.up.RLock()
	defer l.up.RUnlock()
	ctx, cancel := context.WithTimeout(context.Background(), agentDial)
	defer cancel()
	src := netip.AddrPortFrom(addrOf(c.RemoteAddr()).Addr(), 0)
	return polled(l.dialer.Load().DialInbound(ctx, to.ns, src, addrOf(c.LocalAddr())))
}

// polled gives what DialInbound returns to Go's poller.
func polled(s *netns.Sock, err error) (*net.TCPConn, error) {
	if err != nil {
		return nil, err
	}
	return s.TCPConn()
}

func relay(a, b *net.TCPConn) {
	var wg sync.WaitGroup
	for _, d := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		wg.Go(func() {
			if _, err := io.Copy(d[0], d[1]); err != nil {
				d[0].SetLinger(0)
				d[0].Close()
				return
			}
			d[0].CloseWrite()
		})
	}
	wg.Wait()
	a.Close()
	b.Close()
}

// destinations captures both services and both pods.
func (l *lab) destinations() Destinations {
	d := Destinations{Addrs: map[netip.Addr]bool{}}
	for _, a := range []netip.Addr{vip4, vip6, l.ui.v4, l.ui.v6, l.cat.v4, l.cat.v6} {
		d.Addrs[a] = true
	}
	return d
}

// counted runs f and checks by how much the named counters rose. A negative number wants "at least".
func (l *lab) counted(want map[string]int, f func()) {
	l.t.Helper()
	before, err := l.dp.Counters()
	check(l.t, err)
	f()
	var after map[string]uint64
	ok := func() bool {
		after, err = l.dp.Counters()
		check(l.t, err)
		for name, n := range want {
			rose := int(after[name] - before[name])
			if n >= 0 && rose != n || n < 0 && rose < -n {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(plenty); time.Now().Before(end); time.Sleep(5 * time.Millisecond) { // the last event may be an acknowledgement under way
		if ok() {
			return
		}
	}
	for name, b := range before {
		rose := int(after[name] - b)
		if w, named := want[name]; named || rose != 0 {
			l.t.Logf("%-28s rose by %d, want %d", name, rose, w)
		}
	}
	l.t.Errorf("counters did not rise as they should")
}

func timedOut(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func writeProc(t *testing.T, path, value string) {
	t.Helper()
	check(t, os.WriteFile(path, []byte(value), 0o644))
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(plenty); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not within %s: %s", plenty, what)
			return
		}
	}
}

func TestMain(m *testing.M) {
	runtime.LockOSThread() // the main thread leads the cgroup
	os.Exit(m.Run())
}

func ptr(b *[16]byte) unsafe.Pointer { return unsafe.Pointer(b) }

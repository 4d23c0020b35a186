package proxy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// lab is two nodes with their agents' datapath and proxy, and a machine outside the mesh; no Kubernetes:
//
//	node-a 10.71.0.1 ── ui        10.71.1.2  fd71:1::2
//	      │          └─ load      10.71.1.3  fd71:1::3
//	    link
//	      │          ┌─ catalog-1 10.71.2.2  fd71:2::2
//	node-b 10.71.0.2 ── catalog-2 10.71.2.3  fd71:2::3
//	                 └─ outside   10.71.9.2  fd71:9::2   (not captured)
//
// The test process is in a cgroup of its own, to which both nodes' programs are attached; its threaded child
// kubepods is where a thread moves that acts for a pod.
type lab struct {
	t       *testing.T
	cgroup  string
	store   *mesh.Store
	ca      *testCA
	nodes   map[string]*labNode
	pods    map[string]*labPod
	builder *mesh.Builder
	rev     uint64
	apps    sync.WaitGroup

	configure func(*Config)
	between   func(a, b *netns.Handle) error // makes a device "link" in each
}

type labNode struct {
	lab     *lab
	name    string
	ns      *netns.Handle
	dp      *datapath.Datapath
	proxy   *Proxy
	metrics *prometheus.Registry
	log     *logLines
}

type labPod struct {
	node      *labNode
	name      string
	ns        *netns.Handle
	v4, v6    netip.Addr
	id        mesh.Identity
	listeners datapath.Listeners
	handle    *PodHandle
}

var (
	catalogVIP4 = netip.MustParseAddr("10.70.0.10")
	catalogVIP6 = netip.MustParseAddr("fd70::10")
	catalogName = mesh.ServiceName{Namespace: "shop", Hostname: "catalog.shop.svc.cluster.local"}
)

const (
	catalogPort = 80
	appPort     = 8080

	plenty = 30 * time.Second // for what has to come about, on a machine that does other things
)

// option makes a lab different from the usual one.
type option func(*lab)

// configured changes how the agents are configured.
func configured(f func(*Config)) option { return func(l *lab) { l.configure = f } }

func newLab(t *testing.T, options ...option) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces, cgroups and BPF")
	}
	l := &lab{t: t, store: &mesh.Store{}, ca: newTestCA(t, "cluster.local"), nodes: map[string]*labNode{}, pods: map[string]*labPod{},
		builder: mesh.NewBuilder(nil), configure: func(*Config) {}, between: veths}
	for _, o := range options {
		o(l)
	}
	l.makeCgroup()
	a, b := l.addNode("node-a"), l.addNode("node-b")
	l.connect(a, b)
	l.addPod(a, "ui", "10.71.1.2", "fd71:1::2")
	l.addPod(a, "load", "10.71.1.3", "fd71:1::3")
	l.addPod(b, "catalog-1", "10.71.2.2", "fd71:2::2")
	l.addPod(b, "catalog-2", "10.71.2.3", "fd71:2::3")
	l.addPod(b, "outside", "10.71.9.2", "fd71:9::2")
	l.builder.SetConfig(mesh.Config{TrustDomain: "cluster.local", Cluster: "test"})
	l.builder.PutService(&mesh.Service{Name: catalogName, Short: "catalog", Ports: []mesh.ServicePort{{Port: catalogPort, Target: appPort}},
		VIPs: []mesh.NetAddr{{Addr: catalogVIP4}, {Addr: catalogVIP6}}})
	for _, name := range []string{"ui", "load", "catalog-1", "catalog-2"} {
		l.builder.PutWorkload(l.workload(name))
	}
	l.commit()
	for _, n := range l.nodes {
		n.start()
	}
	for _, name := range []string{"ui", "load", "catalog-1", "catalog-2"} {
		l.pods[name].enroll()
	}
	return l
}

// workload is a pod as the control plane would describe it.
func (l *lab) workload(name string) *mesh.Workload {
	p := l.pods[name]
	app, _, _ := strings.Cut(name, "-")
	w := &mesh.Workload{UID: "test//Pod/shop/" + name, Name: name, Namespace: "shop", Cluster: "test", Node: p.node.name,
		Addrs: []netip.Addr{p.v4, p.v6}, Identity: p.id, Tunnel: mesh.TunnelHBONE, Healthy: true,
		WorkloadName: app, CanonicalName: app, CanonicalRevision: "v1", Kind: mesh.KindDeployment}
	if app == "catalog" {
		w.Services = map[mesh.ServiceName][]mesh.ServicePort{catalogName: {{Port: catalogPort, Target: appPort}}}
	}
	return w
}

func (l *lab) commit() {
	l.rev++
	l.store.Swap(l.builder.Commit(l.rev))
}

// namespace makes a network namespace whose IPv6 addresses can be used at once.
func (l *lab) namespace() *netns.Handle {
	ns := must(netns.New())
	l.t.Cleanup(func() { ns.Close() })
	check(l.t, ns.Do(func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/accept_dad", []byte("0"), 0))
	}))
	return ns
}

func (l *lab) addNode(name string) *labNode {
	n := &labNode{lab: l, name: name, ns: l.namespace(), log: &logLines{}}
	check(l.t, n.ns.Do(func() error {
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0), up("lo"))
	}))
	l.nodes[name] = n
	return n
}

// start opens the node's datapath and starts its proxy.
func (n *labNode) start() {
	t := n.lab.t
	bpffs := t.TempDir()
	check(t, unix.Mount("bpf", bpffs, "bpf", 0, ""))
	t.Cleanup(func() { unix.Unmount(bpffs, unix.MNT_DETACH) })
	cfg := datapath.Config{Dir: filepath.Join(bpffs, "warren"), CgroupRoot: n.lab.cgroup, Node: n.ns}
	var err error
	n.dp, err = datapath.Open(context.Background(), cfg)
	check(t, err)
	check(t, n.dp.SetDestinations(datapath.Desired(n.lab.store.Load(), "")))
	metrics := NewMetrics()
	n.metrics = prometheus.NewRegistry()
	n.metrics.MustRegister(metrics)
	pc := Config{Store: n.lab.store, Certs: n.lab.ca, Sockets: n.dp, Metrics: metrics,
		Access: slog.New(slog.NewJSONHandler(n.log, nil)), ConnectTimeout: plenty, HandshakeTimeout: plenty}
	n.lab.configure(&pc)
	n.proxy, err = New(pc)
	check(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			counters, _ := n.dp.Counters()
			for name, v := range counters {
				if v > 0 {
					t.Logf("%s %-28s %d", n.name, name, v)
				}
			}
			log := n.log.String()
			t.Logf("%s access log, its end:\n%s", n.name, log[max(0, len(log)-20_000):])
		}
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		check(t, n.proxy.Close(ctx))
		n.dp.Close()
		check(t, datapath.Uninstall(context.Background(), cfg))
		n.lab.apps.Wait()
	})
}

func (l *lab) addPod(n *labNode, name, v4, v6 string) *labPod {
	p := &labPod{node: n, name: name, ns: l.namespace(), v4: netip.MustParseAddr(v4), v6: netip.MustParseAddr(v6),
		id: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: strings.Split(name, "-")[0]}}
	check(l.t, n.ns.Do(func() error {
		return p.ns.WithFD(func(fd int) error {
			return errors.Join(
				netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v" + name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}),
				up("v"+name), addr("v"+name, "169.254.1.1"), addr("v"+name, "fe80::1"),
				route("v"+name, p.v4, netip.Addr{}), route("v"+name, p.v6, netip.Addr{}))
		})
	}))
	gw4, gw6 := netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1")
	check(l.t, p.ns.Do(func() error {
		return errors.Join(up("lo"), up("eth0"), addr("eth0", v4), addr("eth0", v6), route("eth0", gw4, netip.Addr{}),
			route("eth0", netip.IPv4Unspecified(), gw4), route("eth0", netip.IPv6Unspecified(), gw6))
	}))
	l.pods[name] = p
	return p
}

func veths(a, b *netns.Handle) error {
	return a.Do(func() error {
		return b.WithFD(func(fd int) error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "link"}, PeerName: "link", PeerNamespace: netlink.NsFd(fd)})
		})
	})
}

// connect links the nodes and routes their pods' addresses to each other.
func (l *lab) connect(a, b *labNode) {
	check(l.t, l.between(a.ns, b.ns))
	for _, x := range []struct {
		n            *labNode
		own4, own6   string
		peer4, peer6 string
		nets4, nets6 []string
	}{
		{a, "10.71.0.1", "fd71::1", "10.71.0.2", "fd71::2", []string{"10.71.2.0/24", "10.71.9.0/24"}, []string{"fd71:2::/64", "fd71:9::/64"}},
		{b, "10.71.0.2", "fd71::2", "10.71.0.1", "fd71::1", []string{"10.71.1.0/24"}, []string{"fd71:1::/64"}},
	} {
		check(l.t, x.n.ns.Do(func() error {
			err := errors.Join(up("link"), addr("link", x.own4), addr("link", x.own6),
				route("link", netip.MustParseAddr(x.peer4), netip.Addr{}), route("link", netip.MustParseAddr(x.peer6), netip.Addr{}))
			for _, n := range x.nets4 {
				err = errors.Join(err, routeNet("link", n, x.peer4))
			}
			for _, n := range x.nets6 {
				err = errors.Join(err, routeNet("link", n, x.peer6))
			}
			return err
		}))
	}
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func addr(link, a string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	x := &netlink.Addr{IPNet: hostNet(netip.MustParseAddr(a))}
	if strings.Contains(a, ":") {
		x.Flags = unix.IFA_F_NODAD
		if strings.HasPrefix(a, "fe80") {
			x.IPNet.Mask = net.CIDRMask(64, 128)
		}
	}
	return netlink.AddrAdd(l, x)
}

func route(link string, dst, gw netip.Addr) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: hostNet(dst)}
	if dst.IsUnspecified() {
		r.Dst = &net.IPNet{IP: dst.AsSlice(), Mask: net.CIDRMask(0, dst.BitLen())}
	}
	if gw.IsValid() {
		r.Gw = gw.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	return netlink.RouteAdd(r)
}

func routeNet(link, dst, gw string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	_, n, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: n, Gw: netip.MustParseAddr(gw).AsSlice()})
}

// enroll captures a pod and has its node's proxy serve it.
func (p *labPod) enroll() {
	t := p.node.lab.t
	var err error
	p.listeners, err = datapath.Listen(p.ns)
	check(t, err)
	var ls Listeners
	ls.Outbound = []net.Listener{must(net.FileListener(p.listeners.Outbound))}
	ls.Inbound = []net.Listener{must(net.FileListener(p.listeners.Inbound))}
	ls.HBONE = []net.Listener{must(net.FileListener(p.listeners.HBONE))}
	p.handle, err = p.node.proxy.AddPod(Pod{UID: "uid-" + p.name, WorkloadUID: "test//Pod/shop/" + p.name, Identity: p.id,
		Addrs: []netip.Addr{p.v4, p.v6}, NetNS: p.ns}, ls)
	check(t, err)
	check(t, p.node.dp.Enroll(datapath.Pod{UID: "uid-" + p.name, Workload: "test//Pod/shop/" + p.name, Identity: p.id, NetNS: p.ns, Addrs: []netip.Addr{p.v4, p.v6}, Listeners: p.listeners}))
	t.Cleanup(func() { p.listeners.Close() })
}

// as runs f on a thread in the pod's namespace and its node's pods' cgroup.
func (p *labPod) as(f func() error) error {
	return p.ns.Do(func() error {
		tid := []byte(strconv.Itoa(unix.Gettid()))
		if err := os.WriteFile(filepath.Join(p.node.lab.cgroup, "kubepods", "cgroup.threads"), tid, 0); err != nil {
			return err
		}
		err := f()
		return errors.Join(err, os.WriteFile(filepath.Join(p.node.lab.cgroup, "cgroup.threads"), tid, 0))
	})
}

// dial connects as a process of the pod.
func (p *labPod) dial(dst netip.AddrPort) (c *net.TCPConn, err error) {
	err = p.as(func() error {
		d := net.Dialer{Timeout: plenty}
		x, err := d.Dial("tcp", dst.String())
		if err == nil {
			c = x.(*net.TCPConn)
		}
		return err
	})
	return c, err
}

// listen runs an application in the pod: each connection is given to serve.
func (p *labPod) listen(port int, serve func(*net.TCPConn)) (stop func()) {
	t := p.node.lab.t
	t.Helper()
	var ln net.Listener
	check(t, p.as(func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}))
	apps := &p.node.lab.apps
	apps.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			apps.Go(func() { defer c.Close(); serve(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() { ln.Close() })
	return func() { ln.Close() }
}

// greet tells the client who serves it and what addresses the application sees, then echoes.
func (p *labPod) greet(c *net.TCPConn) {
	fmt.Fprintf(c, "%s %s %s\n", p.name, addrPort(c.LocalAddr()), addrPort(c.RemoteAddr()))
	io.Copy(c, c)
}

// seen is the line that greet wrote.
func seen(c net.Conn) (by string, local, remote netip.AddrPort, err error) {
	c.SetReadDeadline(time.Now().Add(plenty))
	defer c.SetReadDeadline(time.Time{})
	var line []byte
	one := make([]byte, 1)
	for {
		if _, err = c.Read(one); err != nil {
			return
		}
		if one[0] == '\n' {
			break
		}
		line = append(line, one[0])
	}
	f := strings.Fields(string(line))
	return f[0], netip.MustParseAddrPort(f[1]), netip.MustParseAddrPort(f[2]), nil
}

func (l *lab) makeCgroup() {
	root := "/sys/fs/cgroup"
	var st unix.Statfs_t
	if unix.Statfs(root, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		root = filepath.Join(root, "unified")
	}
	var err error
	l.cgroup, err = os.MkdirTemp(root, "warren-proxy-")
	check(l.t, err)
	home := root
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		for line := range strings.SplitSeq(string(b), "\n") {
			if p, ok := strings.CutPrefix(line, "0::"); ok {
				home = filepath.Join(root, p)
			}
		}
	}
	pods := filepath.Join(l.cgroup, "kubepods")
	check(l.t, os.Mkdir(pods, 0o755))
	check(l.t, os.WriteFile(filepath.Join(pods, "cgroup.type"), []byte("threaded"), 0))
	own := []byte(strconv.Itoa(os.Getpid()))
	check(l.t, os.WriteFile(filepath.Join(l.cgroup, "cgroup.procs"), own, 0))
	l.t.Cleanup(func() {
		check(l.t, os.WriteFile(filepath.Join(home, "cgroup.procs"), own, 0))
		eventually(l.t, "cgroup is removed", func() bool { os.Remove(pods); return os.Remove(l.cgroup) == nil })
	})
}

// testCA is a CA and a Source: it signs whatever it is asked for.
type testCA struct {
	t           *testing.T
	trustDomain string
	key         *ecdsa.PrivateKey
	cert        *x509.Certificate
	pem         []byte

	mu      sync.Mutex
	bundles map[mesh.Identity]*identity.Bundle
	fail    error // instead of a certificate
}

func newTestCA(t *testing.T, trustDomain string) *testCA {
	ca := &testCA{t: t, trustDomain: trustDomain, bundles: map[mesh.Identity]*identity.Bundle{}}
	ca.key = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{trustDomain}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, ca.key.Public(), ca.key))
	ca.cert = must(x509.ParseCertificate(der))
	ca.pem = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return ca
}

// sign makes a bundle; anchors nil are the CA's own.
func (ca *testCA) sign(id mesh.Identity, from, until time.Time, anchors []byte) *identity.Bundle {
	if anchors == nil {
		anchors = ca.pem
	}
	key, cert := ca.leaf(id, from, until)
	return must(identity.NewBundle(id, key, cert, anchors))
}

// leaf makes a key and its certificate, in PEM.
func (ca *testCA) leaf(id mesh.Identity, from, until time.Time) (*ecdsa.PrivateKey, []byte) {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: from, NotAfter: until,
		URIs: []*url.URL{must(url.Parse(id.String()))}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der := must(x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key))
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func (ca *testCA) Bundle(_ context.Context, id mesh.Identity) (*identity.Bundle, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.fail != nil {
		return nil, ca.fail
	}
	if b := ca.bundles[id]; b != nil {
		return b, nil
	}
	b := ca.sign(id, time.Now().Add(-time.Minute), time.Now().Add(time.Hour), nil)
	ca.bundles[id] = b
	return b, nil
}

// logLines collects the access log.
type logLines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// find waits for a line that has all these fields and returns it.
func (l *logLines) find(t *testing.T, want map[string]any) map[string]any {
	t.Helper()
	var found map[string]any
	eventually(t, fmt.Sprintf("a log line with %v", want), func() bool {
		for line := range strings.SplitSeq(l.String(), "\n") {
			var got map[string]any
			if json.Unmarshal([]byte(line), &got) != nil {
				continue
			}
			ok := true
			for k, v := range want {
				ok = ok && fmt.Sprint(got[k]) == fmt.Sprint(v)
			}
			if ok {
				found = got
				return true
			}
		}
		return false
	})
	return found
}

// metric is the sum of a metric's values over the series that have all these labels.
func (n *labNode) metric(name string, want map[string]string) float64 {
	n.lab.t.Helper()
	families, err := n.metrics.Gather()
	check(n.lab.t, err)
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			have := map[string]string{}
			for _, p := range m.Label {
				have[p.GetName()] = p.GetValue()
			}
			ok := true
			for k, v := range want {
				ok = ok && have[k] == v
			}
			if ok {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
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

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(plenty); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("not within %s: %s", plenty, what)
			return
		}
	}
}

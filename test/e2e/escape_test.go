package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/cluster"
	"github.com/warrenmesh/warren/test/e2e/lab"
)

// The pods of the suite. vault and neighbour are the mesh's and STRICT; whatever reaches them otherwise than by
// the tunnel has escaped.
const (
	plain    = "plain"    // of the mesh, first node: no capabilities, not root
	insider  = "insider"  // of the mesh, first node: root with NET_ADMIN and NET_RAW
	onHost   = "host"     // on the host network of the first node: root with NET_RAW
	stranger = "stranger" // not of the mesh, first node: as insider
)

// escape is one way out of capture, or around it.
type escape struct {
	name    string
	from    string
	way     string // of examples/escape
	args    []string
	counter string // that has to rise
	at      int    // on which node
	carried bool   // the token arrives, by the tunnel; otherwise it must not arrive
	control bool   // without the mesh the same way puts the token on the link: tried from stranger
	loud    bool   // the sender is not captured: its token may be seen, but not arrive
	// repaired: it may arrive after all, by the tunnel, once the audit has put capture in order again.
	repaired bool

	token, said string
	rose        float64
}

func (e *escape) String() string { return e.from + ": " + e.name }

// TestEscapes tries to get out of capture or around it. A way that is carried ends in the tunnel; any other is
// refused. In both cases nothing of it is readable on the link, and a counter says what stopped it.
func TestEscapes(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	ns, out := escapePods(t)
	addr := func(ns, name string, v6 int, port string) string {
		return net.JoinHostPort(pod(t, ns, name).IPs[v6], port)
	}
	vault4, vault6 := addr(ns, "vault", 0, "9000"), addr(ns, "vault", 1, "9000")
	near4, near6 := addr(ns, "neighbour", 0, "9000"), addr(ns, "neighbour", 1, "9000")
	outside := addr(out, "outside", 0, "9000")
	as4, as6 := pod(t, ns, "neighbour").IPs[0], pod(t, ns, "neighbour").IPs[1]
	to := func(ap string, more ...string) []string { return append([]string{"-to", ap}, more...) }
	vault := func(port string) string { return addr(ns, "vault", 0, port) }

	ways := []*escape{
		{name: "plain connect, IPv4", from: plain, way: "dial", args: to(vault4), counter: "connect_captured", carried: true, control: true},
		{name: "plain connect, IPv6", from: plain, way: "dial", args: to(vault6), counter: "connect_captured", carried: true, control: true},
		{name: "IPv4-mapped address", from: plain, way: "mapped", args: to(vault4), counter: "connect_captured", carried: true, control: true},
		{name: "MPTCP", from: plain, way: "mptcp", args: to(vault4), counter: "connect_captured", carried: true, control: true},
		{name: "TCP Fast Open by sendto", from: plain, way: "fastopen", args: to(vault4), counter: "connect_captured", carried: true, control: true},
		{name: "TCP Fast Open, SYN with the first write", from: plain, way: "fastopen-late", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "SO_BINDTODEVICE, IPv4", from: plain, way: "device", args: to(vault4), counter: "connect_captured", carried: true, control: true},
		{name: "SO_BINDTODEVICE, IPv6", from: plain, way: "device", args: to(vault6), counter: "connect_captured", carried: true, control: true},
		{name: "socket vouched for another destination", from: plain, way: "reconnect", args: to(vault4, "-via", outside), counter: "connect_captured", carried: true},
		{name: "bpf()", from: plain, way: "bpf", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "setns to another namespace", from: plain, way: "setns", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "user and network namespace of its own", from: plain, way: "namespace", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "127.0.0.1:15001", from: plain, way: "dial", args: to("127.0.0.1:15001"), counter: "lookup_drop_agent_port"},
		{name: "[::1]:15006", from: plain, way: "dial", args: to("[::1]:15006"), counter: "lookup_drop_agent_port"},
		{name: "own address, port 15006", from: plain, way: "dial", args: to(addr(ns, plain, 0, "15006")), counter: "lookup_drop_agent_port"},
		{name: "port 15001 of a pod", from: plain, way: "dial", args: to(vault("15001")), counter: "connect_captured"},
		{name: "port 15008 of a pod", from: plain, way: "dial", args: to(vault("15008")), counter: "connect_captured"},

		{name: "setns to another namespace", from: insider, way: "setns", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "bpf()", from: insider, way: "bpf", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "forged mark", from: insider, way: "mark", args: to(vault4), counter: "connect_captured", carried: true},
		{name: "mark taken off after connect, IPv4", from: insider, way: "unmark", args: to(vault4), counter: "guard_drop_captured"},
		{name: "mark taken off after connect, IPv6", from: insider, way: "unmark", args: to(vault6), counter: "guard_drop_captured"},
		{name: "connection without a SYN (TCP_REPAIR)", from: insider, way: "repair", args: to(vault4), counter: "connect_captured"},
		{name: "raw SYN, IPv4", from: insider, way: "raw-syn", args: to(vault4), counter: "guard_drop_unvouched", control: true},
		{name: "raw SYN, IPv6", from: insider, way: "raw-syn", args: to(vault6), counter: "guard_drop_unvouched", control: true},
		{name: "raw SYN to a pod outside the mesh", from: insider, way: "raw-syn", args: to(outside), counter: "guard_drop_unvouched", control: true},
		{name: "raw SYN behind an IPv6 extension header", from: insider, way: "raw-syn-extension", args: to(vault6), counter: "guard_drop_unvouched", control: true},
		{name: "raw SYN behind seven IPv6 extension headers", from: insider, way: "raw-syn-extensions", args: to(vault6), counter: "guard_drop_malformed"},
		{name: "SYN by packet socket", from: insider, way: "frame-syn", args: to(vault4), counter: "guard_drop_unvouched", control: true},
		{name: "SYN split over fragments", from: insider, way: "frame-fragments", args: to(vault4), counter: "guard_drop_malformed", control: true},
		{name: "SYN in a VLAN", from: insider, way: "frame-vlan", args: to(vault4), counter: "guard_drop_vlan"},
		{name: "SYN from a neighbour's address, IPv4", from: insider, way: "raw-syn", args: to(vault4, "-as", as4), counter: "guard_drop_source"},
		{name: "SYN from a neighbour's address, IPv6", from: insider, way: "raw-syn", args: to(vault6, "-as", as6), counter: "guard_drop_source"},
		{name: "data in a neighbour's connection", from: insider, way: "raw-answer", args: to(vault4, "-as", as4), counter: "guard_drop_source"},
		{name: "a neighbour's address by IP_TRANSPARENT", from: insider, way: "other-source", args: to(outside, "-as", as4), counter: "guard_drop_source"},
		{name: "a neighbour's address on the own interface", from: insider, way: "second-address", args: to(outside, "-as", as4), counter: "guard_drop_source"},
		{name: "a neighbour's address, to the mesh", from: insider, way: "second-address", args: to(vault4, "-as", as4), counter: "connect_captured", carried: true},
		{name: "ARP for a neighbour's address", from: insider, way: "arp", args: []string{"-as", as4}, counter: "guard_drop_neighbour"},
		{name: "neighbour advertisement for a neighbour's address", from: insider, way: "neighbour", args: []string{"-as", as6}, counter: "guard_drop_neighbour"},
		{name: "second interface (macvlan)", from: insider, way: "second-interface", args: to(vault4), counter: "guard_drop_captured"},
		{name: "DNAT in the pod", from: insider, way: "dnat", args: to(vault4, "-via", outside), counter: "guard_drop_mesh"},
		{name: "rule of its own before the agent's", from: insider, way: "earlier-rule", args: to(vault4), counter: "guard_drop_captured"},

		{name: "pod of another node", from: onHost, way: "dial", args: to(vault4), counter: "lookup_denied", at: 1, loud: true},
		{name: "pod of another node, IPv6", from: onHost, way: "dial", args: to(vault6), counter: "lookup_denied", at: 1, loud: true},
		{name: "pod of the same node, IPv4", from: onHost, way: "dial", args: to(near4), counter: "ticket_denied_host_pod", loud: true},
		{name: "pod of the same node, IPv6", from: onHost, way: "dial", args: to(near6), counter: "ticket_denied_host_pod", loud: true},
		{name: "flood of 500 connections", from: onHost, way: "flood", args: to(near4, "-n", "500"), counter: "ticket_denied_host_pod", loud: true},
		{name: "port that a probe of kubelet has just had", from: onHost, way: "dial", args: to(addr(ns, "neighbour", 0, "9001"), "-from", "probe"), counter: "ticket_denied_host_pod", loud: true},
		{name: "bpf()", from: onHost, way: "bpf", args: to(near4), counter: "ticket_denied_host_pod", loud: true},

		{name: "plaintext to a STRICT pod", from: stranger, way: "dial", args: to(vault4), counter: "lookup_denied", at: 1, loud: true},
		{name: "port 15001 of a pod", from: stranger, way: "dial", args: to(vault("15001")), counter: "lookup_drop_agent_port", at: 1, loud: true},
		{name: "port 15006 of a pod, IPv6", from: stranger, way: "dial", args: to(addr(ns, "vault", 1, "15006")), counter: "lookup_drop_agent_port", at: 1, loud: true},
		{name: "port 15008 of a pod, plain", from: stranger, way: "dial", args: to(vault("15008")), counter: "lookup_hbone", at: 1, loud: true},
		{name: "port 15008 of a pod, TLS without a certificate", from: stranger, way: "tls", args: to(vault("15008")), counter: "lookup_hbone", at: 1, loud: true},

		// Last: what is taken away here, the next audit puts back, and a SYN that is sent again after that is captured.
		{name: "rule deleted, IPv4", from: insider, way: "delete-rule", args: to(vault4), counter: "guard_drop_captured", repaired: true},
		{name: "rule deleted, IPv6", from: insider, way: "delete-rule", args: to(vault6), counter: "guard_drop_captured", repaired: true},
		{name: "route deleted, IPv6", from: insider, way: "delete-route", args: to(vault6), counter: "guard_drop_captured", repaired: true},
	}

	listenOnTheTunnelsPort(t, ns)
	s := startEscapes(t)
	var controls []*escape
	for i, e := range ways {
		e.token = fmt.Sprintf("%s-%02d.", tokenPrefix, i)
		s.try(t, e, ns, out)
		if e.control {
			c := *e
			c.from, c.name, c.token = stranger, "without the mesh: "+e.name, fmt.Sprintf("%s-c%02d.", tokenPrefix, i)
			if e.carried || strings.HasPrefix(e.way, "mark") { // plaintext to a STRICT pod is refused: use one outside
				c.args = to(addr(out, "outside", map[bool]int{true: 1}[strings.HasPrefix(e.args[1], "[")], "9000"))
			}
			s.try(t, &c, ns, out)
			controls = append(controls, &c)
		}
	}
	udp := &escape{name: "UDP", from: plain, way: "udp", args: to(vault4), token: tokenPrefix + "-udp."}
	s.try(t, udp, ns, out)

	clear, lost := s.stop(t)
	if lost > 0 {
		t.Errorf("the watch lost %d frames", lost)
	}
	arrived := ""
	for _, name := range []string{"vault", "neighbour"} {
		logs, err := mesh.Kubectl(ctx, "-n", ns, "logs", name)
		must(t, err)
		arrived += logs
	}
	for _, e := range ways {
		t.Run(strings.ReplaceAll(e.String(), "/", " "), func(t *testing.T) {
			if e.rose < 1 {
				t.Errorf("%s on %s did not rise", e.counter, nodes[e.at])
			}
			if clear[e.token] && !e.loud {
				t.Error("its data was on the link in clear")
			}
			got := strings.Contains(arrived, e.token) || strings.HasPrefix(e.said, "answered")
			if got != e.carried && !(got && e.repaired) {
				t.Errorf("arrived: %v, want %v", got, e.carried)
			}
			for _, a := range []string{"peer=" + as4 + ":", "peer=[" + as6 + "]:"} {
				if strings.Contains(e.said, a) {
					t.Errorf("the server takes it for the neighbour: %s", e.said)
				}
			}
			failed := 0
			if t.Failed() {
				failed = 1
				t.Logf("%s rose by %g; it said: %s", e.counter, e.rose, e.said)
			}
			record("escapes", e.String(), 1, failed, e.rose, e.counter)
		})
	}
	for _, c := range controls {
		switch {
		case clear[c.token]:
		case *plugin != "": // what it does not carry at all is no way out either
			t.Logf("%s: nothing was seen on the link: %s stops it", c, *plugin)
		default:
			t.Errorf("%s: nothing was seen on the link, so the test proves nothing; it said: %s", c, c.said)
		}
	}
	if !clear[udp.token] {
		t.Errorf("UDP is said to be neither encrypted nor stopped, but was not seen: %s", udp.said)
	}
	// The audit has put the rule and the route back.
	must(t, lab.Eventually(ctx, 40*time.Second, func() error {
		for _, ap := range []string{vault4, vault6} {
			said, err := mesh.Exec(ctx, ns, insider, "/escape", "dial", "-to", ap, "-token", "afterwards", "-wait", "10s")
			if err != nil || !strings.HasPrefix(said, "answered") {
				return fmt.Errorf("%s: %v %s", ap, err, said)
			}
		}
		return nil
	}))
}

// escapePods starts the suite's pods, in the mesh and outside.
func escapePods(t *testing.T) (ns, out string) {
	t.Helper()
	ns, out = namespace(t, "e2e-escape", ambient), namespace(t, "e2e-escape-out")
	strict(t, ns)
	root := func(caps ...string) map[string]any {
		return map[string]any{"securityContext": map[string]any{"runAsUser": 0, "runAsNonRoot": false, "allowPrivilegeEscalation": false,
			"capabilities": map[string]any{"drop": []string{"ALL"}, "add": caps}, "seccompProfile": map[string]any{"type": "RuntimeDefault"}}}
	}
	probe := map[string]any{"readinessProbe": map[string]any{"httpGet": map[string]any{"path": "/", "port": 9001}, "periodSeconds": 1}}
	spec := func(ns, name, node string, args string, more map[string]any) lab.PodSpec {
		return lab.PodSpec{Namespace: ns, Name: name, Node: node, Account: name, Program: "/escape", Args: []string{args}, Container: more}
	}
	host := spec(ns, onHost, nodes[0], "wait", root("NET_RAW"))
	host.HostNetwork = true
	must(t, mesh.Run(t.Context(),
		spec(ns, "vault", nodes[1], "serve", nil),
		spec(ns, "neighbour", nodes[0], "serve", probe),
		spec(ns, plain, nodes[0], "serve", nil),
		spec(ns, insider, nodes[0], "serve", root("NET_RAW", "NET_ADMIN")),
		host,
		spec(out, "outside", nodes[1], "serve", nil),
		spec(out, stranger, nodes[0], "serve", root("NET_RAW", "NET_ADMIN"))))
	for _, n := range []string{ns, out} {
		must(t, mesh.AwaitReady(t.Context(), n, 90*time.Second))
	}
	must(t, lab.Eventually(t.Context(), 30*time.Second, func() error {
		for _, name := range []string{"vault", "neighbour", plain, insider} {
			if p, err := mesh.Pod(t.Context(), ns, name); err != nil || p.Redirection() != "enabled" {
				return fmt.Errorf("%s: %v, redirection=%q", name, err, p.Redirection())
			}
		}
		return nil
	}))
	waysKnown(t, ns)
	// STRICT has reached both nodes when a stranger is refused.
	for _, name := range []string{"vault", "neighbour"} {
		target := net.JoinHostPort(pod(t, ns, name).IP, "9000")
		must(t, lab.Eventually(t.Context(), 20*time.Second, func() error {
			said, err := mesh.Exec(t.Context(), out, stranger, "/escape", "dial", "-to", target, "-token", "strict-yet")
			if err == nil && strings.HasPrefix(said, "answered") {
				err = fmt.Errorf("%s takes plaintext", name)
			}
			return err
		}))
	}
	return ns, out
}

const tokenPrefix = "warren-escape"

// escapes watches the link and reads the agents' counters.
type escapes struct {
	client *http.Client
	agents [2]string // pods of the first and the second node
	end    context.CancelFunc
	ended  chan cluster.CaptureStats

	mu    sync.Mutex
	clear map[string]bool // tokens that were seen
}

func startEscapes(t *testing.T) *escapes {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	s := &escapes{end: cancel, ended: make(chan cluster.CaptureStats, 1), clear: map[string]bool{}}
	// One connection to the API server for some two hundred readings of the counters.
	socket := filepath.Join(t.TempDir(), "api")
	go mesh.Kubectl(ctx, "proxy", "--unix-socket="+socket)
	s.client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}}}
	pods, err := mesh.Pods(ctx, lab.Namespace, lab.NodeApp)
	must(t, err)
	for _, p := range pods {
		for i := range s.agents {
			if p.Node == nodes[i] && p.Ready && !p.Terminating {
				s.agents[i] = p.Name
			}
		}
	}
	must(t, lab.Eventually(ctx, 10*time.Second, func() error {
		_, err := s.outcome(ctx, 0, "connect_captured")
		return err
	}))
	ready := make(chan struct{})
	go func() {
		stats, err := mesh.Cluster.Capture(ctx, ready, s.see)
		if err != nil {
			t.Error(err)
		}
		s.ended <- stats
	}()
	select {
	case <-ready:
	case <-time.After(10 * time.Second):
		t.Fatal("the watch of the link does not begin")
	}
	return s
}

// see looks for tokens in a frame: the prefix and what follows up to the dot.
func (s *escapes) see(f cluster.Frame) {
	for d := f.Data; ; {
		i := bytes.Index(d, []byte(tokenPrefix))
		if i < 0 {
			return
		}
		d = d[i:]
		if end := bytes.IndexByte(d, '.'); end > 0 {
			s.mu.Lock()
			s.clear[string(d[:end+1])] = true
			s.mu.Unlock()
		}
		d = d[len(tokenPrefix):]
	}
}

func (s *escapes) stop(t *testing.T) (clear map[string]bool, lost uint64) {
	t.Helper()
	time.Sleep(300 * time.Millisecond) // what was sent last is still on its way through the capture
	s.end()
	stats := <-s.ended
	return s.clear, stats.Dropped
}

// outcome reads one counter of the kernel on a node.
func (s *escapes) outcome(ctx context.Context, node int, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		"http://localhost/api/v1/namespaces/"+lab.Namespace+"/pods/"+s.agents[node]+":15020/proxy/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("metrics of %s: %s: %s", s.agents[node], resp.Status, page)
	}
	var v float64
	line := fmt.Sprintf("warren_datapath_outcomes_total{outcome=%q} ", name)
	_, rest, ok := strings.Cut(string(page), line)
	if !ok {
		return 0, fmt.Errorf("%s has no counter %s", s.agents[node], name)
	}
	_, err = fmt.Sscan(rest, &v)
	return v, err
}

// try runs one way and notes by how much its counter rose.
func (s *escapes) try(t *testing.T, e *escape, ns, out string) {
	t.Helper()
	ctx := t.Context()
	where := ns
	if e.from == stranger {
		where = out
	}
	args := append([]string{"/escape", e.way, "-token", e.token}, e.args...)
	if e.carried { // what is to arrive has all the time that a busy machine takes
		args = append(args, "-wait", "15s")
	}
	probed := args[len(args)-1] == "probe"
	if probed {
		args[len(args)-1] = lastProbe(t, ns)
	}
	counted := e.counter != ""
	var before, after float64
	var err error
	if counted {
		before, err = s.outcome(ctx, e.at, e.counter)
		must(t, err)
	}
	e.said, err = mesh.Exec(ctx, where, e.from, args...)
	for n := 0; n < 20 && probed && strings.Contains(e.said, "address already in use"); n++ { // the kubelet has it still
		time.Sleep(200 * time.Millisecond)
		args[len(args)-1] = lastProbe(t, ns)
		e.said, err = mesh.Exec(ctx, where, e.from, args...)
	}
	if err != nil {
		t.Errorf("%s was not tried: %v", e, err)
		e.said = ""
	}
	e.said = strings.TrimSpace(e.said)
	if counted {
		after, err = s.outcome(ctx, e.at, e.counter)
		must(t, err)
	}
	e.rose = after - before
	t.Logf("%s: %s +%g: %s", e, e.counter, e.rose, e.said)
}

// lastProbe is the port that the kubelet probed the neighbour from last.
func lastProbe(t *testing.T, ns string) string {
	t.Helper()
	logs, err := mesh.Kubectl(t.Context(), "-n", ns, "logs", "neighbour", "--tail=20")
	must(t, err)
	i := strings.LastIndex(logs, "probe from ")
	if i < 0 {
		t.Fatalf("the kubelet has not probed: %s", logs)
	}
	line, _, _ := strings.Cut(logs[i+len("probe from "):], "\n")
	ap, err := netip.ParseAddrPort(line)
	must(t, err)
	return fmt.Sprint(ap.Port())
}

// listenOnTheTunnelsPort: a process in a pod that listens on 15008 itself gets none of the tunnel's connections.
func listenOnTheTunnelsPort(t *testing.T, ns string) {
	t.Helper()
	ctx := t.Context()
	said := make(chan string, 1)
	go func() {
		out, err := mesh.Exec(ctx, ns, insider, "/escape", "listen", "-to", "0.0.0.0:15008", "-wait", "5s")
		b, _ := json.Marshal(fmt.Sprint(out, err))
		said <- string(b)
	}()
	target := net.JoinHostPort(pod(t, ns, insider).IP, "9000")
	time.Sleep(time.Second)
	out, err := mesh.Exec(ctx, ns, plain, "/escape", "dial", "-to", target, "-token", "tunnel", "-wait", "15s")
	failed := 0
	if got := <-said; err != nil || !strings.HasPrefix(out, "answered: name="+insider) || strings.Contains(got, "answered") {
		failed = 1
		t.Errorf("a listener on 15008 in the pod: the client got %v %s, the listener %s", err, out, got)
	}
	record("escapes", insider+": listener on the tunnel's port", 1, failed, 1, "connections carried")
}

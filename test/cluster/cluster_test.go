package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/cluster/internal/plan"
	"golang.org/x/sys/unix"
)

// TestCluster boots two nodes and does to them what the end-to-end tests will.
func TestCluster(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a cluster: takes most of a minute")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ctx := t.Context()
	dir, err := os.MkdirTemp("/var/lib", "warren-cluster-test-")
	if err != nil {
		t.Fatal(err)
	}
	id := (&plan.Cluster{Dir: dir}).ID()
	begin := time.Now()
	c, err := Start(ctx, Options{Dir: dir, Log: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Remove(context.Background(), dir, false); err != nil {
			t.Error(err)
		}
	})
	t.Logf("ready after %s", time.Since(begin).Round(100*time.Millisecond))

	s := &smoke{T: t, c: c}
	s.kubectl("apply", "-f", "testdata/smoke.yaml")
	s.rollout()
	s.echo = s.pods("echo")

	t.Run("services answer on both families", s.on((*smoke).services))
	t.Run("names resolve", s.on((*smoke).names))
	t.Run("an outside client reaches pods", s.on((*smoke).outside))
	t.Run("the API server reaches pods", s.on((*smoke).apiToPods))
	t.Run("webhooks and aggregated APIs are called", s.on((*smoke).extensions))
	t.Run("a projected token passes TokenReview", s.on((*smoke).tokenReview))
	t.Run("an agent sees its node", s.on((*smoke).agent))
	t.Run("frames between nodes are captured", s.on((*smoke).capture))
	t.Run("a changed plugin list takes effect", s.on((*smoke).pluginList))
	t.Run("images load on every node", s.on((*smoke).load))
	t.Run("a killed node leaves the others working", s.on((*smoke).powerCut))
	t.Run("a reboot keeps the disk and nothing else", s.on((*smoke).reboot))

	pids := processesOf(t, dir)
	if len(pids) < 10 {
		t.Errorf("found only %d processes of the cluster: the search below proves nothing", len(pids))
	}
	if err := c.Down(ctx); err != nil {
		t.Fatal(err)
	}
	checkGone(t, dir, id)
}

type smoke struct {
	*testing.T
	c    *Cluster
	echo map[string]string // node to pod
}

func (s *smoke) on(f func(*smoke)) func(*testing.T) {
	return func(t *testing.T) { f(&smoke{t, s.c, s.echo}) }
}

func (s *smoke) kubectl(args ...string) string {
	s.Helper()
	out, err := s.c.Kubectl(s.Context(), args...)
	if err != nil {
		s.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (s *smoke) node(name string, args ...string) string {
	s.Helper()
	n, err := s.c.Node(name)
	if err != nil {
		s.Fatal(err)
	}
	out, err := n.Exec(s.Context(), args...)
	if err != nil {
		s.Fatal(err)
	}
	return out
}

func (s *smoke) rollout() {
	s.Helper()
	for _, ds := range []string{"echo", "agent"} {
		s.kubectl("rollout", "status", "daemonset/"+ds, "--timeout=60s")
	}
}

func (s *smoke) pods(app string) map[string]string {
	s.Helper()
	m := map[string]string{}
	out := s.kubectl("get", "pods", "-l", "app="+app, "-o", `jsonpath={range .items[*]}{.spec.nodeName} {.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		node, pod, _ := strings.Cut(strings.TrimSpace(line), " ")
		m[node] = pod
	}
	return m
}

func (s *smoke) probe(node string, args ...string) string {
	s.Helper()
	return s.kubectl(append([]string{"exec", s.echo[node], "--", "/probe"}, args...)...)
}

// hostPort writes an address as a URL has it.
func hostPort(ip, port string) string {
	if strings.Contains(ip, ":") {
		ip = "[" + ip + "]"
	}
	return "http://" + ip + ":" + port + "/"
}

func (s *smoke) services() {
	vips := strings.Fields(s.kubectl("get", "service", "echo", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	if len(vips) != 2 {
		s.Fatalf("addresses of the Service are %v: want one of each family", vips)
	}
	for from, pod := range s.echo {
		for _, vip := range vips {
			seen := map[string]bool{}
			// kube-proxy programs a new endpoint within about a second.
			for deadline := time.Now().Add(20 * time.Second); len(seen) < 2 && time.Now().Before(deadline); {
				out, _ := s.c.Kubectl(s.Context(), "exec", pod, "--", "/probe", "get", hostPort(vip, "80"))
				if _, node, ok := strings.Cut(out, "node="); ok {
					seen[strings.Fields(node)[0]] = true
				}
			}
			if !seen["node1"] || !seen["node2"] {
				s.Errorf("through %s from %s answered only %v", vip, pod, seen)
			}
		}
		for _, to := range s.echo {
			for ip := range strings.FieldsSeq(s.kubectl("get", "pod", to, "-o", "jsonpath={.status.podIPs[*].ip}")) {
				if out := s.probe(from, "get", hostPort(ip, "8080")); !strings.HasPrefix(out, "200 host="+to) {
					s.Errorf("%s from %s: %q", ip, pod, out)
				}
			}
		}
	}
}

func (s *smoke) names() {
	out := s.probe("node1", "lookup", "echo", "echo.default.svc.cluster.local", "kubernetes.default")
	for i, line := range strings.Split(out, "\n") {
		want := []string{"fd00:10:96::", "fd00:10:96::", "10.96.0.1"}[i]
		if !strings.Contains(line, want) {
			s.Errorf("lookup %d gave %q: want %s...", i, line, want)
		}
	}
}

func (s *smoke) outside() {
	ips := strings.Fields(s.kubectl("get", "pod", s.echo["node1"], "-o", "jsonpath={.status.podIPs[*].ip}"))
	for i, from := range []string{"remote=172.30.0.1:", "remote=[fd00:172:30::1]:"} {
		var body []byte
		err := s.c.Outside(func() error {
			conn, err := net.Dial("tcp", net.JoinHostPort(ips[i], "8080"))
			if err != nil {
				return err
			}
			defer conn.Close()
			fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n")
			body, err = io.ReadAll(conn)
			return err
		})
		if err != nil || !strings.Contains(string(body), from) {
			s.Errorf("%s: %q, %v", ips[i], body, err)
		}
	}
	if out, err := output(s.c.OutsideCommand(s.Context(), "ip", "-br", "link", "show", "warren0")); err != nil || !strings.HasPrefix(out, "warren0") {
		s.Errorf("the link: %q, %v", out, err)
	}
}

func (s *smoke) extensions() {
	const complaint = "server gave HTTP response to HTTPS client"
	s.kubectl("apply", "-f", "testdata/extensions.yaml")
	deadline := time.Now().Add(20 * time.Second)
	var webhook error
	var api string
	for time.Now().Before(deadline) {
		_, webhook = s.c.Kubectl(s.Context(), "create", "configmap", "refused")
		api = s.kubectl("get", "apiservice", "v1.echo.example.com", "-o", "jsonpath={.status.conditions[*].message}")
		if webhook != nil && strings.Contains(webhook.Error(), complaint) && strings.Contains(api, complaint) {
			s.kubectl("delete", "-f", "testdata/extensions.yaml")
			return
		}
		s.kubectl("delete", "configmap", "refused", "--ignore-not-found")
		time.Sleep(200 * time.Millisecond)
	}
	s.Errorf("webhook: %v; aggregated API: %q; want each to say %q", webhook, api, complaint)
}

func (s *smoke) apiToPods() {
	if out := s.kubectl("get", "--raw", "/api/v1/namespaces/default/services/echo:80/proxy/"); !strings.HasPrefix(out, "host=echo-") {
		s.Errorf("through the API server: %q", out)
	}
	if out := s.kubectl("logs", s.echo["node1"], "--tail=1"); strings.Contains(out, "rror") {
		s.Errorf("log: %q", out)
	}
}

func (s *smoke) tokenReview() {
	review := func(audience string) string {
		type m = map[string]any
		token := s.probe("node1", "cat", "/var/run/secrets/tokens/istio-token")
		b, err := json.Marshal(m{
			"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
			"spec": m{"token": token, "audiences": []string{audience}},
		})
		if err != nil {
			s.Fatal(err)
		}
		cmd := s.c.Command(s.Context(), "kubectl", "create", "-f", "-", "-o", "jsonpath={.status.authenticated} {.status.user.username}")
		cmd.Stdin = bytes.NewReader(b)
		out, err := output(cmd)
		if err != nil {
			s.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	if got := review("istio-ca"); got != "true system:serviceaccount:default:default" {
		s.Errorf("review for istio-ca: %q", got)
	}
	if got := review("other"); strings.HasPrefix(got, "true") {
		s.Errorf("review for another audience: %q", got)
	}
}

func (s *smoke) agent() {
	for node, pod := range s.agents() {
		in := func(args ...string) string {
			return s.kubectl(append([]string{"exec", pod, "--", "/probe"}, args...)...)
		}
		pin := "of-" + node
		s.node(node, "mkdir", "/sys/fs/bpf/"+pin)
		if out := in("ls", "/sys/fs/bpf"); !strings.Contains(out, pin) {
			s.Errorf("BPF file system of %s in its agent: %q", node, out)
		}
		s.node(node, "ip", "netns", "add", "later")
		if out := in("ls", "/run/netns"); !strings.Contains(out, "later") {
			s.Errorf("network namespaces of %s in its agent: %q", node, out)
		}
		// A namespace file that is mounted later must be the mount, not the
		// file below it.
		if got, want := s.node(node, "stat", "-fc", "%T", "/run/netns/later"), "nsfs"; strings.TrimSpace(got) != want {
			s.Errorf("namespace file on %s is on %q: want %s", node, got, want)
		}
		s.node(node, "ip", "netns", "del", "later")
		if out := in("cat", "/proc/1/cmdline"); !strings.Contains(out, "launcher") {
			s.Errorf("process 1 of %s in its agent: %q", node, out)
		}
		other := map[string]string{"node1": "node2", "node2": "node1"}[node]
		if out := s.node(other, "ls", "/sys/fs/bpf"); strings.Contains(out, pin) {
			s.Errorf("BPF file system of %s shows on %s", node, other)
		}
	}
}

func (s *smoke) agents() map[string]string { return s.pods("agent") }

func (s *smoke) capture() {
	const marker = "planted-marker-5d41"
	ctx, cancel := context.WithCancel(s.Context())
	ready, done := make(chan struct{}), make(chan struct{})
	var st CaptureStats
	var err error
	marked := map[string]int{}
	go func() {
		defer close(done)
		st, err = s.c.Capture(ctx, ready, func(f Frame) {
			if bytes.Contains(f.Data, []byte(marker)) {
				marked[f.Node]++
			}
		})
	}()
	<-ready
	for ip := range strings.FieldsSeq(s.kubectl("get", "pod", s.echo["node2"], "-o", "jsonpath={.status.podIPs[*].ip}")) {
		s.probe("node1", "get", hostPort(ip, "8080")+marker)
		s.probe("node2", "get", hostPort(ip, "8080")+marker) // never leaves its node
	}
	time.Sleep(200 * time.Millisecond)
	cancel()
	<-done
	if err != nil {
		s.Fatal(err)
	}
	if marked["node1"] != 2 || marked["node2"] != 0 || st.Dropped != 0 {
		s.Errorf("marked frames %v, %+v: want node1 to send 2, one per family", marked, st)
	}
}

func (s *smoke) pluginList() {
	s.node("node2", "sed", "-i", "s/1500/1400/", "/etc/cni/net.d/10-pods.conflist")
	s.kubectl("delete", "pod", s.echo["node2"])
	s.rollout()
	s.echo["node2"] = s.pods("echo")["node2"]
	if out := s.probe("node2", "cat", "/sys/class/net/eth0/mtu"); out != "1400" {
		s.Errorf("MTU in a new pod is %s: want 1400", out)
	}
}

func (s *smoke) load() {
	own, err := ownImages(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	if err := s.c.LoadImages(s.Context(), filepath.Join(own, "probe.tar")); err != nil {
		s.Fatal(err)
	}
	for _, n := range s.c.Nodes() {
		if out := s.node(n.Name(), "ctr", "images", "ls", "-q"); !strings.Contains(out, ProbeImage) {
			s.Errorf("images of %s: %q", n.Name(), out)
		}
	}
}

func (s *smoke) powerCut() {
	n, err := s.c.Node("node2")
	if err != nil {
		s.Fatal(err)
	}
	s.reachable(n) // so that node1 has the addresses of its neighbour
	if err := n.Kill(s.Context()); err != nil {
		s.Fatal(err)
	}
	if _, err := n.PID(); err == nil {
		s.Error("node2 still runs")
	}
	if _, err := n.Exec(s.Context(), "true"); err == nil {
		s.Error("node2 still runs programs")
	}
	s.probe("node1", "get", "http://127.0.0.1:8080/")
	begin := time.Now()
	if err := n.Start(s.Context()); err != nil {
		s.Fatal(err)
	}
	if err := s.c.WaitReady(s.Context()); err != nil {
		s.Fatal(err)
	}
	s.Logf("node2 is back after %s", time.Since(begin).Round(100*time.Millisecond))
	s.reachable(n)
	s.rollout()
	s.node2Answers()
}

// reachable checks that node1 reaches another node's addresses at once.
func (s *smoke) reachable(n *Node) {
	s.Helper()
	from, err := s.c.Node("node1")
	if err != nil {
		s.Fatal(err)
	}
	for _, a := range n.Addrs() {
		err := from.InNetNS(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(a.String(), "1"), 3*time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		if !errors.Is(err, unix.ECONNREFUSED) {
			s.Errorf("from node1 to %s, where nobody listens: %v", a, err)
		}
	}
}

// node2Answers waits until pods that came back answer.
func (s *smoke) node2Answers() {
	s.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		// Empty until kubelet has noticed that the sandbox is gone and made another.
		ip := s.kubectl("get", "pod", s.echo["node2"], "-o", "jsonpath={.status.podIP}")
		out, err := s.c.Kubectl(s.Context(), "exec", s.echo["node1"], "--", "/probe", "get", hostPort(ip, "8080"))
		if err == nil && strings.Contains(out, "node=node2") {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("node2's pod does not answer after the boot: %q, %v", out, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func (s *smoke) reboot() {
	n, err := s.c.Node("node2")
	if err != nil {
		s.Fatal(err)
	}
	before := s.node("node2", "cat", "/proc/sys/kernel/random/boot_id")
	for _, f := range []string{"/var/lib/warren-kept", "/opt/kept", "/run/lost", "/sys/fs/bpf/lost", "/tmp/lost"} {
		s.node("node2", "mkdir", f)
	}
	if err := n.Reboot(s.Context()); err != nil {
		s.Fatal(err)
	}
	if err := s.c.WaitReady(s.Context()); err != nil {
		s.Fatal(err)
	}
	if after := s.node("node2", "cat", "/proc/sys/kernel/random/boot_id"); after == before {
		s.Errorf("boot id is still %s", before)
	}
	s.node("node2", "test", "-d", "/var/lib/warren-kept", "-a", "-d", "/opt/kept", "-a", "!", "-e", "/run/lost", "-a", "!", "-e", "/sys/fs/bpf/lost", "-a", "!", "-e", "/tmp/lost")
	s.node("node2", "grep", "-q", "1400", "/etc/cni/net.d/10-pods.conflist")
	s.rollout()
	s.node2Answers()
}

// processesOf finds processes by the mount namespace's root, the command line or
// the cgroup: whatever belongs to the cluster in dir.
func processesOf(t *testing.T, dir string) []string {
	t.Helper()
	id := (&plan.Cluster{Dir: dir}).ID()
	var l []string
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		cmd, _ := os.ReadFile(p + "/cmdline")
		cg, _ := os.ReadFile(p + "/cgroup")
		if bytes.Contains(cmd, []byte(dir)) || bytes.Contains(cg, []byte(id)) {
			l = append(l, fmt.Sprintf("%s %q", filepath.Base(p), cmd))
		}
	}
	return l
}

func checkGone(t *testing.T, dir, id string) {
	t.Helper()
	if l := processesOf(t, dir); len(l) > 0 {
		t.Errorf("processes are left: %v", l)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("%s is left", dir)
	}
	if b, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(b, []byte(dir)) {
		t.Errorf("mounts are left (%v): %s", err, b)
	}
	err := filepath.WalkDir("/sys/fs/cgroup", func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == id {
			t.Errorf("cgroup %s is left", p)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// storm is what `demo tcp-storm` reports.
type storm struct {
	Connections int      `json:"connections"`
	Failed      int      `json:"failed"`
	Cut         int      `json:"cut"` // of the failed: ended after they had been connected
	WrongSource int      `json:"wrong_source"`
	WrongPeer   int      `json:"wrong_peer"`
	WrongTarget int      `json:"wrong_target"`
	Seconds     float64  `json:"seconds"`
	Examples    []string `json:"examples"`
}

func (s storm) bad() int { return s.Failed + s.WrongSource + s.WrongPeer + s.WrongTarget }

// runStorm runs connections from a pod. It fails the test on what is not even a report.
func runStorm(t *testing.T, namespace, client string, n, c int, targets, addr string, more ...string) storm {
	t.Helper()
	args := append([]string{"/demo", "tcp-storm", "-n", strconv.Itoa(n), "-c", strconv.Itoa(c), "-targets", targets}, more...)
	out, err := mesh.Exec(t.Context(), namespace, client, append(args, addr)...)
	var s storm
	if e := json.Unmarshal([]byte(out), &s); e != nil {
		t.Fatalf("no report from %s: %v, %v: %s", client, err, e, out)
	}
	return s
}

// pair runs a client on the first node and echo servers on both, in a namespace of the mesh.
func pair(t *testing.T, name string) string {
	t.Helper()
	ns := namespace(t, name, ambient)
	must(t, mesh.Run(t.Context(),
		lab.PodSpec{Namespace: ns, Name: "client", Account: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "near", Account: "server", Node: nodes[0], Args: []string{"tcp-echo"}, Port: 9000},
		lab.PodSpec{Namespace: ns, Name: "far", Account: "server", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000},
	))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	inMesh(t, ns)
	return ns
}

// Both sides see the addresses that they would see without a mesh: the server the client pod's address and
// port, the client the address it dialled; and the server is the one that was meant.
func TestAddressesAreTrue(t *testing.T) {
	ns := pair(t, "e2e-addresses")
	n := 2000
	if *long {
		n = 20000
	}
	for _, server := range []string{"far", "near"} {
		p := pod(t, ns, server)
		vips, err := mesh.ServiceAddrs(t.Context(), ns, server)
		must(t, err)
		for i, ip := range p.IPs {
			target := net.JoinHostPort(ip, "9000")
			ways := map[string]string{"pod address": target}
			if i < len(vips) {
				ways["cluster address"] = net.JoinHostPort(vips[i], "9000")
			}
			for way, dial := range ways {
				name := fmt.Sprintf("%s server by %s, IPv%d", server, way, map[bool]int{true: 6, false: 4}[strings.Contains(ip, ":")])
				t.Run(name, func(t *testing.T) {
					s := runStorm(t, ns, "client", n, 32, target, dial)
					record("wrong-addresses", name, s.Connections, s.bad(), float64(s.Connections)/s.Seconds, "connections/s")
					if s.bad() > 0 {
						t.Errorf("%+v", s)
					}
				})
			}
		}
	}
}

// What a TCP connection does, it does through the tunnel.
func TestTCPManners(t *testing.T) {
	ns := pair(t, "e2e-manners")
	must(t, mesh.Run(t.Context(),
		lab.PodSpec{Namespace: ns, Name: "greeter", Node: nodes[1], Args: []string{"tcp-greet"}, Port: 9001},
		lab.PodSpec{Namespace: ns, Name: "headless", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000, Headless: true},
	))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	for _, c := range []struct {
		name string
		args []string
	}{
		{"half-close, far", []string{"tcp-halfclose", "-bytes", "8000000", "far:9000"}},
		{"half-close, same node", []string{"tcp-halfclose", "-bytes", "8000000", "near:9000"}},
		{"headless", []string{"tcp-dial", "headless:9000"}},
		{"refused port", []string{"tcp-dial", "-timeout", "3s", "far:9999"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := mesh.Exec(t.Context(), ns, "client", append([]string{"/demo"}, c.args...)...)
			failed := 0
			if refused := c.name == "refused port"; refused != (err != nil) {
				failed = 1
				t.Errorf("%v: %s", err, out)
			}
			record("tcp-fidelity", c.name, 1, failed, 0, "")
		})
	}
	t.Run("server speaks first", func(t *testing.T) {
		out, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-hello", "greeter:9001")
		failed := 0
		if err != nil || !strings.HasPrefix(out, "220 hello") || !strings.Contains(out, "250 ") {
			failed = 1
			t.Errorf("%v: %s", err, out)
		}
		record("tcp-fidelity", "server speaks first", 1, failed, 0, "")
	})
}

// The access log names who talked to whom, and the metrics count it.
func TestIdentityInLogAndMetrics(t *testing.T) {
	ns := pair(t, "e2e-identity")
	out, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "far:9000")
	must(t, err)
	var o struct {
		ClientLocal string `json:"client_local"`
	}
	must(t, json.Unmarshal([]byte(out), &o))
	client, server := "spiffe://cluster.local/ns/"+ns+"/sa/client", "spiffe://cluster.local/ns/"+ns+"/sa/server"
	want := []string{"src.addr=" + o.ClientLocal, "src.identity=" + client, "dst.identity=" + server, "src.namespace=" + ns,
		"dst.workload=far", "dst.service=far." + ns + ".svc.cluster.local"}
	for _, direction := range []string{"direction=inbound", "direction=outbound"} {
		must(t, lab.Eventually(t.Context(), 10*time.Second, func() error {
			logs, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "logs", "-l", lab.NodeApp, "--tail=400")
			if err != nil {
				return err
			}
			var its strings.Builder
			for line := range strings.Lines(logs) {
				if !strings.Contains(line, want[0]) {
					continue
				}
				if !slices.ContainsFunc(append(want, direction), func(w string) bool { return !strings.Contains(line, w) }) {
					return nil
				}
				its.WriteString(line)
			}
			return fmt.Errorf("no line has %s and %s. Of this connection are:\n%s", direction, strings.Join(want, " "), its.String())
		}))
	}
	samples, err := mesh.Metrics(t.Context())
	must(t, err)
	for _, reporter := range []string{"source", "destination"} {
		if lab.Sum(samples, "istio_tcp_connections_opened_total", map[string]string{"reporter": reporter, "source_principal": client,
			"destination_principal": server, "destination_service_name": "far", "connection_security_policy": "mutual_tls"}) < 1 {
			t.Errorf("no metric with reporter=%s counts the connection", reporter)
		}
	}
}

// Destinations outside the mesh are reached, and plaintext from outside reaches pods that allow it.
func TestOutsideTheMesh(t *testing.T) {
	ns := pair(t, "e2e-outside-in")
	out := namespace(t, "e2e-outside")
	must(t, mesh.Run(t.Context(),
		lab.PodSpec{Namespace: out, Name: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: out, Name: "server", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000}))
	must(t, mesh.AwaitReady(t.Context(), out, time.Minute))
	dial := func(namespace, to string) error {
		_, err := mesh.Exec(t.Context(), namespace, "client", "/demo", "tcp-dial", "-timeout", "10s", to+":9000")
		return err
	}
	// kube-proxy takes a second or so to know a new Service.
	if err := lab.Eventually(t.Context(), 20*time.Second, func() error { return dial(ns, "server."+out) }); err != nil {
		t.Errorf("from the mesh to a pod outside: %v", err)
	}
	if err := lab.Eventually(t.Context(), 20*time.Second, func() error { return dial(out, "far."+ns) }); err != nil {
		t.Errorf("from outside to a PERMISSIVE pod: %v", err)
	}
	// The agent's own connection with the client has that address and port already: the application sees another port.
	target := net.JoinHostPort(pod(t, ns, "far").IP, "9000")
	s := runStorm(t, out, "client", 200, 8, target, target, "-any-port")
	record("wrong-addresses", "plaintext from outside", s.Connections, s.bad(), float64(s.Connections)/s.Seconds, "connections/s")
	if s.bad() > 0 {
		t.Errorf("plaintext from outside: %+v", s)
	}
	strict(t, ns)
	must(t, lab.Eventually(t.Context(), 15*time.Second, func() error {
		if dial(out, "far."+ns) == nil {
			return fmt.Errorf("a STRICT pod takes plaintext")
		}
		return nil
	}))
	if err := dial(ns, "far"); err != nil {
		t.Errorf("STRICT refuses a pod of the mesh: %v", err)
	}
}

// A policy decides by identity, on both ways to a pod, and its removal is heard.
func TestAuthorizationPolicy(t *testing.T) {
	ns := pair(t, "e2e-policy")
	dial := func(to string) error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", to+":9000")
		return err
	}
	must(t, dial("far"))
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-the-client, namespace: %[1]s}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/client]}}]}]
`, ns)))
	for _, to := range []string{"far", "near"} {
		must(t, lab.Eventually(t.Context(), 15*time.Second, func() error {
			if dial(to) == nil {
				return fmt.Errorf("the denied client reaches %s", to)
			}
			return nil
		}))
	}
	_, err := mesh.Kubectl(t.Context(), "-n", ns, "delete", "authorizationpolicy", "not-the-client")
	must(t, err)
	must(t, lab.Eventually(t.Context(), 15*time.Second, func() error { return dial("far") }))
}

// Nothing of what two STRICT pods say to each other can be read on the link, through enrolment, an agent's
// restart and the coming and going of pods.
func TestNothingInClear(t *testing.T) {
	ownCluster(t)
	ns := pair(t, "e2e-clear")
	strict(t, ns)
	plain := namespace(t, "e2e-clear-out")
	must(t, mesh.Run(t.Context(),
		lab.PodSpec{Namespace: plain, Name: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: plain, Name: "server", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000}))
	must(t, mesh.AwaitReady(t.Context(), plain, time.Minute))

	// The watch sees a marker where there is one.
	stop, err := mesh.Watch(t.Context())
	must(t, err)
	must(t, lab.Eventually(t.Context(), 20*time.Second, func() error { // kube-proxy takes a second or so
		_, err := mesh.Exec(t.Context(), plain, "client", "/demo", "tcp-dial", "server:9000")
		return err
	}))
	w, err := stop()
	must(t, err)
	if w.Clear == 0 {
		t.Fatalf("the watch does not see a marker that was sent in clear: %+v", w)
	}

	target := net.JoinHostPort(pod(t, ns, "far").IP, "9000")
	phase := func(name string, during func()) {
		t.Run(name, func(t *testing.T) {
			stop, err := mesh.Watch(t.Context())
			must(t, err)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan int)
			go func() {
				n := 0
				for ctx.Err() == nil {
					// Failures are the other tests' matter; here only what can be read counts.
					if _, err := mesh.Exec(ctx, ns, "client", "/demo", "tcp-storm", "-n", "200", "-c", "4", "-timeout", "5s", target); err == nil {
						n += 200
					}
				}
				done <- n
			}()
			during()
			cancel()
			n := <-done
			w, err := stop()
			must(t, err)
			record("clear-packets", name, int(w.Frames), int(w.Clear), float64(w.Tunnel), "tunnel frames")
			if w.Clear > 0 || w.Dropped > 0 || w.Tunnel == 0 {
				t.Errorf("%d connections: %+v", n, w)
			}
		})
	}
	phase("steady", func() { time.Sleep(3 * time.Second) })
	phase("agent restart", func() {
		_, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "rollout", "restart", "ds/warren-node")
		must(t, err)
		must(t, mesh.Rollout(t.Context(), lab.Namespace, "ds/warren-node"))
	})
	phase("pods come and go", func() {
		for i := range 5 {
			name := fmt.Sprintf("passer-%d", i)
			must(t, mesh.Run(t.Context(), lab.PodSpec{Namespace: ns, Name: name, Node: nodes[i%2], Once: true, Args: []string{"tcp-dial", "far:9000"}}))
		}
		must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	})
}

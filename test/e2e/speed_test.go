package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

const tcpload = "/tcpload"

// loadOutcome is what `tcpload qps` and `tcpload churn` print.
type loadOutcome struct {
	Requests, OK, NoPort, Refused, Reset, TimedOut, Other, Late int
	PerSecond, P50, P90, P99, Slowest, Seconds                  float64
	Examples                                                    []string
}

// runLoad runs tcpload in a pod and reads its report.
func runLoad(t *testing.T, ns, pod string, args ...string) loadOutcome {
	t.Helper()
	out, err := mesh.Exec(t.Context(), ns, pod, append([]string{tcpload}, args...)...)
	var o loadOutcome
	if e := json.Unmarshal([]byte(out), &o); e != nil {
		t.Fatalf("no report from %s: %v, %v: %s", pod, err, e, out)
	}
	return o
}

// loaded is a pod of tcpload's server.
func loaded(ns, name, node string) lab.PodSpec {
	return lab.PodSpec{Namespace: ns, Name: name, Account: "server", Node: node, Program: tcpload, Args: []string{"serve", ":8080"}, Port: 8080,
		Container: map[string]any{"readinessProbe": map[string]any{"tcpSocket": map[string]any{"port": 8080}, "periodSeconds": 1}}}
}

// answers waits until a server answers: without a mesh that is when kube-proxy knows its Service.
func answers(t *testing.T, ns, pod, server string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), 30*time.Second, func() error {
		if o := runLoad(t, ns, pod, "churn", "-n", "5", "-c", "1", server); o.OK != o.Requests {
			return fmt.Errorf("%s is not reached from %s/%s: %+v", server, ns, pod, o)
		}
		return nil
	}))
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

// What the mesh adds to a request between nodes: rounds without a mesh and with it take turns, so that both
// had the same machine. The target is 3.5 times the median without a mesh.
func TestRequestLatency(t *testing.T) {
	free, ns := namespace(t, "e2e-speed-free"), namespace(t, "e2e-speed", ambient)
	deploy(t, free, false, client(free, "client", nodes[0]), loaded(free, "far", nodes[1]))
	deploy(t, ns, true, client(ns, "client", nodes[0]), loaded(ns, "far", nodes[1]))
	strict(t, ns)
	type side struct {
		name, ns      string
		p50, p90, p99 []float64
		requests, bad int
	}
	sides := []*side{{name: "without a mesh", ns: free}, {name: "with Warren", ns: ns}}
	for _, s := range sides { // certificates, tunnels and caches
		answers(t, s.ns, "client", "far:8080")
		runLoad(t, s.ns, "client", "qps", "-n", "500", "-c", "16", "far:8080")
	}
	var ratios []float64
	for round := range size(5, 9) {
		for _, s := range sides {
			o := runLoad(t, s.ns, "client", "qps", "-rate", "1000", "-c", "16", "-n", strconv.Itoa(size(4000, 20000)), "far:8080")
			t.Logf("round %d %s: p50 %.0f p90 %.0f p99 %.0f µs, %.0f/s, %d of %d late", round, s.name, o.P50, o.P90, o.P99, o.PerSecond, o.Late, o.Requests)
			if o.OK != o.Requests {
				t.Errorf("%s: %+v", s.name, o)
			}
			s.requests += o.Requests
			s.bad += o.Requests - o.OK
			s.p50, s.p90, s.p99 = append(s.p50, o.P50), append(s.p90, o.P90), append(s.p99, o.P99)
		}
		ratios = append(ratios, sides[1].p50[round]/sides[0].p50[round])
	}
	for _, s := range sides {
		for _, q := range []struct {
			name string
			v    []float64
		}{{"p50", s.p50}, {"p90", s.p90}, {"p99", s.p99}} {
			record("speed", "1000 requests/s of 1 KB to the other node, 16 connections, "+q.name+", "+s.name, s.requests, s.bad, median(q.v)/1000, "ms")
		}
	}
	record("speed", "the same, p50, ratio", sides[1].requests, sides[1].bad, median(ratios), "times without a mesh, median of rounds")
	t.Logf("p50 %.2f times that without a mesh (rounds %.2f)", median(ratios), ratios)
}

// narrow gives a client few source ports, so that a short run wraps around them as a long one does in the
// usual range.
func narrow(ns, name, node string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  nodeSelector: {kubernetes.io/hostname: %[3]s}
  terminationGracePeriodSeconds: 1
  securityContext: {sysctls: [{name: net.ipv4.ip_local_port_range, value: "40000 44095"}]}
  containers:
    - {name: client, image: %[4]q, imagePullPolicy: IfNotPresent, command: [/demo, sleep]}
`, ns, name, node, lab.Image)
}

// A pod opens 2,000 connections a second that it closes itself, for longer than its source ports last: none
// fails for want of a port, neither its own nor one of the agents'.
func TestManyNewConnections(t *testing.T) {
	ns := namespace(t, "e2e-churn", ambient)
	ports := "the usual source ports"
	if !*long {
		ports = "4,096 source ports"
		must(t, mesh.Apply(t.Context(), narrow(ns, "client", nodes[0])))
	} else {
		must(t, mesh.Run(t.Context(), client(ns, "client", nodes[0])))
	}
	deploy(t, ns, true, loaded(ns, "far", nodes[1]), loaded(ns, "near", nodes[0]))
	for _, target := range []string{"far", "near"} {
		runLoad(t, ns, "client", "churn", "-n", "50", "-c", "4", target+":8080")
		o := runLoad(t, ns, "client", "churn", "-rate", "2000", "-c", "64", "-bytes", "64", "-n", strconv.Itoa(size(20000, 240000)), target+":8080")
		record("speed", fmt.Sprintf("new connections that the client closes, asked for 2,000/s, %s server, %s", target, ports), o.Requests, o.Requests-o.OK, o.PerSecond, "connections/s")
		t.Logf("%s: %+v", target, o)
		if o.OK != o.Requests {
			t.Errorf("%s: %+v", target, o)
		}
	}
}

// A server takes short connections from clients outside the mesh, in clear, and from inside: the agent needs
// a socket of its own for each, and never lacks a port for it.
func TestManyInboundConnections(t *testing.T) {
	free, ns := namespace(t, "e2e-inbound-free"), namespace(t, "e2e-inbound", ambient)
	deploy(t, free, false, client(free, "client", nodes[0]))
	deploy(t, ns, true, client(ns, "client", nodes[0]), loaded(ns, "far", nodes[1]))
	for _, from := range []struct{ name, ns string }{{"outside the mesh", free}, {"inside the mesh", ns}} {
		answers(t, from.ns, "client", "far."+ns+":8080")
		n := size(6000, 60000)
		o := runLoad(t, from.ns, "client", "churn", "-rate", strconv.Itoa(size(1000, 1100)), "-c", "64", "-bytes", "64", "-n", strconv.Itoa(n), "far."+ns+":8080")
		if from.name == "outside the mesh" && *long {
			// Without a mesh a client is out of ports after 28,000: only what the server's side did counts.
			o.Requests -= o.NoPort
		}
		record("speed", "short connections to one server from "+from.name, o.Requests, o.Requests-o.OK, o.PerSecond, "connections/s")
		t.Logf("%s: %+v", from.name, o)
		if o.OK != o.Requests {
			t.Errorf("from %s: %+v", from.name, o)
		}
	}
}

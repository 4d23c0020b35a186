package e2e

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// Between pods of one node the kernel decides by identity: who may goes straight to the application, who may not is
// refused at connect, and under STRICT the tunnel is used.
func TestSameNode(t *testing.T) {
	ns := pair(t, "e2e-same-node")
	const n = 50
	for _, c := range []struct {
		name, manifest, counter string
		refused                 bool
	}{
		{name: "no policy", counter: "connect_direct"},
		{name: "allowed by identity", counter: "connect_direct", manifest: `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: who, namespace: %[1]s}
spec:
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/client]}}]}]
`},
		{name: "another identity is allowed", counter: "connect_denied", refused: true, manifest: `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: who, namespace: %[1]s}
spec:
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/somebody]}}]}]
`},
		{name: "denied by identity", counter: "connect_denied", refused: true, manifest: `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: who, namespace: %[1]s}
spec:
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/client]}}]}]
`},
		{name: "STRICT", counter: "connect_captured", manifest: `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: who, namespace: %[1]s}
spec:
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/client]}}]}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: %[1]s}
spec: {mtls: {mode: STRICT}}
`},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.manifest != "" {
				must(t, mesh.Apply(t.Context(), fmt.Sprintf(c.manifest, ns)))
			}
			for _, ip := range pod(t, ns, "near").IPs {
				at := net.JoinHostPort(ip, "9000")
				outcome := func() float64 {
					samples, err := mesh.Metrics(t.Context())
					must(t, err)
					return lab.Sum(samples, "warren_datapath_outcomes_total", map[string]string{"outcome": c.counter})
				}
				var s storm
				err := lab.Eventually(t.Context(), 30*time.Second, func() error { // until the policy is everywhere
					before := outcome()
					s = runStorm(t, ns, "client", n, 4, at, at)
					if rose := outcome() - before; rose < n {
						return fmt.Errorf("%s rose by %g in %d connections: %+v", c.counter, rose, n, s)
					}
					return nil
				})
				must(t, err)
				bad := s.bad()
				if c.refused {
					bad = n - s.Failed
				}
				family := "IPv4"
				if strings.Contains(ip, ":") {
					family = "IPv6"
				}
				record("same-node", c.name+", "+family+": "+c.counter, n, bad, float64(n)/s.Seconds, "connections/s")
				if bad != 0 {
					t.Errorf("%s: %+v", at, s)
				}
			}
		})
	}
}

// What goes directly costs what it costs without a mesh: rounds of both take turns.
func TestSameNodeLatency(t *testing.T) {
	free, ns := namespace(t, "e2e-near-free"), namespace(t, "e2e-near", ambient)
	deploy(t, free, false, client(free, "client", nodes[0]), loaded(free, "near", nodes[0]))
	deploy(t, ns, true, client(ns, "client", nodes[0]), loaded(ns, "near", nodes[0]))
	type side struct {
		name, ns, at  string
		p50           []float64
		requests, bad int
	}
	sides := []*side{{name: "without a mesh", ns: free}, {name: "with Warren, directly", ns: ns}}
	for _, s := range sides {
		s.at = net.JoinHostPort(pod(t, s.ns, "near").IP, "8080")
		answers(t, s.ns, "client", s.at)
	}
	var ratios []float64
	for round := range size(3, 9) {
		for _, s := range sides {
			o := runLoad(t, s.ns, "client", "qps", "-rate", "1000", "-c", "16", "-n", strconv.Itoa(size(2000, 20000)), s.at)
			if o.OK != o.Requests {
				t.Errorf("%s: %+v", s.name, o)
			}
			s.requests += o.Requests
			s.bad += o.Requests - o.OK
			s.p50 = append(s.p50, o.P50)
		}
		ratios = append(ratios, sides[1].p50[round]/sides[0].p50[round])
	}
	for _, s := range sides {
		record("same-node", "1000 requests/s of 1 KB to the same node, 16 connections, p50, "+s.name, s.requests, s.bad, median(s.p50)/1000, "ms")
	}
	record("same-node", "the same, p50, ratio", sides[1].requests, sides[1].bad, median(ratios), "times without a mesh, median of rounds")
	t.Logf("p50 %.2f times that without a mesh (rounds %.2f)", median(ratios), ratios)
}

// The packets of these connections take the short way, from veth to veth, unless a NetworkPolicy selects a pod: then all
// of them go by the path that the network plugin watches over.
func TestSameNodeShortWay(t *testing.T) {
	ns := pair(t, "e2e-short-way")
	const n = 50
	at := net.JoinHostPort(pod(t, ns, "near").IP, "9000")
	outcome := func(name string) float64 {
		samples, err := mesh.Metrics(t.Context())
		must(t, err)
		return lab.Sum(samples, "warren_datapath_outcomes_total", map[string]string{"outcome": name})
	}
	policy := fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: everybody, namespace: %s}
spec: {podSelector: {}, policyTypes: [Ingress], ingress: [{}]}
`, ns)
	for _, c := range []struct {
		name, want, not string
		change          func() error
	}{
		{"no NetworkPolicy", "near_redirected", "near_detour", func() error { return nil }},
		{"a NetworkPolicy selects the pods", "near_detour", "near_redirected", func() error { return mesh.Apply(t.Context(), policy) }},
		{"it is gone", "near_redirected", "near_detour", func() error {
			_, err := mesh.Kubectl(t.Context(), "-n", ns, "delete", "networkpolicy", "everybody")
			return err
		}},
	} {
		must(t, c.change())
		var s storm
		must(t, lab.Eventually(t.Context(), 60*time.Second, func() error {
			took, other := outcome(c.want), outcome(c.not)
			s = runStorm(t, ns, "client", n, 4, at, at)
			took, other = outcome(c.want)-took, outcome(c.not)-other
			if took < n || other >= n {
				return fmt.Errorf("%s: %s rose by %g, %s by %g, in %d connections", c.name, c.want, took, c.not, other, n)
			}
			return nil
		}))
		if bad := s.bad(); bad != 0 {
			t.Errorf("%s: %+v", c.name, s)
		}
		record("same-node", c.name+": "+c.want, n, s.bad(), float64(n)/s.Seconds, "connections/s")
	}
}

// By a Service's address too: the endpoint is chosen when the connection is made, the client sees the address that it
// asked for, and metrics name the Service. What is on another node goes through the tunnel as ever.
func TestSameNodeService(t *testing.T) {
	ns := pair(t, "e2e-near-service")
	const n = 50
	count := func(name string, labels map[string]string) float64 {
		samples, err := mesh.Metrics(t.Context())
		must(t, err)
		return lab.Sum(samples, name, labels)
	}
	for _, c := range []struct{ server, outcome, security string }{{"near", "near_redirected", "unknown"}, {"far", "connect_captured", "mutual_tls"}} {
		vips, err := mesh.ServiceAddrs(t.Context(), ns, c.server)
		must(t, err)
		for i, vip := range vips {
			target, at := net.JoinHostPort(pod(t, ns, c.server).IPs[i], "9000"), net.JoinHostPort(vip, "9000")
			family := map[bool]string{true: "IPv6", false: "IPv4"}[strings.Contains(vip, ":")]
			t.Run(c.server+", "+family, func(t *testing.T) {
				outcomes := func() (way, chosen float64) {
					return count("warren_datapath_outcomes_total", map[string]string{"outcome": c.outcome}),
						count("warren_datapath_outcomes_total", map[string]string{"outcome": "service_near"})
				}
				reported := func(reporter string) float64 {
					return count("istio_tcp_connections_closed_total", map[string]string{"reporter": reporter, "destination_service_namespace": ns,
						"destination_service_name": c.server, "destination_service": c.server + "." + ns + ".svc.cluster.local",
						"source_workload_namespace": ns, "connection_security_policy": c.security})
				}
				var s storm
				var before [2]float64
				must(t, lab.Eventually(t.Context(), 30*time.Second, func() error { // until the node knows the endpoint
					way, chosen := outcomes()
					before = [2]float64{reported("source"), reported("destination")}
					s = runStorm(t, ns, "client", n, 4, target, at)
					nowWay, nowChosen := outcomes()
					if way, chosen = nowWay-way, nowChosen-chosen; way < n || (chosen >= n) != (c.server == "near") {
						return fmt.Errorf("%s rose by %g, service_near by %g, in %d connections: %+v", c.outcome, way, chosen, n, s)
					}
					return nil
				}))
				record("same-node", "the Service of a pod, "+c.server+", "+family+": "+c.outcome, n, s.bad(), float64(n)/s.Seconds, "connections/s")
				if s.bad() != 0 {
					t.Errorf("%s: %+v", at, s)
				}
				for i, reporter := range []string{"source", "destination"} {
					must(t, lab.Eventually(t.Context(), 30*time.Second, func() error {
						if rose := reported(reporter) - before[i]; rose < n { // those of an attempt before it may be in it
							return fmt.Errorf("%s reports %g connections to the Service, want %d", reporter, rose, n)
						}
						return nil
					}))
				}
			})
		}
	}
}

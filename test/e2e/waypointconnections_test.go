package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A TCPRoute at a Service shares the connections to a port out to other Services, by the Service's waypoint: those that a client
// has in its tunnel, whatever is in them.
func TestWaypointConnections(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	ns := namespace(t, "e2e-waypoint-tcp", ambient)
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: ns, Name: "client", Account: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "old", Account: "stock", Node: nodes[1], Args: []string{"inventory"}},
		lab.PodSpec{Namespace: ns, Name: "new", Account: "stock", Node: nodes[0], Args: []string{"inventory"}},
	))
	consumers := namespace(t, "e2e-waypoint-tcp-consumers", ambient)
	must(t, mesh.Run(ctx, lab.PodSpec{Namespace: consumers, Name: "consumer", Account: "consumer", Node: nodes[1], Args: []string{"sleep"}}))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	must(t, mesh.AwaitReady(ctx, consumers, time.Minute))
	inMesh(t, consumers)
	inMesh(t, ns) // before there are pods that are not captured
	applyIn(t, ns, aWaypoint)
	apply := func(weights string) {
		t.Helper()
		must(t, mesh.Apply(ctx, strings.NewReplacer("NS", ns, "REFS", weights).Replace(`
apiVersion: v1
kind: Service
metadata: {name: old, namespace: NS, labels: {istio.io/use-waypoint: way}}
spec: {selector: {app: old}, ports: [{name: tcp, port: 80, targetPort: 8080}, {name: tls, port: 443, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: new, namespace: NS}
spec: {selector: {app: new}, ports: [{name: tcp, port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: old, namespace: NS}
spec:
  parentRefs: [{group: "", kind: Service, name: old, port: 80}]
  rules: [{backendRefs: [REFS]}]
`)))
	}
	apply("{name: old, port: 80}")
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	strict(t, ns)
	requests := func(pod string) int {
		out, err := mesh.Kubectl(ctx, "-n", ns, "logs", pod)
		must(t, err)
		return strings.Count(out, `"msg":"request"`)
	}
	const n = 60 // connections, of one request each
	shared := func(least, most int) {
		t.Helper()
		must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
			before := requests("new")
			for range n {
				if out, err := mesh.Exec(ctx, ns, "client", "/demo", "get", "http://old/stock"); err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
			}
			if got := requests("new") - before; got < least || got > most {
				return fmt.Errorf("of %d connections the other Service got %d, want %d to %d", n, got, least, most)
			}
			return nil
		}))
	}
	shared(0, 0)
	apply("{name: old, port: 80, weight: 1}, {name: new, port: 80, weight: 3}")
	shared(n*3/4-12, n*3/4+12)
	apply("{name: new, port: 80}")
	shared(n, n)
	apply("{name: nowhere, port: 80}")
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if out, err := mesh.Exec(ctx, ns, "client", "/demo", "get", "http://old/stock"); err == nil {
			return fmt.Errorf("a route to a Service that is not there still leads somewhere: %s", out)
		}
		return nil
	}))

	// VirtualServices share them out where no TCPRoute does, and by the server name that is asked for in TLS.
	virtual := func(tcp string) {
		t.Helper()
		must(t, mesh.Apply(ctx, strings.NewReplacer("NS", ns, "TCP", tcp).Replace(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: old, namespace: NS}
spec:
  hosts: [old]
  tcp: [{match: [{port: 80}], route: [TCP]}]
  tls: [{match: [{port: 443, sniHosts: [old.NS]}], route: [{destination: {host: kubernetes.default.svc.cluster.local, port: {number: 443}}}]}]
`)))
	}
	virtual("{destination: {host: old}, weight: 1}, {destination: {host: new}, weight: 3}")
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "tcproute", "old"); err != nil {
		t.Fatal(err, out)
	}
	shared(n*3/4-12, n*3/4+12)
	virtual("{destination: {host: new}}")
	shared(n, n)
	for _, c := range [][2]string{{"old." + ns, "certificate"}, {"old", "gave HTTP response"}} { // of the API server, and by whom there is no TLS
		host, want := c[0], c[1]
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			if out, err := mesh.Exec(ctx, ns, "client", "/demo", "get", "https://"+host+"/"); err == nil || !strings.Contains(err.Error()+out, want) {
				return fmt.Errorf("TLS for %s: %q (%v), want %q", host, out, err, want)
			}
			return nil
		}))
	}

	// Routes of another namespace are for that one's clients, who meet no other: here they lead to the Service itself.
	must(t, mesh.Apply(ctx, strings.NewReplacer("NS", ns, "CONSUMERS", consumers).Replace(`
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: own, namespace: CONSUMERS}
spec:
  parentRefs: [{group: "", kind: Service, name: old, namespace: NS, port: 80}]
  rules: [{backendRefs: [{name: old, namespace: NS, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: own, namespace: CONSUMERS}
spec:
  parentRefs: [{group: "", kind: Service, name: old, namespace: NS, port: 443}]
  hostnames: [old.NS]
  rules: [{backendRefs: [{name: old, namespace: NS, port: 443}]}]
`)))
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		before := requests("old")
		for range 20 {
			if out, err := mesh.Exec(ctx, consumers, "consumer", "/demo", "get", "http://old."+ns+"/stock"); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
		}
		if got := requests("old") - before; got != 20 {
			return fmt.Errorf("of 20 connections of the consumer the Service itself got %d", got)
		}
		if out, err := mesh.Exec(ctx, consumers, "consumer", "/demo", "get", "https://old."+ns+"/"); err == nil || !strings.Contains(err.Error()+out, "gave HTTP response") {
			return fmt.Errorf("the consumer's TLS: %q (%v), want the Service itself, which has none", out, err)
		}
		return nil
	}))
	shared(n, n)
}

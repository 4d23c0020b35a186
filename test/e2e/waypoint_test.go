package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A waypoint is made where a Gateway asks for one; what is sent to services that ask for it goes through it, is routed
// there as a VirtualService says, and is refused while it is not there.
func TestWaypoint(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	ns := namespace(t, "e2e-waypoint", ambient)
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: ns, Name: "client", Account: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "inventory-1", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}, Labels: map[string]string{"app": "inventory", "version": "v1"}},
		lab.PodSpec{Namespace: ns, Name: "inventory-2", Account: "inventory", Node: nodes[0], Args: []string{"inventory"}, Labels: map[string]string{"app": "inventory", "version": "v2"}},
	))
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS, labels: {istio.io/use-waypoint: way}}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns)
	call := func(n int) error {
		out, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", strconv.Itoa(n), "-every", "5ms", "-url", "http://inventory/stock")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	becomes := func(what string, ok func(error) bool) {
		t.Helper()
		must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
			if err := call(5); !ok(err) {
				return fmt.Errorf("%s: %w", what, err)
			}
			return nil
		}))
	}
	answered := func(err error) bool { return err == nil }
	// Refused from the first moment, and not for a time only.
	becomes("a waypoint that is not there is not bypassed", func(err error) bool { return err != nil })
	if call(3) == nil {
		t.Error("calls pass by the waypoint that is not there")
	}

	applyIn(t, ns, aWaypoint)
	for _, wait := range [][]string{{"--for=condition=Accepted", "gateway/way"}, {"--for=condition=Programmed", "gateway/way"}, {"--for=condition=istio.io/WaypointBound", "service/inventory"}} {
		if out, err := mesh.Kubectl(ctx, append([]string{"-n", ns, "wait", "--timeout=180s"}, wait...)...); err != nil {
			t.Fatal(err, out)
		}
	}
	becomes("calls go through the waypoint", answered)

	// Plaintext is refused now, so that what comes through comes by the waypoint's tunnel.
	strict(t, ns)
	becomes("calls go through the waypoint under STRICT", answered)

	split := func(v1 int) string {
		return fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: inventory, namespace: NS}
spec: {host: inventory, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {name: inventory, namespace: NS}
spec:
  hosts: [inventory]
  http:
  - route:
    - {destination: {host: inventory, subset: v1}, weight: %d}
    - {destination: {host: inventory, subset: v2}, weight: %d}
`, v1, 100-v1)
	}
	requests := func(pod string) int {
		out, err := mesh.Kubectl(ctx, "-n", ns, "logs", pod)
		must(t, err)
		return strings.Count(out, `"msg":"request"`)
	}
	shared := func(v1 int) {
		t.Helper()
		const n = 500
		must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
			before1, before2 := requests("inventory-1"), requests("inventory-2")
			if err := call(n); err != nil {
				return err
			}
			got1, got2 := requests("inventory-1")-before1, requests("inventory-2")-before2
			if want := n * v1 / 100; got1+got2 != n || got1 < want-n/12 || got1 > want+n/12 {
				return fmt.Errorf("of %d requests v1 got %d and v2 %d, with weights %d and %d", n, got1, got2, v1, 100-v1)
			}
			t.Logf("weights %d and %d: %d and %d of %d requests", v1, 100-v1, got1, got2, n)
			return nil
		}))
	}
	for _, v1 := range []int{100, 80} {
		applyIn(t, ns, split(v1))
		shared(v1)
	}

	// The same canary as an HTTPRoute, which comes before the VirtualService, and says what it lacks.
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory-v1, namespace: NS}
spec: {selector: {app: inventory, version: v1}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)
	canary := func(v1 int) {
		applyIn(t, ns, fmt.Sprintf(`
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: canary, namespace: NS}
spec:
  parentRefs: [{group: "", kind: Service, name: inventory}]
  rules: [{backendRefs: [{name: inventory-v1, port: 80, weight: %d}, {name: inventory-v2, port: 80, weight: %d}]}]
`, v1, 100-v1))
	}
	says := func(condition string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			kind, want, _ := strings.Cut(condition, "=")
			out, err := mesh.Kubectl(ctx, "-n", ns, "get", "httproute", "canary", "-o",
				`jsonpath={.status.parents[?(@.controllerName=="istio.io/gateway-controller")].conditions[?(@.type=="`+kind+`")].reason}`)
			if err == nil && out != want {
				err = fmt.Errorf("%s is %q, want %q", kind, out, want)
			}
			return err
		}))
	}
	canary(100)
	says("Accepted=Accepted")
	says("ResolvedRefs=BackendNotFound")
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory-v2, namespace: NS}
spec: {selector: {app: inventory, version: v2}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)
	says("ResolvedRefs=ResolvedRefs")
	for _, v1 := range []int{100, 50} {
		canary(v1)
		shared(v1)
	}
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "httproute", "canary"); err != nil {
		t.Fatal(err)
	}
	applyIn(t, ns, `
apiVersion: networking.istio.io/v1beta1
kind: VirtualService
metadata: {name: inventory, namespace: NS}
spec:
  hosts: [inventory]
  http:
  - match: [{uri: {prefix: /stock}}]
    fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
    route: [{destination: {host: inventory}}]
`)
	becomes("the fault of the VirtualService", func(err error) bool { return err != nil && strings.Contains(err.Error(), "418") })
	applyIn(t, ns, split(80))
	becomes("calls are answered again", answered)

	// The waypoint tells of what passes under Istio's names, with both workloads.
	way, err := mesh.Kubectl(ctx, "-n", ns, "get", "pods", "-l", "gateway.networking.k8s.io/gateway-name=way", "-o", "jsonpath={.items[0].metadata.name}")
	must(t, err)
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		text, err := mesh.Kubectl(ctx, "get", "--raw", "/api/v1/namespaces/"+ns+"/pods/"+strings.TrimSpace(way)+":15020/proxy/stats/prometheus")
		if err != nil {
			return err
		}
		for _, metric := range []string{"istio_requests_total{", "istio_request_duration_milliseconds_count{", "istio_request_bytes_sum{", "istio_response_bytes_sum{"} {
			found := false
			for line := range strings.Lines(text) {
				all := strings.HasPrefix(line, metric)
				for _, label := range []string{
					`reporter="waypoint"`, `response_code="200"`, `request_protocol="http"`, `connection_security_policy="mutual_tls"`,
					`source_workload="client"`, `source_workload_namespace="` + ns + `"`, `source_principal="spiffe://cluster.local/ns/` + ns + `/sa/client"`,
					`destination_service="inventory.` + ns + `.svc.cluster.local"`, `destination_service_name="inventory"`, `destination_workload_namespace="` + ns + `"`,
					`destination_principal="spiffe://cluster.local/ns/` + ns + `/sa/inventory"`, `destination_canonical_service="inventory"`, `destination_version="v2"`,
				} {
					all = all && strings.Contains(line, label)
				}
				found = found || all
			}
			if !found {
				return fmt.Errorf("no %s...} with the labels of both workloads", metric)
			}
		}
		return nil
	}))

	// Who may ask for what: the waypoint decides, and the pods admit nobody past it.
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: stock, namespace: NS}
spec:
  targetRefs: [{kind: Service, name: inventory}]
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/NS/sa/client]}}]
    to: [{operation: {methods: [GET], paths: [/stock]}}]
`)
	for _, condition := range []string{"WaypointAccepted", "Enforced"} {
		out, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition="+condition, "authorizationpolicy/stock", "--timeout=120s")
		if err != nil {
			said, _ := mesh.Kubectl(ctx, "-n", ns, "get", "authorizationpolicy", "stock", "-o", "jsonpath={.status}")
			t.Fatal(err, out, said)
		}
	}
	must(t, call(20))
	get := func(url string) (string, error) {
		return mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "3", "-every", "5ms", "-url", url)
	}
	if out, err := get("http://inventory/other"); err == nil || !strings.Contains(err.Error()+out, "403") {
		t.Errorf("a path that is not allowed: %v %s, want 403", err, out)
	}
	ip, err := mesh.Kubectl(ctx, "-n", ns, "get", "pod", "inventory-1", "-o", "jsonpath={.status.podIP}")
	must(t, err)
	if out, err := get("http://" + strings.TrimSpace(ip) + ":8080/stock"); err == nil {
		t.Errorf("a pod is reached past its waypoint: %s", out)
	}
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "authorizationpolicy", "stock"); err != nil {
		t.Fatal(err)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		_, err := get("http://" + strings.TrimSpace(ip) + ":8080/stock")
		return err
	}))

	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "gateway", "way"); err != nil {
		t.Fatal(err)
	}
	becomes("a waypoint that is gone is not bypassed", func(err error) bool { return err != nil })
	_, err = mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=istio.io/WaypointBound=false", "service/inventory", "--timeout=120s")
	must(t, err)
}

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A waypoint sends to the zone that it runs in as long as somebody is there, where the Service prefers that, and elsewhere once nobody
// is; what a DestinationRule says of localities comes before. In this cluster each node is a zone.
func TestWaypointPrefersItsZone(t *testing.T) {
	ns := behindWaypoint(t, "e2e-locality", 0, "client")
	ctx := t.Context()
	get := func(path string, what ...string) string {
		t.Helper()
		out, err := mesh.Kubectl(ctx, append(append([]string{"-n", ns, "get"}, what...), "-o", "jsonpath="+path)...)
		must(t, err)
		return out
	}
	near := get("{.items[0].spec.nodeName}", "pods", "-l", "gateway.networking.k8s.io/gateway-name=way")
	far := nodes[0]
	if far == near {
		far = nodes[1]
	}
	answering := func(node string) {
		t.Helper()
		applyIn(t, ns, strings.NewReplacer("NODE", node, "IMAGE", lab.Image).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: inventory-NODE, namespace: NS, labels: {app: inventory}}
spec:
  nodeSelector: {kubernetes.io/hostname: NODE}
  terminationGracePeriodSeconds: 5
  containers:
  - name: inventory
    image: IMAGE
    imagePullPolicy: IfNotPresent
    command: [/demo, inventory, -quiet]
    env: [{name: VERSION, value: NODE}]
    resources: {requests: {cpu: 50m}}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
`))
	}
	answering(near)
	answering(far)
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	// becomes waits until 40 answers in a row come from some nodes.
	becomes := func(when string, want ...string) {
		t.Helper()
		must(t, lab.Eventually(ctx, 30*time.Second, func() error {
			out, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "40", "-every", "4ms", "-count", "-url", "http://inventory/stock")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			var got map[string]int
			if err := json.Unmarshal([]byte(out), &got); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			for _, n := range want {
				if got[n] == 0 {
					return fmt.Errorf("%s nothing comes from %s: %v; the waypoint is on %s", when, n, got, near)
				}
			}
			if len(got) != len(want) {
				return fmt.Errorf("%s answers come from %v, want %v; the waypoint is on %s", when, got, want, near)
			}
			return nil
		}))
	}
	becomes("without a preference", near, far)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "patch", "service/inventory", "--type=merge", "-p", `{"spec":{"trafficDistribution":"PreferClose"}}`); err != nil {
		t.Fatal(err, out)
	}
	becomes("where the Service prefers the zone", near)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "pod", "inventory-"+near); err != nil {
		t.Fatal(err, out)
	}
	becomes("where there is nobody in the zone", far)
	answering(near)
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	becomes("where there is somebody in the zone again", near)
	applyIn(t, ns, strings.NewReplacer("FROM", "local/"+near+"/*", "TO", "local/"+far+"/*").Replace(`
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: inventory, namespace: NS}
spec:
  host: inventory
  trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: FROM, to: {TO: 100}}]}}}
`))
	becomes("where all is said to go to the other zone", far)
	if events := get("{.items[*].reason}", "events", "--field-selector=involvedObject.kind=DestinationRule"); strings.Contains(events, "PartlyIgnored") {
		t.Errorf("the DestinationRule is said to be ignored in part: %s", events)
	}
}

package e2e

import (
	"context"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// Of how many pods a waypoint is made, and with what, a ConfigMap says, in Istio's words; what cannot be is refused, and requests
// go on.
func TestParametersOfAWaypoint(t *testing.T) {
	ns := behindWaypoint(t, "e2e-parameters", 1, "client")
	ctx := t.Context()
	options := func(data string) {
		t.Helper()
		applyIn(t, ns, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: options, namespace: NS}\ndata:\n"+data)
	}
	becomes := func(what, path, want string) { t.Helper(); fieldBecomes(t, ns, what, path, want) }
	options(`
  horizontalPodAutoscaler: |
    spec: {minReplicas: 2, maxReplicas: 2}
  deployment: |
    metadata: {annotations: {team: blue}}
    spec:
      replicas: 4
      template:
        spec:
          containers:
          - name: istio-proxy
            resources: {requests: {cpu: 123m}}
`)
	stop := startRequests(t, ns, "client", "http://inventory/stock", 50)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "patch", "gateway.gateway.networking.k8s.io/way", "--type=merge", "-p",
		`{"spec":{"infrastructure":{"parametersRef":{"group":"","kind":"ConfigMap","name":"options"}}}}`); err != nil {
		t.Fatal(err, out)
	}
	becomes("deployment/way", "{.status.updatedReplicas} {.status.readyReplicas} {.status.replicas}", "2 2 2")
	becomes("deployment/way", "{.metadata.annotations.team} {.spec.template.spec.containers[0].resources.requests.cpu}", "blue 123m")

	options("  deployment: |\n    spec: {template: {spec: {hostNetwork: true}}}\n")
	const accepted = `{.status.conditions[?(@.type=="Accepted")].status} {.status.conditions[?(@.type=="Accepted")].message}`
	becomes("gateway.gateway.networking.k8s.io/way", accepted, "False infrastructure.parametersRef: ConfigMap "+ns+"/options: deployment: spec.template.spec.hostNetwork cannot be set")
	becomes("deployment/way", "{.status.readyReplicas} {.spec.template.spec.hostNetwork}", "2 ")

	options("  deployment: |\n    spec: {replicas: 1}\n")
	becomes("gateway.gateway.networking.k8s.io/way", accepted, "True ")
	becomes("deployment/way", "{.status.readyReplicas} {.spec.template.spec.containers[0].resources.requests.cpu}", "1 100m")
	if out, err := mesh.Kubectl(ctx, "-n", ns, "get", "horizontalpodautoscaler/way"); err == nil {
		t.Errorf("the HorizontalPodAutoscaler is still there: %s", out)
	}
	time.Sleep(2 * time.Second)
	if r := stop(); r.Failed > 0 || r.Requests == 0 {
		t.Errorf("%d of %d requests failed meanwhile: %v", r.Failed, r.Requests, r.Examples)
	}

	t.Cleanup(func() {
		_, _ = mesh.Kubectl(context.WithoutCancel(ctx), "-n", lab.Namespace, "delete", "configmap/waypoints", "--ignore-not-found")
	})
	applyIn(t, lab.Namespace, `
apiVersion: v1
kind: ConfigMap
metadata: {name: waypoints, namespace: NS, labels: {gateway.istio.io/defaults-for-class: istio-waypoint}}
data:
  serviceAccount: "metadata: {annotations: {role: blue}}"
`)
	becomes("serviceaccount/way", "{.metadata.annotations.role}", "blue")
}

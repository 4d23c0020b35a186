package e2e

import (
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A gateway passes a Service's waypoint by, which lets nobody past it that its policies are about; with the label it goes
// by the waypoint, which decides, and without the waypoint it goes nowhere.
func TestGatewayThroughWaypoint(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	balance(t)
	ns := namespace(t, "e2e-through", ambient)
	must(t, mesh.Run(ctx, lab.PodSpec{Namespace: ns, Name: "inventory", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}}))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns) // before there are pods that are not captured
	applyIn(t, ns, aWaypoint)
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS, labels: {istio.io/use-waypoint: way}}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: NS}
spec: {gatewayClassName: istio, listeners: [{name: http, port: 80, protocol: HTTP}, {name: tcp, port: 9000, protocol: TCP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: inventory, namespace: NS}
spec: {parentRefs: [{name: edge, sectionName: http}], rules: [{backendRefs: [{name: inventory, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: inventory, namespace: NS}
spec: {parentRefs: [{name: edge, sectionName: tcp}], rules: [{backendRefs: [{name: inventory, port: 80}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-secrets, namespace: NS}
spec:
  targetRefs: [{group: "", kind: Service, name: inventory}]
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/NS/sa/edge-istio]}}], to: [{operation: {paths: [/secret]}}]}]
`)
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	enforced(t, ns, "authorizationpolicy/no-secrets")
	client := outside{address: addressOf(t, ns, "edge")}
	client.becomes(t, "http://shop.example/stock", 503)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "label", "service", "inventory", "istio.io/ingress-use-waypoint=true"); err != nil {
		t.Fatal(err, out)
	}
	for _, port := range []string{"", ":9000"} {
		client.becomes(t, "http://shop.example"+port+"/stock", 200)
		client.becomes(t, "http://shop.example"+port+"/secret", 403)
	}
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "gateway.gateway.networking.k8s.io", "way"); err != nil {
		t.Fatal(err, out)
	}
	client.becomes(t, "http://shop.example/stock", 503)
}

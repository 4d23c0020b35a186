package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// TLSRoutes and TCPRoutes at a Gateway of the class istio: TLS that goes on as it comes and TLS that ends at the gateway share
// a port by their server names, and a port without TLS is a route's alone. Into the mesh all of it goes by the tunnel.
func TestGatewayConnections(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	balance(t)
	ns := namespace(t, "e2e-connections", ambient)
	must(t, mesh.Run(ctx, lab.PodSpec{Namespace: ns, Name: "inventory", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}}))
	cert, key, roots := site(t, 1, "ends.example")
	ownCert, ownKey, _ := site(t, 2, "own.example")
	roots.AppendCertsFromPEM([]byte(ownCert))
	must(t, mesh.Apply(ctx, tlsSecret(ns, "ends", cert, key)))
	must(t, mesh.Apply(ctx, tlsSecret(ns, "own", ownCert, ownKey)))
	must(t, mesh.Apply(ctx, ownTLS(ns)))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns) // before there are pods that are not captured
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS}
spec: {selector: {app: inventory}, ports: [{name: tcp, port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: data, namespace: NS}
spec:
  gatewayClassName: istio
  listeners:
  - {name: passes, port: 443, protocol: TLS, hostname: "*.example", tls: {mode: Passthrough}}
  - {name: ends, port: 443, protocol: TLS, hostname: ends.example, tls: {mode: Terminate, certificateRefs: [{name: ends}]}}
  - {name: stock, port: 9000, protocol: TCP}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: own, namespace: NS}
spec:
  parentRefs: [{name: data, sectionName: passes}]
  hostnames: [own.example]
  rules: [{backendRefs: [{name: own, port: 443}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: ends, namespace: NS}
spec:
  parentRefs: [{name: data, sectionName: ends}]
  hostnames: [ends.example]
  rules: [{backendRefs: [{name: inventory, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: stock, namespace: NS}
spec:
  parentRefs: [{name: data, sectionName: stock}]
  rules: [{backendRefs: [{name: inventory, port: 80}]}]
`)
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	client := outside{address: addressOf(t, ns, "data"), roots: roots}
	pages := map[string]int64{ // and the certificate that is shown
		"https://own.example/apis/own/v1": 2, "https://ends.example/stock": 1, "http://anything.example:9000/stock": 0,
	}
	served := func() {
		t.Helper()
		for url, serial := range pages {
			client.becomes(t, url, 200)
			_, _, shown, err := client.get(ctx, url)
			if err != nil || (shown == nil) != (serial == 0) || shown != nil && shown.SerialNumber.Int64() != serial {
				t.Errorf("%s shows %v, %v, want the certificate %d", url, shown, err, serial)
			}
		}
	}
	served()
	if got, _, _, err := client.get(ctx, "https://nobody.example/stock"); err == nil {
		t.Errorf("a server name that no route is for: %d", got)
	}
	for name, want := range map[string]string{"passes": "1", "ends": "1", "stock": "1"} {
		if out, err := mesh.Kubectl(ctx, "-n", ns, "get", "gateway.gateway.networking.k8s.io", "data", "-o", `jsonpath={.status.listeners[?(@.name=="`+name+`")].attachedRoutes}`); err != nil || out != want {
			t.Errorf("listener %s says that %s routes are attached, %v, want %s", name, out, err, want)
		}
	}

	strict(t, ns)
	served()

	// A route that is gone takes its server name with it, and a policy decides about a port.
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "tlsroute", "own"); err != nil {
		t.Fatal(err)
	}
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-stock, namespace: NS}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: data}]
  action: DENY
  rules: [{to: [{operation: {ports: ["9000"]}}]}]
`)
	enforced(t, ns, "authorizationpolicy/no-stock")
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		for _, url := range []string{"https://own.example/apis/own/v1", "http://anything.example:9000/stock"} {
			if got, _, _, err := client.get(ctx, url); err == nil {
				return fmt.Errorf("%s is still answered: %d", url, got)
			}
		}
		return nil
	}))
	client.becomes(t, "https://ends.example/stock", 200)
}

package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// Egress gateways as Istio's articles print them work once the ServiceEntry has a waypoint: that follows what the VirtualService says
// for the mesh, comes to the gateway by the mesh's tunnel and under its own name, and the gateway goes out.
func TestEgressGateway(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	e := egress{clients: namespace(t, "e2e-egressgw-clients", ambient), outside: namespace(t, "e2e-egressgw-outside"), way: namespace(t, "e2e-egressgw")}
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: e.clients, Name: "client", Account: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: e.outside, Name: "stock", Account: "default", Node: nodes[1], Args: []string{"inventory"}},
	))
	ownCert, ownKey, _ := site(t, 2, "own.example")
	must(t, mesh.Apply(ctx, tlsSecret(e.outside, "own", ownCert, ownKey)))
	must(t, mesh.Apply(ctx, ownTLS(e.outside)))
	e.apply(t, `
apiVersion: v1
kind: Service
metadata: {name: stock, namespace: OUTSIDE}
spec: {selector: {app: stock}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)
	must(t, mesh.AwaitReady(ctx, e.clients, time.Minute))
	must(t, mesh.AwaitReady(ctx, e.outside, time.Minute))
	inMesh(t, e.clients) // before there are pods that are not captured
	applyIn(t, e.clients, aWaypoint)
	if out, err := mesh.Helm(ctx, "upgrade", "--install", "istio-egressgateway", filepath.Join(mesh.Root(), "charts", "gateway"), "-n", e.way,
		"--set", "service.type=ClusterIP", "--wait", "--timeout", "180s"); err != nil {
		t.Fatal(err, out, mesh.Diagnose(ctx, e.way))
	}
	must(t, mesh.AwaitReady(ctx, e.clients, 2*time.Minute))

	// The names are of this cluster, whose DNS says addresses that are the ServiceEntries' here.
	entry := func(name, labels string) {
		t.Helper()
		addrs, err := mesh.ServiceAddrs(ctx, e.outside, name)
		must(t, err)
		e.apply(t, `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: `+name+`, namespace: CLIENTS, labels: {`+labels+`}}
spec:
  hosts: [`+name+`.OUTSIDE.svc]
  addresses: [`+addrs[0]+`]
  ports: [{number: 80, name: http-port, protocol: HTTP}, {number: 443, name: https, protocol: HTTPS}]
  resolution: DNS
`)
	}
	entry("stock", "")
	entry("own", "istio.io/use-waypoint: way")
	e.apply(t, `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: istio-egressgateway, namespace: CLIENTS}
spec:
  selector: {istio: egressgateway}
  servers:
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: [stock.OUTSIDE.svc]}
  - {port: {number: 443, name: tls, protocol: TLS}, hosts: [own.OUTSIDE.svc], tls: {mode: PASSTHROUGH}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: egressgateway-for-cnn, namespace: CLIENTS}
spec: {host: istio-egressgateway.WAY.svc.cluster.local, subsets: [{name: cnn}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: stock, namespace: CLIENTS}
spec:
  hosts: [stock.OUTSIDE.svc]
  gateways: [istio-egressgateway, mesh]
  http:
  - match: [{gateways: [mesh], port: 80}]
    route: [{destination: {host: istio-egressgateway.WAY.svc.cluster.local, subset: cnn, port: {number: 80}}, weight: 100}]
  - match: [{gateways: [istio-egressgateway], port: 80}]
    route: [{destination: {host: stock.OUTSIDE.svc, port: {number: 80}}, weight: 100}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: own, namespace: CLIENTS}
spec:
  hosts: [own.OUTSIDE.svc]
  gateways: [mesh, istio-egressgateway]
  tls:
  - match: [{gateways: [mesh], port: 443, sniHosts: [own.OUTSIDE.svc]}]
    route: [{destination: {host: istio-egressgateway.WAY.svc.cluster.local, subset: cnn, port: {number: 443}}}]
  - match: [{gateways: [istio-egressgateway], port: 443, sniHosts: [own.OUTSIDE.svc]}]
    route: [{destination: {host: own.OUTSIDE.svc, port: {number: 443}}, weight: 100}]
`)
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := mesh.Kubectl(ctx, "-n", e.clients, "get", "events", "--field-selector=involvedObject.name=stock,involvedObject.kind=VirtualService", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, "no waypoint is in front of stock."+e.outside+".svc") {
			err = fmt.Errorf("the author of the VirtualService is told %q", out)
		}
		return err
	}))
	entry("stock", "istio.io/use-waypoint: way")
	logged := func(texts ...string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			out, err := mesh.Kubectl(ctx, "-n", e.way, "logs", "deploy/istio-egressgateway")
			for line := range strings.Lines(out) {
				has := true
				for _, s := range texts {
					has = has && strings.Contains(line, s)
				}
				if has {
					return err
				}
			}
			return fmt.Errorf("no line of the gateway has %q (%v):\n%s", texts, err, out)
		}))
	}
	stock, own := "stock."+e.outside+".svc", "own."+e.outside+".svc"
	const answered = `"items"`
	passes := func(want string) { // TLS as it comes, to a server whose certificate the client does not trust
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			out, err := mesh.Exec(ctx, e.clients, "client", "/demo", "get", "https://"+own+"/")
			if err == nil || !strings.Contains(err.Error()+out, want) {
				return fmt.Errorf("TLS for %s: %q (%v), want %q", own, out, err, want)
			}
			return nil
		}))
	}
	// The gateway knows who comes, and nobody gets past it.
	only := func(account string) {
		t.Helper()
		e.apply(t, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only, namespace: WAY}
spec:
  selector: {matchLabels: {istio: egressgateway}}
  rules: [{from: [{source: {principals: [cluster.local/ns/CLIENTS/sa/`+account+`]}}]}]
`)
	}
	only("client")
	e.becomes(t, "client", stock, "/stock", "403")
	logged(`"path":"/stock"`, `"response_code":403`, `"source_principal":"spiffe://cluster.local/ns/`+e.clients+`/sa/way"`)
	passes("EOF")
	only("way")
	e.becomes(t, "client", stock, "/stock", answered)
	passes("certificate")

	// TLS begins at the gateway, to which what comes has to come by the mesh's own.
	secret, err := json.Marshal(object{"apiVersion": "v1", "kind": "Secret", "metadata": object{"name": "own-roots", "namespace": e.way}, "stringData": object{"ca.crt": ownCert}})
	must(t, err)
	must(t, mesh.Apply(ctx, string(secret)))
	e.apply(t, `
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: istio-egressgateway, namespace: CLIENTS}
spec:
  selector: {istio: egressgateway}
  servers:
  - {port: {number: 80, name: https-port-for-tls-origination, protocol: HTTPS}, hosts: [own.OUTSIDE.svc], tls: {mode: ISTIO_MUTUAL}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: egressgateway-for-cnn, namespace: CLIENTS}
spec:
  host: istio-egressgateway.WAY.svc.cluster.local
  subsets:
  - name: cnn
    trafficPolicy:
      loadBalancer: {simple: ROUND_ROBIN}
      portLevelSettings: [{port: {number: 80}, tls: {mode: ISTIO_MUTUAL, sni: own.OUTSIDE.svc}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: own, namespace: CLIENTS}
spec:
  hosts: [own.OUTSIDE.svc]
  gateways: [istio-egressgateway, mesh]
  http:
  - match: [{gateways: [mesh], port: 80}]
    route: [{destination: {host: istio-egressgateway.WAY.svc.cluster.local, subset: cnn, port: {number: 80}}, weight: 100}]
  - match: [{gateways: [istio-egressgateway], port: 80}]
    route: [{destination: {host: own.OUTSIDE.svc, port: {number: 443}}, weight: 100}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: originate-tls, namespace: CLIENTS}
spec:
  host: own.OUTSIDE.svc
  trafficPolicy:
    loadBalancer: {simple: ROUND_ROBIN}
    portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPLE, credentialName: own-roots, sni: own.example}}]
`)
	e.becomes(t, "client", own, "/apis/own/v1", "APIResourceList")
	if out, err := mesh.Exec(ctx, e.outside, "stock", "/demo", "get", "http://istio-egressgateway."+e.way+"/apis/own/v1"); err == nil || !strings.Contains(out+err.Error(), "refused") {
		t.Errorf("in plaintext the gateway answers %q (%v)", out, err)
	}
}

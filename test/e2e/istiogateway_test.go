package e2e

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// ingressGateway installs the chart of a gateway as users of Istio do and returns its address.
func ingressGateway(t *testing.T, ns string) string {
	t.Helper()
	ctx := t.Context()
	if out, err := mesh.Helm(ctx, "upgrade", "--install", "istio-ingressgateway", filepath.Join(mesh.Root(), "charts", "gateway"), "-n", ns, "--wait", "--timeout", "180s"); err != nil {
		t.Fatal(err, out, mesh.Diagnose(ctx, ns))
	}
	address := ""
	must(t, lab.Eventually(ctx, time.Minute, func() (err error) {
		address, err = mesh.Kubectl(ctx, "-n", ns, "get", "service", "istio-ingressgateway", "-o", "jsonpath={.status.loadBalancer.ingress[0].ip}")
		if err == nil && address == "" {
			err = fmt.Errorf("the Service has no address")
		}
		return err
	}))
	return address
}

// ownTLS is the manifest of an application, and its Service, that speaks TLS itself with the certificate of the Secret own.
func ownTLS(ns string) string {
	return strings.NewReplacer("NS", ns, "IMAGE", lab.Image).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: own, namespace: NS, labels: {app: own}}
spec:
  securityContext: {runAsNonRoot: true, runAsUser: 65532, fsGroup: 65532}
  containers:
  - {name: demo, image: "IMAGE", imagePullPolicy: IfNotPresent, command: [/demo, hook, -cert, /tls], volumeMounts: [{name: tls, mountPath: /tls}]}
  volumes: [{name: tls, secret: {secretName: own}}]
---
apiVersion: v1
kind: Service
metadata: {name: own, namespace: NS}
spec: {selector: {app: own}, ports: [{name: tls, port: 443, targetPort: 8443}]}
`)
}

// Gateways of Istio's own API and VirtualServices for them, as articles print them, are served by the pods that helm installs
// with charts/gateway: requests in plaintext and over TLS, with and without clients' certificates, and TLS that goes on as it comes.
func TestIstioGateway(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	balance(t)
	ingress := namespace(t, "e2e-istio-ingress")
	ns := namespace(t, "e2e-bookinfo", ambient)
	must(t, mesh.Run(ctx, lab.PodSpec{Namespace: ns, Name: "productpage", Account: "bookinfo-productpage", Node: nodes[1], Args: []string{"inventory"}}))
	apply := func(manifest string) {
		t.Helper()
		must(t, mesh.Apply(ctx, strings.NewReplacer("NS", ns, "INGRESS", ingress).Replace(manifest)))
	}
	address := ingressGateway(t, ingress)
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns)

	cert, key, _ := site(t, 1, "shop.example", "mutual.example")
	ownCert, ownKey, ownRoots := site(t, 2, "own.example")
	clientCert, clientKey, _ := site(t, 3, "client")
	must(t, mesh.Apply(ctx, tlsSecret(ingress, "shop", cert, key)))
	must(t, mesh.Apply(ctx, tlsSecret(ns, "own", ownCert, ownKey)))
	must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: shop-cacert, namespace: %s}
data: {cacert: %s}
`, ingress, base64.StdEncoding.EncodeToString([]byte(clientCert)))))
	apply(`
apiVersion: v1
kind: Service
metadata: {name: productpage, namespace: NS}
spec: {selector: {app: productpage}, ports: [{name: http, port: 9080, targetPort: 8080}]}
`)
	must(t, mesh.Apply(ctx, ownTLS(ns)))

	// The Gateway and the VirtualService of Istio's own example, as they stand.
	applyIn(t, ns, `
apiVersion: networking.istio.io/v1alpha3
kind: Gateway
metadata:
  name: bookinfo-gateway
  namespace: NS
spec:
  # The selector matches the ingress gateway pod labels.
  selector:
    istio: ingressgateway
  servers:
  - port:
      number: 80
      name: http
      protocol: HTTP
    hosts:
    - "*"
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata:
  name: bookinfo
  namespace: NS
spec:
  hosts:
  - "*"
  gateways:
  - bookinfo-gateway
  http:
  - match:
    - uri:
        exact: /productpage
    - uri:
        prefix: /stock
    route:
    - destination:
        host: productpage
        port:
          number: 9080
`)
	apply(`
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: secure, namespace: NS}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: [NS/shop.example], tls: {httpsRedirect: true}}
  - {port: {number: 443, name: https, protocol: HTTPS}, hosts: [NS/shop.example], tls: {mode: SIMPLE, credentialName: shop}}
  - {port: {number: 443, name: mutual, protocol: HTTPS}, hosts: [mutual.example], tls: {mode: MUTUAL, credentialName: shop}}
  - {port: {number: 443, name: tls, protocol: TLS}, hosts: [own.example], tls: {mode: PASSTHROUGH}}
---
apiVersion: networking.istio.io/v1beta1
kind: VirtualService
metadata: {name: shop, namespace: NS}
spec:
  hosts: [shop.example, mutual.example]
  gateways: [NS/secure]
  http: [{match: [{uri: {prefix: /stock}}], route: [{destination: {host: productpage.NS.svc.cluster.local}}]}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: own, namespace: NS}
spec:
  hosts: [own.example]
  gateways: [secure]
  tls: [{match: [{port: 443, sniHosts: [own.example]}], route: [{destination: {host: own, port: {number: 443}}}]}]
`)
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	ownRoots.AppendCertsFromPEM([]byte(cert))
	client := outside{address: address, roots: ownRoots}
	client.becomes(t, "http://anything.example/stock", 200)
	if got, body, _, err := client.get(ctx, "http://anything.example/productpage"); err != nil || !strings.Contains(body, "404 page not found") {
		t.Errorf("/productpage does not reach the application, which has no such page: %d %s %v", got, body, err)
	}
	if got, body, _, err := client.get(ctx, "http://anything.example/other"); err != nil || got != 404 || body != "" {
		t.Errorf("/other, for which there is no route: %d %q %v", got, body, err)
	}
	client.becomes(t, "https://shop.example/stock", 200)
	client.becomes(t, "http://shop.example/stock", 301)
	client.becomes(t, "https://own.example/apis/own/v1", 200)
	_, _, shown, err := client.get(ctx, "https://own.example/apis/own/v1")
	if err != nil || shown.SerialNumber.Int64() != 2 {
		t.Errorf("TLS that goes on as it comes shows %v, %v", shown, err)
	}
	if got, _, _, err := client.get(ctx, "https://mutual.example/stock"); err == nil {
		t.Errorf("a client without a certificate, where one is asked for: %d", got)
	}
	pair, err := tls.X509KeyPair([]byte(clientCert), []byte(clientKey))
	must(t, err)
	known := client
	known.cert = &pair
	known.becomes(t, "https://mutual.example/stock", 200)
	strangerCert, strangerKey, _ := site(t, 4, "client")
	stranger, err := tls.X509KeyPair([]byte(strangerCert), []byte(strangerKey))
	must(t, err)
	other := client
	other.cert = &stranger
	if got, _, _, err := other.get(ctx, "https://mutual.example/stock"); err == nil {
		t.Errorf("a client with a certificate of another root: %d", got)
	}

	// Into the mesh it goes by the tunnel, under the identity of its own service account.
	strict(t, ns)
	apply(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: gateway-only, namespace: NS}
spec:
  selector: {matchLabels: {app: productpage}}
  rules: [{from: [{source: {principals: [cluster.local/ns/INGRESS/sa/istio-ingressgateway]}}]}]
`)
	enforced(t, ns, "authorizationpolicy/gateway-only")
	for range 20 {
		if got, body, _, err := client.get(ctx, "https://shop.example/stock"); err != nil || got != 200 {
			t.Fatalf("by the gateway's own identity: %d %s %v", got, body, err)
		}
	}

	// A policy by the labels of the gateway's pods is decided by the gateway.
	apply(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-stock, namespace: INGRESS}
spec:
  selector: {matchLabels: {istio: ingressgateway}}
  action: DENY
  rules: [{to: [{operation: {paths: [/stock], hosts: [shop.example]}}]}]
`)
	enforced(t, ingress, "authorizationpolicy/no-stock")
	client.becomes(t, "https://shop.example/stock", 403)
	client.becomes(t, "http://anything.example/stock", 200)

	// So is an EnvoyFilter, as articles print it, made by the pods that it selects.
	must(t, mesh.Apply(ctx, luaFilter(ingress, `workloadSelector: {labels: {istio: ingressgateway}}`, "GATEWAY", luaAnswer)))
	enforced(t, ingress, "envoyfilter/lua")
	answersWithLua(t, address, "a gateway of Istio's own API")

	// A certificate is exchanged, and no handshake fails.
	cert2, key2, roots2 := site(t, 5, "shop.example", "mutual.example")
	roots2.AppendCertsFromPEM([]byte(cert)) // whichever is shown
	both := client
	both.roots = roots2
	must(t, mesh.Apply(ctx, tlsSecret(ingress, "shop", cert2, key2)))
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		_, _, shown, err := both.get(ctx, "https://shop.example/other")
		if err != nil {
			t.Errorf("while the certificate is exchanged: %v", err)
			return nil
		}
		if shown.SerialNumber.Int64() != 5 {
			return fmt.Errorf("the certificate shown is the %d.", shown.SerialNumber)
		}
		return nil
	}))

	// What cannot be served says so.
	apply(`
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: lost, namespace: NS}
spec:
  selector: {istio: ingressgateway}
  servers: [{port: {number: 443, name: https, protocol: HTTPS}, hosts: [lost.example], tls: {mode: SIMPLE, credentialName: nowhere}}]
`)
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := mesh.Kubectl(ctx, "-n", ns, "get", "events", "--field-selector=involvedObject.name=lost", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, "there is no Secret "+ingress+"/nowhere") {
			err = fmt.Errorf("the Gateway's events say %q", out)
		}
		return err
	}))
}

package e2e

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// rootsMap is the manifest of a ConfigMap with roots.
func rootsMap(t *testing.T, ns, name, roots string) string {
	t.Helper()
	quoted, err := json.Marshal(roots)
	must(t, err)
	return fmt.Sprintf("\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, namespace: %s}\ndata: {ca.crt: %s}\n", name, ns, quoted)
}

// A gateway speaks TLS to an application as a BackendTLSPolicy says, inside the tunnel, and to nobody else; a listener asks
// its clients for certificates.
func TestGatewayTLS(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	balance(t)
	ns := namespace(t, "e2e-gateway-tls", ambient)
	cert, key, roots := site(t, 1, "shop.example")
	ownCert, ownKey, _ := site(t, 2, "own.internal")
	clientCert, clientKey, _ := site(t, 3, "client")
	otherCert, otherKey, _ := site(t, 4, "client")
	for _, manifest := range []string{tlsSecret(ns, "shop", cert, key), tlsSecret(ns, "own", ownCert, ownKey), rootsMap(t, ns, "own-roots", ownCert), rootsMap(t, ns, "clients", clientCert), ownTLS(ns)} {
		must(t, mesh.Apply(ctx, manifest))
	}
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns) // before there are pods that are not captured
	applyIn(t, ns, `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: shop, namespace: NS}
spec:
  gatewayClassName: istio
  tls: {frontend: {default: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: clients}]}}}}
  listeners:
  - {name: http, port: 80, protocol: HTTP}
  - {name: https, port: 443, protocol: HTTPS, hostname: shop.example, tls: {certificateRefs: [{name: shop}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: shop, namespace: NS}
spec:
  parentRefs: [{name: shop}]
  hostnames: [shop.example]
  rules: [{backendRefs: [{name: own, port: 443}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: own, namespace: NS}
spec:
  targetRefs: [{group: "", kind: Service, name: own}]
  validation: {hostname: own.internal, caCertificateRefs: [{group: "", kind: ConfigMap, name: own-roots}]}
`)
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	strict(t, ns)
	client := outside{address: addressOf(t, ns, "shop"), roots: roots}
	const plain, encrypted = "http://shop.example/apis/own/v1", "https://shop.example/apis/own/v1"
	client.becomes(t, plain, 200)
	accepted := func(want string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			out, err := mesh.Kubectl(ctx, "-n", ns, "get", "backendtlspolicy", "own", "-o",
				`jsonpath={.status.ancestors[0].ancestorRef.name} {.status.ancestors[0].conditions[?(@.type=="Accepted")].reason}`)
			if err == nil && out != "shop "+want {
				err = fmt.Errorf("the policy says %q, want shop %s", out, want)
			}
			return err
		}))
	}
	accepted("Accepted")

	// The application's certificate has to have the name, and to be of the roots.
	patch := func(kind, name, patch string) {
		t.Helper()
		if out, err := mesh.Kubectl(ctx, "-n", ns, "patch", kind, name, "--type=merge", "-p", patch); err != nil {
			t.Fatal(err, out)
		}
	}
	patch("backendtlspolicy", "own", `{"spec": {"validation": {"hostname": "other.internal"}}}`)
	client.becomes(t, plain, 503)
	patch("backendtlspolicy", "own", `{"spec": {"validation": {"hostname": "own.internal"}}}`)
	client.becomes(t, plain, 200)
	must(t, mesh.Apply(ctx, rootsMap(t, ns, "own-roots", clientCert)))
	client.becomes(t, plain, 503)
	patch("configmap", "own-roots", `{"data": {"ca.crt": ""}}`)
	accepted("NoValidCACertificate")
	client.becomes(t, plain, 503)
	must(t, mesh.Apply(ctx, rootsMap(t, ns, "own-roots", ownCert)))
	accepted("Accepted")
	client.becomes(t, plain, 200)

	// Clients show a certificate of the roots, or are refused.
	with := func(cert, key string) outside {
		pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
		must(t, err)
		c := client
		c.cert = &pair
		return c
	}
	with(clientCert, clientKey).becomes(t, encrypted, 200)
	for name, c := range map[string]outside{"no certificate": client, "a certificate of another root": with(otherCert, otherKey)} {
		if got, _, _, err := c.get(ctx, encrypted); err == nil {
			t.Errorf("a client with %s: %d", name, got)
		}
	}
	patch("gateway.gateway.networking.k8s.io", "shop", `{"spec": {"tls": {"frontend": {"default": {"validation": {"mode": "AllowInsecureFallback"}}}}}}`)
	client.becomes(t, encrypted, 200)
	with(otherCert, otherKey).becomes(t, encrypted, 200)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=InsecureFrontendValidationMode", "gateway.gateway.networking.k8s.io/shop", "--timeout=60s"); err != nil {
		t.Error(err, out)
	}
}

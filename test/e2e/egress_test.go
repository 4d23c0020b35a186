package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// egress is a namespace of clients, one outside the mesh with what they call, and one with the waypoint on the way there.
type egress struct{ clients, outside, way string }

func (e egress) apply(t *testing.T, manifest string) {
	t.Helper()
	must(t, mesh.Apply(t.Context(), strings.NewReplacer("CLIENTS", e.clients, "OUTSIDE", e.outside, "WAY", e.way).Replace(manifest)))
}

// get has a client call an address that a ServiceEntry has for a host.
func (e egress) get(ctx context.Context, client, address, path string) (string, error) {
	out, err := mesh.Exec(ctx, e.clients, client, "/demo", "get", "http://"+address+path)
	if err != nil {
		return out, fmt.Errorf("%w: %s", err, out)
	}
	return out, nil
}

// becomes waits until a client's call is answered with a text, or fails with one.
func (e egress) becomes(t *testing.T, client, address, path, want string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		if out, err := e.get(t.Context(), client, address, path); !strings.Contains(fmt.Sprint(out, err), want) {
			return fmt.Errorf("%s calls %s%s: %q (%v), want %q", client, address, path, out, err, want)
		}
		return nil
	}))
}

// allocated is the IPv4 address that a host of a ServiceEntry was given.
func (e egress) allocated(t *testing.T, entry string) (address string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		out, err := mesh.Kubectl(t.Context(), "-n", e.way, "get", "serviceentry", entry, "-o", "jsonpath={.status.addresses[0].value}")
		if address = strings.TrimSpace(out); err == nil && !strings.HasPrefix(address, "240.240.") {
			err = fmt.Errorf("ServiceEntry %s has the address %q", entry, address)
		}
		return err
	}))
	return address
}

// What pods call outside of the mesh by a ServiceEntry goes by a waypoint, which resolves its names, decides who may, and
// keeps to itself what it does not know.
func TestEgress(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	e := egress{clients: namespace(t, "e2e-egress-clients", ambient), outside: namespace(t, "e2e-egress-outside"), way: namespace(t, "e2e-egress")}
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: e.clients, Name: "client", Account: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: e.clients, Name: "other", Account: "other", Node: nodes[1], Args: []string{"sleep"}},
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
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: stock, namespace: WAY}
spec:
  hosts: [stock.OUTSIDE.svc]
  location: MESH_EXTERNAL
  resolution: DNS
  ports: [{number: 80, name: http, protocol: HTTP}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: own, namespace: WAY}
spec:
  hosts: [own.OUTSIDE.svc]
  location: MESH_EXTERNAL
  resolution: DNS
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 443}]
`)
	must(t, mesh.AwaitReady(ctx, e.clients, time.Minute))
	must(t, mesh.AwaitReady(ctx, e.outside, time.Minute))
	inMesh(t, e.clients)

	// A name that nobody resolves is not called, and the ServiceEntry's author is told why.
	address, own := e.allocated(t, "stock"), e.allocated(t, "own")
	if out, err := e.get(ctx, "client", address, "/stock"); err == nil {
		t.Errorf("an address that leads nowhere answers: %s", out)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := mesh.Kubectl(ctx, "-n", e.way, "get", "events", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, "names, which waypoints resolve") {
			err = fmt.Errorf("nobody says that a waypoint is needed: %s", out)
		}
		return err
	}))

	e.apply(t, `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: way, namespace: WAY}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: WAY, labels: {istio.io/use-waypoint: way}}
`)
	if out, err := mesh.Kubectl(ctx, "-n", e.way, "wait", "--for=condition=Programmed", "gateway.gateway.networking.k8s.io/way", "--timeout=180s"); err != nil {
		t.Fatal(err, out)
	}
	const answered = `"items"`
	e.becomes(t, "client", address, "/stock", answered)
	e.becomes(t, "other", address, "/stock", answered)

	// Who may call it is decided on the way, by identity and by what is asked for.
	e.apply(t, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: stock, namespace: WAY}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: stock}]
  rules:
  - from: [{source: {principals: [cluster.local/ns/CLIENTS/sa/client]}}]
    to: [{operation: {paths: [/stock]}}]
`)
	e.becomes(t, "other", address, "/stock", "403")
	e.becomes(t, "client", address, "/healthz", "403")
	e.becomes(t, "client", address, "/stock", answered)
	e.encrypts(t, own, ownCert)
}

// encrypts has the waypoint speak TLS to a server outside, for pods that call it in plaintext, and to no other than that server.
func (e egress) encrypts(t *testing.T, address, roots string) {
	const path, answered = "/apis/own/v1", "APIResourceList"
	rule := func(settings string) {
		t.Helper()
		e.apply(t, `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: own, namespace: WAY}
spec:
  host: own.OUTSIDE.svc
  trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {sni: own.example, `+settings+`}}]}
`)
	}
	e.becomes(t, "client", address, path, "400") // plaintext, to a server that speaks TLS
	rule("mode: SIMPLE")
	e.becomes(t, "client", address, path, "503") // nobody who is trusted everywhere has signed its certificate
	rule("mode: SIMPLE, credentialName: own")
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		out, err := mesh.Kubectl(t.Context(), "-n", e.way, "get", "events", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, "Secret "+e.way+"/own, of the waypoint's namespace, is not there") {
			err = fmt.Errorf("nobody says that the Secret is missing: %s", out)
		}
		return err
	}))
	secret, err := json.Marshal(object{"apiVersion": "v1", "kind": "Secret", "metadata": object{"name": "own", "namespace": e.way}, "stringData": object{"ca.crt": roots}})
	must(t, err)
	must(t, mesh.Apply(t.Context(), string(secret)))
	e.becomes(t, "client", address, path, answered)
	rule("mode: SIMPLE, credentialName: own, subjectAltNames: [other.example]")
	e.becomes(t, "client", address, path, "503")
	rule("mode: MUTUAL, clientCertificate: /a, privateKey: /b, caCertificates: /c")
	e.becomes(t, "client", address, path, "503")
	rule("mode: SIMPLE, insecureSkipVerify: true")
	e.becomes(t, "client", address, path, answered)
	rule("mode: DISABLE")
	e.becomes(t, "client", address, path, "400")
	rule("mode: MUTUAL, credentialName: own-client")
	e.becomes(t, "client", address, path, "503")
	clientCert, clientKey, _ := site(t, 3, "client")
	must(t, mesh.Apply(t.Context(), tlsSecret(e.way, "own-client", clientCert, clientKey)))
	must(t, mesh.Apply(t.Context(), strings.ReplaceAll(string(secret), `"own"`, `"own-client-cacert"`)))
	e.becomes(t, "client", address, path, answered)
}

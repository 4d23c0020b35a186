package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// outside is a client outside the cluster.
type outside struct {
	address string // of the Gateway
	roots   *x509.CertPool
	cert    *tls.Certificate
	bearer  string // token
}

// get asks a Gateway for a host's page; the host is the one in the URL.
func (o outside) get(ctx context.Context, url string) (status int, body string, shown *x509.Certificate, err error) {
	config := &tls.Config{RootCAs: o.roots}
	if o.cert != nil {
		config.Certificates = []tls.Certificate{*o.cert}
	}
	c := &http.Client{
		Timeout:       10 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DisableKeepAlives: true, ForceAttemptHTTP2: true, TLSClientConfig: config,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				_, port, err := net.SplitHostPort(addr)
				if err != nil {
					return nil, err
				}
				return mesh.DialOutside(ctx, network, net.JoinHostPort(o.address, port))
			},
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", nil, err
	}
	if o.bearer != "" {
		req.Header.Set("Authorization", "Bearer "+o.bearer)
	}
	res, err := c.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if res.TLS != nil {
		shown = res.TLS.PeerCertificates[0]
	}
	return res.StatusCode, string(b), shown, err
}

// becomes waits until a page is answered with a status.
func (o outside) becomes(t *testing.T, url string, want int) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), 2*time.Minute, func() error {
		got, body, _, err := o.get(t.Context(), url)
		if err == nil && got != want {
			err = fmt.Errorf("%s: %d %s, want %d", url, got, strings.TrimSpace(body), want)
		}
		return err
	}))
}

// site is a certificate for hosts, signed by itself.
func site(t *testing.T, serial int64, hosts ...string) (cert, key string, roots *x509.CertPool) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: hosts, NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	must(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(k)
	must(t, err)
	cert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	roots = x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(cert))
	return cert, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})), roots
}

// tlsSecret is a Secret's manifest.
func tlsSecret(namespace, name, cert, key string) string {
	enc := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	return fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: %s, namespace: %s}
type: kubernetes.io/tls
data: {tls.crt: %s, tls.key: %s}
`, name, namespace, enc(cert), enc(key))
}

// balance runs a load balancer for one test.
func balance(t *testing.T) {
	t.Helper()
	end, err := mesh.Balance(t.Context())
	must(t, err)
	t.Cleanup(end)
}

// addressOf waits until a Gateway works and returns where it is reached.
func addressOf(t *testing.T, ns, name string) string {
	t.Helper()
	ctx := t.Context()
	if out, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Programmed", "gateway.gateway.networking.k8s.io/"+name, "--timeout=180s"); err != nil {
		said, _ := mesh.Kubectl(ctx, "-n", ns, "get", "gateway.gateway.networking.k8s.io", name, "-o", "jsonpath={.status}")
		t.Fatal(err, out, said)
	}
	out, err := mesh.Kubectl(ctx, "-n", ns, "get", "gateway.gateway.networking.k8s.io", name, "-o", "jsonpath={.status.addresses[0].value}")
	must(t, err)
	return out
}

// edgeOf makes a gateway "edge" that passes all requests on to a Service, and returns its address.
func edgeOf(t *testing.T, ns, service string) string {
	t.Helper()
	makeEdge(t, ns, service)
	return addressOf(t, ns, "edge")
}

// makeEdge makes it, and does not wait for an address.
func makeEdge(t *testing.T, ns, service string) {
	t.Helper()
	applyIn(t, ns, strings.ReplaceAll(`
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: NS}
spec: {gatewayClassName: istio, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: edge, namespace: NS}
spec:
  parentRefs: [{name: edge}]
  rules: [{backendRefs: [{name: SERVICE, port: 80}]}]
`, "SERVICE", service))
}

// A gateway is made where a Gateway of the class istio asks for one. Clients from outside reach what HTTPRoutes attach to
// it, over TLS with the certificate of a Secret; into the mesh it goes under its own identity.
func TestGateway(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	balance(t)
	ns := namespace(t, "e2e-gateway", ambient)
	must(t, mesh.Run(ctx, lab.PodSpec{Namespace: ns, Name: "inventory", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}}))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns)
	cert, key, roots := site(t, 1, "shop.example")
	must(t, mesh.Apply(ctx, tlsSecret(ns, "shop", cert, key)))
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: shop, namespace: NS}
spec:
  gatewayClassName: istio
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
  rules: [{matches: [{path: {value: /stock}}], backendRefs: [{name: inventory, port: 80}]}]
`)
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	client := outside{address: addressOf(t, ns, "shop"), roots: roots}
	client.becomes(t, "http://shop.example/stock", 200)
	client.becomes(t, "https://shop.example/stock", 200)
	for url, want := range map[string]int{"http://shop.example/other": 404, "http://other.example/stock": 404, "https://shop.example/other": 404} {
		if got, body, _, err := client.get(ctx, url); err != nil || got != want {
			t.Errorf("%s: %d %s %v, want %d", url, got, body, err, want)
		}
	}
	// Plaintext is refused now, so that what comes through comes by the gateway's tunnel.
	strict(t, ns)
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: gateway-only, namespace: NS}
spec:
  selector: {matchLabels: {app: inventory}}
  rules: [{from: [{source: {principals: [cluster.local/ns/NS/sa/shop-istio]}}]}]
`)
	enforced(t, ns, "authorizationpolicy/gateway-only")
	for range 20 {
		if got, body, _, err := client.get(ctx, "https://shop.example/stock"); err != nil || got != 200 {
			t.Fatalf("by the gateway's own identity: %d %s %v", got, body, err)
		}
	}

	// A certificate is exchanged while connections are open, and no handshake fails.
	held, err := mesh.DialOutside(ctx, "tcp", net.JoinHostPort(client.address, "443"))
	must(t, err)
	defer held.Close()
	open := tls.Client(held, &tls.Config{RootCAs: roots, ServerName: "shop.example"})
	must(t, open.HandshakeContext(ctx))
	cert2, key2, roots2 := site(t, 2, "shop.example")
	roots2.AppendCertsFromPEM([]byte(cert)) // whichever is shown
	both := client
	both.roots = roots2
	must(t, mesh.Apply(ctx, tlsSecret(ns, "shop", cert2, key2)))
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		status, _, shown, err := both.get(ctx, "https://shop.example/stock")
		if err != nil || status != 200 {
			t.Errorf("while the certificate is exchanged: %d %v", status, err)
			return nil
		}
		if shown.SerialNumber.Int64() != 2 {
			return fmt.Errorf("the certificate shown is the %d.", shown.SerialNumber)
		}
		return nil
	}))
	_, err = io.WriteString(open, "GET /stock HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n")
	must(t, err)
	if answer, err := io.ReadAll(open); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200") {
		t.Errorf("the connection that was open: %.80s %v", answer, err)
	}

	// Who may come in, the gateway decides.
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-stock, namespace: NS}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: shop}]
  action: DENY
  rules: [{to: [{operation: {paths: [/stock]}}]}]
`)
	enforced(t, ns, "authorizationpolicy/no-stock")
	for _, url := range []string{"http://shop.example/stock", "https://shop.example/stock"} {
		if got, body, _, err := both.get(ctx, url); err != nil || got != 403 {
			t.Errorf("%s that a policy denies: %d %s %v, want 403", url, got, body, err)
		}
	}
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "authorizationpolicy", "no-stock"); err != nil {
		t.Fatal(err)
	}
	both.becomes(t, "https://shop.example/stock", 200)

	// So it does by policies that select its pods.
	member, stranger := newSigner(t, "key"), newSigner(t, "key")
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: NS}
spec:
  selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: shop}}
  jwtRules: [{issuer: "`+issuer+`", jwks: '`+keySet(t, member)+`'}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: staff, namespace: NS}
spec:
  selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: shop}}
  rules: [{when: [{key: "request.auth.claims[group]", values: [staff]}]}]
`)
	enforced(t, ns, "requestauthentication/tokens", "authorizationpolicy/staff")
	for _, c := range []struct {
		bearer string
		want   int
	}{{"", 403}, {member.token(t, "staff", time.Hour), 200}, {member.token(t, "guests", time.Hour), 403}, {stranger.token(t, "staff", time.Hour), 401}} {
		both.bearer = c.bearer
		if got, body, _, err := both.get(ctx, "https://shop.example/stock"); err != nil || got != c.want {
			t.Errorf("by the gateway's own policies: %d %s %v, want %d", got, body, err, c.want)
		}
	}
}

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// selfSigned is a serving certificate that is its own authority, both base64 of PEM.
func selfSigned(t *testing.T, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	must(t, err)
	kder, err := x509.MarshalECPrivateKey(k)
	must(t, err)
	text := func(kind string, b []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return text("CERTIFICATE", der), text("EC PRIVATE KEY", kder)
}

// meshWideStrict is the first thing users copy, and holds until the test ends.
func meshWideStrict(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	t.Cleanup(func() {
		if _, err := mesh.Kubectl(context.WithoutCancel(ctx), "delete", "peerauthentication", "default", "-n", "istio-system", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	strict(t, "istio-system")
}

// What the API server calls in the mesh goes on to work under mesh-wide STRICT, and is open to it alone.
func TestAPIServerCallsUnderStrict(t *testing.T) {
	ns := namespace(t, "e2e-hook", ambient)
	out := namespace(t, "e2e-hook-out")
	cert, key := selfSigned(t, "hook."+ns+".svc")
	ctx := t.Context()
	must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: hook, namespace: %[1]s}
type: kubernetes.io/tls
data: {tls.crt: %[2]s, tls.key: %[3]s}
---
apiVersion: v1
kind: Service
metadata: {name: hook, namespace: %[1]s}
spec: {selector: {app: hook}, ports: [{name: https, port: 443, targetPort: hook}, {name: other, port: 9000}]}
---
apiVersion: v1
kind: Pod
metadata: {name: hook, namespace: %[1]s, labels: {app: hook}}
spec:
  nodeName: %[4]s
  containers:
  - {name: hook, image: %[5]s, imagePullPolicy: IfNotPresent, command: [/demo, hook], ports: [{name: hook, containerPort: 8443}],
     volumeMounts: [{name: cert, mountPath: /cert}]}
  - {name: other, image: %[5]s, imagePullPolicy: IfNotPresent, command: [/demo, tcp-echo]}
  volumes: [{name: cert, secret: {secretName: hook}}]
`, ns, cert, key, nodes[1], lab.Image)))
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: ns, Name: "member", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: out, Name: "outsider", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: out, Name: "neighbour", Node: nodes[1], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: out, Name: "host", Node: nodes[0], Args: []string{"sleep"}, HostNetwork: true},
	))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	must(t, mesh.AwaitReady(ctx, out, time.Minute))
	if _, err := mesh.AwaitRedirection(ctx, ns, "enabled", 30*time.Second); err != nil {
		t.Fatal(err)
	}
	ip := pod(t, ns, "hook").IPs[0]
	dial := func(namespace, from, port string) error {
		_, err := mesh.Exec(ctx, namespace, from, "/demo", "tcp-dial", "-timeout", "3s", net.JoinHostPort(ip, port))
		return err
	}
	must(t, dial(out, "outsider", "9000")) // PERMISSIVE still
	meshWideStrict(t)
	for _, p := range []string{"outsider", "neighbour", "host"} {
		must(t, lab.Eventually(ctx, 20*time.Second, func() error {
			if dial(out, p, "9000") == nil {
				return fmt.Errorf("%s gets in under STRICT", p)
			}
			return nil
		}))
	}
	must(t, dial(ns, "member", "9000"))

	t.Cleanup(func() {
		for _, o := range []string{"validatingwebhookconfiguration/e2e-hook", "apiservice/v1.e2e.warren.example"} {
			if _, err := mesh.Kubectl(context.WithoutCancel(ctx), "delete", o, "--ignore-not-found"); err != nil {
				t.Error(err)
			}
		}
	})
	must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: e2e-hook}
webhooks:
- name: hook.e2e.warren.example
  clientConfig: {caBundle: %[2]s, service: {namespace: %[1]s, name: hook, path: /review}}
  rules: [{apiGroups: [""], apiVersions: [v1], resources: [configmaps], operations: [CREATE]}]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[3]s}}
  objectSelector: {matchExpressions: [{key: refuse, operator: Exists}]}
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.e2e.warren.example}
spec: {group: e2e.warren.example, version: v1, groupPriorityMinimum: 100, versionPriority: 1, caBundle: %[2]s, service: {namespace: %[1]s, name: hook}}
`, ns, cert, out)))
	create := func(name, refuse string) error {
		return mesh.Apply(ctx, fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, namespace: %s, labels: {refuse: %q}}\n", name, out, refuse))
	}
	must(t, lab.Eventually(ctx, 30*time.Second, func() error { // the configuration reaches the API server, the exemption the node
		err := create("refused", "yes")
		if err == nil {
			_, _ = mesh.Kubectl(ctx, "delete", "configmap", "refused", "-n", out)
			return fmt.Errorf("the webhook is not asked")
		}
		if !strings.Contains(err.Error(), "refused by the hook, called from ") {
			return err
		}
		return nil
	}))
	failures, calls := 0, 20
	for i := range calls {
		if err := create(fmt.Sprintf("allowed-%d", i), "no"); err != nil {
			t.Errorf("call %d: %v", i, err)
			failures++
		}
	}
	must(t, lab.Eventually(ctx, 60*time.Second, func() error {
		got, err := mesh.Kubectl(ctx, "get", "apiservice", "v1.e2e.warren.example", "-o", `jsonpath={.status.conditions[?(@.type=="Available")].status}`)
		if err == nil && got != "True" {
			err = fmt.Errorf("the aggregated API is available: %s", got)
		}
		return err
	}))
	// The exemption is the API server's.
	opened := 0
	for _, p := range []string{"outsider", "neighbour", "host"} {
		for _, port := range []string{"8443", "9000"} {
			if dial(out, p, port) == nil {
				t.Errorf("%s gets in at port %s", p, port)
				opened++
			}
		}
	}
	must(t, lab.Eventually(ctx, 20*time.Second, func() error {
		got, err := mesh.Kubectl(ctx, "get", "peerauthentication", "default", "-n", "istio-system", "-o", "jsonpath={.status.conditions}")
		if err == nil && !strings.Contains(got, ns+"/hook:443") {
			err = fmt.Errorf("the exemption is not shown on the PeerAuthentication: %s", got)
		}
		return err
	}))
	if mesh.Cluster != nil { // at the API server's own address: the port that it calls, no other
		for _, c := range []struct {
			port string
			want bool
		}{{"8443", true}, {"9000", false}} {
			err := mesh.Cluster.Outside(func() error {
				conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip, c.port), 3*time.Second)
				if err == nil {
					t.Logf("outside, from %s", netip.MustParseAddrPort(conn.LocalAddr().String()).Addr())
					conn.Close()
				}
				return err
			})
			if (err == nil) != c.want {
				t.Errorf("from the API server's address to port %s: %v", c.port, err)
				opened++
			}
		}
	}
	record("api-server-calls", "calls of the API server to a pod under STRICT", calls, failures, float64(failures), "failed calls")
	record("api-server-calls", "others at the ports that are open to the API server", 6, opened, float64(opened), "let in")
}

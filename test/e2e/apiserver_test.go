package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/cluster"
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

// calledPod is a pod with a Service of its name, 443 to 8443, that an API server may call by TLS under the certificate.
// Beside that it listens on port 9000, which no API server calls.
func calledPod(t *testing.T, ns, name, node string) (cert string) {
	t.Helper()
	cert, key := selfSigned(t, name+"."+ns+".svc")
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Secret
metadata: {name: %[2]s, namespace: %[1]s}
type: kubernetes.io/tls
data: {tls.crt: %[3]s, tls.key: %[4]s}
---
apiVersion: v1
kind: Service
metadata: {name: %[2]s, namespace: %[1]s}
spec: {selector: {app: %[2]s}, ports: [{name: https, port: 443, targetPort: hook}, {name: other, port: 9000}]}
---
apiVersion: v1
kind: Pod
metadata: {name: %[2]s, namespace: %[1]s, labels: {app: %[2]s}}
spec:
  nodeName: %[5]s
  terminationGracePeriodSeconds: 1
  containers:
  - {name: hook, image: %[6]s, imagePullPolicy: IfNotPresent, command: [/demo, hook], ports: [{name: hook, containerPort: 8443}],
     volumeMounts: [{name: cert, mountPath: /cert}]}
  - {name: other, image: %[6]s, imagePullPolicy: IfNotPresent, command: [/demo, tcp-echo]}
  volumes: [{name: cert, secret: {secretName: %[2]s}}]
`, ns, name, cert, key, node, lab.Image)))
	return cert
}

// webhook is the configuration that has the API server ask a calledPod about ConfigMaps of a namespace that have the
// label refuse.
func webhook(ns, name, cert, about string) string {
	return fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: %[1]s-%[2]s}
webhooks:
- name: %[2]s.e2e.warren.example
  clientConfig: {caBundle: %[3]s, service: {namespace: %[1]s, name: %[2]s, path: /review}}
  rules: [{apiGroups: [""], apiVersions: [v1], resources: [configmaps], operations: [CREATE]}]
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[4]s}}
  objectSelector: {matchExpressions: [{key: refuse, operator: Exists}]}
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 5
`, ns, name, cert, about)
}

func asked(ns, name, refuse string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, namespace: %s, labels: {refuse: %q}}\n", name, ns, refuse)
}

// What the API server calls in the mesh goes on to work under mesh-wide STRICT, and is open to it alone: webhooks,
// aggregated APIs and conversions.
func TestAPIServerCallsUnderStrict(t *testing.T) {
	ns := namespace(t, "e2e-hook", ambient)
	out := namespace(t, "e2e-hook-out")
	ctx := t.Context()
	cert := calledPod(t, ns, "hook", nodes[1])
	convertCert := calledPod(t, ns, "convert", nodes[0])
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
		for _, o := range []string{"validatingwebhookconfiguration/e2e-hook-hook", "apiservice/v1.e2e.warren.example", "crd/things.convert.warren.example"} {
			if _, err := mesh.Kubectl(context.WithoutCancel(ctx), "delete", o, "--ignore-not-found"); err != nil {
				t.Error(err)
			}
		}
	})
	must(t, mesh.Apply(ctx, webhook(ns, "hook", cert, out)+fmt.Sprintf(`
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1.e2e.warren.example}
spec: {group: e2e.warren.example, version: v1, groupPriorityMinimum: 100, versionPriority: 1, caBundle: %[2]s, service: {namespace: %[1]s, name: hook}}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.convert.warren.example}
spec:
  group: convert.warren.example
  names: {kind: Thing, plural: things, singular: thing}
  scope: Namespaced
  versions:
  - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
  - {name: v2, served: true, storage: false, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
  conversion:
    strategy: Webhook
    webhook:
      conversionReviewVersions: [v1]
      clientConfig: {caBundle: %[3]s, service: {namespace: %[1]s, name: convert, path: /convert}}
`, ns, cert, convertCert)))
	create := func(name, refuse string) error { return mesh.Apply(ctx, asked(out, name, refuse)) }
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
	must(t, lab.Eventually(ctx, 60*time.Second, func() error {
		return mesh.Apply(ctx, "apiVersion: convert.warren.example/v1\nkind: Thing\nmetadata: {name: one, namespace: "+out+"}\n")
	}))
	read := func() error {
		got, err := mesh.Kubectl(ctx, "-n", out, "get", "things.v2.convert.warren.example", "one", "-o", "jsonpath={.apiVersion}")
		if err == nil && got != "convert.warren.example/v2" {
			err = fmt.Errorf("the object comes as %q", got)
		}
		return err
	}
	must(t, lab.Eventually(ctx, 60*time.Second, read))
	for i := range calls {
		if err := read(); err != nil {
			t.Errorf("conversion %d: %v", i, err)
			failures++
		}
	}
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
		if err == nil && (!strings.Contains(got, ns+"/hook:443") || !strings.Contains(got, ns+"/convert:443")) {
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
	record("api-server-calls", "calls of the API server to pods under STRICT: webhook and conversions", 2*calls, failures, float64(failures), "failed calls")
	record("api-server-calls", "others at the ports that are open to the API server", 6, opened, float64(opened), "let in")
}

// apiServerOnNode runs a second API server of the cluster in a node's own network namespace, as kubeadm's static pods
// do, until the test ends. It returns where it serves.
func apiServerOnNode(t *testing.T, name string) (url string) {
	t.Helper()
	n := mustNode(t, name)
	// Its etcd listens on the loopback of the host.
	var relay net.Listener
	must(t, n.InNetNS(func() (err error) { relay, err = net.Listen("tcp", "127.0.0.1:2379"); return err }))
	t.Cleanup(func() { relay.Close() })
	go func() {
		for {
			in, err := relay.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				var out net.Conn
				if err := mesh.Cluster.Outside(func() (err error) { out, err = net.Dial("tcp", "127.0.0.1:2379"); return err }); err != nil {
					return
				}
				defer out.Close()
				go func() { _, _ = io.Copy(out, in); out.(*net.TCPConn).CloseWrite() }()
				_, _ = io.Copy(in, out)
			}()
		}
	}()
	cmd := n.APIServer(context.WithoutCancel(t.Context()))
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(90 * time.Second):
			_ = cmd.Process.Kill()
			t.Error("the API server on the node does not end")
		}
		if t.Failed() {
			b := log.Bytes()
			t.Logf("the API server on %s: %s", name, b[max(0, len(b)-4000):])
		}
	})
	return "https://" + net.JoinHostPort(n.Addrs()[0].String(), "6443")
}

// An API server that runs on a node of the cluster calls pods from whichever of the node's addresses leads to them:
// its own for pods elsewhere, the bridge's for pods beside it. All of them pass, and no other node's.
func TestAPIServerOnANodeUnderStrict(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	ns := namespace(t, "e2e-hook-node", ambient)
	out := namespace(t, "e2e-hook-node-out")
	certs := map[string]string{"beside": calledPod(t, ns, "beside", nodes[0]), "elsewhere": calledPod(t, ns, "elsewhere", nodes[1])}
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: out, Name: "here", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: out, Name: "there", Node: nodes[1], Args: []string{"sleep"}, HostNetwork: true},
	))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	must(t, mesh.AwaitReady(ctx, out, time.Minute))
	inMesh(t, ns)
	meshWideStrict(t)
	url := apiServerOnNode(t, nodes[0])
	via := func(in string, args ...string) (string, error) { // the host itself has no way to the nodes
		cmd := mesh.Cluster.OutsideCommand(ctx, append([]string{mesh.KubectlPath(), "--kubeconfig=" + mesh.Kubeconfig(), "--server=" + url, "--insecure-skip-tls-verify"}, args...)...)
		cmd.Stdin = strings.NewReader(in)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return string(out), err
	}
	must(t, lab.Eventually(ctx, 90*time.Second, func() error {
		if _, err := via("", "get", "--raw", "/readyz"); err != nil {
			return err
		}
		known, err := mesh.Kubectl(ctx, "get", "endpointslice", "kubernetes", "-o", "jsonpath={.endpoints[*].addresses}")
		if err == nil && !strings.Contains(known, mustNode(t, nodes[0]).Addrs()[0].String()) {
			err = fmt.Errorf("the API servers are known as %s", known)
		}
		return err
	}))
	failures, calls, opened := 0, 0, 0
	for name, cert := range certs {
		t.Cleanup(func() {
			if _, err := mesh.Kubectl(context.WithoutCancel(ctx), "delete", "validatingwebhookconfiguration", ns+"-"+name, "--ignore-not-found"); err != nil {
				t.Error(err)
			}
		})
		must(t, mesh.Apply(ctx, webhook(ns, name, cert, out)))
		create := func(object, refuse string) error {
			_, err := via(asked(out, object, refuse), "create", "-f", "-")
			return err
		}
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			err := create("refused-by-"+name, "yes")
			if err == nil {
				_, _ = mesh.Kubectl(ctx, "delete", "configmap", "refused-by-"+name, "-n", out)
				return fmt.Errorf("the webhook is not asked")
			}
			_, from, ok := strings.Cut(err.Error(), "refused by the hook, called from ")
			if !ok {
				return err
			}
			t.Logf("the pod %s is called from %s", name, from)
			return nil
		}))
		for i := range 10 {
			calls++
			if err := create(fmt.Sprintf("%s-%d", name, i), "no"); err != nil {
				failures++
				t.Errorf("call %d of the pod %s: %v", i, name, err)
			}
		}
		for _, from := range []string{"here", "there"} {
			for _, port := range []string{"8443", "9000"} {
				if _, err := mesh.Exec(ctx, out, from, "/demo", "tcp-dial", "-timeout", "3s", net.JoinHostPort(pod(t, ns, name).IPs[0], port)); err == nil {
					opened++
					t.Errorf("%s gets in at port %s of the pod %s", from, port, name)
				}
			}
		}
		if _, err := mesh.Kubectl(ctx, "delete", "validatingwebhookconfiguration", ns+"-"+name); err != nil {
			t.Error(err)
		}
	}
	record("api-server-calls", "calls of an API server on a node to pods under STRICT, beside it and elsewhere", calls, failures, float64(failures), "failed calls")
	record("api-server-calls", "others at the ports that are open to an API server on a node", 8, opened, float64(opened), "let in")
}

func mustNode(t *testing.T, name string) *cluster.Node {
	t.Helper()
	n, err := mesh.Cluster.Node(name)
	must(t, err)
	return n
}

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// trustStatus is the sentence in which the control plane says how far an exchange of roots has come.
func trustStatus(ctx context.Context) (string, error) {
	return mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "configmap", "warren-trust", "-o", "jsonpath={.data.status}")
}

// issuers are the serial numbers of the roots above the certificates that a node's agent uses for a namespace.
func issuers(ctx context.Context, node, ns string) (map[string]bool, error) {
	page, err := agentAdmin(node, "GET", "/config_dump")
	if err != nil {
		return nil, err
	}
	var dump struct {
		Certificates []struct {
			Identity  string
			RootCerts []struct{ SerialNumber string }
		}
	}
	if err := json.Unmarshal(page, &dump); err != nil {
		return nil, err
	}
	roots := map[string]bool{}
	for _, c := range dump.Certificates {
		if strings.Contains(c.Identity, "/ns/"+ns+"/") {
			for _, r := range c.RootCerts {
				roots[r.SerialNumber] = true
			}
		}
	}
	return roots, ctx.Err()
}

func rotateRoot(ctx context.Context) error {
	_, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "annotate", "secret", "istio-ca-secret", "warren.io/rotate-root=now", "--overwrite")
	return err
}

// awaitTrust waits until the status begins with one of the phases.
func awaitTrust(t *testing.T, limit time.Duration, phases ...string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), limit, func() error {
		s, err := trustStatus(t.Context())
		for _, p := range phases {
			if err == nil && strings.HasPrefix(s, p) {
				return nil
			}
		}
		return fmt.Errorf("the exchange of roots is at %q, %v; want %q", s, err, phases)
	}))
}

func unharmed(t *testing.T, what string, r loadReport) {
	t.Helper()
	failed := r.Refused + r.TimedOut + r.WrongSource + r.Cut + r.HeldHung + r.HeldLost
	record("certificates", what, r.Connections+r.Held, failed, float64(r.Connections), "connections")
	if failed > 0 || r.Connections == 0 {
		t.Errorf("%s: %+v", what, r)
	}
}

// Certificates that live for a minute, for ten minutes of requests and connections; then a root in all three phases;
// then nobody who signs.
func TestShortCertificates(t *testing.T) {
	if !*long {
		t.Skip("ten minutes; the same without a cluster is in test/certificates")
	}
	must(t, mesh.Install(t.Context(), "control.env.MAX_WORKLOAD_CERT_TTL=60s", "control.env.DEFAULT_WORKLOAD_CERT_TTL=60s"))
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if _, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "scale", "deployment", "-l", "app=istiod", "--replicas=1"); err != nil {
			t.Error(err)
		}
		if err := mesh.Install(ctx); err != nil {
			t.Error(err)
		}
	})
	ns := namespace(t, "e2e-short", ambient)
	strict(t, ns)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]), loaded(ns, "requests", nodes[1]))
	answers(t, ns, "client", "requests:8080")
	// 1,000 requests a second on connections that stay open, 100 connections a second that do not, and ten that are
	// there from the beginning to the end.
	load := func(what string, seconds int, first func()) {
		report := startLoad(t, ns, "client", "-for", fmt.Sprint(seconds, "s"), "-rate", "100", "-hold", "10", "-timeout", "60s", "far:9000")
		first()
		o := runLoad(t, ns, "client", "qps", "-rate", "1000", "-c", "16", "-n", fmt.Sprint(1000*seconds), "-timeout", "60s", "requests:8080")
		unharmed(t, what, report())
		record("certificates", what+", requests", o.Requests, o.Requests-o.OK, o.PerSecond, "requests a second")
		if o.OK != o.Requests {
			t.Errorf("%s: %+v", what, o)
		}
	}
	load("certificate-rotation on a cluster", 600, func() {})
	load("root-rotation on a cluster, three phases", 420, func() { // two lifetimes and five minutes
		must(t, rotateRoot(t.Context()))
		awaitTrust(t, 3*time.Minute, "phase 2 of 3")
	})
	awaitTrust(t, 3*time.Minute, "settled")

	_, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "scale", "deployment", "-l", "app=istiod", "--replicas=0")
	must(t, err)
	must(t, lab.Eventually(t.Context(), 5*time.Minute, func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		if err == nil {
			return fmt.Errorf("connections are still accepted")
		}
		return nil
	}))
	s := runStorm(t, ns, "client", 200, 8, "far", "far:9000", "-timeout", "2s")
	record("certificates", "after expiry, on a cluster", s.Connections, s.Connections-s.Failed, float64(s.Connections-s.Failed), "accepted")
	if s.Failed != s.Connections {
		t.Errorf("after every certificate has ended: %+v", s)
	}
}

// The operator asks for a new root by an annotation. Connections go on; pods whose certificates come from the new
// root and pods that still have one of the old reach each other.
func TestRootRotation(t *testing.T) {
	ns := namespace(t, "e2e-roots", ambient)
	strict(t, ns)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	if s, err := trustStatus(t.Context()); err != nil || !strings.HasPrefix(s, "settled") {
		t.Skipf("an exchange of roots is under way: %q, %v", s, err)
	}
	report := startLoad(t, ns, "client", "-for", "25s", "-rate", "200", "-hold", "20", "-timeout", "60s", "far:9000")
	must(t, rotateRoot(t.Context()))
	awaitTrust(t, time.Minute, "phase 2 of 3")
	for _, node := range nodes { // before that it may not have begun
		roots, err := issuers(t.Context(), node, ns)
		if err != nil || len(roots) != 2 {
			t.Errorf("%s trusts the roots %v, %v; want both", node, roots, err)
		}
	}
	deploy(t, ns, true, lab.PodSpec{Namespace: ns, Name: "late-client", Account: "late", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "late", Account: "late-server", Node: nodes[1], Program: tcpcheck, Args: []string{"serve"}, Port: 9000})
	late := startLoad(t, ns, "late-client", "-for", "5s", "-rate", "100", "-timeout", "60s", "far:9000")
	toLate := startLoad(t, ns, "client", "-for", "5s", "-rate", "100", "-timeout", "60s", "late:9000")
	unharmed(t, "root-rotation, certificates of both roots", late())
	unharmed(t, "root-rotation, certificates of both roots, the other way", toLate())
	unharmed(t, "root-rotation on a cluster", report())
	events, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "get", "events", "--field-selector=reason=RootRotation", "-o", "jsonpath={.items[*].message}")
	if err != nil || !strings.Contains(events, "phase 1") || !strings.Contains(events, "phase 2") {
		t.Errorf("the events say %q, %v", events, err)
	}
}

// keyMaterial finds private keys in whatever form the agent could write one: PEM, PKCS 8 or SEC 1 in DER, and
// PKCS 8 in base64.
const keyMaterial = `export LC_ALL=C; grep -rlaE 'PRIVATE KEY|MIGHAgEAMBMGByqGSM49' %[1]s 2>/dev/null; ` +
	`grep -rlaP '\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x04\x6d\x30\x6b\x02\x01\x01\x04\x20' %[1]s 2>/dev/null; ` +
	`grep -rlaP '\x30\x77\x02\x01\x01\x04\x20' %[1]s 2>/dev/null; true`

// No private key is where an agent can write: its directories on the node, its log, what its admin port shows.
func TestKeysAreNowhere(t *testing.T) {
	ownCluster(t)
	ns := namespace(t, "e2e-keys", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	places := "/var/lib/warren /run/warren /etc/cni/net.d /var/log/pods/" + lab.Namespace + "_*"
	for _, name := range nodes {
		n, err := mesh.Cluster.Node(name)
		must(t, err)
		found, err := n.Exec(t.Context(), "sh", "-c", fmt.Sprintf(keyMaterial, places))
		if err != nil || strings.TrimSpace(found) != "" {
			t.Errorf("%s: private keys in %s, %v", name, found, err)
		}
		// The search finds one that is there, in each form.
		planted, err := n.Exec(t.Context(), "sh", "-c", `d=$(mktemp -d) && cd $d && `+
			`printf -- '-----BEGIN PRIVATE KEY-----\n' > pem && printf 'x MIGHAgEAMBMGByqGSM49AgEG x' > base64 && `+
			`printf '\060\201\207\006\010\052\206\110\316\075\003\001\007\004\155\060\153\002\001\001\004\040abc' > der && printf 'a\060\167\002\001\001\004\040abc' > sec1 && `+
			fmt.Sprintf(keyMaterial, "$d")+`; rm -r $d`)
		if err != nil || len(strings.Fields(planted)) != 4 {
			t.Errorf("%s: the search finds %q of four keys that are there, %v", name, planted, err)
		}
		for _, page := range []string{"/config_dump", "/debug/pprof/cmdline"} {
			text, err := agentAdmin(name, "GET", page)
			if err == nil && strings.Contains(string(text), "PRIVATE KEY") {
				t.Errorf("%s: %s shows a private key", name, page)
			}
		}
	}
}

// steps are the commands of docs/certificates.md that begin with "# name".
func steps(t *testing.T, name string) string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(mesh.Root(), "docs", "certificates.md"))
	must(t, err)
	_, rest, ok := strings.Cut(string(page), "```sh\n# "+name+"\n")
	block, _, closed := strings.Cut(rest, "\n```")
	if !ok || !closed {
		t.Fatalf("docs/certificates.md has no commands %q", name)
	}
	return block
}

// A CA is plugged in, one of its intermediates revoked, and taken out again, by the commands of the documentation;
// a Secret that cannot be used changes nothing and is named in an event. Connections go on all the while.
func TestPluggedInCA(t *testing.T) {
	ns := namespace(t, "e2e-cacerts", ambient)
	strict(t, ns)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	dir := t.TempDir()
	sh := func(script string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig(), "PATH="+filepath.Dir(mesh.KubectlPath())+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s\n%v: %s", script, err, out)
		}
	}
	t.Cleanup(func() {
		if _, err := mesh.Kubectl(context.WithoutCancel(t.Context()), "-n", lab.Namespace, "delete", "secret", "cacerts", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	report := startLoad(t, ns, "client", "-for", "30s", "-rate", "100", "-hold", "10", "-timeout", "60s", "far:9000")
	sh(steps(t, "plug-in"))
	root := func() string {
		text, err := os.ReadFile(filepath.Join(dir, "root-cert.pem"))
		must(t, err)
		return strings.TrimSpace(string(text))
	}()
	published := func() (string, error) {
		return mesh.Kubectl(t.Context(), "-n", ns, "get", "configmap", "istio-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)
	}
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		if text, err := published(); err != nil || !strings.Contains(text, root) {
			return fmt.Errorf("the plugged-in root is not published: %v", err)
		}
		return nil
	}))
	awaitTrust(t, time.Minute, "phase 2 of 3")
	sh("cp ca-cert.pem stolen-cert.pem\n" +
		"openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /O=example/CN=next -keyout ca-key.pem -out ca.csr\n" +
		"openssl x509 -req -in ca.csr -CA root-cert.pem -CAkey root-key.pem -CAcreateserial -days 365 -extfile ca.ext -out ca-cert.pem\n" +
		"cat ca-cert.pem root-cert.pem > cert-chain.pem\n" + steps(t, "revoke"))
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		list, err := mesh.Kubectl(t.Context(), "-n", ns, "get", "configmap", "istio-ca-crl", "-o", `jsonpath={.data.ca-crl\.pem}`)
		if err != nil {
			return err
		}
		want, err := os.ReadFile(filepath.Join(dir, "ca-crl.pem"))
		if err == nil && strings.TrimSpace(list) != strings.TrimSpace(string(want)) {
			err = fmt.Errorf("the namespace's revocation list is %q", list)
		}
		return err
	}))
	// The pods' certificates come from the CA before that was plugged in, or from a revoked one: those are asked
	// for anew, and until then refused.
	unharmed(t, "root-rotation, from self-signed to plugged in", report())
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		return err
	}))

	sh(`kubectl -n istio-system create secret generic cacerts --from-file=ca-cert.pem --from-file=ca-key.pem=root-key.pem \
  --from-file=root-cert.pem --from-file=cert-chain.pem --dry-run=client -o yaml | kubectl apply -f -`)
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		events, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "get", "events", "--field-selector=reason=BadSigningKey", "-o", "jsonpath={.items[*].message}")
		if err != nil || !strings.Contains(events, "does not belong to the signing certificate") {
			return fmt.Errorf("a Secret with the wrong key: the events say %q, %v", events, err)
		}
		return nil
	}))
	_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "10s", "far:9000")
	must(t, err)
}

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A waypoint from its making to its end by the command line; what why says of requests is what becomes of them; what Envoy
// does is shown; and nothing secret is in a sysdump.
func TestCommandsOnAWaypoint(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	ns := namespace(t, "e2e-commands", ambient)
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)
	deploy(t, ns, true, client(ns, "client", nodes[0]),
		lab.PodSpec{Namespace: ns, Name: "other", Account: "other", Node: nodes[1], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "inventory-1", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}, Labels: map[string]string{"app": "inventory"}})
	do := func(args ...string) string {
		t.Helper()
		out, err := warren(t, args...)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
	shows := func(want string, args ...string) {
		t.Helper()
		if out := do(args...); !strings.Contains(out, want) {
			t.Errorf("warren %s does not show %q:\n%s", strings.Join(args, " "), want, out)
		}
	}

	do("waypoint", "apply", "-n", ns, "--name", "way", "--enroll-namespace", "--wait", "--timeout", "180s")
	do("waypoint", "status", "way", "-n", ns, "--wait", "--timeout", "120s")
	shows("namespace "+ns, "waypoint", "list", "-A")

	applyIn(t, ns, `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: inventory, namespace: NS}
spec:
  hosts: [inventory]
  http:
  - match: [{uri: {prefix: /old}}]
    directResponse: {status: 410}
  - route: [{destination: {host: inventory}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: stock, namespace: NS}
spec:
  targetRefs: [{kind: Service, name: inventory}]
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/NS/sa/client]}}]
    to: [{operation: {methods: [GET], paths: [/stock, /old/*]}}]
`)
	explained := func(pod, what string) (outcome, text string, took time.Duration) {
		start := time.Now()
		out, err := warren(t, "why", ns+"/"+pod, "inventory."+ns, "--path", what, "-o", "json")
		took = time.Since(start)
		var x struct{ Outcome string }
		if json.Unmarshal([]byte(out), &x) != nil {
			t.Fatal(err, out)
		}
		return x.Outcome, out, took
	}
	happens := func(pod, what string) (ok bool, status string) {
		out, err := mesh.Exec(ctx, ns, pod, "/demo", "load", "-n", "1", "-url", "http://inventory"+what)
		if err != nil {
			status = err.Error() + out
		}
		return err == nil, status
	}
	// Routes and policy are there once both are seen.
	must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
		_, route := happens("client", "/old/x")
		_, policy := happens("other", "/stock")
		if !strings.Contains(route, "410") || !strings.Contains(policy, "403") {
			return fmt.Errorf("the route or the policy is not there yet: %q, %q", route, policy)
		}
		return nil
	}))
	var took []float64
	asked, wrong := 0, 0
	for _, pod := range []string{"client", "other"} {
		for what, code := range map[string]string{"/stock": "403", "/other": "403", "/old/x": "410", "/stock/": "403"} {
			asked++
			outcome, text, d := explained(pod, what)
			took = append(took, float64(d.Milliseconds()))
			ok, status := happens(pod, what)
			if pod == "other" {
				code = "403"
			}
			if ok != (outcome == "allowed") || !ok && (!strings.Contains(status, code) || !strings.Contains(text, "with "+code)) {
				wrong++
				t.Errorf("%s asks for %s: explained as %s, answered %t, %s\n%s", pod, what, outcome, ok, status, text)
			}
		}
	}
	_, text, _ := explained("client", "/stock")
	for _, want := range []string{`"AuthorizationPolicy ` + ns + `/stock"`, "outbound|80|http|inventory." + ns, ns + "/inventory-1 at"} {
		if !strings.Contains(text, want) {
			t.Errorf("why does not say %q:\n%s", want, text)
		}
	}
	slices.Sort(took)
	record("why", "requests through a waypoint explained, and sent", asked, wrong, took[len(took)/2], "ms, the median explanation")
	t.Logf("explanations: median %.0f ms, slowest %.0f ms", took[len(took)/2], took[len(took)-1])

	way := ns + "/way"
	shows("outbound|80|http|inventory."+ns, "proxy-config", "clusters", way)
	shows("inbound-vip|80|http|inventory."+ns, "proxy-config", "listeners", way)
	shows("answer 410", "proxy-config", "routes", way)
	shows("healthy", "proxy-config", "endpoints", way, "--match", "inventory."+ns)
	shows("spiffe://cluster.local/ns/"+ns+"/sa/way", "proxy-config", "secrets", way)
	if out := do("proxy-config", "secrets", way, "-o", "json"); strings.Contains(out, "private_key") || strings.Contains(out, "PRIVATE") {
		t.Errorf("a key is shown:\n%s", out)
	}
	shows("yes, as spiffe://cluster.local/ns/"+ns+"/sa/inventory", "describe", "pod", ns+"/inventory-1")
	shows(ns+"/inventory-1", "describe", "service", "inventory."+ns)

	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := warren(t, "proxy-status")
		if err == nil && (strings.Count(out, "SYNCED") < len(nodes)+1 || !strings.Contains(out, ns+"/way-")) {
			err = errors.New(out)
		}
		return err
	}))
	shows("SYNCED", "proxy-status", nodes[0])
	shows("nothing is wrong with", "analyze", "--only", ns)

	noSecrets(t)

	if out, err := warren(t, "waypoint", "delete", "way", "-n", ns); err == nil || !strings.Contains(err.Error(), "asked for by namespace "+ns) {
		t.Errorf("a waypoint that is asked for is deleted: %v\n%s", err, out)
	}
	_, err := mesh.Kubectl(ctx, "-n", ns, "delete", "authorizationpolicy", "stock")
	must(t, err)
	do("waypoint", "delete", "way", "-n", ns, "--detach")
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if ok, status := happens("client", "/stock"); !ok {
			return errors.New(status)
		}
		return nil
	}))
}

// noSecrets looks in a sysdump for everything that is in a Secret of the cluster, and for keys.
func noSecrets(t *testing.T) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "dump.tar.gz")
	if out, err := warren(t, "sysdump", "-f", file); err != nil {
		t.Fatal(err, out)
	}
	out, err := mesh.Kubectl(t.Context(), "get", "secrets", "-A", "-o", "json")
	must(t, err)
	var list struct {
		Items []struct {
			Metadata struct{ Namespace, Name string }
			Data     map[string]string
		}
	}
	must(t, json.Unmarshal([]byte(out), &list))
	secret := map[string]string{"-----BEGIN PRIVATE KEY": "a key", "-----BEGIN EC PRIVATE KEY": "a key", "PRIVATE KEY-----": "a key"}
	for _, s := range list.Items {
		for k, v := range s.Data {
			plain, err := base64.StdEncoding.DecodeString(v)
			if err != nil || len(plain) < 16 || bytes.Contains(plain, []byte("BEGIN CERTIFICATE")) && !bytes.Contains(plain, []byte("PRIVATE")) {
				continue // certificates are public
			}
			name := s.Metadata.Namespace + "/" + s.Metadata.Name + ", " + k
			secret[v], secret[string(plain)] = name, name
			for line := range strings.Lines(string(plain)) { // also of a part of it
				if line = strings.TrimSpace(line); len(line) >= 32 && !strings.HasPrefix(line, "-----") && bytes.Contains(plain, []byte("PRIVATE")) && !bytes.Contains(plain, []byte("CERTIFICATE")) {
					secret[line] = name
				}
			}
		}
	}
	if len(secret) < 6 {
		t.Errorf("the cluster has no secrets that could be found: %d", len(secret))
	}
	f, err := os.Open(file)
	must(t, err)
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("others may read the sysdump: %v, %v", info.Mode(), err)
	}
	gz, err := gzip.NewReader(f)
	must(t, err)
	names := map[string]int{}
	missing := ""
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		b, err := io.ReadAll(tr)
		must(t, err)
		names[path.Base(h.Name)]++
		if path.Base(h.Name) == "missing.txt" {
			missing = string(b)
		}
		for s, name := range secret {
			if bytes.Contains(b, []byte(s)) {
				t.Errorf("%s has a secret in it: %s", h.Name, name)
			}
		}
	}
	for _, want := range []string{"check.json", "status.json", "nodes.yaml", "pods.txt", "daemonsets.yaml", "authorizationpolicies.security.istio.io.yaml",
		"config_dump.json", "mesh.json", "clusters.json", "metrics.txt", "goroutines.txt", "istio-proxy.log"} {
		if names[want] == 0 {
			t.Errorf("%s is not in the sysdump: %v\n%s", want, names, missing)
		}
	}
}

package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// servesModules has a pod serve the module of examples/wasm, and returns its SHA-256.
func servesModules(t *testing.T, ns string) string {
	t.Helper()
	ctx := t.Context()
	file := filepath.Join(mesh.Root(), "examples", "wasm", "teapot.wasm")
	b, err := os.ReadFile(file)
	must(t, err)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "create", "configmap", "modules", "--from-file="+file); err != nil {
		t.Fatal(err, out)
	}
	must(t, mesh.Apply(ctx, strings.NewReplacer("NS", ns, "IMAGE", lab.Image).Replace(`
apiVersion: v1
kind: Pod
metadata: {name: modules, namespace: NS, labels: {app: modules}}
spec:
  containers:
  - {name: files, image: IMAGE, imagePullPolicy: IfNotPresent, command: [/demo, files, -dir, /modules], volumeMounts: [{name: modules, mountPath: /modules}]}
  volumes: [{name: modules, configMap: {name: modules}}]
---
apiVersion: v1
kind: Service
metadata: {name: modules, namespace: NS}
spec: {selector: {app: modules}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)))
	if out, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Ready", "pod/modules", "--timeout=60s"); err != nil {
		t.Fatal(err, out)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// A waypoint and a gateway run a module that a pod serves, where its phase says beside a policy; what is not supported has
// requests refused.
func TestWasmPlugins(t *testing.T) {
	ns := behindWaypoint(t, "e2e-wasmplugins", 1, "client")
	ctx := t.Context()
	balance(t)
	digest := servesModules(t, ns)
	apply := func(spec string) {
		t.Helper()
		must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: extensions.istio.io/v1alpha1
kind: WasmPlugin
metadata: {name: teapot, namespace: %s}
spec: {%s}
`, ns, spec)))
	}
	from := fmt.Sprintf("url: http://modules.%s.svc.cluster.local/teapot.wasm, sha256: %s", ns, digest)
	atService := from + `, targetRefs: [{group: "", kind: Service, name: inventory}]`
	asked := func(path string) string {
		out, err := mesh.Exec(ctx, ns, "client", "/demo", "get", "http://inventory"+path)
		return out + fmt.Sprint(err)
	}
	apply(atService)
	enforced(t, ns, "wasmplugin/teapot")
	if out := asked("/teapot"); !strings.Contains(out, "short and stout") {
		t.Errorf("a waypoint does not run the module: %s", out)
	}
	if out := asked("/stock"); !strings.HasSuffix(out, "<nil>") {
		t.Errorf("what is not the module's: %s", out)
	}
	must(t, mesh.Apply(ctx, strings.ReplaceAll(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-teapots, namespace: NS}
spec: {targetRefs: [{kind: Service, name: inventory}], action: DENY, rules: [{to: [{operation: {paths: [/teapot]}}]}]}
`, "NS", ns)))
	enforced(t, ns, "authorizationpolicy/no-teapots")
	if out := asked("/teapot"); !strings.Contains(out, "403") || strings.Contains(out, "short and stout") {
		t.Errorf("a module without a phase comes before a policy: %s", out)
	}
	apply(atService + ", phase: AUTHZ")
	enforced(t, ns, "wasmplugin/teapot")
	must(t, lab.Eventually(ctx, time.Minute, func() error { // connections that are open keep what they had
		if out := asked("/teapot"); !strings.Contains(out, "short and stout") {
			return fmt.Errorf("a module before policies comes after one: %s", out)
		}
		return nil
	}))
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "authorizationpolicy/no-teapots"); err != nil {
		t.Fatal(err, out)
	}
	apply(`url: "file:///teapot.wasm", targetRefs: [{group: "", kind: Service, name: inventory}]`)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Accepted=false", "wasmplugin/teapot", "--timeout=60s"); err != nil {
		t.Fatal(err, out)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if out := asked("/stock"); !strings.Contains(out, "503") || !strings.Contains(out, "the module of WasmPlugin "+ns+"/teapot does not run") {
			return fmt.Errorf("without a module: %s", out)
		}
		return nil
	}))
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "wasmplugin/teapot"); err != nil {
		t.Fatal(err, out)
	}

	t.Run("gateway", func(t *testing.T) {
		address := edgeOf(t, ns, "inventory")
		outside{address: address}.becomes(t, "http://shop.example/stock", 200)
		for _, whom := range []string{
			`targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: edge}]`,
			`selector: {matchLabels: {gateway.networking.k8s.io/gateway-name: edge}}`,
		} {
			apply(from + ", match: [{mode: CLIENT}], " + whom)
			enforced(t, ns, "wasmplugin/teapot")
			answersWith(t, address, whom, "x-by", "wasm")
			if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "wasmplugin/teapot"); err != nil {
				t.Fatal(err, out)
			}
		}
	})
}

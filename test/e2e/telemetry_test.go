package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// setMesh has the mesh's configuration say more than it does, until the test ends.
func setMesh(t *testing.T, more string) {
	t.Helper()
	set := func(ctx context.Context, text string) error {
		patch, err := json.Marshal(map[string]any{"data": map[string]string{"mesh": text}})
		if err != nil {
			return err
		}
		_, err = mesh.Kubectl(ctx, "-n", lab.Namespace, "patch", "configmap", "istio", "--type=merge", "-p", string(patch))
		return err
	}
	was, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "get", "configmap", "istio", "-o", "jsonpath={.data.mesh}")
	must(t, err)
	must(t, set(t.Context(), strings.TrimSuffix(was, "\n")+"\n"+more))
	t.Cleanup(func() {
		if err := set(context.WithoutCancel(t.Context()), was); err != nil {
			t.Error(err)
		}
	})
}

// A collector of OpenTelemetry gets a waypoint's spans and logs, of both workloads, and only what is asked for.
func TestTelemetry(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	program, err := mesh.Peer(ctx, "collector")
	must(t, err)
	ns := behindWaypoint(t, "e2e-telemetry", 1, "client")
	must(t, mesh.RunCollector(ctx, program, ns, nodes[0]))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	setMesh(t, strings.ReplaceAll(`extensionProviders:
- {name: otel, opentelemetry: {service: collector.NS.svc.cluster.local, port: 4317}}
- {name: otel-logs, envoyOtelAls: {service: collector.NS.svc.cluster.local, port: 4317}}
`, "NS", ns))
	applyIn(t, ns, `
apiVersion: telemetry.istio.io/v1alpha1
kind: Telemetry
metadata: {name: all, namespace: NS}
spec:
  tracing: [{providers: [{name: otel}], randomSamplingPercentage: 100, customTags: {team: {literal: {value: blue}}}}]
  accessLogging: [{providers: [{name: otel-logs}], filter: {expression: "request.url_path.startsWith('/stock')"}}]
`)
	enforced(t, ns, "telemetry/all")
	call := func(path string) {
		t.Helper()
		if out, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "5", "-every", "5ms", "-url", "http://inventory"+path); err != nil {
			t.Log(err, out) // other paths are answered with 404
		}
	}
	call("/nothing-of-the-kind")
	call("/stock")
	var text string
	must(t, lab.Eventually(ctx, time.Minute, func() (err error) {
		if text, err = mesh.Kubectl(ctx, "-n", ns, "logs", "collector"); err != nil {
			return err
		}
		for _, want := range []string{
			"-> service.name: Str(way." + ns + ")", "-> team: Str(blue)", "-> istio.source_workload: Str(client)", "-> istio.source_namespace: Str(" + ns + ")",
			"-> istio.destination_workload: Str(inventory)", "-> istio.destination_namespace: Str(" + ns + ")",
			"-> istio.source_principal: Str(spiffe://cluster.local/ns/" + ns + "/sa/client)",
			"-> path: Str(/stock)", "-> source_workload: Str(client)", "-> destination_workload: Str(inventory)",
			"-> http.url: Str(http://inventory/nothing-of-the-kind)",
		} {
			if !strings.Contains(text, want) {
				return fmt.Errorf("the collector has not got %q in %.4000s", want, text)
			}
		}
		if strings.Contains(text, "-> path: Str(/nothing-of-the-kind)") {
			t.Error("a line that the filter excludes came")
		}
		return nil
	}))
	// The waypoint's line about a request and the node's about the connection that it came by name the same end of it.
	from := regexp.MustCompile(`-> tunnel_forwarded: Str\(for="([^"]+)"`).FindStringSubmatch(text)
	if from == nil {
		t.Fatal("the waypoint's lines do not say where requests come from")
	}
	must(t, lab.Eventually(ctx, 30*time.Second, func() error {
		lines, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "logs", "-l", lab.NodeApp, "--tail=2000")
		if err != nil {
			return err
		}
		for line := range strings.Lines(lines) {
			if strings.Contains(line, "src.addr="+from[1]+" ") && strings.Contains(line, "dst.service=inventory."+ns+".svc.cluster.local") && strings.Contains(line, "direction=outbound") {
				return nil
			}
		}
		return fmt.Errorf("no line of a node's about what comes from %s", from[1])
	}))
	way, err := mesh.Kubectl(ctx, "-n", ns, "logs", "-l", "gateway.networking.k8s.io/gateway-name=way", "--tail=-1")
	must(t, err)
	if strings.Contains(way, `"path":"/stock"`) {
		t.Error("the object names another provider, and lines are written to standard output as well")
	}

	// What means nothing is refused.
	if err := mesh.Apply(ctx, strings.ReplaceAll(`
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: bad, namespace: NS}
spec: {accessLogging: [{filter: {expression: "response.code >="}}]}
`, "NS", ns)); err == nil || !strings.Contains(err.Error(), "spec.accessLogging[0].filter.expression") {
		t.Errorf("a filter that is no expression: %v", err)
	}
}

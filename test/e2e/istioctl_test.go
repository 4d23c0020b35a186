package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// Istio's own command line, as Istio builds it, sees and changes this mesh: what docs/istioctl.md says works does.
func TestIstioctl(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	program, err := mesh.Peer(ctx, "istioctl")
	must(t, err)
	must(t, mesh.LoadWaypoint(ctx))
	ns := namespace(t, "e2e-istioctl", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]),
		lab.PodSpec{Namespace: ns, Name: "inventory-1", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}, Labels: map[string]string{"app": "inventory"}})
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: far, namespace: NS}
spec:
  selector: {matchLabels: {app: far}}
  rules: [{from: [{source: {principals: [cluster.local/ns/NS/sa/client, cluster.local/ns/NS/sa/way]}}]}]
`)

	istioctl := func(args ...string) (string, error) { return mesh.Program(ctx, program, args...) }
	asked, failed := 0, 0
	// shows waits until a command succeeds and all words stand in one line of what it prints, for each of the lines.
	shows := func(command string, lines ...string) string {
		t.Helper()
		asked++
		var out string
		err := lab.Eventually(ctx, time.Minute, func() error {
			var err error
			if out, err = istioctl(strings.Fields(command)...); err != nil {
				return err
			}
			for _, words := range lines {
				if !slices.ContainsFunc(strings.Split(out, "\n"), func(line string) bool {
					return !slices.ContainsFunc(strings.Fields(words), func(w string) bool { return !strings.Contains(line, w) })
				}) {
					return fmt.Errorf("no line with all of %q", words)
				}
			}
			return nil
		})
		if err != nil {
			failed++
			t.Errorf("istioctl %s: %v\n%s", command, err, out)
		}
		return out
	}

	// Waypoints.
	shows("waypoint apply -n "+ns+" --name way --enroll-namespace --wait --waypoint-timeout 180s", "waypoint "+ns+"/way applied", "waypoint "+ns+"/way is ready", "namespace "+ns+" labeled")
	must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
		_, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "1", "-url", "http://inventory/stock")
		return err
	}))
	shows("waypoint list -n "+ns, "way default True")
	shows("waypoint list -A", ns+" way True")
	shows("waypoint status -n "+ns, "way True Programmed")
	pods, err := mesh.Pods(ctx, ns, "gateway.networking.k8s.io/gateway-name=way")
	must(t, err)
	if len(pods) != 1 {
		t.Fatalf("pods of the waypoint: %+v", pods)
	}
	way := pods[0].Name + "." + ns

	// Versions of the control plane, of the nodes' agents and of the waypoint.
	shows("version", "client version:", "control plane version: dev", fmt.Sprintf("data plane version: dev (%d proxies)", len(nodes)+1))
	shows("version -o json", `"Component": "pilot"`, `"Type": "ztunnel"`, `"Type": "waypoint"`)

	// What was sent and acknowledged, over xDS.
	agent, err := agents(ctx)
	must(t, err)
	shows("proxy-status", agent[nodes[0]].Name+"."+lab.Namespace+" Kubernetes dev", agent[nodes[1]].Name+"."+lab.Namespace, way+" Kubernetes dev CDS,LDS,EDS,RDS")
	shows("proxy-status -n "+ns+" -v 1", way+" Kubernetes SYNCED")
	shows("proxy-status "+way, "Clusters Match", "Listeners Match", "Routes Match")
	if out, err := istioctl("proxy-status", way); err == nil && strings.Contains(out, "Don't") {
		t.Errorf("what Envoy has differs from what was sent:\n%s", out)
	}

	// What a node knows. Names of objects are Istio's only where compat.istioNames is set; the agents' pods can be named.
	node := func(n int) string { return agent[nodes[n]].Name + "." + lab.Namespace }
	shows("ztunnel-config workloads "+node(0), ns+" client "+nodes[0]+" HBONE", ns+" far "+nodes[1]+" HBONE")
	shows("ztunnel-config workloads daemonset/warren-node."+lab.Namespace, ns+" far "+nodes[1]+" HBONE")
	shows("ztunnel-config services "+node(0), ns+" inventory way 1/1")
	shows("ztunnel-config policies "+node(1), ns+" far Allow WorkloadSelector")
	shows("ztunnel-config certificates "+node(0), "spiffe://cluster.local/ns/"+ns+"/sa/client Leaf Available true", "spiffe://cluster.local/ns/"+ns+"/sa/client Root Available true")
	stop := loadUntil(t, ns, "client", "-rate", "0", "-hold", "2", "-for", "3m", "far:9000")
	shows("ztunnel-config connections "+node(0), "client."+ns+" Outbound far."+ns+" HBONE")
	shows("ztunnel-config connections "+node(1), "far."+ns+" Inbound HBONE")
	stop()
	shows("ztunnel-config all "+node(0)+" -o json", `"workloads"`, `"certificates"`)
	shows("ztunnel-config log "+node(0), "current log level is info")

	// What the waypoint's Envoy has.
	shows("proxy-config clusters "+way, "inventory."+ns+".svc.cluster.local 80")
	shows("proxy-config listeners "+way, "Route: inbound-vip|80|http|inventory."+ns)
	shows("proxy-config routes "+way, "inventory")
	shows("proxy-config endpoints "+way, "HEALTHY OK inventory."+ns+".svc.cluster.local")
	shows("proxy-config secret "+way, "default Cert Chain ACTIVE true")
	shows("proxy-config all "+way+" -o json", "ListenersConfigDump")
	shows("proxy-config bootstrap "+way, "WARREN_VERSION")
	shows("proxy-config log "+way, "active loggers")

	// Analysis, of the cluster and of a file with a mistake.
	shows("analyze -n " + ns)
	file := filepath.Join(t.TempDir(), "wrong.yaml")
	must(t, os.WriteFile(file, []byte(strings.ReplaceAll(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: wrong, namespace: NS}
spec: {hosts: [inventory], gateways: [mesh, nowhere], http: [{route: [{destination: {host: inventory, subset: v7}}]}]}
`, "NS", ns)), 0o600))
	asked++
	if out, err := istioctl("analyze", "-n", ns, file); err == nil || !strings.Contains(out, "IST0101") {
		failed++
		t.Errorf("a subset that is not there is not found: %v\n%s", err, out)
	}
	asked++
	if out, err := istioctl("analyze", "--use-kube=false", "-n", ns, file); err == nil || !strings.Contains(out, "IST0101") {
		failed++
		t.Errorf("a gateway that is not there is not found in the file alone: %v\n%s", err, out)
	}

	shows("waypoint delete way -n "+ns, "waypoint "+ns+"/way deleted")
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := istioctl("waypoint", "list", "-n", ns)
		if err == nil && !strings.Contains(out, "No waypoints found") {
			err = errors.New(out)
		}
		return err
	}))
	record("istioctl", "commands of Istio's own istioctl against this mesh", asked, failed, 0, "")
}

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

func onAPlugin(t *testing.T) {
	t.Helper()
	if *plugin == "" {
		t.Skip("needs a network plugin that enforces NetworkPolicies: give -cni=cilium (make test-cni does)")
	}
}

// To a network plugin the tunnel is a connection between the two pods: what a NetworkPolicy forbids stays forbidden, also to a pod of
// the same account as one that may, and the tunnel's port has to be among those that it lets in.
func TestNetworkPolicies(t *testing.T) {
	onAPlugin(t)
	ctx := t.Context()
	ns := namespace(t, "e2e-network-policies", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), client(ns, "stranger", nodes[0]), server(ns, "near", nodes[0]), server(ns, "far", nodes[1]))
	letIn := func(ports string) func() error {
		return func() error {
			return mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: servers, namespace: %s}
spec:
  podSelector: {matchExpressions: [{key: app, operator: In, values: [near, far]}]}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [%s]}]
`, ns, ports))
		}
	}
	type way struct{ from, to string }
	tried, wrong := 0, 0
	for _, c := range []struct {
		name   string
		change func() error
		may    map[way]bool
	}{
		{"none", func() error { return nil }, map[way]bool{{"client", "near"}: true, {"client", "far"}: true, {"stranger", "near"}: true, {"stranger", "far"}: true}},
		{"the client, with the tunnel's port", letIn("{port: 9000}, {port: 15008}"), map[way]bool{{"client", "near"}: true, {"client", "far"}: true}},
		{"the client, without it", letIn("{port: 9000}"), map[way]bool{{"client", "near"}: true}},
	} {
		must(t, c.change())
		for _, w := range []way{{"client", "near"}, {"client", "far"}, {"stranger", "near"}, {"stranger", "far"}} {
			err := lab.Eventually(ctx, 30*time.Second, func() error {
				_, err := mesh.Exec(ctx, ns, w.from, tcpcheck, "who", "-timeout", "3s", w.to+":9000")
				if (err == nil) != c.may[w] {
					return fmt.Errorf("%s lets %s reach %s: %v (%v), want %v", c.name, w.from, w.to, err == nil, err, c.may[w])
				}
				return nil
			})
			tried++
			if err != nil {
				wrong++
				t.Error(err)
			}
		}
	}
	record("network-plugins", *plugin+": NetworkPolicies and the tunnel", tried, wrong, 0, "")
}

// In a namespace that lets nothing in or out the mesh works with the NetworkPolicies that the chart brings, and not without them.
func TestMeshInANamespaceThatDenies(t *testing.T) {
	onAPlugin(t)
	ctx := t.Context()
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		mesh.Kubectl(ctx, "-n", lab.Namespace, "delete", "networkpolicy", "nothing", "--ignore-not-found")
		must(t, mesh.Install(ctx))
	})
	must(t, mesh.Apply(ctx, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nothing, namespace: `+lab.Namespace+`}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
`))
	if out, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "delete", "pod", "-l", "app=istiod"); err != nil {
		t.Fatal(err, out)
	}
	if _, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "rollout", "status", "deployment/warren-control", "--timeout=20s"); err == nil {
		t.Error("the control plane is ready where nothing is let in or out: the network plugin enforces nothing, and this test shows nothing")
	}
	must(t, mesh.Install(ctx, "networkPolicies.enabled=true"))
	ns := namespace(t, "e2e-denied-mesh", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	strict(t, ns) // which the control plane judges first
	must(t, lab.Eventually(ctx, 30*time.Second, func() error {
		_, err := mesh.Exec(ctx, ns, "client", tcpcheck, "who", "-timeout", "3s", "far:9000")
		return err
	}))
	record("network-plugins", *plugin+": the mesh's own NetworkPolicies in a namespace that denies", 1, 0, 0, "")
}

package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// ofRevision lists what there is of a control plane beside the mesh's.
func ofRevision(t *testing.T, rev string) string {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	out, err := mesh.Kubectl(ctx, "get", "deploy,svc,cm,sa,role,rolebinding,clusterrole,clusterrolebinding,pdb,pods,validatingwebhookconfigurations", "-A",
		"-l", "app.kubernetes.io/instance=warren-"+rev, "-o", "name")
	must(t, err)
	more, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "secrets", "-l", "owner=helm,name=warren-"+rev, "-o", "name")
	must(t, err)
	lease, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "leases", "warren-control-leader-"+rev, "--ignore-not-found", "-o", "name")
	must(t, err)
	pods, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "pods", "-l", "app=istiod,istio.io/rev="+rev, "-o", "name")
	must(t, err)
	return out + more + lease + pods
}

// A control plane of another revision joins the mesh. A waypoint goes over to it and back while requests go through it, by its own
// label, by its namespace's and by a tag; what is enforced there is said by both of them together, and neither is taken away while
// something needs it.
func TestRevisions(t *testing.T) {
	ns := behindWaypoint(t, "e2e-revisions", 2, "client", "stranger")
	ctx := t.Context()
	const rev = "next"
	say := func(args ...string) string {
		t.Helper()
		said, err := warrenSays(t, args...)
		if err != nil {
			t.Fatalf("warren %s: %v\n%s", strings.Join(args, " "), err, said)
		}
		return said
	}
	refused := func(want string, args ...string) {
		t.Helper()
		if said, err := warrenSays(t, args...); err == nil || !strings.Contains(said, want) {
			t.Errorf("warren %s is not refused with %q: %v\n%s", strings.Join(args, " "), want, err, said)
		}
	}
	becomes := func(what, path, want string) { t.Helper(); fieldBecomes(t, ns, what, path, want) }
	kubectl := func(args ...string) {
		t.Helper()
		if out, err := mesh.Kubectl(ctx, args...); err != nil {
			t.Fatal(err, out)
		}
	}
	t.Cleanup(func() {
		_, _ = mesh.Kubectl(context.WithoutCancel(ctx), "-n", lab.Namespace, "delete", "services", "-l", "istio.io/tag", "--ignore-not-found")
		if _, said, err := runWarren(context.WithoutCancel(ctx), t, "uninstall", "--revision", rev, "--force"); err != nil {
			t.Errorf("%v\n%s", err, said)
		}
	})

	before, err := mesh.Pods(ctx, lab.Namespace, "")
	must(t, err)
	root := field(t, lab.Namespace, "secret/istio-ca-secret", "{.metadata.uid}/{.metadata.resourceVersion}")
	refused("mesh.trustDomain", "install", "--revision", rev, "--set", "mesh.trustDomain=other.example")
	t.Log(say("install", "--revision", rev))
	after, err := mesh.Pods(ctx, lab.Namespace, "")
	must(t, err)
	there := map[string]bool{}
	for _, p := range after {
		there[p.UID] = true
	}
	for _, p := range before {
		if !there[p.UID] {
			t.Errorf("the pod %s of the mesh was replaced", p.Name)
		}
	}
	if len(after) != len(before)+1 {
		t.Errorf("there were %d pods, and are %d: a control plane is one", len(before), len(after))
	}
	if now := field(t, lab.Namespace, "secret/istio-ca-secret", "{.metadata.uid}/{.metadata.resourceVersion}"); now != root {
		t.Errorf("the root of trust was %s and is %s", root, now)
	}
	refused("goes first", "uninstall")

	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: clients, namespace: NS}
spec:
  targetRefs: [{group: "", kind: Service, name: inventory}]
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/NS/sa/client]}}]
`)
	enforced(t, ns, "authorizationpolicy/clients")
	const asks = `{.spec.template.spec.containers[0].env[?(@.name=="CONTROL_ADDRESS")].value}`
	stop := startRequests(t, ns, "client", "http://inventory/stock", float64(size(50, 200)))
	moves := 0
	// over waits until the waypoint is all of a revision, and the policy holds there.
	over := func(address string, next bool) {
		t.Helper()
		moves++
		becomes("deployment/way", asks, address)
		kubectl("-n", ns, "rollout", "status", "deployment/way", "--timeout=180s")
		must(t, lab.Eventually(ctx, 90*time.Second, func() error {
			rows, err := warren(t, "proxy-status")
			if err != nil {
				return err
			}
			for line := range strings.Lines(rows) {
				if strings.HasPrefix(line, ns+"/way-") && strings.Contains(line, "warren-control-next-") != next {
					return fmt.Errorf("told by another than %s: %s", address, line)
				}
			}
			return nil
		}))
		enforced(t, ns, "authorizationpolicy/clients")
		if moves > 1 {
			enforced(t, ns, "ratelimit/many")
		}
		if _, err := mesh.Exec(ctx, ns, "stranger", "/demo", "load", "-n", "1", "-url", "http://inventory/stock"); err == nil {
			t.Errorf("%s: a stranger is let in", address)
		}
	}
	theirs, ours := "istiod-next."+lab.Namespace+".svc:15012", "istiod."+lab.Namespace+".svc:15012"
	const part = `{.status.conditions[?(@.type=="warren.io/Enforced-next")].status}`

	kubectl("-n", ns, "label", "gateway.gateway.networking.k8s.io/way", "istio.io/rev="+rev)
	over(theirs, true)
	becomes("authorizationpolicy/clients", part, "True")
	becomes("deployment/way", `{.spec.template.metadata.labels.istio\.io/rev}`, rev)
	refused(ns+"/way", "uninstall", "--revision", rev)
	// What is asked for now is enforced by what the second control plane tells.
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: never, namespace: NS}
spec:
  targetRefs: [{group: "", kind: Service, name: inventory}]
  action: DENY
  rules: [{to: [{operation: {paths: [/never]}}]}]
---
apiVersion: policy.warren.io/v1alpha1
kind: RateLimit
metadata: {name: many, namespace: NS}
spec:
  targetRefs: [{kind: Service, name: inventory}]
  limits: [{requests: 100000, per: Second}]
`)
	enforced(t, ns, "authorizationpolicy/never", "ratelimit/many")
	if _, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "1", "-url", "http://inventory/never"); err == nil {
		t.Error("what is denied since the waypoint has gone over is not")
	}
	// A tag is another name for it, and goes back with whoever asks for the tag.
	say("tag", "set", "trial", "--revision", rev)
	kubectl("-n", ns, "label", "--overwrite", "gateway.gateway.networking.k8s.io/way", "istio.io/rev=trial")
	refused("trial", "uninstall", "--revision", rev)
	if out, err := warren(t, "tag", "list"); err != nil || !strings.Contains(out, ns+"/way") {
		t.Errorf("%v\n%s", err, out)
	}
	becomes("deployment/way", asks, theirs)
	say("tag", "set", "trial", "--revision", "default", "--overwrite")
	over(ours, false)
	becomes("authorizationpolicy/clients", part, "")
	kubectl("-n", ns, "label", "gateway.gateway.networking.k8s.io/way", "istio.io/rev-")
	say("tag", "remove", "trial")

	// The namespace's label is for those that have none.
	kubectl("label", "namespace", ns, "istio.io/rev="+rev)
	over(theirs, true)
	kubectl("label", "namespace", ns, "istio.io/rev-")
	over(ours, false)

	kubectl("-n", ns, "label", "gateway.gateway.networking.k8s.io/way", "istio.io/rev=nobody")
	becomes("gateway.gateway.networking.k8s.io/way", `{.status.conditions[?(@.type=="Programmed")].reason} {.status.conditions[?(@.type=="Programmed")].message}`, `RevisionNotFound nobody makes or configures it: it asks for "nobody"`)
	kubectl("-n", ns, "label", "gateway.gateway.networking.k8s.io/way", "istio.io/rev-")
	becomes("gateway.gateway.networking.k8s.io/way", `{.status.conditions[?(@.type=="Programmed")].status}`, "True")

	time.Sleep(2 * time.Second) // what ends ends after its successors are ready
	r := stop()
	t.Logf("%d moves of a waypoint to another control plane and back: %+v", moves, r)
	if r.Failed > 0 || r.Requests == 0 {
		t.Errorf("%d of %d requests failed: %v", r.Failed, r.Requests, r.Examples)
	}
	record("revision-moves", "revision-moves", r.Requests, r.Failed, float64(moves), fmt.Sprintf("moves of a waypoint to another control plane at %d requests/s", size(50, 200)))

	if *long {
		agentsAsk(t, ns, rev, say)
	}

	say("uninstall", "--revision", rev)
	if left := ofRevision(t, rev); left != "" {
		t.Errorf("left:\n%s", left)
	}
	if now := field(t, lab.Namespace, "secret/istio-ca-secret", "{.metadata.uid}/{.metadata.resourceVersion}"); now != root {
		t.Errorf("the root of trust was %s and is %s", root, now)
	}
}

// agentsAsk has the agent of one node ask another control plane, which tells it of the mesh and says of its pods what it reports.
func agentsAsk(t *testing.T, ns, rev string, say func(...string) string) {
	t.Helper()
	ctx := t.Context()
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		_, _ = mesh.Kubectl(ctx, "label", "node", nodes[0], "pool-")
		if err := mesh.Install(ctx); err != nil {
			t.Error(err)
		}
	})
	_, err := mesh.Kubectl(ctx, "label", "node", nodes[0], "pool=canary")
	must(t, err)
	say("upgrade", "--set", "node.canary.nodes=pool=canary", "--set", "node.canary.revision="+rev)
	must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
		rows, err := warren(t, "proxy-status")
		if err != nil {
			return err
		}
		for i, n := range nodes[:2] {
			if !slices.ContainsFunc(slices.Collect(strings.Lines(rows)), func(l string) bool {
				return strings.HasPrefix(l, n+" ") && strings.Contains(l, "warren-control-"+rev+"-") == (i == 0)
			}) {
				return fmt.Errorf("%s does not ask whom it is to ask:\n%s", n, rows)
			}
		}
		return nil
	}))
	must(t, mesh.Run(ctx, caller(ns, "late", nodes[0])))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	fieldBecomes(t, ns, "pod/late", `{.metadata.annotations.ambient\.istio\.io/redirection}`, "enabled")
	// It says what that node enforces, too.
	strict(t, ns)
	enforced(t, ns, "peerauthentication/default")
	fieldBecomes(t, ns, "peerauthentication/default", `{.status.conditions[?(@.type=="Enforced")].message}`, "(the control plane of revision "+rev+")")
	if out, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "20", "-url", "http://inventory/stock"); err != nil {
		t.Errorf("a client on %s: %v: %s", nodes[0], err, out)
	}
	if said, err := warrenSays(t, "uninstall", "--revision", rev); err == nil || !strings.Contains(said, "the agents of "+nodes[0]+" ask") {
		t.Errorf("a control plane is uninstalled that an agent asks: %v\n%s", err, said)
	}
	say("upgrade", "--reset-values")
}

// Package chart renders charts/warren with the helm that the test cluster uses, and holds it to what it
// promises: strict values, no rights for the agent, capabilities by name.
package chart

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/test/cluster"
)

const dir = "../../../charts/warren"

func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	bin, err := cluster.Binaries(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(bin, "helm"), args...).CombinedOutput()
	return string(out), err
}

func render(t *testing.T, set ...string) string {
	t.Helper()
	return renderChart(t, "warren", dir, "istio-system", set)
}

func renderChart(t *testing.T, release, chart, namespace string, set []string) string {
	t.Helper()
	args := []string{"template", release, chart, "-n", namespace}
	for _, s := range set {
		args = append(args, "--set", s)
	}
	out, err := helm(t, args...)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return out
}

// object returns the document of a kind and name.
func object(t *testing.T, all, kind, name string) string {
	t.Helper()
	for doc := range strings.SplitSeq(all, "\n---\n") {
		if strings.Contains(doc, "\nkind: "+kind+"\n") && strings.Contains(doc, "\n  name: "+name+"\n") {
			return doc
		}
	}
	t.Fatalf("no %s %s is rendered", kind, name)
	return ""
}

func TestLint(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", dir); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestUnknownValuesAreRejected(t *testing.T) {
	for _, v := range []string{"node.unknown=1", "nodeAgent.x=1", "control.replicas=0", "mesh.trustDomain=Not/A/Domain", "node.cni.binDir=relative"} {
		if out, err := helm(t, "template", "warren", dir, "--set", v); err == nil {
			t.Errorf("%s is accepted: %.200s", v, out)
		}
	}
}

func TestEveryDefinitionIsRendered(t *testing.T) {
	all := render(t)
	if n := strings.Count(all, "\nkind: CustomResourceDefinition\n"); n != 26 {
		t.Errorf("%d CustomResourceDefinitions are rendered, want 15 of Istio, 10 of the Gateway API and one of Warren", n)
	}
	if n := strings.Count(render(t, "crds.install=false"), "\nkind: CustomResourceDefinition\n"); n != 0 {
		t.Errorf("crds.install=false renders %d", n)
	}
}

func TestAgentPrivileges(t *testing.T) {
	all := render(t)
	agent := object(t, all, "DaemonSet", "warren-node")
	for _, want := range []string{"drop: [ALL]", "privileged: false", "automountServiceAccountToken: false", "readOnlyRootFilesystem: true"} {
		if !strings.Contains(agent, want) {
			t.Errorf("the agent lacks %q", want)
		}
	}
	if strings.Contains(agent, "SYS_RESOURCE") {
		t.Error("the agent asks for SYS_RESOURCE, which some machines do not have")
	}
	for doc := range strings.SplitSeq(all, "\n---\n") {
		if strings.Contains(doc, "Binding\n") && strings.Contains(doc, "name: warren-node") {
			t.Errorf("the agent has rights in the API:\n%s", doc)
		}
	}
}

func TestIstioNames(t *testing.T) {
	all := render(t, "compat.istioNames=true")
	object(t, all, "DaemonSet", "ztunnel")
	object(t, all, "Deployment", "istiod")
	object(t, render(t), "Service", "istiod")
}

// Nodes of canaries have one agent, and the others have one.
func TestCanaryNodes(t *testing.T) {
	all := render(t, "node.canary.nodes=example.org/pool=canary", "node.canary.tag=next", "image.tag=now", "node.nodeSelector.disk=fast",
		"node.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].key=arch",
		"node.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].operator=Exists")
	for name, lines := range map[string][]string{
		"warren-node":        {"matchLabels: {app: ztunnel}", "/node-agent:now", "- key: arch", "- key: example.org/pool", "operator: NotIn", "- canary", "disk: fast", "updateStrategy: {type: OnDelete}", "warren.io/canary-nodes: \"example.org/pool=canary\""},
		"warren-node-canary": {`matchLabels: {app: ztunnel, warren.io/canary: "true"}`, "/node-agent:next", "example.org/pool: canary", "disk: fast", "- key: arch"},
	} {
		set := object(t, all, "DaemonSet", name)
		for _, line := range lines {
			if !strings.Contains(set, line) {
				t.Errorf("%s lacks %q:\n%s", name, line, set)
			}
		}
		if isCanary := name != "warren-node"; strings.Contains(set, "NotIn") == isCanary || strings.Contains(set, "example.org/pool: canary") != isCanary {
			t.Errorf("%s is for other nodes:\n%s", name, set)
		}
	}
	all = render(t, "node.canary.nodes=pool=canary", "node.canary.revision=next")
	for name, asks := range map[string]string{"warren-node": "istiod.istio-system", "warren-node-canary": "istiod-next.istio-system"} {
		for _, variable := range []string{"XDS_ADDRESS", "CA_ADDRESS"} {
			if want := "{name: " + variable + `, value: "https://` + asks + `.svc:15012"}`; !strings.Contains(object(t, all, "DaemonSet", name), want) {
				t.Errorf("%s lacks %s", name, want)
			}
		}
	}
	if out, err := helm(t, "template", "warren", dir, "--set", "node.canary.revision=next"); err == nil || !strings.Contains(out, "node.canary.nodes says for which nodes") {
		t.Errorf("a revision for no node is taken: %v: %.300s", err, out)
	}
	if strings.Contains(render(t), "canary") {
		t.Error("there are canaries that nobody asked for")
	}
}

// A control plane beside the mesh's brings nothing that there is once in a mesh, and no name that the mesh's has.
func TestRevision(t *testing.T) {
	set := []string{"revision=next", "networkPolicies.enabled=true", "resourceQuotas.enabled=true", "securityContextConstraints.enabled=true", "node.canary.nodes=pool=canary"}
	all := renderChart(t, "warren-next", dir, "istio-system", set)
	names := map[string]bool{}
	for doc := range strings.SplitSeq("\n"+render(t, set[1:]...), "\n---") {
		names[kindAndName(doc)] = true
	}
	n := 0
	for doc := range strings.SplitSeq("\n"+all, "\n---") {
		what := kindAndName(doc)
		if what == "" {
			continue
		}
		n++
		if names[what] {
			t.Errorf("the mesh has a %s too", what)
		}
		if !strings.Contains(what, "next") {
			t.Errorf("%s does not say whose it is", what)
		}
		if strings.Contains(doc, "helm.sh/hook") {
			t.Errorf("%s is a hook", what)
		}
	}
	if n != 11 {
		t.Errorf("%d objects, want a Deployment, two Services, a ConfigMap, a ServiceAccount, two roles with their bindings, a budget and a NetworkPolicy", n)
	}
	control := object(t, all, "Deployment", "warren-control-next")
	for _, want := range []string{`{name: REVISION, value: "next"}`, `{name: ADMISSION, value: "false"}`, `matchLabels: {app: istiod, istio.io/rev: "next"}`, "serviceAccountName: warren-control-next"} {
		if !strings.Contains(control, want) {
			t.Errorf("it lacks %q:\n%s", want, control)
		}
	}
	role := object(t, all, "Role", "warren-control-next")
	if !strings.Contains(role, "resourceNames: [warren-control-leader-next]") || strings.Contains(role, "update, ") || strings.Count(role, "update") != 1 {
		t.Errorf("what it may write in its namespace is not its own Lease alone:\n%s", role)
	}
	if out, err := helm(t, "template", "warren", dir, "--set", "revision=next"); err == nil || !strings.Contains(out, "install it under another name, as warren-next") {
		t.Errorf("a second control plane takes the name of the mesh's release: %v: %.300s", err, out)
	}
	object(t, renderChart(t, "warren-next", dir, "istio-system", []string{"revision=next", "compat.istioNames=true"}), "Deployment", "istiod-next")
}

// kindAndName describes a document.
func kindAndName(doc string) string {
	kind, name := "", ""
	for line := range strings.Lines(doc) {
		if v, ok := strings.CutPrefix(line, "kind: "); ok && kind == "" {
			kind = strings.TrimSpace(v)
		}
		if v, ok := strings.CutPrefix(line, "  name: "); ok && name == "" {
			name = strings.TrimSpace(v)
		}
	}
	return strings.TrimSpace(kind + " " + name)
}

func TestAdmission(t *testing.T) {
	all := render(t)
	hook := object(t, all, "ValidatingWebhookConfiguration", "warren-validator")
	for _, want := range []string{
		"failurePolicy: Ignore", "timeoutSeconds: 3", "sideEffects: None", "matchPolicy: Equivalent", "apiGroups: [security.istio.io]",
		"service: {name: warren-control, namespace: istio-system, path: /validate, port: 443}",
	} {
		if !strings.Contains(hook, want) {
			t.Errorf("the webhook lacks %q", want)
		}
	}
	if strings.Contains(hook, "caBundle:") {
		t.Error("the chart sets caBundle, which an upgrade would take from the control plane")
	}
	for _, name := range []string{"warren-control", "istiod"} {
		if !strings.Contains(object(t, all, "Service", name), "{name: https-webhook, port: 443, targetPort: 15017}") {
			t.Errorf("Service %s has no port for the webhook", name)
		}
	}
	rights := object(t, all, "ClusterRole", "warren-control-istio-system")
	if !strings.Contains(rights, "resources: [validatingwebhookconfigurations]\n    resourceNames: [warren-validator]\n    verbs: [get, patch]") {
		t.Error("the right to write webhook configurations is not bound to one name")
	}
	without := render(t, "admission.enabled=false")
	for _, gone := range []string{"ValidatingWebhookConfiguration", "15017", "https-webhook"} {
		if strings.Contains(without, gone) {
			t.Errorf("admission.enabled=false renders %s", gone)
		}
	}
	if !strings.Contains(object(t, without, "Deployment", "warren-control"), `{name: ADMISSION, value: "false"}`) {
		t.Error("admission.enabled=false does not reach the control plane")
	}
}

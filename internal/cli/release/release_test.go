package release

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	helmcommon "helm.sh/helm/v4/pkg/release/common"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// What is rendered is ordered so that everything is there before what needs it.
func TestProfilesRender(t *testing.T) {
	agents := []string{
		"ServiceAccount istio-system/warren-holder", "ServiceAccount istio-system/warren-node",
		"DaemonSet istio-system/warren-holder", "DaemonSet istio-system/warren-node",
	}
	control := []string{
		"ServiceAccount istio-system/warren-control", "ConfigMap istio-system/istio",
		"ClusterRole warren-control-istio-system", "ClusterRoleBinding warren-control-istio-system",
		"Role istio-system/warren-control", "RoleBinding istio-system/warren-control",
		"Service istio-system/istiod", "Service istio-system/warren-control", "PodDisruptionBudget istio-system/warren-control",
		"Deployment istio-system/warren-control",
		"ValidatingAdmissionPolicy warren-namespaces", "ValidatingAdmissionPolicyBinding warren-namespaces",
		"ValidatingWebhookConfiguration warren-validator",
	}
	want := map[string][]string{"default": slices.Concat(agents, control), "ambient": slices.Concat(agents, control),
		"demo": slices.Concat(agents, control), "minimal": control, "empty": nil, "external": agents,
		"gke":       slices.Concat(agents, control, []string{"ResourceQuota istio-system/warren-critical-pods"}),
		"openshift": slices.Concat(agents, control, []string{"ClusterRole warren-privileged-istio-system", "RoleBinding istio-system/warren-privileged"})}
	for _, like := range []string{"eks", "k3d", "k3s", "kind", "microk8s", "minikube", "preview"} {
		want[like] = want["default"]
	}
	for _, name := range Profiles() {
		v, err := Sources{Profile: name}.Values(nil)
		if err != nil {
			t.Fatal(name, err)
		}
		r, err := Render(v, Target{Namespace: "istio-system", Version: "1.36"})
		if err != nil {
			t.Fatal(name, err)
		}
		var got []string
		definitions, last := 0, -1
		for _, o := range r.Objects {
			if rank(o) < last {
				t.Errorf("%s: %s comes too late", name, Describe(o))
			}
			if last = rank(o); o.GetKind() == "CustomResourceDefinition" {
				definitions++
				continue
			}
			got = append(got, Describe(o))
			if o.GetLabels()["app.kubernetes.io/part-of"] != "warren" {
				t.Errorf("%s: %s does not say that it is Warren's, and would stay when it is uninstalled", name, Describe(o))
			}
		}
		slices.Sort(got)
		w := slices.Sorted(slices.Values(want[name]))
		if d := cmp.Diff(w, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if n := map[bool]int{true: 0, false: 26}[name == "empty"]; definitions != n {
			t.Errorf("%s: %d definitions, want %d", name, definitions, n)
		}
		if len(r.Hooks) != 4 || r.Hooks[3].Kind != "Job" || r.Hooks[3].Events[0] != "pre-delete" {
			t.Errorf("%s: hooks %+v", name, r.Hooks)
		}
	}
}

func TestManifestIsReadBack(t *testing.T) {
	r, err := Render(nil, Target{Namespace: "mesh"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := Manifest(r.Objects)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(string(b))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(r.Objects, got); d != "" {
		t.Error(d)
	}
	if gone := Gone(r.Objects, got); len(gone) > 0 {
		t.Errorf("%d objects are gone", len(gone))
	}
	if gone := Gone(got, got[1:]); len(gone) != 1 || gone[0] != got[0] {
		t.Errorf("gone: %v", gone)
	}
}

func TestValuesThatAreWrongAreRefusedWithWhatWasMeant(t *testing.T) {
	for _, c := range []struct {
		s    Sources
		want string
	}{
		{Sources{Set: []string{"node.logLevl=debug"}}, "there is no value node.logLevl; did you mean node.logLevel?"},
		{Sources{Set: []string{"nod.logLevel=debug"}}, "there is no value nod; did you mean node?"},
		{Sources{Set: []string{"trustDomain=a.b"}}, "there is no value trustDomain; did you mean mesh.trustDomain?"},
		{Sources{Set: []string{"node.logLevel=degub"}}, `node.logLevel: "degub" is none of debug, info, warn, error; did you mean debug?`},
		{Sources{Set: []string{"control.replicas=none"}}, "control.replicas: got string, want integer"},
		{Sources{Set: []string{"control.replicas=10"}}, "control.replicas: maximum: got 10, want 9"},
		{Sources{Set: []string{"xyzzy=1"}}, "there is no value xyzzy; the chart has admission, besideIstio, ca,"},
		{Sources{Files: []File{{"my.yaml", []byte("mesh: {trustdomain: a}")}}}, "my.yaml: there is no value mesh.trustdomain; did you mean mesh.trustDomain?"},
		{Sources{Files: []File{{"my.yaml", []byte("- a")}}}, "reading values from my.yaml:"},
		{Sources{Profile: "dem"}, `there is no profile "dem"; did you mean demo?`},
		{Sources{Set: []string{"node"}}, "--set node:"},
	} {
		_, err := c.s.Values(nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.s, err, c.want)
		}
	}
}

func TestValuesGoOverEachOther(t *testing.T) {
	base := map[string]any{"mesh": map[string]any{"trustDomain": "old", "network": "n1"}}
	v, err := Sources{
		Profile: "demo",
		Files:   []File{{"a", []byte("mesh: {trustDomain: a.example}\nnode: {logLevel: warn}")}, {"b", []byte("mesh: {clusterID: b}")}},
		Set:     []string{"node.accessLog=false,control.replicas=2"}, SetString: []string{"node.env.LEVEL=1"},
	}.Values(base)
	if err != nil {
		t.Fatal(err)
	}
	node := v["node"].(map[string]any)
	got := fmt.Sprintf("%v %v %v %v", v["mesh"], node["logLevel"], node["accessLog"], node["env"])
	if want := "map[clusterID:b network:n1 trustDomain:a.example] warn false map[LEVEL:1]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if base["mesh"].(map[string]any)["trustDomain"] != "old" {
		t.Error("the base was changed")
	}
}

func TestRecordsAreHelms(t *testing.T) {
	ctx := t.Context()
	r := Records{Client: fake.NewClientset(), Namespace: "istio-system"}
	rendered, err := Render(map[string]any{"crds": map[string]any{"install": false}}, Target{Namespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		history, err := r.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && InForce(history).Version != i {
			t.Errorf("revision %d is in force, want %d", InForce(history).Version, i)
		}
		rec, err := r.Next(history, map[string]any{"n": i}, rendered)
		if err != nil {
			t.Fatal(err)
		}
		if i < 11 {
			rec.Chart, rec.Manifest = nil, "" // megabytes
		}
		if err := r.Put(ctx, rec); err != nil {
			t.Fatal(err)
		}
		if now, err := r.List(ctx); err != nil || !Interrupted(now) {
			t.Errorf("a revision that is under way does not count as such: %v", err)
		}
		if err := r.Deployed(ctx, history, rec, "done"); err != nil {
			t.Fatal(err)
		}
	}
	history, err := r.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(history) != kept || history[len(history)-1].Version != 12 || history[0].Info.Status != helmcommon.StatusSuperseded {
		t.Errorf("%d revisions, the last %d", len(history), history[len(history)-1].Version)
	}
	s, err := r.Client.CoreV1().Secrets("istio-system").Get(ctx, "sh.helm.release.v1.warren.v12", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if s.Type != "helm.sh/release.v1" || s.Labels["status"] != "deployed" || s.Labels["owner"] != "helm" || s.Labels["version"] != "12" {
		t.Errorf("type %s, labels %v", s.Type, s.Labels)
	}
	if len(s.Data["release"]) > 900_000 {
		t.Errorf("a record has %d bytes; a Secret holds 1 MiB", len(s.Data["release"]))
	}
	if err := r.Forget(ctx, history); err != nil {
		t.Fatal(err)
	}
	if history, err = r.List(ctx); err != nil || len(history) != 0 {
		t.Errorf("%d left, %v", len(history), err)
	}
}

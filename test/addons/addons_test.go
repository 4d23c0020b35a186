package addons

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/warrenmesh/warren/results"
)

// repository is its root.
func repository(t *testing.T) string {
	t.Helper()
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func objects(t *testing.T, name string) []runtime.Object {
	t.Helper()
	all, err := Objects(repository(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

var pinned = regexp.MustCompile(`^[a-z.]+/[a-z/-]+:v?\d+(\.\d+)+$`)

// One kubectl apply installs each: all of it is known to Kubernetes, in the mesh's namespace, of named versions, and outside of
// capture; what pods mount is there.
func TestManifests(t *testing.T) {
	files, err := filepath.Glob(File(repository(t), "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".yaml")
		if !slices.Contains(Names, name) && name != "tracing-values" {
			t.Errorf("%s is tested by nobody", f)
		}
	}
	for _, name := range Names {
		all := objects(t, name)
		maps := map[string]bool{}
		for _, o := range all {
			m, err := meta.Accessor(o)
			if err != nil {
				t.Fatal(err)
			}
			kind := o.GetObjectKind().GroupVersionKind().Kind
			if strings.HasPrefix(kind, "ClusterRole") != (m.GetNamespace() == "") || m.GetNamespace() != "" && m.GetNamespace() != "istio-system" {
				t.Errorf("%s: %s %s is in the namespace %q", name, kind, m.GetName(), m.GetNamespace())
			}
			if _, ok := o.(*corev1.ConfigMap); ok {
				maps[m.GetName()] = true
			}
		}
		pods := 0
		for _, o := range all {
			t1 := Template(o)
			if t1 == nil {
				continue
			}
			pods++
			if t1.Labels["istio.io/dataplane-mode"] != "none" {
				t.Errorf("%s: its pods may be captured, and what they scrape or receive is outside of the mesh", name)
			}
			for _, c := range t1.Spec.Containers {
				if !pinned.MatchString(c.Image) {
					t.Errorf("%s: the image %s is of no version", name, c.Image)
				}
				if c.Resources.Requests.Memory().IsZero() || c.ReadinessProbe == nil {
					t.Errorf("%s: %s has no request of memory or no readiness probe", name, c.Name)
				}
			}
			for _, v := range t1.Spec.Volumes {
				if v.ConfigMap != nil && !maps[v.ConfigMap.Name] {
					t.Errorf("%s: the ConfigMap %s is not in the manifest", name, v.ConfigMap.Name)
				}
			}
		}
		if pods != 1 {
			t.Errorf("%s has %d kinds of pods", name, pods)
		}
	}
}

// Every alert says what is wrong and what to do, and has a figure that can be looked at while nothing is wrong.
func TestAlerts(t *testing.T) {
	rules, err := Rules(objects(t, "prometheus"))
	if err != nil {
		t.Fatal(err)
	}
	alerts := 0
	for _, r := range rules {
		if r.Record != "" {
			continue
		}
		alerts++
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" || r.Labels["severity"] != "warning" && r.Labels["severity"] != "critical" {
			t.Errorf("%s lacks a summary, a description or a severity", r.Alert)
		}
		if _, ok := r.Compared(); !ok && !strings.HasPrefix(r.Expr, "absent(") {
			t.Errorf("%s has neither the form FIGURE > LIMIT nor absent(): %s", r.Alert, r.Expr)
		}
	}
	if alerts < 10 || alerts == len(rules) {
		t.Errorf("%d alerts of %d rules", alerts, len(rules))
	}
}

// The values that name the providers name those that the Telemetry objects ask for.
func TestTracingValues(t *testing.T) {
	values, err := os.ReadFile(File(repository(t), "tracing-values"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"zipkin", "jaeger"} {
		asked := false
		for _, o := range objects(t, name) {
			if s, ok := o.(*corev1.Service); ok && strings.Contains(string(values), s.Name+".istio-system.svc.cluster.local") {
				asked = true
			}
		}
		if !asked || !strings.Contains(string(values), "{name: "+name+",") {
			t.Errorf("tracing-values.yaml does not name %s and its Service", name)
		}
	}
}

// The dashboards are made; each has queries.
func TestDashboards(t *testing.T) {
	all, err := Queries(objects(t, "grafana"))
	if err != nil {
		t.Fatal(err)
	}
	boards := map[string]int{}
	for _, q := range all {
		boards[q.Dashboard]++
		if strings.Contains(q.Plain(), "$") {
			t.Errorf("%s: a variable is left: %s", q.Name(), q.Plain())
		}
	}
	if len(boards) != 6 {
		t.Errorf("dashboards and their queries: %v", boards)
	}
}

// Package addons reads the manifests of samples/addons: their objects, the queries of the dashboards and the rules of the
// alerts, for the tests that hold them against Kubernetes' types and against a Prometheus. It knows nothing of clusters.
package addons

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
	serializer "k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Names are the add-ons, each in a file of its own.
var Names = []string{"fluent-bit", "grafana", "jaeger", "kiali", "prometheus", "zipkin"}

// File is an add-on's manifest in the repository at root.
func File(root, name string) string { return filepath.Join(root, "samples", "addons", name+".yaml") }

// Objects are those of an add-on's manifest. A field that Kubernetes does not know is an error.
func Objects(root, name string) ([]runtime.Object, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, rbacv1.AddToScheme, telemetryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	strict := serializer.NewSerializerWithOptions(serializer.DefaultMetaFactory, scheme, scheme, serializer.SerializerOptions{Yaml: true, Strict: true})
	b, err := os.ReadFile(File(root, name))
	if err != nil {
		return nil, err
	}
	var out []runtime.Object
	docs := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(b)))
	for i := 1; ; i++ {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		o, _, err := strict.Decode(doc, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("%s.yaml, document %d: %w", name, i, err)
		}
		out = append(out, o)
	}
}

// Template is the pod template of a Deployment or a DaemonSet, nil of others.
func Template(o runtime.Object) *corev1.PodTemplateSpec {
	switch o := o.(type) {
	case *appsv1.Deployment:
		return &o.Spec.Template
	case *appsv1.DaemonSet:
		return &o.Spec.Template
	}
	return nil
}

// Data is what a ConfigMap of the objects holds, nil where it is not there.
func Data(objects []runtime.Object, configMap string) map[string]string {
	for _, o := range objects {
		if c, ok := o.(*corev1.ConfigMap); ok && c.Name == configMap {
			return c.Data
		}
	}
	return nil
}

// Query is an expression that a panel or a choice of a dashboard shows.
type Query struct {
	Dashboard, Panel string
	Expr             string // with Grafana's variables
	Label            string // of a choice: the label whose values it offers
}

// Name tells queries apart.
func (q Query) Name() string { return q.Dashboard + ": " + q.Panel + ": " + q.Expr }

var (
	labelValues = regexp.MustCompile(`^label_values\((.*), *(\w+)\)$`)
	variable    = regexp.MustCompile(`\$(\w+)`)
)

// Plain is the expression as Grafana sends it where everything is chosen and a step is short.
func (q Query) Plain() string {
	return variable.ReplaceAllStringFunc(q.Expr, func(v string) string {
		if v == "$__rate_interval" {
			return "1m"
		}
		return ".*"
	})
}

// Queries are those of the dashboards in Grafana's manifest.
func Queries(objects []runtime.Object) ([]Query, error) {
	var out []Query
	for file, text := range Data(objects, "grafana-dashboards") {
		var d struct {
			UID, Title string
			Templating struct {
				List []struct{ Name, Type, Definition string }
			}
			Panels []struct {
				Title, Type string
				Targets     []struct{ Expr string }
			}
		}
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if d.UID+".json" != file || d.Title == "" {
			return nil, fmt.Errorf("%s is the dashboard %s, %q", file, d.UID, d.Title)
		}
		for _, v := range d.Templating.List {
			if v.Type != "query" {
				continue
			}
			m := labelValues.FindStringSubmatch(v.Definition)
			if m == nil {
				return nil, fmt.Errorf("%s: the choice %s is no label_values(metric, label): %s", file, v.Name, v.Definition)
			}
			out = append(out, Query{Dashboard: d.UID, Panel: "choice " + v.Name, Expr: m[1], Label: m[2]})
		}
		for _, p := range d.Panels {
			if p.Type != "row" && len(p.Targets) == 0 {
				return nil, fmt.Errorf("%s: the panel %q asks nothing", file, p.Title)
			}
			for _, t := range p.Targets {
				out = append(out, Query{Dashboard: d.UID, Panel: p.Title, Expr: t.Expr})
			}
		}
	}
	return out, nil
}

// Rule is a recording or alerting rule.
type Rule struct {
	Alert, Record, Expr, For string
	Labels, Annotations      map[string]string
}

// Name is what Prometheus calls it.
func (r Rule) Name() string { return r.Alert + r.Record }

var comparison = regexp.MustCompile(`(?s)^(.*) [<>] [\d.]+$`)

// Compared is what an alert compares with its limit, which has a value also while nothing is wrong; false where the
// alert has another form.
func (r Rule) Compared() (string, bool) {
	m := comparison.FindStringSubmatch(strings.TrimSpace(r.Expr))
	if m == nil {
		return "", false
	}
	return m[1], true
}

// Rules are those of Prometheus' manifest.
func Rules(objects []runtime.Object) ([]Rule, error) {
	var out []Rule
	data := Data(objects, "prometheus")
	if err := yaml.Unmarshal([]byte(data["prometheus.yml"]), &struct{}{}); err != nil {
		return nil, fmt.Errorf("prometheus.yml: %w", err)
	}
	for _, file := range []string{"recording.yml", "alerts.yml"} {
		var f struct{ Groups []struct{ Rules []Rule } }
		if err := yaml.Unmarshal([]byte(data[file]), &f); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		for _, g := range f.Groups {
			out = append(out, g.Rules...)
		}
	}
	return out, nil
}

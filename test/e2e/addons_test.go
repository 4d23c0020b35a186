package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/warrenmesh/warren/test/addons"
	"github.com/warrenmesh/warren/test/e2e/lab"
)

// The API server takes the manifest of every add-on as it is, and its pods under the pod security standard `restricted`.
func TestAddonsAreAdmitted(t *testing.T) {
	ns := namespace(t, "e2e-restricted", "pod-security.kubernetes.io/enforce=restricted")
	for _, name := range addons.Names {
		if out, err := mesh.Kubectl(t.Context(), "apply", "--dry-run=server", "--validate=strict", "-f", addons.File(mesh.Root(), name)); err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		objects, err := addons.Objects(mesh.Root(), name)
		must(t, err)
		for _, o := range objects {
			template := addons.Template(o)
			if template == nil {
				continue
			}
			pod, err := json.Marshal(corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec})
			must(t, err)
			var manifest object
			must(t, json.Unmarshal(pod, &manifest))
			manifest["apiVersion"], manifest["kind"] = "v1", "Pod"
			manifest["metadata"].(object)["name"] = name
			manifest["spec"].(object)["serviceAccountName"] = "default"
			file := filepath.Join(t.TempDir(), name+".json")
			text, err := json.Marshal(manifest)
			must(t, err)
			must(t, os.WriteFile(file, text, 0o600))
			_, err = mesh.Kubectl(t.Context(), "-n", ns, "create", "--dry-run=server", "-f", file)
			switch {
			case name == "fluent-bit": // reads the node's logs, which belong to root
				if err == nil || !strings.Contains(err.Error(), "restricted volume types") {
					t.Errorf("%s, which reads a directory of the node, is admitted as restricted: %v", name, err)
				}
			case err != nil:
				t.Errorf("%s is not admitted as restricted: %v", name, err)
			}
		}
	}
}

// emptyInHealth are queries that have no series while nothing goes wrong, by a part of their expression, and why.
var emptyInHealth = map[string]string{
	"warren_ca_refused_total":   "the CA has refused nobody",
	"warren_tls_failures_total": "nobody has failed to prove who it is",
}

// provoked are the alerts that the test's traffic raises, a part of which fails on purpose.
var provoked = []string{"WarrenConnectionsFail", "WarrenRequestsFail"}

// The Prometheus of samples/addons, with its configuration, rules, rights and security context, finds all parts of the mesh;
// every query of every dashboard and the figure of every alert has a value after traffic, and no alert is raised but those
// about traffic that fails.
func TestAddonsOverLiveData(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	program, err := mesh.Peer(ctx, "prometheus")
	must(t, err)
	must(t, mesh.LoadWaypoint(ctx))
	prometheus, err := addons.Objects(mesh.Root(), "prometheus")
	must(t, err)
	must(t, runAddon(t, program, prometheus))

	ns := namespace(t, "e2e-addons", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]), lab.PodSpec{Namespace: ns, Name: "stranger", Account: "stranger", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "inventory-1", Account: "inventory", Node: nodes[1], Args: []string{"inventory"}, Labels: map[string]string{"app": "inventory"}})
	applyIn(t, ns, aWaypoint)
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS, labels: {istio.io/use-waypoint: way}}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: inventory, namespace: NS}
spec:
  parentRefs: [{group: "", kind: Service, name: inventory}]
  rules:
    - {matches: [{path: {type: PathPrefix, value: /broken}}], backendRefs: [{name: nobody, port: 80}]}
    - backendRefs: [{name: inventory, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: nobody, namespace: NS}
spec: {selector: {app: nobody}, ports: [{name: http, port: 80, targetPort: 8080}]}
`)
	must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
		_, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", "1", "-url", "http://inventory/stock")
		return err
	}))

	// Traffic until the queries have been asked: requests and connections that are answered, and some that fail.
	traffic, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for traffic.Err() == nil {
			_, _ = mesh.Exec(traffic, ns, "client", "/demo", "load", "-n", "100", "-every", "10ms", "-url", "http://inventory/stock")
			_, _ = mesh.Exec(traffic, ns, "client", "/demo", "load", "-n", "1", "-url", "http://inventory/broken")
			_, _ = mesh.Exec(traffic, ns, "stranger", "/demo", "tcp-dial", "-timeout", "1s", "far:9000")
			_, _ = mesh.Exec(traffic, ns, "client", "/demo", "tcp-dial", "-timeout", "1s", "far:9000")
			_, _ = mesh.Exec(traffic, ns, "client", "/demo", "tcp-dial", "-timeout", "1s", "far:9")
		}
	}()
	defer func() { stop(); <-ended }()

	ask := func(path string, query url.Values, data any) error {
		return mesh.AskPrometheus(ctx, lab.Namespace, path, query, data)
	}
	// Conditions are written while it is scraped.
	must(t, lab.Eventually(ctx, 2*time.Minute, func() error { return targetsUp(ask) }))
	asked := time.Now()
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: far, namespace: NS}
spec:
  selector: {matchLabels: {app: far}}
  rules: [{from: [{source: {principals: [cluster.local/ns/NS/sa/client]}}]}]
`)

	// What Prometheus has of the rules is what the file says, and it can evaluate them.
	want, err := addons.Rules(prometheus)
	must(t, err)
	var rules struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError, State string }
		}
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		rules.Groups = nil
		if err := ask("rules", nil, &rules); err != nil {
			return err
		}
		n := 0
		for _, g := range rules.Groups {
			for _, r := range g.Rules {
				n++
				if r.Health != "ok" {
					return fmt.Errorf("%s is %s: %s", r.Name, r.Health, r.LastError)
				}
			}
		}
		if n != len(want) {
			return fmt.Errorf("%d rules, want %d", n, len(want))
		}
		return nil
	}))

	// Everything that can be asked.
	objects, err := addons.Objects(mesh.Root(), "grafana")
	must(t, err)
	queries, err := addons.Queries(objects)
	must(t, err)
	missing := map[string]string{} // by query
	type question struct{ name, expr, label string }
	var questions []question
	for _, q := range queries {
		questions = append(questions, question{q.Name(), q.Plain(), q.Label})
	}
	for _, r := range want {
		expr := r.Expr
		if r.Alert != "" {
			var ok bool
			if expr, ok = r.Compared(); !ok {
				continue // absent(...) is empty in health
			}
		}
		questions = append(questions, question{r.Name(), expr, ""}, question{"series of " + r.Name(), r.Record, ""})
	}
	questions = slices.DeleteFunc(questions, func(q question) bool { return q.expr == "" })
	_ = lab.Eventually(ctx, 3*time.Minute, func() error {
		clear(missing)
		for _, q := range questions {
			var data struct{ Result json.RawMessage }
			if err := ask("query", url.Values{"query": {q.expr}}, &data); err != nil {
				missing[q.name] = err.Error()
				continue
			}
			var found []series
			if strings.HasPrefix(string(data.Result), "[{") {
				must(t, json.Unmarshal(data.Result, &found))
			}
			if len(found) == 0 && string(data.Result) == "[]" {
				missing[q.name] = "empty: " + q.expr
			}
			if q.label != "" && len(found) > 0 && found[0].Metric[q.label] == "" {
				missing[q.name] = "no label " + q.label
			}
		}
		for name, why := range missing {
			if !excused(name + why) {
				return errors.New(name)
			}
		}
		return nil
	})
	t.Logf("%d queries asked, all answered %s after Prometheus was there", len(questions), time.Since(asked).Round(time.Second))
	for name, why := range missing {
		if !excused(name + why) {
			t.Errorf("%s: %s", name, why)
		}
	}
	record("addons", "queries of dashboards and alerts that have a value after traffic", len(questions), len(missing), time.Since(asked).Seconds(), "s after Prometheus started")

	must(t, lab.Eventually(ctx, time.Minute, func() error {
		rules.Groups = nil
		if err := ask("rules", nil, &rules); err != nil {
			return err
		}
		var raised []string
		for _, g := range rules.Groups {
			for _, r := range g.Rules {
				if r.State == "firing" || r.State == "pending" {
					raised = append(raised, r.Name)
				}
			}
		}
		if slices.Sort(raised); !slices.Equal(raised, provoked) {
			return fmt.Errorf("alerts are raised: %v, want %v", raised, provoked)
		}
		return nil
	}))
}

func excused(query string) bool {
	for part := range emptyInHealth {
		if strings.Contains(query, part) {
			return true
		}
	}
	return false
}

// targetsUp reports what of the mesh is not scraped.
func targetsUp(ask func(string, url.Values, any) error) error {
	var targets struct {
		ActiveTargets []struct {
			Labels            map[string]string
			Health, LastError string
		}
	}
	if err := ask("targets", url.Values{"state": {"active"}}, &targets); err != nil {
		return err
	}
	up := map[string]int{}
	for _, s := range targets.ActiveTargets {
		if s.Labels["job"] != "warren" {
			continue
		}
		if s.Health != "up" {
			return fmt.Errorf("%v is %s: %s", s.Labels, s.Health, s.LastError)
		}
		up[s.Labels["app"]+s.Labels["gateway_networking_k8s_io_gateway_name"]]++
	}
	if up["ztunnel"] != len(nodes) || up["istiod"] != 1 || up["way"] != 1 {
		return fmt.Errorf("targets that are up: %v", up)
	}
	return nil
}

// runAddon applies an add-on whose image cannot be had here, with the program on the disk of a node in place of it, and
// takes it away in the end. Everything else stays as it is.
func runAddon(t *testing.T, program string, objects []runtime.Object) error {
	t.Helper()
	dir, err := mesh.OnDisk(program, nodes[1])
	if err != nil {
		return err
	}
	var list []any
	for _, o := range objects {
		if template := addons.Template(o); template != nil {
			c := &template.Spec.Containers[0]
			c.Image, c.ImagePullPolicy = lab.Image, corev1.PullIfNotPresent
			c.Command = []string{dir + "/" + filepath.Base(program)}
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "program", MountPath: dir})
			template.Spec.Volumes = append(template.Spec.Volumes, corev1.Volume{Name: "program",
				VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: dir}}})
			template.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": nodes[1]}
		}
		list = append(list, o)
	}
	text, err := json.Marshal(object{"apiVersion": "v1", "kind": "List", "items": list})
	if err != nil {
		return err
	}
	t.Cleanup(func() {
		if _, err := mesh.Kubectl(context.WithoutCancel(t.Context()), "delete", "--ignore-not-found", "-f", addons.File(mesh.Root(), "prometheus")); err != nil {
			t.Error(err)
		}
	})
	if err := mesh.Apply(t.Context(), string(text)); err != nil {
		return err
	}
	return mesh.Rollout(t.Context(), lab.Namespace, "deployment/prometheus")
}

package release

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	kjson "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"
)

// apiServer is what a version of Kubernetes takes.
type apiServer struct {
	version string
	valid   func(o *unstructured.Unstructured) error
}

// foreign are the kinds that are of no version of Kubernetes.
var foreign = map[string]bool{"SecurityContextConstraints": true}

// apiServers are those whose OpenAPI description there is, and the newest one, of which there are the types alone.
func apiServers(t *testing.T) []apiServer {
	t.Helper()
	files, err := filepath.Glob("testdata/kubernetes-1.*.json")
	if err != nil || len(files) != 4 {
		t.Fatalf("the descriptions of 1.33 to 1.36 are wanted, there are %v (%v)", files, err)
	}
	var out []apiServer
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var index struct{ Kinds map[string]string }
		if err := json.Unmarshal(b, &index); err != nil {
			t.Fatal(f, err)
		}
		doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
		if err != nil {
			t.Fatal(f, err)
		}
		c := jsonschema.NewCompiler()
		if err := c.AddResource("k8s.json", doc); err != nil {
			t.Fatal(f, err)
		}
		out = append(out, apiServer{strings.TrimSuffix(strings.TrimPrefix(filepath.Base(f), "kubernetes-"), ".json"), func(o *unstructured.Unstructured) error {
			at, ok := index.Kinds[o.GetAPIVersion()+"/"+o.GetKind()]
			if !ok {
				return fmt.Errorf("there is no %s %s", o.GetAPIVersion(), o.GetKind())
			}
			s, err := c.Compile("k8s.json" + at)
			if err != nil {
				return err
			}
			b, err := o.MarshalJSON()
			if err != nil {
				return err
			}
			v, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
			if err != nil {
				return err
			}
			return s.Validate(v)
		}})
	}
	strict := kjson.NewSerializerWithOptions(kjson.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, kjson.SerializerOptions{Strict: true})
	return append(out, apiServer{strings.TrimSuffix(strings.TrimPrefix(newest, "v"), ".0"), func(o *unstructured.Unstructured) error {
		b, err := o.MarshalJSON()
		if err != nil {
			return err
		}
		_, _, err = strict.Decode(b, nil, nil)
		if runtime.IsNotRegisteredError(err) && o.GetKind() == "CustomResourceDefinition" {
			return nil // those types are not the client's
		}
		return err
	}})
}

// everything enables what no profile does.
var everything = map[string]any{
	"compat":          map[string]any{"istioNames": true},
	"image":           map[string]any{"pullSecrets": []any{"registry"}},
	"networkPolicies": map[string]any{"enabled": true},
	"node":            map[string]any{"canary": map[string]any{"nodes": "pool=canary", "revision": "next"}},
}

// beside is a control plane beside the mesh's, besideIstio one beside Istio's.
const (
	beside      = "(a second control plane)"
	besideIstio = "(beside an Istio)"
)

func TestEveryVersionOfKubernetesTakesTheChart(t *testing.T) {
	for _, s := range apiServers(t) {
		n, seen := 0, map[string]bool{} // most profiles share most objects
		for _, name := range append(Profiles(), "", beside, besideIstio) {
			v := everything
			switch name {
			case "":
			case beside:
				v = merge(clone(everything), map[string]any{"revision": "next"})
			case besideIstio:
				v = merge(clone(everything), map[string]any{"besideIstio": map[string]any{"enabled": true}, "compat": map[string]any{"istioNames": false}})
			default:
				var err error
				if v, err = (Sources{Profile: name}).Values(nil); err != nil {
					t.Fatal(name, err)
				}
			}
			r, err := Render(v, Target{Namespace: "istio-system", Version: s.version})
			if err != nil {
				t.Fatal(name, err)
			}
			objects := r.Objects
			for _, h := range r.Hooks {
				o, err := Parse(h.Manifest)
				if err != nil {
					t.Fatal(name, err)
				}
				objects = append(objects, o...)
			}
			for _, o := range objects {
				if foreign[o.GetKind()] {
					continue
				}
				b, err := o.MarshalJSON()
				if err != nil {
					t.Fatal(err)
				}
				if n++; seen[string(b)] {
					continue
				}
				seen[string(b)] = true
				if err := s.valid(o); err != nil {
					t.Errorf("Kubernetes %s, profile %q: %s: %v", s.version, name, Describe(o), err)
				}
			}
		}
		if n < 300 {
			t.Errorf("Kubernetes %s: only %d objects were looked at", s.version, n)
		}
	}
}

// What no API server takes, none of them does here.
func TestWhatKubernetesDoesNotTakeIsFound(t *testing.T) {
	for what, manifest := range map[string]string{
		"a field that is not there": `{"apiVersion":"apps/v1","kind":"DaemonSet","metadata":{"name":"x"},"spec":{"selector":{},"template":{"spec":{"containers":[{"name":"c","imagePullPolice":"Always"}]}}}}`,
		"a number for a word":       `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"x"},"data":{"a":1}}`,
		"a kind that is gone":       `{"apiVersion":"policy/v1beta1","kind":"PodSecurityPolicy","metadata":{"name":"x"}}`,
		"a word for a list":         `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"x"},"spec":{"podSelector":{},"ingress":"all"}}`,
	} {
		o := &unstructured.Unstructured{}
		if err := o.UnmarshalJSON([]byte(manifest)); err != nil {
			t.Fatal(err)
		}
		for _, s := range apiServers(t) {
			if s.valid(o) == nil {
				t.Errorf("Kubernetes %s is said to take %s", s.version, what)
			}
		}
	}
}

// Who denies by default and lets in what the policies name has a control plane that works: every port of its is named.
func TestNetworkPoliciesNameEveryPort(t *testing.T) {
	for _, admission := range []bool{true, false} {
		r, err := Render(map[string]any{"networkPolicies": map[string]any{"enabled": true}, "admission": map[string]any{"enabled": admission}}, Target{Namespace: "istio-system"})
		if err != nil {
			t.Fatal(err)
		}
		ports, named, selected, labels := map[any]bool{}, map[any]bool{}, map[string]any{}, map[string]any{}
		for _, o := range r.Objects {
			switch Describe(o) {
			case "Deployment istio-system/warren-control":
				labels, _, _ = unstructured.NestedMap(o.Object, "spec", "template", "metadata", "labels")
				containers, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
				for _, p := range containers[0].(map[string]any)["ports"].([]any) {
					ports[p.(map[string]any)["containerPort"]] = true
				}
			case "NetworkPolicy istio-system/warren-control":
				selected, _, _ = unstructured.NestedMap(o.Object, "spec", "podSelector", "matchLabels")
				rules, _, _ := unstructured.NestedSlice(o.Object, "spec", "ingress")
				for _, p := range rules[0].(map[string]any)["ports"].([]any) {
					named[p.(map[string]any)["port"]] = true
				}
			}
		}
		if len(ports) == 0 || !maps.Equal(ports, named) {
			t.Errorf("admission %t: the control plane has the ports %v, let in are %v", admission, ports, named)
		}
		for k, v := range selected {
			if labels[k] != v {
				t.Errorf("the policy selects %s=%v, the pods have %v", k, v, labels[k])
			}
		}
		if len(selected) == 0 {
			t.Error("the policy would select every pod of the namespace")
		}
	}
}

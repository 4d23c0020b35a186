package cli

import (
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// says finds a line of a check by the words in it.
func says(list []finding, result string, words ...string) bool {
	return slices.ContainsFunc(list, func(f finding) bool {
		text := f.Check + " " + f.What + " " + f.Hint
		return f.Result == result && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) })
	})
}

func TestMigrationNeedsAnIstio(t *testing.T) {
	a := &app{namespace: "istio-system", env: Env{Analyze: echo}}
	if _, err := a.migration(t.Context(), &conn{Interface: fake.NewClientset(installed()...)}); err == nil || !strings.Contains(err.Error(), "nothing to migrate") {
		t.Errorf("Warren itself is taken for an Istio: %v", err)
	}
}

func TestMigrationOfTheControlPlane(t *testing.T) {
	control := func(ns, name, image string) appsv1.Deployment {
		d := appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}
		d.Spec.Template.Spec.Containers = []corev1.Container{{Image: image}}
		return d
	}
	if f := istioVersions([]appsv1.Deployment{control("istio-system", "istiod", "r.example:5000/pilot:1.27.2")}); f.Result != "ok" || !strings.Contains(f.What, "istio-system/istiod, 1.27.2") {
		t.Errorf("%+v", f)
	}
	if f := istioVersions([]appsv1.Deployment{control("istio-system", "istiod", "pilot:1.27.2"), control("istio-system", "istiod-canary", "pilot@sha256:aa")}); f.Result != "warning" || !strings.Contains(f.What, "2 control planes") {
		t.Errorf("%+v", f)
	}
	if f := istioPlace("mesh", "istio-system"); f.Result != "warning" || f.Hint != "install with -n mesh" {
		t.Errorf("%+v", f)
	}
	if f := istioPlace("istio-system", "istio-system"); f.Result != "ok" {
		t.Errorf("%+v", f)
	}

	set := func(name string, labels map[string]string) *appsv1.DaemonSet {
		return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name, Labels: labels}}
	}
	for _, tt := range []struct {
		sets   []*appsv1.DaemonSet
		result string
		word   string
	}{
		{[]*appsv1.DaemonSet{set("ztunnel", map[string]string{"app": "ztunnel"}), set("istio-cni-node", nil)}, "ok", "istio-system/istio-cni-node, istio-system/ztunnel"},
		{[]*appsv1.DaemonSet{set("warren-node", map[string]string{"app": "ztunnel", "app.kubernetes.io/part-of": "warren"})}, "warning", "no ztunnel"},
	} {
		k := fake.NewClientset()
		for _, s := range tt.sets {
			if _, err := k.AppsV1().DaemonSets("istio-system").Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		got, err := istioDataPlane(t.Context(), &conn{Interface: k})
		if err != nil || len(got) != 1 || !says(got, tt.result, tt.word) {
			t.Errorf("%+v, %v; want %s with %q", got, err, tt.result, tt.word)
		}
	}
}

func TestMigrationOfTheMeshConfiguration(t *testing.T) {
	read := func(data map[string]string) ([]finding, error) {
		k := fake.NewClientset(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: data})
		_, got, err := istioConfig(t.Context(), &conn{Interface: k}, "istio-system")
		return got, err
	}
	got, err := read(map[string]string{"meshNetworks": "networks: {}", "mesh": "rootNamespace: istio-system\ntrustDomain: example.org\nenableAutoMtls: true\noutboundTrafficPolicy: {mode: REGISTRY_ONLY}\n" +
		"defaultConfig: {discoveryAddress: istiod.istio-system.svc:15012}\nextensionProviders: [{name: x}]"})
	if err != nil || len(got) != 1 || got[0].Result != "ok" {
		t.Errorf("a configuration that is followed: %+v, %v", got, err)
	}
	got, err = read(map[string]string{"meshNetworks": "networks: {n1: {}}", "mesh": "rootNamespace: elsewhere\ninboundTrafficPolicy: {mode: LOCALHOST}\ndefaultConfig: {concurrency: 4}"})
	if err != nil || len(got) != 4 || !says(got, "warning", "meshConfig.inboundTrafficPolicy.mode has no effect") || !says(got, "warning", "meshConfig.rootNamespace") ||
		!says(got, "warning", "meshConfig.defaultConfig.concurrency") || !says(got, "failed", "more than one network") {
		t.Errorf("what is not followed: %+v, %v", got, err)
	}
	if _, err := read(map[string]string{"mesh": "a: ["}); err == nil || !strings.Contains(err.Error(), "ConfigMap istio-system/istio, key mesh") {
		t.Errorf("a configuration that cannot be read: %v", err)
	}
	_, got, err = istioConfig(t.Context(), &conn{Interface: fake.NewClientset()}, "istio-system")
	if err != nil || !says(got, "warning", "no ConfigMap istio in istio-system") {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestMigrationOfObjects(t *testing.T) {
	objects, err := parseObjects("", []byte(`
{kind: Pod, apiVersion: v1, metadata: {name: a, namespace: shop, annotations: {ambient.istio.io/redirection: enabled}}, spec: {containers: [{name: app}]}}
---
{kind: Pod, apiVersion: v1, metadata: {name: b, namespace: old}, spec: {containers: [{name: app}], initContainers: [{name: istio-proxy}]}}
---
{kind: Pod, apiVersion: v1, metadata: {name: way, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: way}}, spec: {containers: [{name: istio-proxy}]}}
---
{kind: EnvoyFilter, apiVersion: networking.istio.io/v1alpha3, metadata: {name: e, namespace: shop}}
---
{kind: WasmPlugin, apiVersion: extensions.istio.io/v1alpha1, metadata: {name: f, namespace: shop}}
---
{kind: ProxyConfig, apiVersion: networking.istio.io/v1beta1, metadata: {name: p, namespace: shop}}
---
{kind: Sidecar, apiVersion: other.example/v1, metadata: {name: not-istio, namespace: shop}}
---
{kind: Gateway, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: way, namespace: shop}, spec: {gatewayClassName: istio-waypoint}}
---
{kind: Gateway, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: pods, namespace: shop, labels: {istio.io/waypoint-for: workload}}, spec: {gatewayClassName: istio-waypoint}}
---
{kind: Gateway, apiVersion: gateway.networking.k8s.io/v1, metadata: {name: east, namespace: shop}, spec: {gatewayClassName: istio-east-west}}
---
{kind: Gateway, apiVersion: networking.istio.io/v1, metadata: {name: own, namespace: shop}, spec: {}}
`))
	if err != nil {
		t.Fatal(err)
	}
	if got := istioPods(objects); len(got) != 2 || !says(got, "ok", "1 pod captured") || !says(got, "warning", "in old (1)") {
		t.Errorf("pods: %+v", got)
	}
	got := istioObjects(objects)
	if len(got) != 6 || !says(got, "ok", "2 waypoints") || !says(got, "failed", "Gateway shop/pods", "istio.io/waypoint-for=workload") ||
		!says(got, "failed", "Gateway shop/east", "istio-east-west") || !says(got, "warning", "WasmPlugin", "not in all: shop/f") || !says(got, "warning", "ProxyConfig", "of no effect: shop/p") || !says(got, "warning", "EnvoyFilter", "not in all: shop/e") {
		t.Errorf("objects: %+v", got)
	}
	if got := istioObjects(nil); len(got) != 0 {
		t.Errorf("of nothing: %+v", got)
	}
}

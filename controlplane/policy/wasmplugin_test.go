package policy

import (
	"slices"
	"strings"
	"testing"

	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

func wasmPlugin(t *testing.T, spec string) CompiledPlugin {
	t.Helper()
	w := &extensionsv1alpha1.WasmPlugin{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "filter"}}
	if err := yaml.Unmarshal([]byte(spec), &w.Spec); err != nil {
		t.Fatal(err)
	}
	return CompileWasmPlugin(w)
}

func TestWasmPlugin(t *testing.T) {
	digest := strings.Repeat("0f", 32)
	p := wasmPlugin(t, `
targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: way}, {kind: Service, name: ui}]
url: http://m.example/filter.wasm
sha256: `+digest+`
phase: AUTHZ
priority: -3
failStrategy: FAIL_RELOAD
pluginName: one
pluginConfig: {b: [1, "x", null], a: {c: true}}
vmConfig: {env: [{name: WHO, value: me}, {name: EMPTY}]}
match: [{mode: SERVER, ports: [{number: 8080}, {number: 80}]}, {mode: CLIENT}, {ports: [{number: 80}, {number: 443}]}]
`)
	if len(p.Problems) > 0 || p.Source != (ModuleSource{URL: "http://m.example/filter.wasm", SHA256: digest}) || p.Priority != -3 || len(p.Targets) != 2 {
		t.Fatalf("%+v", p)
	}
	w, g := p.Waypoint, p.Gateway
	if w == nil || w.Object != "shop/filter" || w.Phase != mesh.PluginAuthZ || w.Fails != mesh.PluginReloads || w.Root != "one" ||
		w.Config != `{"a":{"c":true},"b":[1,"x",null]}` || !slices.Equal(w.Env, []mesh.PluginEnv{{Name: "WHO", Value: "me"}, {Name: "EMPTY"}}) ||
		!slices.Equal(w.Ports, []uint16{80, 443, 8080}) {
		t.Errorf("for waypoints: %+v", w)
	}
	if g == nil || len(g.Ports) != 0 || g.Key() != w.Key() {
		t.Errorf("for gateways: %+v", g)
	}
	if p := wasmPlugin(t, "url: https://m.example/a\nmatch: [{mode: CLIENT, ports: [{number: 80}]}, {mode: SERVER, ports: [{number: 70000}]}]"); p.Waypoint != nil || p.Gateway == nil {
		t.Errorf("for gateways alone: %+v", p)
	}
	if a, b := wasmPlugin(t, "url: https://m.example/a"), wasmPlugin(t, "url: https://m.example/a\npluginConfig: {x: 1}"); a.Waypoint.Key() == b.Waypoint.Key() {
		t.Error("what is changed has the name that it had")
	}
}

// TestWasmPluginRefused has what cannot be had be said, and requests be refused for it: a module may be what keeps them out.
func TestWasmPluginRefused(t *testing.T) {
	for _, c := range []struct{ spec, want string }{
		{`url: ""`, "spec.url"},
		{`{url: "oci://registry.example/filter:v1", imagePullSecret: other/s}`, "spec.imagePullSecret"},
		{`url: oci://registry.example/filter@sha256:abc`, "is no digest"},
		{`{url: "oci://registry.example/filter@sha256:` + strings.Repeat("0a", 32) + `", sha256: ` + strings.Repeat("0b", 32) + `}`, "it is not the digest in the url"},
		{`url: file:///opt/filter.wasm`, "spec.url: a file"},
		{`url: ftp://m.example/a`, `not fetched by "ftp"`},
		{`url: http://m.example/a`, "without TLS"},
		{`url: https:///a`, "has to have a host"},
		{`url: https://me:secret@m.example/a`, "no user name"},
		{`{url: "https://m.example/a", sha256: abc}`, "spec.sha256"},
		{`{url: "https://m.example/a", verificationKey: k}`, "spec.verificationKey"},
		{`{url: "https://m.example/a", vmConfig: {env: [{name: HOME, valueFrom: HOST}]}}`, "spec.vmConfig.env[0].valueFrom: HOST"},
		{`{url: "https://m.example/a", vmConfig: {env: [{name: a-b, value: x}]}}`, "spec.vmConfig.env[0].name"},
		{`{url: "https://m.example/a", vmConfig: {env: [{name: A}, {name: A}]}}`, "there twice"},
		{`{url: "https://m.example/a", targetRefs: [{kind: Service, name: a}], selector: {matchLabels: {a: b}}}`, "selector and targetRefs"},
	} {
		p := wasmPlugin(t, c.spec)
		if len(p.Problems) != 1 || !strings.Contains(p.Problems[0], c.want) || strings.Contains(p.Problems[0], "secret") {
			t.Errorf("%s: %q, want %q", c.spec, p.Problems, c.want)
		}
		if p.Source != (ModuleSource{}) || p.Waypoint == nil || p.Gateway == nil {
			t.Errorf("%s: %+v", c.spec, p)
		}
	}
	if p := wasmPlugin(t, `{url: "https://m.example/a", type: NETWORK}`); len(p.Problems) != 1 || !strings.Contains(p.Problems[0], "NETWORK is not supported yet") || p.Waypoint != nil {
		t.Errorf("one for connections: %+v", p)
	}
}

func TestWasmPluginImages(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	for _, c := range []struct {
		spec string
		want ModuleSource
		anew bool
	}{
		{`url: oci://registry.example/filter:v1`, ModuleSource{URL: "oci://registry.example/filter:v1"}, false},
		{`url: registry.example:5000/a/filter:v1`, ModuleSource{URL: "oci://registry.example:5000/a/filter:v1"}, false},
		{`url: registry.example:5000/a/filter`, ModuleSource{URL: "oci://registry.example:5000/a/filter"}, true},
		{`url: oci://registry.example/filter:latest`, ModuleSource{URL: "oci://registry.example/filter:latest"}, true},
		{`{url: "oci://registry.example/filter:v1", imagePullSecret: pull}`, ModuleSource{URL: "oci://registry.example/filter:v1", Secret: "shop/pull"}, false},
		{`{url: "oci://registry.example/filter:latest", imagePullPolicy: IfNotPresent}`, ModuleSource{URL: "oci://registry.example/filter:latest"}, false},
		{`{url: "oci://registry.example/filter:latest", sha256: ` + sum + `}`, ModuleSource{URL: "oci://registry.example/filter:latest", SHA256: sum}, false},
		{`url: oci://registry.example/filter:v1@sha256:` + sum, ModuleSource{URL: "oci://registry.example/filter:v1@sha256:" + sum, SHA256: sum}, false},
	} {
		p := wasmPlugin(t, c.spec)
		if anew := p.Source.For != ""; anew != c.anew {
			t.Errorf("%s: fetched anew %t, want %t", c.spec, anew, c.anew)
		}
		p.Source.For = ""
		if len(p.Problems) > 0 || p.Source != c.want {
			t.Errorf("%s: %+v %q", c.spec, p.Source, p.Problems)
		}
	}
}

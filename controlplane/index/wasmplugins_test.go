package index

import (
	"strings"
	"testing"

	extensions "istio.io/api/extensions/v1alpha1"
	typeapi "istio.io/api/type/v1beta1"
	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// TestModules follows a module that is fetched, fetched in vain, changed for another and no longer needed.
func TestModules(t *testing.T) {
	x, err := New(Config{ClusterID: "c", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", RootNamespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }
	x.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/use-waypoint": "way"}}})
	x.Set(&corev1.Service{ObjectMeta: meta("ui"), Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1", Ports: []corev1.ServicePort{{Port: 80, Name: "http"}}}})
	set := func(change func(*extensions.WasmPlugin)) {
		w := &extensionsv1alpha1.WasmPlugin{ObjectMeta: meta("filter")}
		w.Spec.TargetRefs = []*typeapi.PolicyTargetReference{{Kind: "Service", Name: "ui"}}
		w.Spec.Url = "https://m.example/a"
		if change != nil {
			change(&w.Spec)
		}
		x.Set(w)
	}
	ui := mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}
	check := func(m *mesh.Module, root, reason, says string, wanted ...policy.ModuleSource) {
		t.Helper()
		u := x.Commit()
		plugins := u.Snapshot.Service(ui).Plugins
		if len(plugins) != 1 || plugins[0].Module != m || plugins[0].Root != root {
			t.Errorf("the waypoint runs %+v, want %v as %q", plugins, m, root)
		}
		s := x.states[PolicyKey{WasmPlugin, "shop", "filter"}]
		if s == nil || s.Reason != reason || s.Exact != (reason == "") || !strings.Contains(s.Message, says) || len(s.Waypoints) != 1 || s.Patches == "" {
			t.Errorf("state %+v, want %s %q", s, reason, says)
		}
		if len(u.Modules) != len(wanted) || len(wanted) > 0 && u.Modules[0] != wanted[0] {
			t.Errorf("wanted are %v, not %v", u.Modules, wanted)
		}
	}
	from := policy.ModuleSource{URL: "https://m.example/a"}
	first, second := &mesh.Module{Digest: "d1"}, &mesh.Module{Digest: "d2"}
	set(nil)
	check(nil, "", policy.ReasonNoModule, "503 meanwhile: https://m.example/a is being fetched", from)
	x.SetModule(from, ModuleState{Problem: "the answer is 404"})
	check(nil, "", policy.ReasonNoModule, "404", from)
	x.SetModule(from, ModuleState{Module: first})
	check(first, "", "", "its sha256 is d1", from)
	set(func(w *extensions.WasmPlugin) {
		w.PluginName, w.FailStrategy = "other", extensions.FailStrategy_FAIL_OPEN
	})
	check(first, "other", "", "", from)
	// What it was goes on until the other module is there, however often it is changed meanwhile.
	known := policy.ModuleSource{URL: "http://m.example/b", SHA256: strings.Repeat("ab", 32)}
	for _, root := range []string{"next", "last"} {
		set(func(w *extensions.WasmPlugin) { w.PluginName, w.Url, w.Sha256 = root, known.URL, known.SHA256 })
		check(first, "other", policy.ReasonNoModule, "what it was before holds meanwhile", known)
	}
	x.SetModule(from, ModuleState{Problem: "nobody asks"})
	x.SetModule(known, ModuleState{Module: second})
	check(second, "last", "", "", known)
	// One that is to be fetched anew whenever the object changes.
	set(func(w *extensions.WasmPlugin) { w.ImagePullPolicy = extensions.PullPolicy_Always })
	if u := x.Commit(); len(u.Modules) != 1 || !strings.HasPrefix(u.Modules[0].For, "shop/filter@") {
		t.Errorf("wanted are %+v", u.Modules)
	}
	// Of what cannot be had nothing runs, and nothing is fetched.
	set(func(w *extensions.WasmPlugin) { w.Url = "file:///filter.wasm" })
	check(nil, "", policy.ReasonUnsupported, "answered with 503: spec.url: a file would be")
	x.Delete(WasmPlugin, "shop", "filter")
	if u := x.Commit(); len(u.Modules) != 0 || len(u.Snapshot.Service(ui).Plugins) != 0 || len(x.modules.state) != 0 {
		t.Errorf("without the object %v is wanted, and the waypoint has %v", u.Modules, u.Snapshot.Service(ui).Plugins)
	}
}

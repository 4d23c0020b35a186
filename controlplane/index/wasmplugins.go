package index

import (
	"cmp"
	"slices"
	"strings"

	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// ModuleState is what came of fetching a Wasm module.
type ModuleState struct {
	Module  *mesh.Module // nil for none yet
	Problem string       // of the last attempt
}

// wasmPluginFact is a WasmPlugin.
type wasmPluginFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	policy.CompiledPlugin

	last *running // what the object was when its module was there; nil while that was never so
}

// running is what of a WasmPlugin runs where, and its module.
type running struct {
	gateway, waypoint *mesh.Plugin
	module            *mesh.Module
}

// runs is what of a WasmPlugin runs: what it was before goes on until its module has been fetched.
func (x *Index) runs(f *wasmPluginFact) running {
	m := x.modules.state[f.Source].Module
	if m == nil && f.last != nil && len(f.Problems) == 0 {
		return *f.last
	}
	return running{f.Gateway, f.Waypoint, m}
}

func wasmPluginFactOf(w *extensionsv1alpha1.WasmPlugin) *wasmPluginFact {
	return &wasmPluginFact{keyOf(w), string(w.UID), w.Generation, w.CreationTimestamp, policy.CompileWasmPlugin(w), nil}
}

func (x *Index) setWasmPlugin(k key, f *wasmPluginFact) {
	old := put(x.wasmPlugins, k, f)
	for _, p := range []*wasmPluginFact{old, f} {
		if p != nil {
			x.touchTargets(k.Namespace, p.Targets)
		}
	}
	if old != nil && f != nil {
		if was := x.runs(old); was.module != nil {
			f.last = &was
		}
	}
	x.modules.use(old.sources(), f.sources())
	x.dirtyStates[PolicyKey{WasmPlugin, k.Namespace, k.Name}] = struct{}{}
}

// sources are where what a WasmPlugin needs is fetched from.
func (f *wasmPluginFact) sources() []policy.ModuleSource {
	if f == nil || f.Source == (policy.ModuleSource{}) || f.Gateway == nil && f.Waypoint == nil {
		return nil
	}
	return []policy.ModuleSource{f.Source}
}

// touchWasmPlugins marks the WasmPlugins of a namespace, of which it may have changed where they run.
func (x *Index) touchWasmPlugins(ns string) {
	for name := range x.wasmPlugins[ns] {
		x.dirtyStates[PolicyKey{WasmPlugin, ns, name}] = struct{}{}
	}
}

// SetModule records what came of fetching a module. One that nobody needs any more is fine.
func (x *Index) SetModule(from policy.ModuleSource, s ModuleState) {
	if !x.modules.set(from, s) {
		return
	}
	for _, all := range x.wasmPlugins {
		for _, f := range all {
			if slices.Contains(f.sources(), from) {
				x.dirtyStates[PolicyKey{WasmPlugin, f.Namespace, f.Name}] = struct{}{}
				x.touchTargets(f.Namespace, f.Targets)
			}
		}
	}
}

// moduleSources are the modules that are needed, sorted.
func (x *Index) moduleSources() []policy.ModuleSource {
	return x.modules.wanted(func(a, b policy.ModuleSource) int {
		return cmp.Or(strings.Compare(a.URL, b.URL), strings.Compare(a.SHA256, b.SHA256), strings.Compare(a.For, b.For), strings.Compare(a.Secret, b.Secret))
	})
}

// pluginsFrom are the plugins of WasmPlugins for a proxy of a namespace, in the order in which requests pass by those of a phase:
// by priority, the older ones first, as in Istio.
func (x *Index) pluginsFrom(proxy string, is func(*wasmPluginFact) bool, at func(running) *mesh.Plugin) (out []mesh.Plugin) {
	var all []*wasmPluginFact
	for _, ns := range namespacesOf(proxy, x.c.RootNamespace) {
		for _, f := range x.wasmPlugins[ns] {
			if is(f) {
				all = append(all, f)
			}
		}
	}
	slices.SortFunc(all, func(a, b *wasmPluginFact) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), a.created.Compare(b.created.Time), compareKeys(a.key, b.key))
	})
	for _, f := range all {
		r := x.runs(f)
		if p := at(r); p != nil {
			next := *p
			next.Module = r.module
			out = append(out, next)
		}
	}
	return out
}

// pluginsOf are those that requests to a service pass by at its waypoint.
func (x *Index) pluginsOf(s *serviceFact) []mesh.Plugin {
	if x.waypointFor(s) == nil {
		return nil
	}
	return x.pluginsFrom(x.waypointAsked(s).Namespace, func(f *wasmPluginFact) bool { return x.anyTargets(f.Namespace, f.Targets, s) },
		func(r running) *mesh.Plugin { return r.waypoint })
}

// gatewayPlugins are those of a gateway in a namespace: that are for it by a target, and by the labels of its pods.
func (x *Index) gatewayPlugins(namespace string, pods []map[string]string, is func(ns string, t policy.Target) bool) []mesh.Plugin {
	return x.pluginsFrom(namespace, func(f *wasmPluginFact) bool { return x.extendsGateway(f.extension(), namespace, pods, is) },
		func(r running) *mesh.Plugin { return r.gateway })
}

func (f *wasmPluginFact) extension() extension {
	return extension{
		key: f.key, kind: "WasmPlugins", targets: f.Targets, selector: f.Selector, waypoints: f.Waypoint != nil, gateways: f.Gateway != nil,
		nothing: "its match is for no port of waypoints or gateways", asks: "its match",
	}
}

// meanwhile is what becomes of requests without the module.
func meanwhile(p *mesh.Plugin) string {
	if p.Fails == mesh.PluginOpens {
		return "requests pass without it"
	}
	return "requests are answered with 503"
}

func (x *Index) wasmPluginState(f *wasmPluginFact) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: true}
	p := cmp.Or(f.Waypoint, f.Gateway)
	if p == nil && len(f.Problems) > 0 {
		s.lacks(policy.ReasonUnsupported, "no module is loaded: %s", strings.Join(f.Problems[:min(len(f.Problems), 5)], "; "))
		return s
	}
	if len(f.Problems) > 0 {
		s.lacks(policy.ReasonUnsupported, "no module is loaded, and %s: %s", meanwhile(p), strings.Join(f.Problems[:min(len(f.Problems), 5)], "; "))
	}
	x.place(s, f.extension())
	if p == nil || len(s.Waypoints) == 0 {
		return s
	}
	s.Patches = p.Key()
	is := x.modules.state[f.Source]
	doing := meanwhile(p) + " meanwhile"
	if x.runs(f).module != nil {
		doing = "what it was before holds meanwhile"
	}
	switch {
	case len(f.Problems) > 0:
	case is.Module != nil && f.Source.SHA256 == "":
		s.Message = strings.TrimPrefix(s.Message+"; its sha256 is "+is.Module.Digest+", and nothing says that it has to be", "; ")
	case is.Module != nil:
	case is.Problem != "":
		s.lacks(policy.ReasonNoModule, "%s: %s: %s", doing, f.Source.URL, is.Problem)
	default:
		s.lacks(policy.ReasonNoModule, "%s: %s is being fetched", doing, f.Source.URL)
	}
	return s
}

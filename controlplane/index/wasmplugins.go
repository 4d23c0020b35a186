package index

import "github.com/warrenmesh/warren/controlplane/policy"

// wasmPluginFact is a WasmPlugin. Nobody loads modules of it: it is read so that its author hears of that.
type wasmPluginFact struct {
	uid        string
	generation int64
}

func (x *Index) setWasmPlugin(k key, f *wasmPluginFact) {
	put(x.wasmPlugins, k, f)
	x.dirtyStates[PolicyKey{WasmPlugin, k.Namespace, k.Name}] = struct{}{}
}

func (f *wasmPluginFact) state() *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: true}
	s.lacks(policy.ReasonUnsupported, "WasmPlugins are not supported yet, and no module is loaded; an EnvoyFilter brings filters of Envoy's and code in Lua")
	return s
}

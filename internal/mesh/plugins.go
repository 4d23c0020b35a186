package mesh

// Plugin is a Wasm module that requests to a service, or to a gateway, pass by, as a WasmPlugin asks for it.
type Plugin struct {
	Object  string // namespace/name of the WasmPlugin
	Version string // of its spec: another one is tried anew where Envoy has refused this one

	Phase  PluginPhase
	Root   string // which of the plugins in the module; "": the one that has no name
	Config string // what the plugin is told, mostly JSON; "": nothing
	Env    []PluginEnv
	Fails  PluginFailure
	Ports  []uint16 // of the service or the gateway; none: all
	Module *Module  // nil until it has been fetched
}

// Key names the object as it is, as [Patch.Key] does.
func (p *Plugin) Key() string { return p.Object + "@" + p.Version }

// Module is a Wasm module. It is not to be changed: whoever has the same one has the same pointer.
type Module struct {
	Digest string // SHA-256 of Code, in hexadecimal
	Code   []byte `json:"-"`
}

// String names the module: whoever prints a Snapshot does not mean its code.
func (m *Module) String() string {
	if m == nil {
		return "none"
	}
	return "sha256:" + m.Digest
}

// PluginEnv is a variable of the environment that a module is shown.
type PluginEnv struct{ Name, Value string }

// PluginPhase is where in a request's way a plugin stands.
type PluginPhase uint8

const (
	PluginLast  PluginPhase = iota // once all that is refused has been
	PluginAuthN                    // before tokens are verified
	PluginAuthZ                    // once they are, and before it is decided who may ask
	PluginStats                    // before those that are last
)

// PluginFailure is what becomes of requests while a module is not there, and after it has failed.
type PluginFailure uint8

const (
	PluginCloses  PluginFailure = iota // they are refused
	PluginOpens                        // they pass
	PluginReloads                      // they are refused, and a module that has failed is begun anew
)

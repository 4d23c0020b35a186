package mesh

// Patch is a change to what is written for Envoy, as an EnvoyFilter asks for it. What may be changed and what not package
// waypoint says. It can be compared.
type Patch struct {
	Object  string // namespace/name of the EnvoyFilter
	Version string // of its spec: another one is tried anew where Envoy has refused this one
	At      string // where in the object, as spec.configPatches[0]

	To PatchedKind
	Op PatchOperation

	// Which of them. Empty values are any.
	Port       uint16 // of a service, or of a gateway's listener
	ServerName string // that a gateway's listener is for
	Filter     string // of requests, that an operation is about or relative to
	Host       string // that requests are for
	Route      string // its name, or the last part of it
	Action     PatchedAction
	Service    string // host name of the one that a cluster reaches
	Subset     string

	Value string // JSON, as Envoy's definitions have it; "" of one that removes
}

// Key names the object as it is.
func (p Patch) Key() string { return p.Object + "@" + p.Version }

// PatchedKind is what a patch changes.
type PatchedKind uint8

const (
	PatchHTTPFilter PatchedKind = iota // filters of requests
	PatchManager                       // what is done with connections that carry requests
	PatchRoutes                        // tables of routes
	PatchHost                          // the routes of some hosts
	PatchRoute                         // one route
	PatchCluster                       // how endpoints are reached
)

// PatchedAction is what a route does.
type PatchedAction uint8

const (
	PatchAnyAction PatchedAction = iota
	PatchForwards
	PatchRedirects
	PatchResponds
)

// PatchOperation is how.
type PatchOperation uint8

const (
	PatchFirst   PatchOperation = iota // before all others that may be placed
	PatchLast                          // after them
	PatchBefore                        // the one that is named
	PatchAfter                         // the one that is named
	PatchMerge                         // into the one that is named
	PatchReplace                       // the one that is named
	PatchRemove                        // the one that is named
)

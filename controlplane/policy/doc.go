// Package policy says what Istio's security objects mean for connections. It compiles an AuthorizationPolicy into
// a [mesh.Policy] ([Mesh.Compile]) and tells what is wrong with an object and how to mend it ([Mesh.Check]).
//
// Both are pure functions of one object and the settings of the mesh: the index compiles with them, the admission
// webhook asks them before an object is stored, and neither can say something else than the other. Which workloads
// an object selects, and what else is in the cluster, they must not know.
//
// What a node cannot see makes a policy stricter, never weaker. An ALLOW rule that needs it matches nothing; a
// DENY rule matches without it; a policy that is for a waypoint denies whatever it is attached to. An AUDIT policy
// or a dry run decides nothing and so never refuses anything.
//
// Telemetry objects are read here too, since they are attached as policies are ([Mesh.CompileTelemetry], [Mesh.Tell]).
// RateLimits are, too ([CompileRateLimit]). They decide about no connection: what of one cannot be had is left out and named.
package policy

import "github.com/warrenmesh/warren/internal/mesh"

// Mesh is what a policy's meaning depends on beside the policy.
type Mesh struct {
	RootNamespace      string // its policies hold for the whole mesh
	TrustDomain        string
	TrustDomainAliases []string
	// Providers are those that CUSTOM policies may name.
	Providers map[string]*mesh.AuthProvider
	// Telemetry are those that Telemetry objects may name.
	Telemetry TelemetryProviders
}

// Why a policy is not enforced as it is written. The words are for conditions: CamelCase and stable.
const (
	ReasonNoWaypoint  = "NoWaypoint"       // part of it can be decided by a waypoint alone, and there is none
	ReasonUnsupported = "UnsupportedValue" // values that mean nothing
	ReasonTooLarge    = "TooLarge"         // beyond what one policy may have
	ReasonConflicted  = "Conflicted"       // an older object of the same level holds instead
	ReasonNoKeys      = "KeysNotFetched"   // the keys that verify tokens are not there
	ReasonNoModule    = "ModuleNotFetched" // the Wasm module is not there
	ReasonIgnored     = "Ignored"          // it cannot apply to anything where it is
)

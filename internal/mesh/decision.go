package mesh

import "net/netip"

// RouteKind is the way a connection takes.
type RouteKind uint8

const (
	RouteRefuse      RouteKind = iota // the zero Route refuses: in doubt, deny
	RoutePassthrough                  // plain TCP to the address the application asked for
	RouteDirect                       // plain TCP to a chosen endpoint of a mesh service that is not captured
	RouteHBONE                        // CONNECT to the endpoint's own node
	RouteWaypoint                     // CONNECT to a waypoint, with the service's address as authority
)

// Route is where a connection goes, and why. It is the value that the proxy executes, the log prints and
// `warren why` explains.
type Route struct {
	Kind      RouteKind
	Dial      netip.AddrPort // what to open a TCP connection to
	Authority netip.AddrPort // :authority of the CONNECT; for a waypoint the service's VIP and port
	Want      []string       // identities (URI form) of which the peer must present one; empty only on plain routes
	Service   *Service       // the service that was addressed, nil for a pod address
	Workload  *Workload      // the endpoint chosen, nil on passthrough
	Why       Reason
}

// Verdict is whether a connection may be, by which policy, and why.
type Verdict struct {
	Allow  bool
	By     PolicyName // zero where no policy decided
	Why    Reason
	Audit  []PolicyName // AUDIT policies that matched
	DryRun []DryRun     // what dry-run policies would have decided
}

// DryRun is what a policy under istio.io/dry-run would have decided.
type DryRun struct {
	Policy PolicyName
	Allow  bool
}

// Reason is a stable machine-readable word for a decision; String-like, printed in logs, metrics and status.
type Reason string

// Conn is what an authorization decision may look at.
type Conn struct {
	Source      Identity // zero when the peer did not authenticate
	SourceIP    netip.Addr
	Dst         netip.AddrPort // the destination as the application knows it
	DstWorkload *Workload
	Plaintext   bool // arrived outside the tunnel
}

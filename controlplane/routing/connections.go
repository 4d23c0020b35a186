package routing

import (
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// ConnectionRoute converts the backends of a TLSRoute's or a TCPRoute's rules. The API lets these have one rule; of more, which
// an older definition may have let in, the first decides. The share of a backend that cannot be reached is closed.
func ConnectionRoute(rules [][]gatewayv1.BackendRef, find Backends) (out Route) {
	if len(rules) == 0 {
		out.Accepted.and(gatewayv1.RouteReasonUnsupportedValue, "it has no rule: its connections are closed")
		return out
	}
	if len(rules) > 1 {
		out.Partly.and(gatewayv1.RouteReasonUnsupportedValue, "rules[1]: there is no telling which connections it is for; rules[0] has them all")
	}
	for i := range rules[0] {
		ref := &rules[0][i]
		b, unresolved := find(ref.BackendObjectReference)
		if !unresolved.OK() {
			out.Resolved.and(gatewayv1.RouteConditionReason(unresolved.Reason), "rules[0]: %s", unresolved.Message)
			b = mesh.HTTPBackend{Invalid: unresolved.Message}
		}
		b.Weight = weight(ref.Weight)
		out.Backends = append(out.Backends, b)
	}
	return out
}

// weight is the share of a backend.
func weight(w *int32) uint32 {
	if w == nil {
		return 1
	}
	return uint32(max(0, *w))
}

package status

import (
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// accepted are the conditions with which Istio says what it took a policy for, in its words. They say nothing about any
// node.
func accepted(k index.PolicyKey, s *index.PolicyState, o Object) []condition {
	if k.Kind == index.PeerAuthentication {
		return nil
	}
	if k.Kind == index.EnvoyFilter || k.Kind == index.WasmPlugin {
		return []condition{patchesAccepted(s)}
	}
	if len(o.Targets) > 0 {
		c := waypointAccepted(s, o)
		if k.Kind == index.RateLimit {
			c.Type = ConditionAccepted
			if c.Status != string(metav1.ConditionTrue) && s.Reason == policy.ReasonUnsupported {
				c.Reason, c.Message = "Invalid", s.Message
			}
		}
		return []condition{c}
	}
	if k.Kind != index.AuthorizationPolicy {
		return nil
	}
	c := condition{ConditionZtunnelAccepted, string(metav1.ConditionTrue), "Accepted", "attached to ztunnel"}
	if !s.Exact {
		c.Reason, c.Message = s.Reason, s.Message
		if s.Reason == policy.ReasonNoWaypoint {
			c.Reason = policy.ReasonUnsupported
		}
		if len(s.Compiled) == 0 {
			c.Status = string(metav1.ConditionFalse)
		}
	}
	return []condition{c}
}

// patchesAccepted says whether an EnvoyFilter or a WasmPlugin is one that proxies are told of.
func patchesAccepted(s *index.PolicyState) condition {
	c := condition{ConditionAccepted, string(metav1.ConditionTrue), "Accepted", "bound to " + few(names(s.Waypoints))}
	switch {
	case s.Reason == policy.ReasonUnsupported:
		c.Status, c.Reason, c.Message = string(metav1.ConditionFalse), "Invalid", s.Message
	case len(s.Waypoints) > 0:
	case s.Exact:
		c.Message = s.Message
	default:
		c.Status, c.Reason, c.Message = string(metav1.ConditionFalse), s.Reason, s.Message
	}
	return c
}

func waypointAccepted(s *index.PolicyState, o Object) condition {
	c := condition{Type: ConditionWaypointAccepted, Status: string(metav1.ConditionFalse)}
	if len(s.Waypoints) > 0 || s.Exact {
		c.Status, c.Reason, c.Message = string(metav1.ConditionTrue), "Accepted", "bound to "+few(names(s.Waypoints))
		if len(s.Waypoints) == 0 {
			c.Message = s.Message
		}
		return c
	}
	if len(o.Targets) > 1 {
		c.Reason, c.Message = "Invalid", "Invalid targetRefs: "+few(o.Targets)
		return c
	}
	kind, name, _ := strings.Cut(o.Targets[0], " ")
	switch {
	case s.Reason == index.ReasonTargetNotFound:
		c.Reason, c.Message = "TargetNotFound", o.Targets[0]+" was not found"
	case kind == "Gateway" || kind == "GatewayClass":
		c.Reason, c.Message = "TargetNotFound", "not bound"
	default:
		c.Reason, c.Message = "AncestorNotBound", kind+" "+name+" is not bound to a waypoint"
	}
	return c
}

func names(waypoints []mesh.ServiceName) []string {
	out := make([]string, 0, len(waypoints))
	for _, w := range waypoints {
		out = append(out, gatewayName(w))
	}
	return out
}

// gatewayName is what users call a waypoint: namespace/name of its Gateway.
func gatewayName(waypoint mesh.ServiceName) string {
	name, _, _ := strings.Cut(waypoint.Hostname, ".")
	return waypoint.Namespace + "/" + name
}

// policyName reads the name of a resource that a node refuses; the zero name fits no policy.
func policyName(resource string) mesh.PolicyName {
	n, err := wds.ParsePolicyName(resource)
	if err != nil {
		return mesh.PolicyName{}
	}
	return n
}

package index

import (
	"fmt"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// PolicyKey names a policy object: an AuthorizationPolicy, PeerAuthentication, RequestAuthentication, Telemetry,
// RateLimit, EnvoyFilter or WasmPlugin.
type PolicyKey struct {
	Kind            Kind
	Namespace, Name string
}

// PolicyState is what has become of a policy object before any node hears of it.
type PolicyState struct {
	UID        string
	Generation int64
	// Compiled are the policies that nodes hold for the object. Empty: there is nothing for a node to hold.
	Compiled []mesh.PolicyName
	// Waypoints have to enforce it too, sorted.
	Waypoints []mesh.ServiceName
	// Patches names an EnvoyFilter or a WasmPlugin as it is ([mesh.Patch.Key]): waypoints and gateways may refuse it.
	Patches string
	// Exact says that nodes which hold Compiled do all that the object asks for. If not, Reason (one of package
	// policy, or TargetNotFound) and Message say what they do instead; that is never weaker than asked for, but for
	// an object that applies to nothing (Ignored, Conflicted).
	Exact           bool
	Reason, Message string
}

// lacks says what of an object does not hold. The first reason stays.
func (s *PolicyState) lacks(reason, format string, args ...any) {
	if s.Exact {
		s.Exact, s.Reason = false, reason
	}
	s.Message = strings.TrimPrefix(s.Message+"; "+fmt.Sprintf(format, args...), "; ")
}

// ReasonTargetNotFound says that a targetRef names what is not there, in Istio's word.
const ReasonTargetNotFound = "TargetNotFound"

// touchTargeting marks the policies of a namespace whose targets may have come or gone.
func (x *Index) touchTargeting(ns string) {
	for _, f := range x.authz[ns] {
		if len(f.Targets) > 0 {
			x.dirtyStates[PolicyKey{AuthorizationPolicy, f.Namespace, f.Name}] = struct{}{}
		}
	}
	for _, f := range x.requests[ns] {
		if len(f.Targets) > 0 {
			x.dirtyStates[PolicyKey{RequestAuthentication, f.Namespace, f.Name}] = struct{}{}
		}
	}
	x.touchTelemetry(ns)
	x.touchRateLimits(ns)
	x.touchEnvoyFilters(ns)
	x.touchWasmPlugins(ns)
}

func (x *Index) commitStates(u *Update) {
	if len(x.dirtyStates) == 0 {
		return
	}
	pods := x.exempted()
	for k := range x.dirtyStates {
		next := x.policyState(k, pods)
		old := x.states[k]
		nk := NoticeKey(k)
		if next != nil && !next.Exact {
			x.notice(u, nk, next.UID, next.Reason, next.Message)
		} else {
			x.notice(u, nk, "", "", "")
		}
		switch {
		case next == nil && old != nil:
			delete(x.states, k)
			u.Policies[k] = nil
		case next != nil && (old == nil || !old.equal(next)):
			x.states[k] = next
			u.Policies[k] = next
		}
	}
}

func (s *PolicyState) equal(o *PolicyState) bool {
	return s.UID == o.UID && s.Generation == o.Generation && slices.Equal(s.Compiled, o.Compiled) &&
		slices.Equal(s.Waypoints, o.Waypoints) && s.Patches == o.Patches &&
		s.Exact == o.Exact && s.Reason == o.Reason && s.Message == o.Message
}

// policyState tells what has become of an object, nil where there is none.
func (x *Index) policyState(k PolicyKey, pods []exempted) *PolicyState {
	switch k.Kind {
	case AuthorizationPolicy:
		if f := x.authz[k.Namespace][k.Name]; f != nil {
			return x.authorizationState(f)
		}
	case PeerAuthentication:
		if f := x.peerAuths[k.Namespace][k.Name]; f != nil {
			return x.peerAuthState(f, pods)
		}
	case RequestAuthentication:
		if f := x.requests[k.Namespace][k.Name]; f != nil {
			return x.requestState(f)
		}
	case Telemetry:
		if f := x.telemetries[k.Namespace][k.Name]; f != nil {
			return x.telemetryState(f)
		}
	case RateLimit:
		if f := x.rateLimits[k.Namespace][k.Name]; f != nil {
			return x.rateLimitState(f)
		}
	case EnvoyFilter:
		if f := x.envoyFilters[k.Namespace][k.Name]; f != nil {
			return x.envoyFilterState(f)
		}
	case WasmPlugin:
		if f := x.wasmPlugins[k.Namespace][k.Name]; f != nil {
			return x.wasmPluginState(f)
		}
	}
	return nil
}

func (x *Index) authorizationState(f *authorizationFact) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: f.Exact, Reason: f.Reason, Message: f.Message}
	if !f.Inert {
		s.Compiled = []mesh.PolicyName{f.Policy.Name}
	}
	if f.Exact {
		s.Message = reported(f)
	}
	if len(f.Targets) > 0 && x.decided(f, s) {
		return s
	}
	if len(f.Targets) == 0 {
		x.atGatewaysToo(f, s)
	}
	x.misses(f.Namespace, f.Targets, s)
	return s
}

// reported says of a policy that decides nothing what becomes of it.
func reported(f *authorizationFact) string {
	switch {
	case f.Policy.DryRun:
		return "it is a dry run: evaluated and reported, and decides nothing"
	case f.Policy.Action == mesh.Audit:
		return "AUDIT: what it matches is reported, and nothing decided"
	}
	return ""
}

// misses says where none of the targets of a policy is there.
func (x *Index) misses(ns string, targets []policy.Target, s *PolicyState) {
	var missing, useless []string
	for _, t := range targets {
		switch t.Kind {
		case policy.TargetService:
			if x.services[ns][t.Name] == nil {
				missing = append(missing, t.String())
			}
		case policy.TargetServiceEntry:
			if x.entries[ns][t.Name] == nil {
				missing = append(missing, t.String())
			}
		case policy.TargetGatewayClass:
			if ns != x.c.RootNamespace || t.Name != WaypointClass && x.classes[t.Name] != IngressController {
				useless = append(useless, t.String())
			}
		case policy.TargetUnknown:
			useless = append(useless, t.String())
		}
	}
	if len(useless) > 0 && len(missing)+len(useless) == len(targets) {
		s.Reason = policy.ReasonIgnored
		s.Message = fmt.Sprintf("%s is no waypoint's, so that the policy applies to nothing; a policy for the GatewayClass %s is made in the root namespace %s",
			strings.Join(useless, ", "), WaypointClass, x.c.RootNamespace)
		return
	}
	if len(missing) > 0 && len(missing) == len(targets) {
		s.Reason = ReasonTargetNotFound
		s.Message = fmt.Sprintf("there is no %s in namespace %s, so that the policy applies to nothing", strings.Join(missing, ", no "), ns)
	}
}

// waypointsAlone reports whether targets are waypoints as a whole.
func (x *Index) waypointsAlone(ns string, targets []policy.Target) bool {
	return !slices.ContainsFunc(targets, func(t policy.Target) bool {
		return t.Kind != policy.TargetGateway || x.gateways[ns][t.Name] == nil
	})
}

// decided tells of a policy that waypoints decide on; false where there is none of them.
func (x *Index) decided(f *authorizationFact, s *PolicyState) bool {
	waypoints, guards, without := x.decidedAt(f.Namespace, f.Targets)
	if len(waypoints) == 0 {
		if len(without) == 0 && x.waypointsAlone(f.Namespace, f.Targets) {
			s.Exact, s.Reason, s.Message = true, "", "no Service asks for this waypoint"
			return true
		}
		return false
	}
	s.Waypoints, s.Compiled = waypoints, guards
	s.Exact, s.Reason, s.Message = f.Attached.Message == "", f.Attached.Reason, f.Attached.Message
	switch {
	case f.Inert:
		s.Compiled = nil
		if s.Exact {
			s.Message = reported(f)
		}
	case len(without) > 0:
		s.Compiled = append(s.Compiled, f.Policy.Name)
		s.Exact, s.Reason = false, policy.ReasonNoWaypoint
		s.Message = strings.TrimSuffix(fmt.Sprintf("no waypoint is in front of %s: connections to the workloads behind it are refused; %s", strings.Join(without, ", "), s.Message), "; ")
	}
	return true
}

func (x *Index) peerAuthState(f *peerAuthFact, pods []exempted) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: true}
	level := "mesh"
	switch {
	case len(f.selector) > 0 && f.Namespace == x.c.RootNamespace:
		s.Exact, s.Reason = false, policy.ReasonIgnored
		s.Message = fmt.Sprintf("in the root namespace %s a PeerAuthentication with a selector applies to nothing; make it in the workloads' namespace", f.Namespace)
		return s
	case len(f.selector) > 0:
		level = "workload"
	case f.Namespace != x.c.RootNamespace:
		level = "namespace"
	}
	var older []string
	for _, other := range x.peerAuths[f.Namespace] {
		if other == f || f.older(other) || !overlapping(f.selector, other.selector) {
			continue
		}
		older = append(older, other.Namespace+"/"+other.Name)
		if level != "workload" || sameLabels(f.selector, other.selector) {
			s.Exact, s.Reason = false, policy.ReasonConflicted
		}
	}
	slices.Sort(older)
	switch {
	case len(older) == 0:
	case s.Exact:
		s.Message = fmt.Sprintf("where %s selects the same workloads it holds instead, because it is older", strings.Join(older, ", "))
	default:
		s.Message = fmt.Sprintf("of several PeerAuthentications of a %s the oldest holds: %s", level, strings.Join(older, ", "))
		return s
	}
	ns := f.Namespace
	if level == "mesh" {
		ns = ""
	}
	if text := exemptText(pods, ns, f.selector); text != "" {
		s.Message = strings.TrimPrefix(s.Message+"; "+text, "; ")
	}
	// The static policy stands for whatever is strict on all ports; a policy of its own for exceptions by port.
	s.Compiled = []mesh.PolicyName{x.c.strictName()}
	if p := x.policy(f.portPolicyName()); p != nil {
		s.Compiled = append(s.Compiled, p.Name)
	}
	return s
}

// overlapping reports whether something can have the labels of both selectors; those without labels are of another
// level than those with.
func overlapping(a, b map[string]string) bool {
	if (len(a) == 0) != (len(b) == 0) {
		return false
	}
	for k, v := range a {
		if w, ok := b[k]; ok && w != v {
			return false
		}
	}
	return true
}

func sameLabels(a, b map[string]string) bool {
	return len(a) == len(b) && (len(a) == 0 || selects(a, b))
}

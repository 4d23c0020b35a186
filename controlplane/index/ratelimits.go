package index

import (
	"iter"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// ReasonNoRequests says of a RateLimit that there are none to count: connections of its target have no requests.
const ReasonNoRequests = "NoRequests"

// ReasonNoCounter says of a RateLimit that there is nobody to count for all pods.
const ReasonNoCounter = "NoCounter"

// rateLimitFact is a RateLimit.
type rateLimitFact struct {
	key
	uid        string
	generation int64
	policy.CompiledLimits
}

func rateLimitFactOf(r *policy.RateLimit) *rateLimitFact {
	return &rateLimitFact{keyOf(r), string(r.UID), r.Generation, policy.CompileRateLimit(r)}
}

func (x *Index) setRateLimit(k key, f *rateLimitFact) {
	old := put(x.rateLimits, k, f)
	for _, r := range []*rateLimitFact{old, f} {
		if r != nil {
			x.touchLimited(r)
		}
	}
}

// touchLimited marks a RateLimit and what it is for.
func (x *Index) touchLimited(f *rateLimitFact) {
	for _, t := range f.Targets {
		x.touchTarget(f.Namespace, t)
		x.dirtyEntrance = x.dirtyEntrance || t.Kind == policy.TargetIstioGateway
	}
	x.dirtyStates[PolicyKey{RateLimit, f.Namespace, f.Name}] = struct{}{}
}

// touchRateLimits marks the RateLimits of a namespace, of which it may have changed where they hold, and those that are counted there.
func (x *Index) touchRateLimits(ns string) {
	for name := range x.rateLimits[ns] {
		x.dirtyStates[PolicyKey{RateLimit, ns, name}] = struct{}{}
	}
	for f := range x.countedIn(ns) {
		x.dirtyStates[PolicyKey{RateLimit, f.Namespace, f.Name}] = struct{}{}
	}
}

// limitsFrom are the limits of those RateLimits of some namespaces that are for something, by name.
func (x *Index) limitsFrom(namespaces []string, is func(*rateLimitFact) bool) (out []mesh.RateLimit) {
	var all []*rateLimitFact
	for _, ns := range namespaces {
		for _, f := range x.rateLimits[ns] {
			if is(f) {
				all = append(all, f)
			}
		}
	}
	slices.SortFunc(all, func(a, b *rateLimitFact) int { return compareKeys(a.key, b.key) })
	for _, f := range all {
		by := x.counterOf(f)
		for _, l := range f.Limits {
			l.CountedBy = by
			out = append(out, l)
		}
	}
	return out
}

// counterOf is who counts for all pods what a RateLimit says, without a Service where there is none that may be asked.
func (x *Index) counterOf(f *rateLimitFact) *mesh.LimitCounter {
	if f.CountedBy == nil {
		return nil
	}
	out := f.CountedBy.LimitCounter
	if x.mayCount(f) {
		out.Service = x.c.ServiceName(f.CountedBy.Namespace, f.CountedBy.Name)
	}
	return &out
}

// mayCount reports whether a RateLimit may have its requests counted by the Service it names: of another namespace it takes a
// ReferenceGrant there, since waypoints come to it under their own names.
func (x *Index) mayCount(f *rateLimitFact) bool {
	k := key{f.CountedBy.Namespace, f.CountedBy.Name}
	return k.Namespace == f.Namespace || x.grantedFrom(policy.RateLimitGroup, "RateLimit", f.Namespace, "Service", k)
}

// countedIn are the RateLimits that have their requests counted by a Service of a namespace.
func (x *Index) countedIn(ns string) iter.Seq[*rateLimitFact] {
	return func(yield func(*rateLimitFact) bool) {
		for _, all := range x.rateLimits {
			for _, f := range all {
				if f.CountedBy != nil && f.CountedBy.Namespace == ns && !yield(f) {
					return
				}
			}
		}
	}
}

// limitsOf are those that a service's waypoint counts by.
func (x *Index) limitsOf(s *serviceFact) []mesh.RateLimit {
	if x.waypointFor(s) == nil {
		return nil
	}
	return x.limitsFrom(x.decidersOf(s), func(f *rateLimitFact) bool { return x.anyTargets(f.Namespace, f.Targets, s) })
}

// ingressLimits are those of a Gateway of the Gateway API.
func (x *Index) ingressLimits(g *ingressFact) []mesh.RateLimit {
	return x.limitsFrom([]string{g.Namespace}, func(f *rateLimitFact) bool {
		return slices.ContainsFunc(f.Targets, func(t policy.Target) bool { return x.targetsIngress(f.Namespace, t, g) })
	})
}

// entranceLimits are those of pods that serve Gateways of Istio's. They hold for all that the pods serve.
func (x *Index) entranceLimits(e *entrance) []mesh.RateLimit {
	var namespaces []string
	for _, g := range e.gateways {
		namespaces = append(namespaces, g.Namespace)
	}
	slices.Sort(namespaces)
	return x.limitsFrom(slices.Compact(namespaces), func(f *rateLimitFact) bool { return e.targeted(f) })
}

func (e *entrance) targeted(f *rateLimitFact) bool {
	return slices.ContainsFunc(e.gateways, func(g *istioGatewayFact) bool {
		return g.Namespace == f.Namespace && slices.Contains(f.Targets, policy.Target{Kind: policy.TargetIstioGateway, Name: g.Name})
	})
}

// gatewaysLimited are the gateways that a RateLimit is for.
func (x *Index) gatewaysLimited(f *rateLimitFact) []mesh.ServiceName {
	out := x.ingressTargets(f.Namespace, f.Targets)
	for _, e := range x.entrances {
		if e.targeted(f) {
			out = append(out, e.name)
		}
	}
	return out
}

func (x *Index) rateLimitState(f *rateLimitFact) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: true}
	if len(f.Problems) > 0 {
		s.lacks(policy.ReasonUnsupported, "what means nothing counts nothing: %s", strings.Join(f.Problems[:min(len(f.Problems), 5)], "; "))
	}
	if missing := x.missingTargets(f.Namespace, f.Targets); len(missing) > 0 {
		s.lacks(ReasonTargetNotFound, "in namespace %s there is no %s", f.Namespace, strings.Join(missing, ", no "))
	}
	if by := f.CountedBy; by != nil {
		otherwise := "every request is answered with 503"
		if by.FailOpen {
			otherwise = "all requests are let through"
		}
		switch {
		case !x.mayCount(f):
			s.lacks(ReasonNoCounter, "spec.countedBy: no ReferenceGrant in %s lets RateLimits of %s name its Service %s: %s", by.Namespace, f.Namespace, by.Name, otherwise)
		case x.services[by.Namespace][by.Name] == nil:
			s.lacks(ReasonNoCounter, "spec.countedBy: there is no Service %s/%s: %s", by.Namespace, by.Name, otherwise)
		case !slices.ContainsFunc(x.services[by.Namespace][by.Name].service.Ports, func(p mesh.ServicePort) bool { return p.Port == by.Port }):
			s.lacks(ReasonNoCounter, "spec.countedBy: Service %s/%s has no port %d: %s", by.Namespace, by.Name, by.Port, otherwise)
		}
	}
	waypoints, _, without := x.decidedAt(f.Namespace, f.Targets)
	gateways := x.gatewaysLimited(f)
	for _, g := range gateways {
		if !slices.Contains(waypoints, g) {
			waypoints = append(waypoints, g)
		}
	}
	slices.SortFunc(waypoints, mesh.ServiceName.Compare)
	if len(without) > 0 {
		s.lacks(policy.ReasonNoWaypoint, "no waypoint is in front of %s, whose requests nobody counts", strings.Join(without, ", "))
	}
	if none := x.withoutRequests(f); len(none) > 0 {
		s.lacks(ReasonNoRequests, "no port of %s is for HTTP, and connections are not counted", strings.Join(none, ", "))
	}
	if len(gateways) > 0 && len(f.Identities) > 0 {
		s.lacks(reasonPartlyIgnored, "%s: clients of a gateway have no identity in the mesh, so that there all of them are one client", strings.Join(f.Identities, ", "))
	}
	if len(waypoints) == 0 && s.Exact {
		if x.waypointsAlone(f.Namespace, f.Targets) {
			s.Message = "no Service asks for this waypoint"
			return s
		}
		s.lacks(ReasonNoProxy, "requests are counted by waypoints and gateways, and it is for none that is there")
	}
	if len(f.Limits) > 0 {
		s.Waypoints = waypoints
	}
	return s
}

// missingTargets are those that are not there.
func (x *Index) missingTargets(ns string, targets []policy.Target) (out []string) {
	for _, t := range targets {
		k, there := key{ns, t.Name}, false
		switch t.Kind {
		case policy.TargetService:
			there = x.services[k.Namespace][k.Name] != nil
		case policy.TargetServiceEntry:
			there = x.entries[k.Namespace][k.Name] != nil
		case policy.TargetGateway:
			there = x.gateways[k.Namespace][k.Name] != nil || x.ingresses[k.Namespace][k.Name] != nil
		case policy.TargetIstioGateway:
			there = x.istioGateways[k.Namespace][k.Name] != nil
		case policy.TargetGatewayClass:
			there = ns == x.c.RootNamespace && (t.Name == WaypointClass || x.classes[t.Name] == IngressController)
		}
		if !there {
			out = append(out, t.String())
		}
	}
	return out
}

// withoutRequests are the services named by a RateLimit of which no port is for HTTP.
func (x *Index) withoutRequests(f *rateLimitFact) (out []string) {
	for _, s := range x.winners {
		named := slices.ContainsFunc(f.Targets, func(t policy.Target) bool {
			return (t.Kind == policy.TargetService || t.Kind == policy.TargetServiceEntry) && x.targets(f.Namespace, t, s)
		})
		if named && !slices.ContainsFunc(s.service.Ports, func(p mesh.ServicePort) bool { return p.App.HTTP() }) {
			out = append(out, s.service.Name.Hostname)
		}
	}
	slices.Sort(out)
	return out
}

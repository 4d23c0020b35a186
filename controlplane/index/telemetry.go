package index

import (
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// ReasonNoProxy says of a Telemetry that there is no waypoint and no gateway for it.
const ReasonNoProxy = "NoProxy"

// telemetryFact is a Telemetry.
type telemetryFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	*policy.Telemetry
}

func (c *compiled) telemetryFactOf(t *telemetryv1.Telemetry) *telemetryFact {
	return &telemetryFact{keyOf(t), string(t.UID), t.Generation, t.CreationTimestamp, c.PolicyMesh().CompileTelemetry(t)}
}

func (f *telemetryFact) older(o *telemetryFact) bool {
	if o == nil {
		return true
	}
	if !f.created.Equal(&o.created) {
		return f.created.Before(&o.created)
	}
	return compareKeys(f.key, o.key) < 0
}

// level is how narrow a Telemetry is about something: of two, the higher one holds.
type level uint8

const (
	levelNone level = iota // it is not about it
	levelMesh
	levelClass
	levelNamespace
	levelGateway
	levelService
	levels
)

// levelOf tells of a Telemetry and of something in whose proxy's namespace it may hold.
func (x *Index) levelOf(f *telemetryFact, proxy string, is func(policy.Target) bool) level {
	switch {
	case f.Selector:
		return levelNone
	case len(f.Targets) > 0:
		best := levelNone
		for _, t := range f.Targets {
			if is(t) {
				best = max(best, map[policy.TargetKind]level{policy.TargetGatewayClass: levelClass, policy.TargetGateway: levelGateway}[t.Kind])
				if t.Kind == policy.TargetService || t.Kind == policy.TargetServiceEntry {
					best = levelService
				}
			}
		}
		return best
	case f.Namespace == x.c.RootNamespace:
		return levelMesh
	case f.Namespace == proxy:
		return levelNamespace
	}
	return levelNone
}

// tell merges what is written about something behind a proxy of a namespace. Of each level the oldest object holds.
func (x *Index) tell(gateway bool, proxy string, namespaces []string, is func(ns string, t policy.Target) bool) *mesh.Telemetry {
	var best [levels]*telemetryFact
	for _, ns := range namespaces {
		for _, f := range x.telemetries[ns] {
			if l := x.levelOf(f, proxy, func(t policy.Target) bool { return is(ns, t) }); l != levelNone && f.older(best[l]) {
				best[l] = f
			}
		}
	}
	var all []*policy.Telemetry
	for _, f := range best {
		if f != nil {
			all = append(all, f.Telemetry)
		}
	}
	return x.c.PolicyMesh().Tell(gateway, all)
}

// telemetryOf is what the waypoint of a service tells of it.
func (x *Index) telemetryOf(s *serviceFact) *mesh.Telemetry {
	if x.waypointFor(s) == nil {
		return nil
	}
	proxy := x.waypointAsked(s).Namespace
	namespaces := []string{x.c.RootNamespace, proxy, s.owner.Namespace}
	slices.Sort(namespaces)
	return x.tell(false, proxy, slices.Compact(namespaces), func(ns string, t policy.Target) bool { return x.targets(ns, t, s) })
}

// ingressTelemetry is what a gateway tells.
func (x *Index) ingressTelemetry(f *ingressFact) *mesh.Telemetry {
	return x.tell(true, f.Namespace, namespacesOf(f.Namespace, x.c.RootNamespace), func(ns string, t policy.Target) bool { return x.targetsIngress(ns, t, f) })
}

func (x *Index) setTelemetry(k key, f *telemetryFact) {
	old := put(x.telemetries, k, f)
	for _, t := range []*telemetryFact{old, f} {
		if t == nil {
			continue
		}
		for _, target := range t.Targets {
			x.touchTarget(k.Namespace, target)
		}
		if len(t.Targets) == 0 && !t.Selector {
			x.touchProxied(func(ns string) bool { return ns == k.Namespace || k.Namespace == x.c.RootNamespace })
		}
	}
	x.dirtyStates[PolicyKey{Telemetry, k.Namespace, k.Name}] = struct{}{}
	x.touchTelemetry(k.Namespace) // which of several holds
}

// touchProxied marks the services behind waypoints of namespaces, and the gateways there.
func (x *Index) touchProxied(is func(ns string) bool) {
	for name, claims := range x.candidates {
		for _, f := range claims {
			if w := x.waypointAsked(f); w != (key{}) && is(w.Namespace) {
				x.dirtyHosts[name] = struct{}{}
			}
		}
	}
	for ns, all := range x.ingresses {
		for _, f := range all {
			if is(ns) {
				x.dirtyIngress[f.key] = struct{}{}
			}
		}
	}
}

// touchTelemetry marks the Telemetry objects of a namespace.
func (x *Index) touchTelemetry(ns string) {
	for name := range x.telemetries[ns] {
		x.dirtyStates[PolicyKey{Telemetry, ns, name}] = struct{}{}
	}
}

// touchSenders marks the Telemetry objects that send to a service.
func (x *Index) touchSenders(name mesh.ServiceName) {
	for _, all := range x.telemetries {
		for _, f := range all {
			if slices.Contains(f.Services, name) {
				x.dirtyStates[PolicyKey{Telemetry, f.Namespace, f.Name}] = struct{}{}
			}
		}
	}
}

// tellers are the waypoints and gateways that a Telemetry is about, and those of its services that have none.
func (x *Index) tellers(f *telemetryFact) (out []mesh.ServiceName, without []string) {
	if len(f.Targets) > 0 {
		out, _, without = x.decidedAt(f.Namespace, f.Targets)
		return out, without
	}
	in := func(ns string) bool { return ns == f.Namespace || f.Namespace == x.c.RootNamespace }
	for _, s := range x.winners {
		if w := x.waypointFor(s); w != nil && in(x.waypointAsked(s).Namespace) && !slices.Contains(out, w.Service) {
			out = append(out, w.Service)
		}
	}
	for ns, all := range x.ingresses {
		for _, g := range all {
			if in(ns) && x.classes[g.class] == IngressController {
				out = append(out, x.c.serviceName(key{ns, g.name}))
			}
		}
	}
	slices.SortFunc(out, mesh.ServiceName.Compare)
	return out, nil
}

func (x *Index) telemetryState(f *telemetryFact) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: true}
	if f.Selector {
		s.lacks(policy.ReasonIgnored, "pods have no proxy of their own, so that it applies to nothing: name waypoints, gateways or Services in targetRefs")
		return s
	}
	if older := x.olderThan(f); older != nil {
		s.lacks(policy.ReasonConflicted, "for the same the oldest Telemetry holds: %s/%s", older.Namespace, older.Name)
	}
	waypoints, without := x.tellers(f)
	if len(waypoints) == 0 {
		before := *s
		x.misses(f.Namespace, f.Targets, s)
		if s.Reason == before.Reason {
			s.lacks(ReasonNoProxy, "requests are told of by waypoints and gateways, and it is for none that is there")
		}
		s.Exact = false
		return s
	}
	s.Waypoints = waypoints
	if len(f.Problems) > 0 {
		s.lacks(reasonPartlyIgnored, "%s", f.ProblemText())
	}
	for _, name := range f.Services {
		if x.winners[name] == nil {
			s.lacks(ReasonTargetNotFound, "there is no Service %s in namespace %s, to which it would send", name.Hostname, name.Namespace)
		}
	}
	if len(without) > 0 {
		s.lacks(policy.ReasonNoWaypoint, "no waypoint is in front of %s, of whose requests nothing is told", strings.Join(without, ", "))
	}
	return s
}

// olderThan is another object that holds in place of one wherever that is about.
func (x *Index) olderThan(f *telemetryFact) *telemetryFact {
	var best *telemetryFact
	for _, o := range x.telemetries[f.Namespace] {
		if o == f || o.Selector || !o.older(f) || (len(o.Targets) == 0) != (len(f.Targets) == 0) {
			continue
		}
		if len(f.Targets) == 0 || !slices.ContainsFunc(f.Targets, func(t policy.Target) bool { return !slices.Contains(o.Targets, t) }) {
			if o.older(best) {
				best = o
			}
		}
	}
	return best
}

package index

import (
	"slices"
	"strconv"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// A policy that a waypoint decides on would mean nothing if its Service's pods could be reached past the waypoint. So on
// the ports behind the Service they admit that waypoint alone: what keeps others out is a guard, an ordinary policy for
// nodes. There is one for each waypoint and port, and a colon in its name, which no object's name has.

// guard is a waypoint and a port that it alone may call.
type guard struct {
	waypoint key
	port     uint16
}

func (g guard) name() mesh.PolicyName {
	return mesh.PolicyName{Namespace: g.waypoint.Namespace, Name: "waypoint:" + g.waypoint.Name + ":" + strconv.Itoa(int(g.port))}
}

// guardPolicy denies the port to everybody but the waypoint's service account.
func (x *Index) guardPolicy(g guard) *mesh.Policy {
	m := mesh.Match{DestinationPorts: []uint16{g.port}}
	for _, d := range append([]string{x.c.TrustDomain}, x.c.TrustDomainAliases...) {
		m.NotPrincipals = append(m.NotPrincipals, mesh.StringMatch{Kind: mesh.MatchExact, Value: d + "/ns/" + g.waypoint.Namespace + "/sa/" + g.waypoint.Name})
	}
	return &mesh.Policy{
		Name: g.name(), Scope: mesh.ScopeWorkload, Action: mesh.Deny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}}},
	}
}

// useGuards notes which guards the workloads of an object are behind.
func (x *Index) useGuards(src source, guards []guard) {
	old := x.guardsOf[src]
	if slices.Equal(old, guards) {
		return
	}
	for _, g := range old {
		unlink(x.guards, g, src)
		x.dirtyGuards[g] = struct{}{}
	}
	for _, g := range guards {
		link(x.guards, g, src)
		x.dirtyGuards[g] = struct{}{}
	}
	if len(guards) == 0 {
		delete(x.guardsOf, src)
	} else {
		x.guardsOf[src] = guards
	}
}

func (x *Index) commitGuards(b *mesh.Builder) {
	for g := range x.dirtyGuards {
		if len(x.guards[g]) == 0 {
			b.DeletePolicy(g.name())
			continue
		}
		b.PutPolicy(x.guardPolicy(g))
	}
	if len(x.dirtyGuards) > 0 { // policies for waypoints tell of their guards
		for ns := range x.authz {
			x.touchTargeting(ns)
		}
		for ns := range x.requests {
			x.touchTargeting(ns)
		}
	}
	x.dirtyGuards = emptied(x.dirtyGuards)
}

// guarded adds the guards that a policy of a namespace gives a subject. It reports whether every way to the subject that the policy is
// about leads through a waypoint that decides; where one does not, the policy itself has to keep everybody out.
func (x *Index) guarded(ns string, targets []policy.Target, s subject, waypoints []key, guards *[]guard) bool {
	all := true
	for _, t := range targets {
		found := false
		for name, ports := range s.services {
			w := x.winners[name]
			if w == nil || !x.targets(ns, t, w) {
				continue
			}
			found = true
			if x.waypointFor(w) == nil {
				all = false
				continue
			}
			for _, p := range ports {
				g := guard{x.waypointAsked(w), p.Target}
				if p.Target != 0 && !slices.Contains(*guards, g) {
					*guards = append(*guards, g)
				}
			}
		}
		if !found && (t.Kind == policy.TargetGateway || t.Kind == policy.TargetGatewayClass) && !x.servesServices(waypoints) {
			all = false // it may have to take what is sent to the subject itself
		}
	}
	slices.SortFunc(*guards, func(a, b guard) int { return a.name().Compare(b.name()) })
	return all
}

// servesServices reports whether waypoints are there and take what is sent to Services alone.
func (x *Index) servesServices(waypoints []key) bool {
	return !slices.ContainsFunc(waypoints, func(k key) bool {
		g := x.gateways[k.Namespace][k.Name]
		return g == nil || !g.services || g.workloads
	})
}

// targets reports whether a target of a policy of a namespace is about a service.
func (x *Index) targets(ns string, t policy.Target, s *serviceFact) bool {
	switch t.Kind {
	case policy.TargetService:
		return !s.owner.entry && s.owner.key == key{ns, t.Name}
	case policy.TargetServiceEntry:
		return s.owner.entry && s.owner.key == key{ns, t.Name}
	case policy.TargetGateway:
		return x.waypointAsked(s) == key{ns, t.Name}
	case policy.TargetGatewayClass:
		return t.Name == WaypointClass && ns == x.c.RootNamespace && x.waypointAsked(s) != key{}
	}
	return false
}

// decidersOf are the namespaces of policies that may be for a service behind a waypoint.
func (x *Index) decidersOf(s *serviceFact) []string {
	namespaces := namespacesOf(s.owner.Namespace, x.c.RootNamespace)
	if w := x.waypointAsked(s).Namespace; !slices.Contains(namespaces, w) {
		namespaces = append(namespaces, w)
	}
	return namespaces
}

// accessOf are the policies that a service's waypoint decides by, and how it verifies tokens.
func (x *Index) accessOf(s *serviceFact) (access []mesh.AccessPolicy, tokens []mesh.TokenRule) {
	if x.waypointFor(s) == nil {
		return nil, nil
	}
	var requests []*requestFact
	for _, ns := range x.decidersOf(s) {
		for _, f := range x.authz[ns] {
			if f.Attached != nil && x.anyTargets(ns, f.Targets, s) {
				access = append(access, mesh.AccessPolicy{Name: f.Policy.Name, Action: f.Attached.Action, DryRun: f.Attached.DryRun, Ask: f.Attached.Ask, Rules: f.Attached.Rules})
			}
		}
		for _, f := range x.requests[ns] {
			if x.anyTargets(ns, f.Targets, s) {
				requests = append(requests, f)
			}
		}
	}
	slices.SortFunc(access, func(a, b mesh.AccessPolicy) int { return a.Name.Compare(b.Name) })
	slices.SortFunc(requests, func(a, b *requestFact) int { return compareKeys(a.key, b.key) })
	for _, f := range requests {
		tokens = append(tokens, x.tokenRules(f)...)
	}
	return access, tokens
}

func (x *Index) anyTargets(ns string, targets []policy.Target, s *serviceFact) bool {
	return slices.ContainsFunc(targets, func(t policy.Target) bool { return x.targets(ns, t, s) })
}

// decidedAt tells at which waypoints a policy is decided, what guards it has there, and which of its services are without.
func (x *Index) decidedAt(ns string, targets []policy.Target) (waypoints []mesh.ServiceName, guards []mesh.PolicyName, without []string) {
	for _, s := range x.winners {
		if !x.anyTargets(ns, targets, s) {
			continue
		}
		w := x.waypointFor(s)
		if w == nil {
			without = append(without, s.service.Name.Hostname)
			continue
		}
		if !slices.Contains(waypoints, w.Service) {
			waypoints = append(waypoints, w.Service)
		}
		for g := range x.guards {
			if g.waypoint == x.waypointAsked(s) && !slices.Contains(guards, g.name()) {
				guards = append(guards, g.name())
			}
		}
	}
	waypoints = append(waypoints, x.ingressTargets(ns, targets)...)
	slices.SortFunc(waypoints, mesh.ServiceName.Compare)
	slices.SortFunc(guards, mesh.PolicyName.Compare)
	slices.Sort(without)
	return waypoints, guards, without
}

// touchDeciders marks the policies that may be about a service, as it was or is.
func (x *Index) touchDeciders(name mesh.ServiceName, is *serviceFact) {
	x.touchTargeting(name.Namespace)
	x.touchTargeting(x.c.RootNamespace)
	if is != nil {
		x.touchTargeting(x.waypointAsked(is).Namespace)
	}
	if s := x.snapshot.Service(name); s != nil && s.Waypoint != nil {
		x.touchTargeting(s.Waypoint.Service.Namespace)
	}
}

package index

import (
	"slices"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// authorizationFact is an AuthorizationPolicy compiled for the nodes.
type authorizationFact struct {
	key
	uid        string
	generation int64
	policy.Compiled

	object    *securityv1.AuthorizationPolicy
	atGateway *policy.Attached // what gateways do about one without targets; nil until one asks
}

func (c *compiled) authorizationFactOf(p *securityv1.AuthorizationPolicy) *authorizationFact {
	return &authorizationFact{key: keyOf(p), uid: string(p.UID), generation: p.Generation, Compiled: c.PolicyMesh().Compile(p), object: p}
}

// PolicyMesh is what the meaning of policies depends on.
func (c Config) PolicyMesh() policy.Mesh {
	return policy.Mesh{RootNamespace: c.RootNamespace, TrustDomain: c.TrustDomain, TrustDomainAliases: c.TrustDomainAliases, Providers: c.Providers, Telemetry: c.Telemetry}
}

// Labels with which a namespace, a service or a pod asks for a waypoint.
const (
	LabelWaypoint          = "istio.io/use-waypoint"
	LabelWaypointNamespace = "istio.io/use-waypoint-namespace"
	labelIngressUses       = "istio.io/ingress-use-waypoint" // gateways send by the waypoint, too
)

// WaypointClass is that of the Gateways that are waypoints.
const WaypointClass = "istio-waypoint"

// waypointOf reads the labels of an object in a namespace; said is false where they leave it to the namespace. The
// zero key is the wish for none.
func waypointOf(l map[string]string, ns string) (_ key, said bool) {
	name, ok := l[LabelWaypoint]
	if !ok || name == "" {
		return key{}, false
	}
	if name == "none" {
		return key{}, true
	}
	if other := l[LabelWaypointNamespace]; other != "" {
		ns = other
	}
	return key{ns, name}, true
}

// subject is what policies may bind to: a workload's namespace, labels and services.
type subject struct {
	namespace string
	labels    map[string]string
	services  map[mesh.ServiceName][]mesh.ServicePort
}

// waypoints are those that the subject, its services or its namespace ask for.
func (x *Index) waypoints(s subject) []key {
	var inherited key
	if ns := x.namespaces[s.namespace]; ns != nil {
		inherited, _ = waypointOf(ns.labels, s.namespace)
	}
	var out []key
	add := func(k key, said bool) {
		if !said {
			k = inherited
		}
		if k != (key{}) && !slices.Contains(out, k) {
			out = append(out, k)
		}
	}
	add(waypointOf(s.labels, s.namespace))
	for name := range s.services {
		if w := x.winners[name]; w != nil {
			add(w.waypoint, w.waypointSaid)
		}
	}
	return out
}

// attachedTo reports whether one of the targets of a policy is the subject's service or waypoint.
func (x *Index) attachedTo(ns string, targets []policy.Target, s subject, waypoints []key) bool {
	return slices.ContainsFunc(targets, func(t policy.Target) bool {
		switch t.Kind {
		case policy.TargetService:
			_, ok := s.services[x.c.serviceName(key{ns, t.Name})]
			return ok
		case policy.TargetServiceEntry:
			e := x.entries[ns][t.Name]
			return e != nil && slices.ContainsFunc(e.hosts, func(h *serviceFact) bool { _, ok := s.services[h.service.Name]; return ok })
		case policy.TargetGateway:
			return slices.Contains(waypoints, key{ns, t.Name})
		case policy.TargetGatewayClass:
			return len(waypoints) > 0 && t.Name == WaypointClass && ns == x.c.RootNamespace
		}
		return false
	})
}

// boundTo reports whether a policy that binds by selector or targets binds to the subject. One that a waypoint decides on
// does not, but for the guards.
func (x *Index) boundTo(f *authorizationFact, s subject, waypoints []key, guards *[]guard) bool {
	if f.Policy.Scope != mesh.ScopeWorkload || f.Inert {
		return false
	}
	if len(f.Targets) > 0 {
		return x.attachedTo(f.Namespace, f.Targets, s, waypoints) && !x.guarded(f.Namespace, f.Targets, s, waypoints, guards)
	}
	return (f.Namespace == s.namespace || f.Namespace == x.c.RootNamespace) && selects(f.Selector, s.labels)
}

// bindings are the policies of one workload that do not come by scope.
type bindings struct {
	policies, audits []mesh.PolicyName
	strict           bool // on every port

	guards []guard // of the waypoints that decide for it

	exempt     *exemption // nil where the API server calls nothing
	exemptName mesh.PolicyName
}

// policiesFor finds the policies that bind to a workload.
func (x *Index) policiesFor(s subject) bindings {
	var b bindings
	waypoints := x.waypoints(s)
	namespaces := namespacesOf(s.namespace, x.c.RootNamespace)
	for _, w := range waypoints {
		if !slices.Contains(namespaces, w.Namespace) {
			namespaces = append(namespaces, w.Namespace)
		}
	}
	for _, from := range namespaces {
		for _, f := range x.authz[from] {
			switch {
			case !x.boundTo(f, s, waypoints, &b.guards):
			case f.Policy.Action == mesh.Audit:
				b.audits = append(b.audits, f.Policy.Name)
			default:
				b.policies = append(b.policies, f.Policy.Name)
			}
		}
	}
	for _, from := range namespaces {
		for _, f := range x.requests[from] { // what comes past the waypoint has tokens that nobody has verified
			if x.attachedTo(from, f.Targets, s, waypoints) {
				x.guarded(from, f.Targets, s, waypoints, &b.guards)
			}
		}
	}
	for _, g := range b.guards {
		b.policies = append(b.policies, g.name())
	}
	slices.SortFunc(b.policies, mesh.PolicyName.Compare)
	slices.SortFunc(b.audits, mesh.PolicyName.Compare)
	meshWide, namespace, workload := x.peerAuthsFor(s)
	converted, strict := x.c.peerPolicies(meshWide, namespace, workload)
	b.policies, b.strict = append(b.policies, converted...), strict
	if len(converted) > 0 {
		x.exempt(&b, s, workload, effectiveStrict(meshWide, namespace, workload), converted[0])
	}
	return b
}

// peerAuthsFor finds the PeerAuthentications of the three levels that hold for a workload.
func (x *Index) peerAuthsFor(s subject) (meshWide, namespace, workload *peerAuthFact) {
	meshWide, namespace = x.peerAuthLevels(s.namespace)
	if s.namespace == x.c.RootNamespace {
		return meshWide, namespace, nil
	}
	for _, p := range x.peerAuths[s.namespace] {
		if selects(p.selector, s.labels) && p.older(workload) {
			workload = p
		}
	}
	return meshWide, namespace, workload
}

func namespacesOf(ns, root string) []string {
	if ns == root {
		return []string{ns}
	}
	return []string{ns, root}
}

func (x *Index) setAuthorization(k key, f *authorizationFact) {
	old := put(x.authz, k, f)
	if old == nil && f == nil {
		return
	}
	x.dirtyPolicies[mesh.PolicyName(k)] = struct{}{}
	x.dirtyStates[PolicyKey{AuthorizationPolicy, k.Namespace, k.Name}] = struct{}{}
	for _, p := range []*authorizationFact{old, f} {
		if p == nil {
			continue
		}
		x.touchTargets(k.Namespace, p.Targets)
		if len(p.Selector) == 0 {
			continue
		}
		if k.Namespace == x.c.RootNamespace {
			for ns := range x.pods {
				x.touchSelected(ns, p.Selector)
			}
			for ns := range x.endpoints {
				x.touchSelected(ns, p.Selector)
			}
			continue
		}
		x.touchSelected(k.Namespace, p.Selector)
	}
}

// touchTargets marks what a policy of a namespace binds to: without targets it may be about gateways.
func (x *Index) touchTargets(ns string, targets []policy.Target) {
	for _, t := range targets {
		x.touchTarget(ns, t)
	}
	if len(targets) == 0 {
		x.touchGateways(ns)
	}
}

// touchTarget marks what a policy of a namespace binds to by one target.
func (x *Index) touchTarget(ns string, t policy.Target) {
	switch t.Kind {
	case policy.TargetService:
		if s := x.services[ns][t.Name]; s != nil {
			x.touchBackends(s)
			x.dirtyHosts[s.service.Name] = struct{}{}
		}
	case policy.TargetServiceEntry:
		if e := x.entries[ns][t.Name]; e != nil {
			for _, h := range e.hosts {
				x.touchBackends(h)
				x.dirtyHosts[h.service.Name] = struct{}{}
			}
		}
	case policy.TargetGateway, policy.TargetGatewayClass:
		for _, all := range x.ingresses {
			for _, f := range all {
				if x.targetsIngress(ns, t, f) {
					x.dirtyIngress[f.key] = struct{}{}
				}
			}
		}
		x.touchWaypoint(func(k key) bool {
			return k != key{} && (t.Kind == policy.TargetGatewayClass || k == key{ns, t.Name})
		})
	}
}

// touchWaypoint marks what asks for a waypoint.
func (x *Index) touchWaypoint(is func(key) bool) {
	asks := func(k key, said bool) bool { return said && is(k) }
	for name, ns := range x.namespaces {
		if asks(waypointOf(ns.labels, name)) {
			for _, p := range x.pods[name] {
				x.touch(Pod, p.key)
			}
			for _, e := range x.endpoints[name] {
				x.touch(WorkloadEntry, e.key)
			}
		}
	}
	for _, pods := range x.pods {
		for _, p := range pods {
			if asks(waypointOf(p.labels, p.Namespace)) {
				x.touch(Pod, p.key)
			}
		}
	}
	for _, entries := range x.endpoints {
		for _, e := range entries {
			if asks(waypointOf(e.labels, e.Namespace)) {
				x.touch(WorkloadEntry, e.key)
			}
		}
	}
	for name, claims := range x.candidates {
		for _, f := range claims {
			if is(x.waypointAsked(f)) {
				x.touchBackends(f)
				x.dirtyHosts[name] = struct{}{}
			}
		}
	}
}

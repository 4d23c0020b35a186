package index

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Routes of the Gateway API that are attached to Services. A route of the Service's own namespace is for all its clients, one
// of another namespace for the clients of that namespace alone, who then meet no other. What a route says is followed by the
// Service's waypoint; without one it has no effect, which its conditions say.

// RouteKey names a route, or a BackendTLSPolicy: what is said of it is of the same kind.
type RouteKey struct {
	Kind            Kind
	Namespace, Name string
}

// RouteState is what has become of a route at each Service and Gateway that it is attached to, of a policy at each Gateway that it
// is for.
type RouteState struct {
	UID     string
	Parents []RouteParent
}

// RouteParent is one of them.
type RouteParent struct {
	Ref                        gatewayv1.ParentReference
	Accepted, Resolved, Partly routing.Verdict
}

// Reasons of the condition Accepted that the Gateway API's Go types have no word for.
const (
	// ReasonConflicted says that routes of another kind hold for the same port.
	ReasonConflicted = "Conflicted"
	reasonNoWaypoint = policy.ReasonNoWaypoint
)

// gatewayRouteFact is a route.
type gatewayRouteFact struct {
	ref
	uid        string
	generation int64
	created    metav1.Time
	parents    []gatewayv1.ParentReference // Services, Gateways and ListenerSets
	hostnames  []string                    // which mean nothing at Services
	services   bool                        // it has such parents
	gateways   bool
	convert    func(routing.Backends) routing.Route
	mentions   []mesh.ServiceName // what it is attached to and what it sends to
}

func (f *gatewayRouteFact) older(o *gatewayRouteFact) int {
	if !f.created.Equal(&o.created) {
		if f.created.Before(&o.created) {
			return -1
		}
		return 1
	}
	return cmp.Or(compareKeys(f.key, o.key), cmp.Compare(f.kind, o.kind))
}

// gatewayAPI is what the index has of it.
type gatewayAPI struct {
	gatewayRoutes      map[ref]*gatewayRouteFact
	grants             map[string]map[string]*grantFact      // ReferenceGrants
	routesOn           map[mesh.ServiceName]map[ref]struct{} // by what they mention
	dirtyGatewayRoutes map[ref]struct{}

	// What was derived at the last Commit.
	routeStates map[RouteKey]*RouteState
	routesBound map[ref][]*boundRoute                         // by route
	routesAt    map[mesh.ServiceName]map[*boundRoute]struct{} // by parent
}

func newGatewayAPI() gatewayAPI {
	return gatewayAPI{
		gatewayRoutes: map[ref]*gatewayRouteFact{}, grants: map[string]map[string]*grantFact{}, routesOn: map[mesh.ServiceName]map[ref]struct{}{},
		dirtyGatewayRoutes: map[ref]struct{}{}, routeStates: map[RouteKey]*RouteState{}, routesBound: map[ref][]*boundRoute{},
		routesAt: map[mesh.ServiceName]map[*boundRoute]struct{}{},
	}
}

// boundRoute is a route at one of its parents.
type boundRoute struct {
	fact   *gatewayRouteFact
	parent RouteParent
	nth    int // of the route's parents
	name   mesh.ServiceName
	ports  []uint16 // of the service that it is for, sorted; empty where it is not followed at all
	every  bool     // for all ports
	from   string   // namespace of the clients; "" for all
	rules  []routing.Rule

	backends []mesh.HTTPBackend // of a route for connections
	gateway  key                // that it is attached to; the zero key for a Service
	at       []attachment
}

// older orders routes at one parent.
func (b *boundRoute) older(o *boundRoute) int {
	return cmp.Or(b.fact.older(o.fact), cmp.Compare(b.nth, o.nth))
}

func (c *compiled) httpRouteFactOf(r *gatewayv1.HTTPRoute) *gatewayRouteFact {
	f := c.gatewayRouteFactOf(HTTPRoute, r, r.Spec.ParentRefs, r.Spec.Hostnames)
	for i := range r.Spec.Rules {
		rule := &r.Spec.Rules[i]
		for _, b := range rule.BackendRefs {
			c.mention(f, b.BackendObjectReference)
			for _, l := range b.Filters {
				c.mentionMirror(f, l.RequestMirror)
			}
		}
		for _, l := range rule.Filters {
			c.mentionMirror(f, l.RequestMirror)
			if l.ExternalAuth != nil {
				c.mention(f, l.ExternalAuth.BackendRef)
			}
		}
	}
	f.convert = func(find routing.Backends) routing.Route {
		return routing.HTTPRoute(r.Namespace, r.Name, &r.Spec, find)
	}
	return f
}

func (c *compiled) grpcRouteFactOf(r *gatewayv1.GRPCRoute) *gatewayRouteFact {
	f := c.gatewayRouteFactOf(GRPCRoute, r, r.Spec.ParentRefs, r.Spec.Hostnames)
	for i := range r.Spec.Rules {
		rule := &r.Spec.Rules[i]
		for _, b := range rule.BackendRefs {
			c.mention(f, b.BackendObjectReference)
			for _, l := range b.Filters {
				c.mentionMirror(f, l.RequestMirror)
			}
		}
		for _, l := range rule.Filters {
			c.mentionMirror(f, l.RequestMirror)
		}
	}
	f.convert = func(find routing.Backends) routing.Route {
		return routing.GRPCRoute(r.Namespace, r.Name, &r.Spec, find)
	}
	return f
}

func (c *compiled) gatewayRouteFactOf(kind Kind, r metav1.Object, parents []gatewayv1.ParentReference, hostnames []gatewayv1.Hostname) *gatewayRouteFact {
	f := &gatewayRouteFact{ref: ref{kind, keyOf(r)}, uid: string(r.GetUID()), generation: r.GetGeneration(), created: r.GetCreationTimestamp()}
	for _, h := range hostnames {
		f.hostnames = append(f.hostnames, strings.ToLower(string(h)))
	}
	for _, p := range parents {
		switch {
		case ofService(p):
			f.services = true
			f.parents = append(f.parents, p)
			if !ofEntry(p) { // whose host only the entry says
				f.mentions = append(f.mentions, c.serviceName(parentKey(f, p)))
			}
		case deref(p.Group, gatewayv1.GroupName) == gatewayv1.GroupName && (deref(p.Kind, "Gateway") == "Gateway" || *p.Kind == "ListenerSet"):
			f.gateways = true
			f.parents = append(f.parents, p)
		}
	}
	return f
}

// ofService reports whether a parent is what is asked for within the mesh: a Service, or what a ServiceEntry declares.
func ofService(p gatewayv1.ParentReference) bool {
	return deref(p.Group, gatewayv1.GroupName) == "" && deref(p.Kind, "Gateway") == "Service" || ofEntry(p)
}

func ofEntry(p gatewayv1.ParentReference) bool {
	return deref(p.Group, gatewayv1.GroupName) == hostnameGroup && deref(p.Kind, "Gateway") == "ServiceEntry"
}

func deref[T ~string](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}

func parentKey(f *gatewayRouteFact, p gatewayv1.ParentReference) key {
	return key{string(deref(p.Namespace, gatewayv1.Namespace(f.Namespace))), string(p.Name)}
}

// parentAt is the Gateway, the ListenerSet or the ServiceEntry that a route names.
func parentAt(f *gatewayRouteFact, p gatewayv1.ParentReference) ref {
	if ofEntry(p) {
		return ref{ServiceEntry, parentKey(f, p)}
	}
	if deref(p.Kind, "Gateway") == "ListenerSet" {
		return ref{ListenerSet, parentKey(f, p)}
	}
	return ref{Gateway, parentKey(f, p)}
}

// hostnameGroup is that of the kind Hostname, with which routes name what ServiceEntries declare.
const hostnameGroup = "networking.istio.io"

// backendName is the service that a reference names; false for other kinds.
func (c *compiled) backendName(f *gatewayRouteFact, b gatewayv1.BackendObjectReference) (mesh.ServiceName, bool) {
	switch group, kind := deref(b.Group, ""), deref(b.Kind, "Service"); {
	case group == "" && kind == "Service":
		return c.serviceName(key{string(deref(b.Namespace, gatewayv1.Namespace(f.Namespace))), string(b.Name)}), true
	case group == hostnameGroup && kind == "Hostname" && strings.Contains(string(b.Name), "."):
		return c.ResolveHost(f.Namespace, string(b.Name)), true
	}
	return mesh.ServiceName{}, false
}

func (c *compiled) mention(f *gatewayRouteFact, b gatewayv1.BackendObjectReference) {
	if name, ok := c.backendName(f, b); ok && !slices.Contains(f.mentions, name) {
		f.mentions = append(f.mentions, name)
	}
}

func (c *compiled) mentionMirror(f *gatewayRouteFact, m *gatewayv1.HTTPRequestMirrorFilter) {
	if m != nil {
		c.mention(f, m.BackendRef)
	}
}

func (x *Index) setGatewayRoute(kind Kind, k key, f *gatewayRouteFact) {
	r := ref{kind, k}
	old := x.gatewayRoutes[r]
	if old == nil && f == nil || old != nil && f != nil && f.generation != 0 && old.generation == f.generation && old.uid == f.uid {
		return // none, or only its status has changed
	}
	if old != nil {
		for _, name := range old.mentions {
			unlink(x.routesOn, name, r)
		}
		for _, p := range old.parents {
			if !ofService(p) || ofEntry(p) {
				unlink(x.routesOf, parentAt(old, p), r)
			}
		}
		delete(x.gatewayRoutes, r)
	}
	if f != nil {
		x.gatewayRoutes[r] = f
		for _, p := range f.parents {
			if !ofService(p) || ofEntry(p) {
				link(x.routesOf, parentAt(f, p), r)
			}
		}
		for _, name := range f.mentions {
			link(x.routesOn, name, r)
		}
	}
	x.dirtyGatewayRoutes[r] = struct{}{}
}

// grantFact is a ReferenceGrant.
type grantFact struct {
	key
	from []gatewayv1.ReferenceGrantFrom
	to   []gatewayv1.ReferenceGrantTo
}

func (x *Index) setGrant(k key, f *grantFact) {
	put(x.grants, k, f)
	for name, routes := range x.routesOn {
		if name.Namespace == k.Namespace {
			for r := range routes {
				x.dirtyGatewayRoutes[r] = struct{}{}
			}
		}
	}
	for _, all := range x.ingresses {
		for _, f := range all {
			if slices.ContainsFunc(f.wants(), func(s key) bool { return s.Namespace == k.Namespace }) {
				x.dirtyIngress[f.key] = struct{}{}
			}
		}
	}
	for f := range x.countedIn(k.Namespace) {
		x.touchLimited(f)
	}
}

// granted reports whether a route may send to a Service of another namespace.
func (x *Index) granted(f *gatewayRouteFact, k key) bool {
	return x.grantedTo(f.kind.String(), f.Namespace, "Service", k)
}

// grantedTo reports whether what is of a kind of the Gateway API, in a namespace, may refer to what is in another.
func (x *Index) grantedTo(fromKind, fromNamespace string, kind gatewayv1.Kind, k key) bool {
	return x.grantedFrom(gatewayv1.GroupName, fromKind, fromNamespace, kind, k)
}

// grantedFrom is the same for a kind of any group.
func (x *Index) grantedFrom(group gatewayv1.Group, fromKind, fromNamespace string, kind gatewayv1.Kind, k key) bool {
	for _, g := range x.grants[k.Namespace] {
		from := slices.ContainsFunc(g.from, func(r gatewayv1.ReferenceGrantFrom) bool {
			return r.Group == group && string(r.Kind) == fromKind && string(r.Namespace) == fromNamespace
		})
		if from && slices.ContainsFunc(g.to, func(r gatewayv1.ReferenceGrantTo) bool {
			return r.Group == "" && r.Kind == kind && (deref(r.Name, "") == "" || string(*r.Name) == k.Name)
		}) {
			return true
		}
	}
	return false
}

// backends finds what a route sends to from a parent. To what is in other namespaces somebody there has to grant it: the
// waypoint comes there under its own name, and past what would be decided about the client. What was asked for needs none.
func (x *Index) backends(f *gatewayRouteFact, parent mesh.ServiceName) routing.Backends {
	not := func(reason gatewayv1.RouteConditionReason, message string) (mesh.HTTPBackend, routing.Verdict) {
		return mesh.HTTPBackend{}, routing.Verdict{Reason: string(reason), Message: message}
	}
	return func(b gatewayv1.BackendObjectReference) (mesh.HTTPBackend, routing.Verdict) {
		name, ok := x.c.backendName(f, b)
		if !ok {
			return not(gatewayv1.RouteReasonInvalidKind, "backendRef "+string(b.Name)+" is of kind "+string(deref(b.Kind, "Service"))+", which nothing can be sent to")
		}
		at := name.Namespace + "/" + string(b.Name)
		if name.Namespace != f.Namespace && name != parent && !x.granted(f, key{name.Namespace, string(b.Name)}) {
			return not(gatewayv1.RouteReasonRefNotPermitted, "no ReferenceGrant in "+name.Namespace+" lets "+f.kind.String()+"s of "+f.Namespace+" send to Service "+at)
		}
		s := winner(x.candidates[name])
		if s == nil {
			return not(gatewayv1.RouteReasonBackendNotFound, "Service "+at+" was not found")
		}
		if b.Port == nil {
			return not(gatewayv1.RouteReasonUnsupportedValue, "the backendRef to Service "+at+" has no port")
		}
		port := uint16(*b.Port)
		i := slices.IndexFunc(s.service.Ports, func(p mesh.ServicePort) bool { return p.Port == port })
		switch {
		case i < 0:
			return not(gatewayv1.RouteReasonBackendNotFound, "Service "+at+" has no port "+strconv.Itoa(int(port)))
		case s.service.Ports[i].App == mesh.AppTLS && !f.connections() && (parent != (mesh.ServiceName{}) || !x.encrypted(s, port)): // waypoints do not speak it
			return not(gatewayv1.RouteReasonUnsupportedProtocol, "port "+strconv.Itoa(int(port))+" of Service "+at+" is declared as TLS; gateways speak it where a BackendTLSPolicy says how")
		}
		return mesh.HTTPBackend{Service: name, Port: port}, routing.Verdict{}
	}
}

// parent finds the Service, or what a ServiceEntry declares, that a route is attached to, nil where it is not there; without a name where
// there is more than one.
func (x *Index) parent(f *gatewayRouteFact, p gatewayv1.ParentReference) (at string, name mesh.ServiceName, s *serviceFact) {
	k := parentKey(f, p)
	if !ofEntry(p) {
		return "Service " + k.String(), x.c.serviceName(k), x.services[k.Namespace][k.Name]
	}
	at = "ServiceEntry " + k.String()
	e := x.entries[k.Namespace][k.Name]
	switch {
	case e == nil:
		return at, mesh.ServiceName{Namespace: k.Namespace, Hostname: k.Name}, nil // a name of nothing
	case len(e.hosts) != 1:
		return at, mesh.ServiceName{}, nil
	}
	s = e.hosts[0]
	if name = s.service.Name; !slices.Contains(f.mentions, name) {
		f.mentions = append(f.mentions, name)
		link(x.routesOn, name, f.ref)
	}
	if w := winner(x.candidates[name]); w != s {
		return at + " (" + name.Hostname + " is another object's)", name, nil
	}
	return at, name, s
}

// bind finds what a route means at one of its parents.
func (x *Index) bind(f *gatewayRouteFact, p gatewayv1.ParentReference) *boundRoute {
	k := parentKey(f, p)
	at, name, s := x.parent(f, p)
	b := &boundRoute{fact: f, name: name, parent: RouteParent{Ref: p}, every: p.Port == nil && p.SectionName == nil}
	if k.Namespace != f.Namespace {
		b.from = f.Namespace
	}
	r := f.convert(x.backends(f, b.name))
	b.parent.Resolved, b.parent.Partly = r.Resolved, r.Partly
	refuse := func(reason, message string) *boundRoute {
		b.parent.Accepted, b.parent.Partly = routing.Verdict{Reason: reason, Message: message}, routing.Verdict{}
		b.ports = nil
		return b
	}
	switch {
	case name == (mesh.ServiceName{}):
		return refuse(string(gatewayv1.RouteReasonUnsupportedValue), at+" has more than one host; routes are for those with one")
	case s == nil:
		return refuse(string(gatewayv1.RouteReasonNoMatchingParent), at+" was not found")
	case len(s.service.VIPs) == 0 && s.owner.entry:
		return refuse(string(gatewayv1.RouteReasonNoMatchingParent), at+" has no address: nobody comes to it")
	case len(s.service.VIPs) == 0:
		return refuse(string(gatewayv1.RouteReasonNoMatchingParent), at+" is headless: without an address of its own nothing can be routed")
	}
	if f.kind == TLSRoute && len(f.hostnames) == 0 {
		return refuse(string(gatewayv1.RouteReasonUnsupportedValue), "it has no hostnames: which server names is it for?")
	}
	var other []string
	for i, port := range s.service.Ports {
		if p.Port != nil && uint16(*p.Port) != port.Port || p.SectionName != nil && string(*p.SectionName) != s.ports[i].name {
			continue
		}
		if opaquely := port.App == mesh.AppTCP || port.App == mesh.AppTLS; port.App == mesh.AppUnknown || opaquely == f.connections() {
			b.ports = append(b.ports, port.Port)
		} else {
			other = append(other, strconv.Itoa(int(port.Port)))
		}
	}
	slices.Sort(b.ports)
	switch {
	case len(b.ports) == 0 && len(other) == 0:
		return refuse(string(gatewayv1.RouteReasonNoMatchingParent), at+" has no such port")
	case len(b.ports) == 0 && f.connections():
		return refuse(string(gatewayv1.RouteReasonUnsupportedValue), "port "+strings.Join(other, ", ")+" of "+at+" is declared as HTTP, which HTTPRoutes are for")
	case len(b.ports) == 0:
		return refuse(string(gatewayv1.RouteReasonUnsupportedValue), "port "+strings.Join(other, ", ")+" of "+at+" is declared as other than HTTP")
	case x.waypointFor(s) == nil:
		return refuse(reasonNoWaypoint, "it has no effect: "+at+" is not behind a waypoint for Services (label istio.io/use-waypoint)")
	case !r.Accepted.OK():
		b.parent.Accepted = r.Accepted // its rules are there, and fail what they match
	}
	b.rules, b.backends = r.Rules, r.Backends
	return b
}

// commitGatewayRoutes binds routes anew that have changed, or whose Services have. It comes before the services.
func (x *Index) commitGatewayRoutes(u *Update) {
	for name := range x.dirtyHosts {
		for r := range x.routesOn[name] {
			x.dirtyGatewayRoutes[r] = struct{}{}
		}
	}
	touched := map[mesh.ServiceName]struct{}{}
	for r := range x.dirtyGatewayRoutes {
		for _, b := range x.routesBound[r] {
			if b.gateway != (key{}) {
				unlink(x.routesAttached, b.gateway, b)
				x.dirtyIngress[b.gateway] = struct{}{}
				continue
			}
			unlink(x.routesAt, b.name, b)
			touched[b.name] = struct{}{}
		}
		delete(x.routesBound, r)
		f := x.gatewayRoutes[r]
		if f == nil {
			continue
		}
		for nth, p := range f.parents {
			if !ofService(p) {
				if b := x.attach(f, p); b != nil {
					b.nth = nth
					x.routesBound[r] = append(x.routesBound[r], b)
					link(x.routesAttached, b.gateway, b)
					x.dirtyIngress[b.gateway] = struct{}{}
				}
				continue
			}
			b := x.bind(f, p)
			b.nth = nth
			x.routesBound[r] = append(x.routesBound[r], b)
			link(x.routesAt, b.name, b)
			touched[b.name] = struct{}{}
		}
	}
	again := x.dirtyGatewayRoutes // whose state has to be looked at: also that of those which others are in the way of
	for name := range touched {
		x.dirtyHosts[name] = struct{}{}
		for b := range x.routesAt[name] {
			again[b.fact.ref] = struct{}{}
		}
		for _, v := range x.virtuals[name.Namespace] {
			if slices.Contains(v.hosts, name) {
				x.dirtyRoutes[ref{VirtualService, v.key}] = struct{}{}
			}
		}
	}
	for r := range again {
		x.stateRoute(u, r)
	}
	x.dirtyGatewayRoutes = emptied(x.dirtyGatewayRoutes)
}

// stateRoute notes what has become of a route.
func (x *Index) stateRoute(u *Update, r ref) {
	k, nk := RouteKey{r.kind, r.Namespace, r.Name}, NoticeKey{Kind: r.kind, Namespace: r.Namespace, Name: r.Name}
	f := x.gatewayRoutes[r]
	if f == nil {
		if x.routeStates[k] != nil {
			delete(x.routeStates, k)
			u.Routes[k] = nil
		}
		x.notice(u, nk, "", "", "")
		return
	}
	next := &RouteState{UID: f.uid}
	var worst routing.Verdict
	for _, b := range x.routesBound[r] {
		p := b.parent
		if b.gateway == (key{}) && p.Accepted.OK() && len(x.portsOf(b)) == 0 {
			others := "GRPCRoutes"
			if f.kind == TCPRoute {
				others = "HTTPRoutes or GRPCRoutes"
			}
			p.Accepted = routing.Verdict{Reason: ReasonConflicted, Message: others + " are attached to the same ports of the Service, and hold there"}
			p.Partly = routing.Verdict{}
		}
		next.Parents = append(next.Parents, p)
		for _, v := range []routing.Verdict{p.Accepted, p.Resolved, p.Partly} {
			if worst.OK() && !v.OK() {
				worst = v
			}
		}
	}
	if worst.OK() && len(f.hostnames) > 0 && f.services && f.kind != TLSRoute {
		worst = routing.Verdict{Reason: reasonPartlyIgnored, Message: "hostnames mean nothing at a Service, which is known by its address; match the header Host instead"}
	}
	x.notice(u, nk, f.uid, worst.Reason, worst.Message)
	if old := x.routeStates[k]; old == nil || !sameState(old, next) {
		x.routeStates[k] = next
		u.Routes[k] = next
	}
}

func sameState(a, b *RouteState) bool {
	return a.UID == b.UID && slices.EqualFunc(a.Parents, b.Parents, func(p, q RouteParent) bool {
		return SameParent(p.Ref, q.Ref) && p.Accepted == q.Accepted && p.Resolved == q.Resolved && p.Partly == q.Partly
	})
}

// SameParent reports whether two references of a route are the same.
func SameParent(a, b gatewayv1.ParentReference) bool {
	same := func(p, q *gatewayv1.PortNumber) bool { return p == nil && q == nil || p != nil && q != nil && *p == *q }
	return deref(a.Group, gatewayv1.GroupName) == deref(b.Group, gatewayv1.GroupName) && deref(a.Kind, "Gateway") == deref(b.Kind, "Gateway") &&
		deref(a.Namespace, "") == deref(b.Namespace, "") && a.Name == b.Name && deref(a.SectionName, "") == deref(b.SectionName, "") && same(a.Port, b.Port)
}

// portsOf are the ports where a route holds: those where the routes of its clients are of its kind. GRPCRoutes come first, then
// HTTPRoutes, whomever they are for where the other is for connections, but those that a TLSRoute is for are no requests.
func (x *Index) portsOf(b *boundRoute) []uint16 {
	if b.fact.kind == GRPCRoute || b.fact.kind == TLSRoute {
		return b.ports
	}
	var taken []uint16
	for o := range x.routesAt[b.name] {
		if len(o.rules) > 0 && (o.fact.kind == GRPCRoute && o.from == b.from || b.fact.connections()) {
			taken = append(taken, o.ports...)
		}
	}
	if len(taken) == 0 {
		return b.ports
	}
	return slices.DeleteFunc(slices.Clone(b.ports), func(p uint16) bool { return slices.Contains(taken, p) })
}

// gatewayRules are the rules of a service's routes, those for the clients of a namespace first; open says that there are none
// for all others.
func (x *Index) gatewayRules(name mesh.ServiceName) (rules []mesh.HTTPRule, open bool) {
	groups := map[string][]*boundRoute{}
	for b := range x.routesAt[name] {
		if len(b.rules) > 0 {
			groups[b.from] = append(groups[b.from], b)
		}
	}
	others := groups[""]
	delete(groups, "")
	for _, from := range slices.Sorted(maps.Keys(groups)) {
		rules = append(rules, x.ordered(groups[from])...)
	}
	all := x.ordered(others)
	return append(rules, all...), len(all) == 0
}

// overridden names the route that holds for a service in place of its VirtualService; "" where none does.
func (x *Index) overridden(name mesh.ServiceName) string {
	var first *gatewayRouteFact
	for b := range x.routesAt[name] {
		if b.from == "" && len(b.rules) > 0 && (first == nil || b.fact.older(first) < 0) {
			first = b.fact
		}
	}
	if first == nil {
		return ""
	}
	return first.kind.String() + " " + first.Name
}

// ordered are the rules of routes for the same clients, in the order in which they are asked.
func (x *Index) ordered(routes []*boundRoute) []mesh.HTTPRule {
	slices.SortFunc(routes, (*boundRoute).older)
	return inOrder(routes, func(b *boundRoute) []uint16 {
		ports := x.portsOf(b)
		if b.every && len(ports) == len(b.ports) {
			ports = []uint16{0}
		}
		return ports
	})
}

// inOrder merges the rules of routes, the oldest first, by the precedence of the Gateway API.
func inOrder(routes []*boundRoute, ports func(*boundRoute) []uint16) []mesh.HTTPRule {
	var all []routing.Rule
	for _, b := range routes {
		for _, port := range ports(b) {
			for _, r := range b.rules {
				r.Port, r.From = port, b.from
				all = append(all, r)
			}
		}
	}
	slices.SortStableFunc(all, routing.Rule.Compare)
	out := make([]mesh.HTTPRule, 0, len(all))
	for i := range all {
		out = append(out, all[i].HTTPRule)
	}
	return out
}

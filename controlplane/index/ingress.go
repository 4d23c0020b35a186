package index

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Gateways for clients from outside the mesh: those of a class that this control plane is the controller of, but for the
// class of waypoints.

// Names of Istio's, by which tools find gateways.
const (
	IngressClass      = "istio"
	IngressController = "istio.io/gateway-controller"

	annotationNameOverride = "gateway.istio.io/name-override"
)

// IngressName is the name of what is made for a Gateway: its Deployment, its Service and its service account.
func IngressName(g *gatewayv1.Gateway) string {
	return cmp.Or(g.Annotations[annotationNameOverride], g.Name+"-"+string(g.Spec.GatewayClassName))
}

// GatewayKey names a Gateway.
type GatewayKey struct{ Namespace, Name string }

// GatewayState is what has become of a Gateway as far as the index knows: whether there are pods, others do.
type GatewayState struct {
	UID        string
	Generation int64
	Accepted   routing.Verdict
	Resolved   routing.Verdict // of what it is to show to applications
	Listeners  []ListenerState // as many as the Gateway has
	Sets       []ListenerSetState
}

// ListenerState is one listener of it.
type ListenerState struct {
	Name                           gatewayv1.SectionName
	Port                           uint16
	Kinds                          []gatewayv1.RouteGroupKind
	Attached                       int32 // routes
	Accepted, Resolved, Conflicted routing.Verdict
}

// Programmed reports whether a listener is served: also one that asks for routes of some kinds that there are not.
func (l ListenerState) Programmed() bool {
	return l.Accepted.OK() && l.resolvable() && l.Conflicted.OK()
}

func (l ListenerState) resolvable() bool {
	return l.Resolved.OK() || l.Resolved.Reason == string(gatewayv1.ListenerReasonInvalidRouteKinds) && len(l.Kinds) > 0
}

func (l ListenerState) equal(o ListenerState) bool {
	return l.Name == o.Name && l.Port == o.Port && l.Attached == o.Attached && l.Accepted == o.Accepted && l.Resolved == o.Resolved && l.Conflicted == o.Conflicted &&
		slices.EqualFunc(l.Kinds, o.Kinds, func(p, q gatewayv1.RouteGroupKind) bool { return p.Kind == q.Kind })
}

// ingressFact is a Gateway.
type ingressFact struct {
	key
	uid        string
	generation int64
	class      string
	name       string // of its pods
	accepted   routing.Verdict
	listeners  []ingressListener // its own, and then those of the sets
	own        int               // how many are its own
	admits     admission         // of ListenerSets
	sets       []setPlace
	frontend   *gatewayv1.GatewayTLSConfig
	shown      *gatewayv1.SecretObjectReference // to applications with which TLS is spoken
}

// ingressListener is what a listener says.
type ingressListener struct {
	of       ref // the Gateway, or a ListenerSet
	name     gatewayv1.SectionName
	port     uint16
	protocol gatewayv1.ProtocolType
	host     string // "" for any
	kinds    []gatewayv1.RouteGroupKind
	admits   admission // of routes
	refs     []gatewayv1.SecretObjectReference
	passes   bool // TLS goes on as it comes
	clients  *clientChecks

	accepted, resolved, conflicted routing.Verdict
}

// ingressAPI is what the index has of gateways.
type ingressAPI struct {
	declared     map[string]map[string]*ingressFact // Gateways as they are
	listenerSets map[string]map[string]*listenerSetFact
	setsOf       map[key]map[key]struct{} // ListenerSets by Gateway
	dirtySets    map[key]struct{}
	ingresses    map[string]map[string]*ingressFact // Gateways with the listeners of their sets
	classes      map[string]string                  // class → controller
	secrets      map[key]*SecretState
	roots        map[key]*RootsState // ConfigMaps
	dirtyIngress map[key]struct{}

	routesOf map[ref]map[ref]struct{} // by the Gateway, ListenerSet or ServiceEntry that they name

	// What was derived at the last Commit.
	gatewayStates  map[key]*GatewayState
	routesAttached map[key]map[*boundRoute]struct{} // that are attached
	ingressNames   map[key]mesh.ServiceName
}

func newIngressAPI() ingressAPI {
	return ingressAPI{
		declared: map[string]map[string]*ingressFact{}, listenerSets: map[string]map[string]*listenerSetFact{}, setsOf: map[key]map[key]struct{}{}, dirtySets: map[key]struct{}{},
		ingresses: map[string]map[string]*ingressFact{}, classes: map[string]string{IngressClass: IngressController}, secrets: map[key]*SecretState{}, roots: map[key]*RootsState{},
		dirtyIngress: map[key]struct{}{}, routesOf: map[ref]map[ref]struct{}{}, gatewayStates: map[key]*GatewayState{},
		routesAttached: map[key]map[*boundRoute]struct{}{}, ingressNames: map[key]mesh.ServiceName{},
	}
}

// routeKinds are the kinds of routes that a protocol takes.
func routeKinds(l *ingressListener) []gatewayv1.Kind {
	switch l.protocol {
	case gatewayv1.HTTPProtocolType, gatewayv1.HTTPSProtocolType:
		return []gatewayv1.Kind{"HTTPRoute", "GRPCRoute"}
	case gatewayv1.TLSProtocolType:
		if l.passes {
			return []gatewayv1.Kind{"TLSRoute"}
		}
		return []gatewayv1.Kind{"TLSRoute", "TCPRoute"}
	case gatewayv1.TCPProtocolType:
		return []gatewayv1.Kind{"TCPRoute"}
	}
	return nil
}

func ingressFactOf(g *gatewayv1.Gateway) *ingressFact {
	if g.Spec.GatewayClassName == WaypointClass {
		return nil
	}
	f := &ingressFact{key: keyOf(g), uid: string(g.UID), generation: g.Generation, class: string(g.Spec.GatewayClassName), name: IngressName(g)}
	for _, a := range g.Spec.Addresses {
		if kind := deref(a.Type, gatewayv1.IPAddressType); kind != gatewayv1.IPAddressType {
			f.accepted = verdict(gatewayv1.GatewayReasonUnsupportedAddress, "addresses of type "+string(kind)+" cannot be asked for; IPAddress can")
		} else if _, err := netip.ParseAddr(a.Value); err != nil && a.Value != "" {
			f.accepted = verdict(gatewayv1.GatewayReasonUnsupportedAddress, strconv.Quote(a.Value)+" is no IP address")
		}
	}
	f.admits, f.frontend = setsAdmitted(g.Spec.AllowedListeners), g.Spec.TLS
	if t := g.Spec.TLS; t != nil && t.Backend != nil {
		f.shown = t.Backend.ClientCertificateRef
	}
	for i := range g.Spec.Listeners {
		f.listeners = append(f.listeners, listenerOf(ref{Gateway, f.key}, &g.Spec.Listeners[i]))
	}
	f.own = len(f.listeners)
	return f
}

// family is what can share a port.
func family(l *ingressListener) string {
	if l.protocol == gatewayv1.HTTPSProtocolType || l.protocol == gatewayv1.TLSProtocolType {
		return "TLS"
	}
	return string(l.protocol)
}

func verdict[R ~string](reason R, message string) routing.Verdict {
	return routing.Verdict{Reason: string(reason), Message: message}
}

func listenerOf(of ref, s *gatewayv1.Listener) ingressListener {
	l := ingressListener{
		of: of, name: s.Name, port: uint16(s.Port), protocol: s.Protocol, host: strings.ToLower(string(deref(s.Hostname, ""))),
		admits: admissionOf(nil, gatewayv1.NamespacesFromSame, nil),
	}
	if s.TLS != nil {
		l.refs = s.TLS.CertificateRefs
		l.passes = deref(s.TLS.Mode, gatewayv1.TLSModeTerminate) == gatewayv1.TLSModePassthrough
	}
	kinds := routeKinds(&l)
	for _, k := range kinds {
		l.kinds = append(l.kinds, routeKind(k))
	}
	if a := s.AllowedRoutes; a != nil {
		if n := a.Namespaces; n != nil {
			l.admits = admissionOf(n.From, gatewayv1.NamespacesFromSame, n.Selector)
		}
		if len(a.Kinds) > 0 {
			l.kinds = []gatewayv1.RouteGroupKind{}
			for _, k := range a.Kinds {
				if deref(k.Group, gatewayv1.GroupName) == gatewayv1.GroupName && slices.Contains(kinds, k.Kind) {
					l.kinds = append(l.kinds, routeKind(k.Kind))
				} else {
					l.resolved = verdict(gatewayv1.ListenerReasonInvalidRouteKinds, "routes of kind "+string(k.Kind)+" cannot be attached to a listener with protocol "+string(l.protocol))
				}
			}
		}
	}
	switch {
	case len(kinds) == 0:
		l.accepted = verdict(gatewayv1.ListenerReasonUnsupportedProtocol, "protocol "+string(s.Protocol)+" is not supported; HTTP, HTTPS, TLS and TCP are")
	case slices.Contains(routing.GatewayPorts, l.port):
		l.accepted = verdict(gatewayv1.ListenerReasonPortUnavailable, "port "+strconv.Itoa(int(l.port))+" is the gateway's own")
	case l.protocol == gatewayv1.HTTPSProtocolType && l.passes:
		l.resolved = verdict(gatewayv1.ListenerReasonInvalidCertificateRef, "tls.mode is Passthrough, with which there are no requests to route; use Terminate")
	case l.terminates() && len(l.refs) == 0:
		l.resolved = verdict(gatewayv1.ListenerReasonInvalidCertificateRef, "tls.certificateRefs names no certificate")
	}
	if l.kinds == nil {
		l.kinds = []gatewayv1.RouteGroupKind{}
	}
	return l
}

// id tells a listener from all others of its Gateway.
func (l *ingressListener) id() string {
	if l.of.kind == Gateway {
		return string(l.name)
	}
	return l.of.key.String() + "/" + string(l.name)
}

// terminates reports whether TLS ends at a listener.
func (l *ingressListener) terminates() bool {
	return l.protocol == gatewayv1.HTTPSProtocolType || l.protocol == gatewayv1.TLSProtocolType && !l.passes
}

func routeKind(k gatewayv1.Kind) gatewayv1.RouteGroupKind {
	group := gatewayv1.Group(gatewayv1.GroupName)
	return gatewayv1.RouteGroupKind{Group: &group, Kind: k}
}

// ingress is a Gateway of ours; nil for others.
func (x *Index) ingress(k key) *ingressFact {
	if f := x.ingresses[k.Namespace][k.Name]; f != nil && x.classes[f.class] == IngressController {
		return f
	}
	return nil
}

func (x *Index) setIngress(k key, f *ingressFact) {
	old := put(x.declared, k, f)
	if old == nil && f == nil || old != nil && f != nil && f.generation != 0 && old.generation == f.generation && old.uid == f.uid && old.name == f.name {
		return
	}
	x.arrange(k)
}

// touchIngress marks a Gateway and what is attached to it.
func (x *Index) touchIngress(k key) {
	x.dirtyIngress[k] = struct{}{}
	for r := range x.routesOf[ref{Gateway, k}] {
		x.dirtyGatewayRoutes[r] = struct{}{}
	}
	for s := range x.setsOf[k] {
		for r := range x.routesOf[ref{ListenerSet, s}] {
			x.dirtyGatewayRoutes[r] = struct{}{}
		}
	}
	x.touchTargeting(k.Namespace)
	x.touchTargeting(x.c.RootNamespace)
	x.touchUntargeted()
}

// setClass notes whose a class is; "" where it is gone.
func (x *Index) setClass(name, controller string) {
	if name == IngressClass { // made by us
		return
	}
	if controller == "" {
		delete(x.classes, name)
	} else {
		x.classes[name] = controller
	}
	for _, all := range x.ingresses {
		for _, f := range all {
			if f.class == name {
				x.touchIngress(f.key)
			}
		}
	}
}

// touchRoutesFrom marks the routes of a namespace that are attached to Gateways, which may go by its labels.
func (x *Index) touchRoutesFrom(ns string) {
	for r, f := range x.gatewayRoutes {
		if r.Namespace == ns && f.gateways {
			x.dirtyGatewayRoutes[r] = struct{}{}
		}
	}
}

// attachment is a listener that a route is attached to, and the hosts that it is for there.
type attachment struct {
	listener int
	hosts    []string
}

// attach finds what a route means at a Gateway; nil where the Gateway is not ours.
func (x *Index) attach(f *gatewayRouteFact, p gatewayv1.ParentReference) *boundRoute {
	named := parentAt(f, p)
	k := named.key
	if named.kind == ListenerSet {
		s := x.listenerSets[k.Namespace][k.Name]
		if s == nil {
			return nil
		}
		k = s.gateway
	}
	g := x.ingress(k)
	if g == nil {
		return nil
	}
	b := &boundRoute{fact: f, gateway: k, parent: RouteParent{Ref: p}}
	r := f.convert(x.backends(f, mesh.ServiceName{}))
	b.parent.Resolved, b.parent.Partly = r.Resolved, r.Partly
	at := named.kind.String() + " " + named.key.String()
	found, allowed := false, false
	for i := range g.listeners {
		l := &g.listeners[i]
		if l.of != named || p.SectionName != nil && *p.SectionName != l.name || p.Port != nil && uint16(*p.Port) != l.port {
			continue
		}
		found = true
		if !slices.ContainsFunc(l.kinds, func(k gatewayv1.RouteGroupKind) bool { return string(k.Kind) == f.kind.String() }) || !x.admits(l.admits, l.of.Namespace, f.Namespace) {
			continue
		}
		allowed = true
		if hosts := intersection(l.host, f.hostnames); len(hosts) > 0 && l.accepted.OK() && l.conflicted.OK() {
			b.at = append(b.at, attachment{i, hosts})
		}
	}
	refused := routing.Verdict{}
	switch {
	case !found && named.kind == ListenerSet && slices.ContainsFunc(g.sets, func(s setPlace) bool { return s.fact.key == named.key && !s.refused.OK() }):
		refused = verdict(gatewayv1.RouteReasonNoMatchingParent, at+" is not attached to a Gateway")
	case !found:
		refused = verdict(gatewayv1.RouteReasonNoMatchingParent, at+" has no such listener")
	case !allowed:
		refused = verdict(gatewayv1.RouteReasonNotAllowedByListeners, at+" does not let "+f.kind.String()+"s of namespace "+f.Namespace+" be attached (allowedRoutes)")
	case len(b.at) == 0:
		refused = verdict(gatewayv1.RouteReasonNoMatchingListenerHostname, "no listener of "+at+" is for any of its hostnames")
	}
	if !refused.OK() {
		b.parent.Accepted, b.parent.Partly = refused, routing.Verdict{}
		return b
	}
	b.parent.Accepted = r.Accepted // rules that cannot be followed fail what they match
	b.rules, b.backends = r.Rules, r.Backends
	return b
}

// commitIngress writes what gateways serve, after the routes have been bound.
func (x *Index) commitIngress(b *mesh.Builder, u *Update) {
	for k := range x.dirtyIngress {
		f := x.ingress(k)
		if was, ok := x.ingressNames[k]; ok && (f == nil || was != x.c.serviceName(key{k.Namespace, f.name})) {
			b.DeleteIngress(was)
			delete(x.ingressNames, k)
			x.dirtyServing = true
		}
		if f == nil {
			for s := range x.setsOf[k] {
				x.dirtySets[s] = struct{}{}
			}
			if x.gatewayStates[k] != nil {
				delete(x.gatewayStates, k)
				u.Gateways[GatewayKey(k)] = nil
				x.notice(u, NoticeKey{Kind: Gateway, Namespace: k.Namespace, Name: k.Name}, "", "", "")
			}
			continue
		}
		in, state := x.serve(f, u)
		x.dirtyServing = x.dirtyServing || x.ingressNames[k] != in.Name
		x.ingressNames[k] = in.Name
		b.PutIngress(in)
		problem := state.Accepted
		for _, v := range []routing.Verdict{state.Resolved, firstProblem(state.Listeners)} {
			if problem.OK() {
				problem = v
			}
		}
		x.notice(u, NoticeKey{Kind: Gateway, Namespace: k.Namespace, Name: k.Name}, f.uid, problem.Reason, problem.Message)
		if old := x.gatewayStates[k]; old == nil || !old.equal(state) {
			x.gatewayStates[k] = state
			u.Gateways[GatewayKey(k)] = state
		}
	}
	x.dirtyIngress = emptied(x.dirtyIngress)
	x.commitSets(u)
}

func (s *GatewayState) equal(o *GatewayState) bool {
	return s.UID == o.UID && s.Generation == o.Generation && s.Accepted == o.Accepted && s.Resolved == o.Resolved && slices.EqualFunc(s.Listeners, o.Listeners, ListenerState.equal) &&
		slices.EqualFunc(s.Sets, o.Sets, func(a, b ListenerSetState) bool { return a.equal(&b) })
}

// serve is what a Gateway serves, and how far that is what it asks for.
func (x *Index) serve(f *ingressFact, u *Update) (*mesh.Ingress, *GatewayState) {
	in := &mesh.Ingress{Name: x.c.serviceName(key{f.Namespace, f.name}), Workload: f.name}
	in.Access, in.Tokens = x.gatewayAccess(f.Namespace, x.labelsOf(f), func(ns string, targets []policy.Target) bool {
		return slices.ContainsFunc(targets, func(t policy.Target) bool { return x.targetsIngress(ns, t, f) })
	})
	in.Telemetry, in.Limits = x.ingressTelemetry(f), x.ingressLimits(f)
	targeted := func(ns string, t policy.Target) bool { return x.targetsIngress(ns, t, f) }
	in.Patches, in.Plugins = x.gatewayPatches(f.Namespace, x.labelsOf(f), targeted), x.gatewayPlugins(f.Namespace, x.labelsOf(f), targeted)
	state := &GatewayState{UID: f.uid, Generation: f.generation, Accepted: f.accepted}
	if f.shown != nil {
		c, v := x.certificate(ref{Gateway, f.key}, *f.shown, gatewayv1.ListenerConditionReason(gatewayv1.GatewayReasonInvalidClientCertificateRef))
		if v.OK() {
			in.AddCertificate(c)
			in.BackendCertificate = c.Name
		} else {
			v.Message = "tls.backend.clientCertificateRef: " + v.Message
		}
		state.Resolved = v
	}
	attached := make([][]placed, len(f.listeners))
	for b := range x.routesAttached[f.key] {
		for _, a := range b.at {
			for _, h := range a.hosts {
				attached[a.listener] = append(attached[a.listener], placed{h, b})
			}
		}
	}
	for i := range f.listeners {
		l := &f.listeners[i]
		s := ListenerState{Name: l.name, Port: l.port, Kinds: l.kinds, Accepted: l.accepted, Resolved: l.resolved, Conflicted: l.conflicted}
		routes := map[ref]struct{}{}
		for _, p := range attached[i] {
			routes[p.route.fact.ref] = struct{}{}
		}
		s.Attached = int32(len(routes))
		if l.terminates() && s.resolvable() {
			if v := x.certificates(l, in); !v.OK() {
				s.Resolved = v
			}
		}
		if l.clients != nil && s.resolvable() {
			accepted, resolved := x.clientRootsAt(f, l, in)
			if !resolved.OK() {
				s.Resolved = resolved
			}
			if s.Accepted.OK() {
				s.Accepted = accepted
			}
		}
		state.Listeners = append(state.Listeners, s)
	}
	slices.SortFunc(in.Certificates, func(a, b mesh.Certificate) int { return cmp.Compare(a.Name, b.Name) })
	if f.accepted.OK() {
		for port := range portsOfListeners(f, state) {
			in.Listeners = append(in.Listeners, x.servePort(f, state, attached, port)...)
		}
		slices.SortFunc(in.Listeners, func(a, b mesh.IngressListener) int {
			return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Name, b.Name))
		})
	}
	x.tellSets(u, f, state)
	return in, state
}

func portsOfListeners(f *ingressFact, s *GatewayState) map[uint16]struct{} {
	out := map[uint16]struct{}{}
	for i, l := range f.listeners {
		if s.Listeners[i].Programmed() {
			out[l.port] = struct{}{}
		}
	}
	return out
}

// targetsIngress reports whether a target of a policy of a namespace is a Gateway.
func (x *Index) targetsIngress(ns string, t policy.Target, f *ingressFact) bool {
	switch t.Kind {
	case policy.TargetGateway:
		return ns == f.Namespace && t.Name == f.Name
	case policy.TargetGatewayClass:
		return ns == x.c.RootNamespace && t.Name == f.class
	}
	return false
}

// ingressTargets are the gateways that a policy of a namespace is about.
func (x *Index) ingressTargets(ns string, targets []policy.Target) (out []mesh.ServiceName) {
	for _, all := range x.ingresses {
		for _, f := range all {
			if x.classes[f.class] == IngressController && slices.ContainsFunc(targets, func(t policy.Target) bool { return x.targetsIngress(ns, t, f) }) {
				out = append(out, x.c.serviceName(key{f.Namespace, f.name}))
			}
		}
	}
	return out
}

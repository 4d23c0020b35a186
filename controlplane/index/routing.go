package index

import (
	"slices"
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	labelWaypointFor = "istio.io/waypoint-for"
	labelManaged     = "gateway.istio.io/managed"
)

// gatewayFact is what the mesh needs of a Gateway of the class for waypoints.
type gatewayFact struct {
	key
	services  bool // it takes what is sent to services
	workloads bool // it would take what is sent to workloads
}

// gatewayFactOf returns nil for a Gateway of another class.
func gatewayFactOf(g *gatewayv1.Gateway) *gatewayFact {
	if g.Spec.GatewayClassName != WaypointClass {
		return nil
	}
	takes := g.Labels[labelWaypointFor]
	return &gatewayFact{key: keyOf(g), services: takes == "" || takes == "service" || takes == "all", workloads: takes == "workload" || takes == "all"}
}

func (x *Index) setGateway(k key, f *gatewayFact) {
	old := put(x.gateways, k, f)
	if old == nil && f == nil || old != nil && f != nil && *old == *f {
		return
	}
	x.dirtyServing = true
	for _, namespace := range []string{k.Namespace, x.c.RootNamespace} {
		x.touchTargeting(namespace)
	}
	x.touchWaypoint(func(asked key) bool { return asked == k })
}

// waypointAsked is the waypoint that a service or its namespace asks for.
func (x *Index) waypointAsked(f *serviceFact) key {
	if f.waypointSaid {
		return f.waypoint
	}
	if ns := x.namespaces[f.owner.Namespace]; ns != nil {
		k, _ := waypointOf(ns.labels, f.owner.Namespace)
		return k
	}
	return key{}
}

// waypointFor is the waypoint that a service is bound to. One that is not there binds too: its clients are refused,
// rather than let around what was asked for. A Gateway that says it is not for services does not.
func (x *Index) waypointFor(f *serviceFact) *mesh.Gateway {
	k := x.waypointAsked(f)
	if k == (key{}) || f.managed || (f.owner == owner{key: k}) {
		return nil
	}
	if g := x.gateways[k.Namespace][k.Name]; g != nil && !g.services {
		return nil
	}
	return &mesh.Gateway{Service: x.c.serviceName(k), HBONEPort: mesh.HBONEPort}
}

// routeFact is what a VirtualService or a DestinationRule says about hosts.
type routeFact struct {
	key
	uid      string
	created  metav1.Time
	hosts    []mesh.ServiceName
	rules    []mesh.HTTPRule
	subsets  []mesh.Subset
	traffic  []mesh.Traffic
	problems []string

	// Of a VirtualService, for connections by server name and for others:
	named, connections []routing.ConnectionRule

	// Of a VirtualService that is for Gateways of Istio's:
	at        map[key]*routing.AtGateway
	hostnames []string
	exportTo  []string
}

func (f *routeFact) older(o *routeFact) bool {
	if o == nil {
		return true
	}
	if !f.created.Equal(&o.created) {
		return f.created.Before(&o.created)
	}
	return compareKeys(f.key, o.key) < 0
}

// ResolveHost is what a host of a VirtualService or a DestinationRule means in a namespace.
func (c Config) ResolveHost(namespace, host string) mesh.ServiceName {
	if !strings.Contains(host, ".") {
		return c.ServiceName(namespace, host)
	}
	host = strings.TrimSuffix(host, ".")
	if rest, ok := strings.CutSuffix(host, ".svc."+c.ClusterDomain); ok {
		if name, ns, ok := strings.Cut(rest, "."); ok && !strings.Contains(ns, ".") {
			return c.ServiceName(ns, name)
		}
	}
	return mesh.ServiceName{Namespace: namespace, Hostname: host} // of a ServiceEntry
}

func (c *compiled) virtualServiceFactOf(v *networkingv1.VirtualService) *routeFact {
	f := &routeFact{key: keyOf(v), uid: string(v.UID), created: v.CreationTimestamp}
	if !routing.ForMesh(&v.Spec) {
		f.atGateways(v, c)
		return f
	}
	for _, h := range v.Spec.Hosts {
		f.hosts = append(f.hosts, c.ResolveHost(v.Namespace, h))
	}
	here, problems := routing.VirtualService(v.Namespace, v.Name, &v.Spec, c.ResolveHost)
	f.rules, f.named, f.connections, f.problems = here.HTTP, here.TLS, here.TCP, problems
	f.atGateways(v, c)
	return f
}

func (c *compiled) destinationRuleFactOf(d *networkingv1.DestinationRule) *routeFact {
	f := &routeFact{key: keyOf(d), uid: string(d.UID), created: d.CreationTimestamp, hosts: []mesh.ServiceName{c.ResolveHost(d.Namespace, d.Spec.Host)}, exportTo: d.Spec.ExportTo}
	f.subsets, f.traffic, f.problems = routing.DestinationRule(&d.Spec)
	if f.away() {
		f.consume()
	}
	return f
}

func (x *Index) setRoutes(kind Kind, all map[string]map[string]*routeFact, k key, f *routeFact) {
	old := put(all, k, f)
	if kind == DestinationRule {
		x.setCredentialed(k, f)
		x.setConsumer(old, f)
	}
	for _, r := range []*routeFact{old, f} {
		if r == nil {
			continue
		}
		x.dirtyEntrance = x.dirtyEntrance || r.at != nil
		x.dirtyRoutes[ref{kind, k}] = struct{}{}
		if kind == VirtualService {
			x.touchConsumers(k.Namespace)
		}
		for _, h := range r.hosts {
			x.dirtyHosts[h] = struct{}{}
			for _, other := range all[k.Namespace] { // which of several holds may have changed
				if slices.Contains(other.hosts, h) {
					x.dirtyRoutes[ref{kind, other.key}] = struct{}{}
				}
			}
		}
	}
}

// oldest is the object of the service's namespace that speaks for it. Those of other namespaces are for their own
// clients, whom a waypoint cannot tell from others.
func oldest(all map[string]map[string]*routeFact, name mesh.ServiceName) *routeFact {
	return oldestIn(all[name.Namespace], name)
}

// spokenFor is the VirtualService that speaks for a service: the oldest that is exported to the namespace of its waypoint.
func (x *Index) spokenFor(name mesh.ServiceName) *routeFact {
	way, ok := x.wayTo(name)
	return oldestOf(x.virtuals[name.Namespace], name, func(f *routeFact) bool { return !ok || f.visible(way) })
}

// wayTo is the namespace of the waypoint of a service; ok is false where it has none.
func (x *Index) wayTo(name mesh.ServiceName) (_ string, ok bool) {
	s := winner(x.candidates[name])
	if s == nil || x.waypointFor(s) == nil {
		return "", false
	}
	return x.waypointAsked(s).Namespace, true
}

func oldestIn(namespace map[string]*routeFact, name mesh.ServiceName) *routeFact {
	return oldestOf(namespace, name, func(*routeFact) bool { return true })
}

func oldestOf(namespace map[string]*routeFact, name mesh.ServiceName, counts func(*routeFact) bool) *routeFact {
	var best *routeFact
	for _, f := range namespace {
		if slices.Contains(f.hosts, name) && counts(f) && f.older(best) {
			best = f
		}
	}
	return best
}

// route adds to a service what is written about its requests.
func (x *Index) route(s *mesh.Service) {
	rules, open := x.gatewayRules(s.Name)
	v := x.spokenFor(s.Name)
	if v != nil && open && v.rules != nil {
		if rules = append(rules, v.rules...); len(rules) == 0 {
			rules = []mesh.HTTPRule{} // nothing of it can be followed: no request matches
		} else if len(v.rules) == 0 {
			rules = append(rules, mesh.HTTPRule{Name: v.Namespace + "/" + v.Name, Direct: &mesh.HTTPDirect{Status: 404}})
		}
	}
	s.HTTP, s.Routed = rules, x.routed(s.Name)
	if v != nil {
		s.Routed = v.routeConnections(s, s.Routed)
	}
	if d := oldest(x.destinations, s.Name); d != nil {
		s.Subsets, s.Traffic, s.RuleIn = d.subsets, x.equipped(s.Name, d), visibleIn(d.exportTo, d.Namespace)
		if x.credentialed[d.key] == d {
			x.dirtyRoutes[ref{DestinationRule, d.key}] = struct{}{} // what is missing is said
		}
	}
	x.consumed(s)
}

// routeConnections adds what a VirtualService says about connections to ports of a service, where neither TCPRoute nor TLSRoute does. On ports that
// are declared as HTTP there are none but requests.
func (f *routeFact) routeConnections(s *mesh.Service, routed []mesh.Routed) []mesh.Routed {
	for _, p := range s.Ports {
		taken := slices.ContainsFunc(routed, func(r mesh.Routed) bool { return r.Port == p.Port && r.From == "" })
		if taken || p.App == mesh.AppHTTP1 || p.App == mesh.AppHTTP2 || p.App == mesh.AppGRPC {
			continue
		}
		for _, r := range f.named {
			if r.Port == 0 || r.Port == p.Port {
				routed = append(routed, mesh.Routed{Port: p.Port, Names: r.Names, Only: r.Only, Beside: true, Backends: r.Backends})
			}
		}
		for _, r := range f.connections {
			if r.Port == 0 || r.Port == p.Port {
				routed = append(routed, mesh.Routed{Port: p.Port, Only: r.Only, Beside: true, Backends: r.Backends})
				if r.Only == nil {
					break
				}
			}
		}
	}
	return routed
}

// holds is the object of a kind that holds for a service.
func (x *Index) holds(kind Kind, name mesh.ServiceName) *routeFact {
	if kind == VirtualService {
		return x.spokenFor(name)
	}
	return oldest(x.destinations, name)
}

// commitRoutes tells authors what of their objects does not hold.
func (x *Index) commitRoutes(u *Update) {
	for r := range x.dirtyRoutes {
		all := x.virtuals
		if r.kind == DestinationRule {
			all = x.destinations
		}
		nk := NoticeKey{Kind: r.kind, Namespace: r.Namespace, Name: r.Name}
		f := all[r.Namespace][r.Name]
		if f == nil {
			x.notice(u, nk, "", "", "")
			continue
		}
		problems, reason := append(slices.Clone(f.problems), x.missing(f)...), reasonPartlyIgnored
		if r.kind == VirtualService {
			without := x.withoutWaypoint(f)
			if len(problems) == 0 && len(without) == len(f.hosts) && len(without) > 0 {
				reason = reasonNoWaypoint
			}
			problems = append(problems, without...)
		}
		for _, h := range f.hosts {
			if h.Namespace != f.Namespace && r.kind == DestinationRule {
				problems = append(problems, x.unconsumed(f, all[f.Namespace])...)
			} else if h.Namespace != f.Namespace {
				problems = append(problems, h.Hostname+" is of another namespace, where this holds for nobody; write it in the namespace "+h.Namespace)
			} else if way, ok := x.wayTo(h); ok && !f.visible(way) {
				problems = append(problems, "exportTo leaves out "+way+", whose waypoint is in front of "+h.Hostname+": there it has no effect")
			} else if first := x.holds(r.kind, h); first != f {
				problems = append(problems, "for "+h.Hostname+" "+first.Name+" holds, which is older")
			} else if r.kind == VirtualService && f.rules != nil {
				if route := x.overridden(h); route != "" {
					problems = append(problems, "for "+h.Hostname+" "+route+" holds, which is of the Gateway API")
				}
			}
		}
		if lost := x.atGateways(f); len(lost) > 0 {
			if len(problems) == 0 {
				reason = reasonUnknownGateway
			}
			problems = append(problems, lost...)
		}
		if len(problems) == 0 {
			x.notice(u, nk, "", "", "")
			continue
		}
		x.notice(u, nk, f.uid, reason, strings.Join(problems, "; "))
	}
	x.dirtyRoutes = emptied(x.dirtyRoutes)
}

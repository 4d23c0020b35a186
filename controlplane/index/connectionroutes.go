package index

import (
	"cmp"
	"maps"
	"slices"
	"strconv"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Routes for connections, whatever is in them: TLSRoutes, by the server name that a client asks for, and TCPRoutes.

// connections reports whether a route is for them rather than for requests.
func (f *gatewayRouteFact) connections() bool { return f.kind == TLSRoute || f.kind == TCPRoute }

func (c *compiled) tlsRouteFactOf(r *gatewayv1.TLSRoute) *gatewayRouteFact {
	var refs [][]gatewayv1.BackendRef
	for i := range r.Spec.Rules {
		refs = append(refs, r.Spec.Rules[i].BackendRefs)
	}
	return c.connectionRouteFactOf(TLSRoute, r, r.Spec.ParentRefs, r.Spec.Hostnames, refs)
}

func (c *compiled) tcpRouteFactOf(r *gatewayv1.TCPRoute) *gatewayRouteFact {
	var refs [][]gatewayv1.BackendRef
	for i := range r.Spec.Rules {
		refs = append(refs, r.Spec.Rules[i].BackendRefs)
	}
	return c.connectionRouteFactOf(TCPRoute, r, r.Spec.ParentRefs, nil, refs)
}

func (c *compiled) connectionRouteFactOf(kind Kind, r metav1.Object, parents []gatewayv1.ParentReference, hostnames []gatewayv1.Hostname, rules [][]gatewayv1.BackendRef) *gatewayRouteFact {
	f := c.gatewayRouteFactOf(kind, r, parents, hostnames)
	for _, refs := range rules {
		for _, b := range refs {
			c.mention(f, b.BackendObjectReference)
		}
	}
	f.convert = func(find routing.Backends) routing.Route { return routing.ConnectionRoute(rules, find) }
	return f
}

// connectionsOf is a port without TLS. Of several routes the oldest has it; without any, connections are closed.
func connectionsOf(port uint16, routes []placed) mesh.IngressListener {
	out := mesh.IngressListener{Name: "tcp/" + strconv.Itoa(int(port)), Port: port}
	if r := firstOf(routes); r != nil {
		out.Backends = r.backends
	}
	return out
}

func firstOf(routes []placed) (first *boundRoute) {
	for _, p := range routes {
		if first == nil || p.route.older(first) < 0 {
			first = p.route
		}
	}
	return first
}

// namedConnectionsOf is a listener for connections with TLS, for each of its routes that has server names left for it: of
// several routes for a name the oldest has it. Connections for other names of the listener are closed, whatever another
// listener says of more names than these.
func namedConnectionsOf(f *ingressFact, here []int, own int, routes []placed) (out []mesh.IngressListener) {
	l := &f.listeners[own]
	byHost := map[string][]placed{}
	for _, p := range routes {
		if !anothers(f, here, own, p.host) {
			byHost[p.host] = append(byHost[p.host], p)
		}
	}
	at := "tls/" + strconv.Itoa(int(l.port)) + "/" + l.id()
	of := map[*boundRoute]int{}
	for _, host := range slices.Sorted(maps.Keys(byHost)) {
		r := firstOf(byHost[host])
		i, ok := of[r]
		if !ok {
			i = len(out)
			of[r] = i
			out = append(out, mesh.IngressListener{
				Name: at + "/" + r.fact.kind.String() + "/" + r.fact.key.String() + "/" + strconv.Itoa(r.nth), Port: l.port, TLS: f.tls(l), Backends: r.backends,
			})
		}
		out[i].Names = append(out[i].Names, host)
	}
	if rest := cmp.Or(l.host, "*"); byHost[rest] == nil {
		out = append(out, mesh.IngressListener{Name: at, Port: l.port, Names: []string{rest}})
	}
	return out
}

// tls is how TLS ends at a listener; nil where it goes on as it comes.
func (f *ingressFact) tls(l *ingressListener) *mesh.ListenerTLS {
	if !l.terminates() {
		return nil
	}
	out := &mesh.ListenerTLS{}
	for _, r := range l.refs {
		out.Certificates = append(out.Certificates, secretOf(l.of, r).String())
	}
	if c := l.clients; c != nil {
		out.ClientRoots, out.Optional, out.Untrusted = clientsName(l.port), c.insecure, c.insecure
	}
	return out
}

// routed are the ports of a service of which TCPRoutes share the connections out, and TLSRoutes those that ask for a server name. Of
// several routes for the same clients the oldest has a port, or a name.
func (x *Index) routed(name mesh.ServiceName) (out []mesh.Routed) {
	var routes []*boundRoute
	for b := range x.routesAt[name] {
		if b.fact.connections() && len(b.backends) > 0 {
			routes = append(routes, b)
		}
	}
	slices.SortFunc(routes, (*boundRoute).older)
	for _, b := range routes {
		for _, port := range x.portsOf(b) {
			r := mesh.Routed{Port: port, From: b.from, Backends: b.backends}
			if b.fact.kind == TLSRoute {
				r.Names, r.Beside = b.fact.hostnames, true
			}
			if len(r.Names) > 0 || !slices.ContainsFunc(out, func(o mesh.Routed) bool { return o.Port == port && o.From == r.From && len(o.Names) == 0 }) {
				out = append(out, r)
			}
		}
	}
	slices.SortStableFunc(out, func(a, b mesh.Routed) int { return cmp.Compare(a.Port, b.Port) })
	return out
}

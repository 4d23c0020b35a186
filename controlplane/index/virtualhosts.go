package index

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Which rules are for a request to a gateway: those of the listener whose hostname is the most specific that the request's
// host has, and of its routes first those with the most specific hostname.

// placed is a route at a listener, for a host.
type placed struct {
	host  string
	route *boundRoute
}

// servePort has the listeners of a port serve what is attached to them. Without TLS they are one, and the host in the
// request tells them apart.
func (x *Index) servePort(f *ingressFact, state *GatewayState, attached [][]placed, port uint16) []mesh.IngressListener {
	var here []int
	for i, l := range f.listeners {
		if l.port == port && state.Listeners[i].Programmed() {
			here = append(here, i)
		}
	}
	switch f.listeners[here[0]].protocol {
	case gatewayv1.TCPProtocolType:
		return []mesh.IngressListener{connectionsOf(port, attached[here[0]])}
	case gatewayv1.HTTPProtocolType:
		out := mesh.IngressListener{Name: "http/" + strconv.Itoa(int(port)), Port: port, Hosts: []mesh.IngressHost{}}
		for _, i := range here {
			out.Hosts = append(out.Hosts, x.hostsOf(f, here, i, attached[i])...)
		}
		sortHosts(out.Hosts)
		return []mesh.IngressListener{out}
	}
	var out []mesh.IngressListener
	for _, i := range here {
		l := &f.listeners[i]
		if l.protocol == gatewayv1.TLSProtocolType {
			out = append(out, namedConnectionsOf(f, here, i, attached[i])...)
			continue
		}
		in := mesh.IngressListener{Name: "https/" + strconv.Itoa(int(port)) + "/" + l.id(), Port: port, TLS: f.tls(l), Hosts: x.hostsOf(f, here, i, attached[i])}
		if l.host != "" {
			in.Names = []string{l.host}
		}
		for _, j := range here {
			if name := cmp.Or(f.listeners[j].host, "*"); j != i && !hasHost(in.Hosts, name) {
				in.Hosts = append(in.Hosts, mesh.IngressHost{Names: []string{name}, Misdirects: true})
			}
		}
		sortHosts(in.Hosts)
		out = append(out, in)
	}
	return out
}

func hasHost(hosts []mesh.IngressHost, name string) bool {
	return slices.ContainsFunc(hosts, func(h mesh.IngressHost) bool { return slices.Contains(h.Names, name) })
}

func sortHosts(hosts []mesh.IngressHost) {
	slices.SortFunc(hosts, func(a, b mesh.IngressHost) int { return cmp.Compare(a.Names[0], b.Names[0]) })
}

// hostsOf are the hosts that a listener decides about, of those on its port.
func (x *Index) hostsOf(f *ingressFact, here []int, own int, routes []placed) []mesh.IngressHost {
	l := &f.listeners[own]
	byHost := map[string][]*boundRoute{cmp.Or(l.host, "*"): nil}
	for _, p := range routes {
		if !slices.Contains(byHost[p.host], p.route) {
			byHost[p.host] = append(byHost[p.host], p.route)
		}
	}
	out := make([]mesh.IngressHost, 0, len(byHost))
	for host := range byHost {
		if anothers(f, here, own, host) {
			continue
		}
		h := mesh.IngressHost{Names: []string{host}}
		var asked []*boundRoute
		for _, at := range wider(host) {
			var more []*boundRoute
			for _, r := range byHost[at] {
				if !slices.Contains(asked, r) {
					more = append(more, r)
				}
			}
			asked = append(asked, more...)
			h.Rules = append(h.Rules, merged(more)...)
		}
		out = append(out, h)
	}
	return out
}

// anothers reports whether another listener of the port, which is more specific, decides about a host of one.
func anothers(f *ingressFact, here []int, own int, host string) bool {
	l := &f.listeners[own]
	return slices.ContainsFunc(here, func(i int) bool {
		other := f.listeners[i].host
		return i != own && other != l.host && covers(l.host, other) && covers(other, host)
	})
}

// wider are a host and the patterns that it is one of, the most specific first.
func wider(host string) []string {
	out := []string{host}
	if host == "*" {
		return out
	}
	for rest := strings.TrimPrefix(host, "*."); ; {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			return append(out, "*")
		}
		out, rest = append(out, "*."+parent), parent
	}
}

// merged are the rules of routes for the same hosts, in the order in which they are asked.
func merged(routes []*boundRoute) []mesh.HTTPRule {
	slices.SortFunc(routes, (*boundRoute).older)
	return inOrder(routes, func(*boundRoute) []uint16 { return []uint16{0} })
}

// covers reports whether every host of b is one of a; "" and "*" are all hosts.
func covers(a, b string) bool {
	switch {
	case a == "" || a == "*" || a == b:
		return true
	case strings.HasPrefix(a, "*."):
		return strings.HasSuffix(b, a[1:]) && len(b) > len(a)-1
	}
	return false
}

// intersection are the hosts of a listener that a route is for.
func intersection(listener string, route []string) []string {
	if len(route) == 0 {
		return []string{cmp.Or(listener, "*")}
	}
	var out []string
	for _, h := range route {
		switch {
		case covers(listener, h):
			out = append(out, h)
		case covers(h, listener) && !slices.Contains(out, listener):
			out = append(out, listener)
		}
	}
	return out
}

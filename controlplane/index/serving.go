package index

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// serving makes of Gateways of Istio's and VirtualServices what a gateway serves.
type serving struct {
	x        *Index
	entrance *entrance
	virtuals map[key][]*routeFact
	texts    map[key][]string // what is said of Gateways

	out   *mesh.Ingress
	ports map[uint16]*servedPort
}

// servedPort is what servers have made of a port.
type servedPort struct {
	family    string
	tunnelled bool
	first     string          // server that has it
	names     map[string]bool // server names in TLS that are taken; "*" is all others
	hosts     *hostTable      // of all servers without TLS
}

// hostTable is which VirtualServices are for which hosts.
type hostTable struct {
	order []string
	hosts map[string]*tableHost
}

type tableHost struct {
	httpsOnly bool
	virtuals  []*routeFact
	rules     [][]mesh.HTTPRule // of each
}

func (s *serving) say(g *istioGatewayFact, server *routing.Server, format string, args ...any) {
	text := "spec." + server.At + ": " + fmt.Sprintf(format, args...)
	if !slices.Contains(s.texts[g.key], text) {
		s.texts[g.key] = append(s.texts[g.key], text)
	}
}

func (s *serving) serve() *mesh.Ingress {
	s.out, s.ports = &mesh.Ingress{Name: s.entrance.name, Workload: s.entrance.workload, Tunnels: s.entrance.tunnels()}, map[uint16]*servedPort{}
	s.out.Access, s.out.Tokens = s.x.gatewayAccess(s.entrance.Namespace, s.entrance.labels, func(string, []policy.Target) bool { return false })
	s.out.Limits = s.x.entranceLimits(s.entrance)
	nobody := func(string, policy.Target) bool { return false }
	s.out.Patches = s.x.gatewayPatches(s.entrance.Namespace, s.entrance.labels, nobody)
	s.out.Plugins = s.x.gatewayPlugins(s.entrance.Namespace, s.entrance.labels, nobody)
	for _, g := range s.entrance.gateways {
		for i := range g.servers {
			s.server(g, &g.servers[i])
		}
	}
	for port, p := range s.ports {
		if p.hosts != nil {
			s.out.Listeners = append(s.out.Listeners, mesh.IngressListener{Name: "http/" + strconv.Itoa(int(port)), Port: port, Tunnelled: p.tunnelled, Hosts: p.hosts.finish()})
		}
	}
	slices.SortFunc(s.out.Listeners, func(a, b mesh.IngressListener) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Name, b.Name))
	})
	slices.SortFunc(s.out.Certificates, func(a, b mesh.Certificate) int { return cmp.Compare(a.Name, b.Name) })
	return s.out
}

func (s *serving) server(g *istioGatewayFact, server *routing.Server) {
	p, family := s.ports[server.Port], server.Family()
	switch {
	case server.Tunnelled && !s.out.Tunnels:
		s.say(g, server, "tls.mode ISTIO_MUTUAL: the gateway's pods have not the label %s: http, so that nothing comes to them by the mesh's tunnel", labelTunnel)
		return
	case p == nil:
		p = &servedPort{family: family, tunnelled: server.Tunnelled, first: "Gateway " + g.String() + " " + server.At, names: map[string]bool{}}
	case p.family != family:
		s.say(g, server, "port %d is taken for %s by %s", server.Port, p.family, p.first)
		return
	case server.Serves == routing.ServesTCP:
		s.say(g, server, "port %d is taken by %s, and connections without TLS tell no host", server.Port, p.first)
		return
	}
	name := fmt.Sprintf("%d/%s/%s", server.Port, g, server.At)
	switch server.Serves {
	case routing.ServesHTTP:
		if p.hosts == nil {
			p.hosts = newHostTable()
		}
		s.table(g, server, p.hosts)
	case routing.ServesHTTPS, routing.ServesTLS:
		names, ok := s.claim(g, server, p, hostNames(server))
		if !ok {
			return
		}
		l := mesh.IngressListener{Name: "https/" + name, Port: server.Port, Names: names}
		if server.Serves == routing.ServesTLS {
			l.Name = "tls/" + name
			if l.Backends = s.connections(g, server); l.Backends == nil {
				return
			}
		} else {
			hosts := newHostTable()
			s.table(g, server, hosts)
			l.Hosts = hosts.finish()
		}
		if l.TLS = s.terminate(g, server); l.TLS == nil {
			return
		}
		s.out.Listeners = append(s.out.Listeners, l)
	case routing.ServesSNI:
		s.pass(g, server, p)
	case routing.ServesTCP:
		backends := s.connections(g, server)
		if backends == nil {
			return
		}
		s.out.Listeners = append(s.out.Listeners, mesh.IngressListener{Name: "tcp/" + name, Port: server.Port, Backends: backends, Tunnelled: server.Tunnelled})
	}
	s.ports[server.Port] = p
}

func hostNames(server *routing.Server) (out []string) {
	for _, h := range server.Hosts {
		if !slices.Contains(out, h.Name) {
			out = append(out, h.Name)
		}
	}
	return out
}

// claim takes server names on a port; ok is false where none was left.
func (s *serving) claim(g *istioGatewayFact, server *routing.Server, p *servedPort, names []string) (out []string, ok bool) {
	for _, n := range names {
		if p.names[n] {
			s.say(g, server, "another server has port %d for %s", server.Port, n)
			continue
		}
		p.names[n], ok = true, true
		out = append(out, n)
	}
	return out, ok
}

// terminate is how TLS ends at a server; nil where what that takes is not there.
func (s *serving) terminate(g *istioGatewayFact, server *routing.Server) *mesh.ListenerTLS {
	t := server.TLS
	for _, name := range server.Credentials {
		k := key{s.entrance.Namespace, name}
		state := s.x.secrets[k]
		switch {
		case state == nil:
			s.say(g, server, "there is no Secret %s", k)
			return nil
		case state.Problem != "":
			s.say(g, server, "Secret %s: %s", k, state.Problem)
			return nil
		}
		c := state.Certificate
		c.Name, c.Roots, c.CRL = k.String(), "", ""
		s.out.AddCertificate(c)
		t.Certificates = append(t.Certificates, c.Name)
	}
	if server.ClientRoots != "" {
		k := s.x.clientRoots(s.entrance, server)
		state := s.x.secrets[k]
		if state == nil || state.Certificate.Roots == "" {
			s.say(g, server, "there are no roots for clients' certificates: neither in Secret %s/%s (key ca.crt or cacert) nor as ca.crt in Secret %s/%s",
				s.entrance.Namespace, server.ClientRoots, s.entrance.Namespace, server.Credentials[0])
			return nil
		}
		t.ClientRoots = "roots of " + k.String()
		s.out.AddCertificate(mesh.Certificate{Name: t.ClientRoots, Roots: state.Certificate.Roots, CRL: state.Certificate.CRL})
	}
	return &t
}

// at yields the VirtualServices for a server, the oldest first.
func (s *serving) at(g *istioGatewayFact, server *routing.Server, yield func(*routeFact, *routing.AtGateway, []string)) {
	for _, v := range s.virtuals[g.key] {
		if v.visible(s.entrance.Namespace) {
			if hosts := hostsAt(server, v); len(hosts) > 0 {
				yield(v, v.at[g.key], hosts)
			}
		}
	}
}

// table adds what is for requests to a server.
func (s *serving) table(g *istioGatewayFact, server *routing.Server, t *hostTable) {
	if server.HTTPSOnly {
		for _, n := range hostNames(server) {
			t.host(n).httpsOnly = true
		}
	}
	s.at(g, server, func(v *routeFact, at *routing.AtGateway, hosts []string) {
		if at.HTTP == nil {
			return
		}
		for _, name := range hosts {
			h := t.host(name)
			h.httpsOnly = h.httpsOnly || server.HTTPSOnly
			if !slices.Contains(h.virtuals, v) {
				h.virtuals, h.rules = append(h.virtuals, v), append(h.rules, at.HTTP)
			}
		}
	})
}

// connections is where connections to a server go that are not requests; nil where nothing says so.
func (s *serving) connections(g *istioGatewayFact, server *routing.Server) (out []mesh.HTTPBackend) {
	s.at(g, server, func(v *routeFact, at *routing.AtGateway, _ []string) {
		for _, r := range at.TCP {
			if out == nil && (r.Port == 0 || r.Port == server.Port) {
				out = r.Backends
			}
		}
	})
	if out == nil {
		s.say(g, server, "no VirtualService has a tcp route for it")
	}
	return out
}

// pass adds what goes on as TLS, by the names that clients ask for.
func (s *serving) pass(g *istioGatewayFact, server *routing.Server, p *servedPort) {
	any := false
	s.at(g, server, func(v *routeFact, at *routing.AtGateway, _ []string) {
		for _, r := range at.TLS {
			if r.Port != 0 && r.Port != server.Port {
				continue
			}
			var asked []string
			for _, h := range server.Hosts {
				if h.Namespace == "" || h.Namespace == v.Namespace {
					for _, n := range intersection(h.Name, r.Names) {
						if !slices.Contains(asked, n) {
							asked = append(asked, n)
						}
					}
				}
			}
			if len(asked) == 0 {
				continue
			}
			any = true
			if names, ok := s.claim(g, server, p, asked); ok {
				s.out.Listeners = append(s.out.Listeners, mesh.IngressListener{
					Name: fmt.Sprintf("sni/%d/%s", server.Port, r.Name), Port: server.Port, Names: names, Backends: r.Backends,
				})
			}
		}
	})
	if !any {
		s.say(g, server, "no VirtualService has a tls route for it")
	}
}

func newHostTable() *hostTable { return &hostTable{hosts: map[string]*tableHost{}} }

func (t *hostTable) host(name string) *tableHost {
	h := t.hosts[name]
	if h == nil {
		h = &tableHost{}
		t.hosts[name] = h
		t.order = append(t.order, name)
	}
	return h
}

// finish makes the hosts of a listener. The rules of several VirtualServices for one host are asked in the order in which those
// were made, but those that are for every request come last.
func (t *hostTable) finish() []mesh.IngressHost {
	out := []mesh.IngressHost{}
	for _, name := range t.order {
		h := t.hosts[name]
		rules := slices.Concat(h.rules...)
		if len(h.rules) > 1 {
			slices.SortStableFunc(rules, func(a, b mesh.HTTPRule) int { return cmp.Compare(forAll(&a), forAll(&b)) })
		}
		out = append(out, mesh.IngressHost{Names: []string{name}, Rules: rules, HTTPSOnly: h.httpsOnly})
	}
	sortHosts(out)
	return out
}

// forAll is 1 for a rule that every request matches.
func forAll(r *mesh.HTTPRule) int {
	for i := range r.Matches {
		m := &r.Matches[i]
		path := m.Path.Kind == 0 || m.Path.Kind == mesh.TextPrefix && m.Path.Value == "/"
		if path && m.Port == 0 && m.Method.Kind == 0 && m.Scheme.Kind == 0 && m.Authority.Kind == 0 && len(m.Headers) == 0 && len(m.Query) == 0 {
			return 1
		}
	}
	if len(r.Matches) == 0 {
		return 1
	}
	return 0
}

// clientRoots is the Secret with the roots for a server's clients: one of its own, or else that of the certificate.
func (x *Index) clientRoots(e *entrance, server *routing.Server) key {
	k := key{e.Namespace, server.ClientRoots}
	if s := x.secrets[k]; s == nil || s.Certificate.Roots == "" {
		return key{e.Namespace, server.Credentials[0]}
	}
	return k
}

// wants are the Secrets that a gateway needs.
func (e *entrance) wants() (out []key) {
	for _, g := range e.gateways {
		for i := range g.servers {
			s := &g.servers[i]
			for _, n := range s.Credentials {
				out = append(out, key{e.Namespace, n})
			}
			if s.ClientRoots != "" {
				out = append(out, key{e.Namespace, s.ClientRoots})
			}
		}
	}
	return out
}

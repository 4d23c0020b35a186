package why

import (
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/internal/cli/envoy"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

var topologies = flag.Int("topologies", 500, "how many meshes are made")

// world is a generated mesh: three nodes, some of which may lag behind, pods captured or not, services, policies.
type world struct {
	nodes map[string]*Node
	pods  []*mesh.Workload
	dsts  []netip.AddrPort
}

func generate(r *rand.Rand) world {
	yes := func(percent int) bool { return r.IntN(100) < percent }
	namespaces := []string{"a", "b", "c"}
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "td", RootNamespace: "root"})
	w := world{nodes: map[string]*Node{}}
	carried := map[string]map[string]bool{"n0": {}, "n1": {}, "n2": {}}
	var services []*mesh.Service
	for i := range 1 + r.IntN(4) {
		svc := &mesh.Service{Name: mesh.ServiceName{Namespace: namespaces[r.IntN(3)], Hostname: fmt.Sprintf("s%d", i)}, Short: fmt.Sprintf("s%d", i),
			VIPs:  []mesh.NetAddr{{Addr: netip.AddrFrom4([4]byte{10, 96, 0, byte(i + 1)})}},
			Ports: []mesh.ServicePort{{Port: 80, Target: 8080}, {Port: 81}}}
		if yes(15) {
			svc.LB = mesh.LoadBalancing{Mode: mesh.LBStrict, Prefer: []mesh.LBScope{mesh.ScopeNode}}
		}
		if yes(10) {
			svc.LB.AllowUnhealthy = true
		}
		services = append(services, svc)
	}
	policies := []mesh.PolicyName{}
	for i := range r.IntN(6) {
		p := &mesh.Policy{Name: mesh.PolicyName{Namespace: namespaces[r.IntN(3)], Name: fmt.Sprintf("p%d", i)}, Scope: mesh.Scope(r.IntN(3)), Action: mesh.Action(r.IntN(2)), DryRun: yes(10)}
		if p.Scope == mesh.ScopeMesh {
			p.Name.Namespace = "root"
		}
		for range 1 + r.IntN(2) {
			var m mesh.Match
			switch r.IntN(5) {
			case 0:
				m.Namespaces = []mesh.StringMatch{{Value: namespaces[r.IntN(3)]}}
			case 1:
				m.ServiceAccounts = []mesh.ServiceAccountMatch{{Namespace: namespaces[r.IntN(3)], ServiceAccount: "sa"}}
			case 2:
				m.DestinationPorts = []uint16{[]uint16{8080, 9090}[r.IntN(2)]}
			case 3:
				m.SourceIPs = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(16))}), 28)}
			case 4:
				m.NotPrincipals = []mesh.StringMatch{{Kind: mesh.MatchPresence}}
			}
			p.Rules = append(p.Rules, mesh.Rule{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}})
		}
		if yes(20) {
			p.Name.Name = "strict_" + p.Name.Name
		}
		b.PutPolicy(p)
		if p.Scope == mesh.ScopeWorkload {
			policies = append(policies, p.Name)
		}
	}
	for i := range 2 + r.IntN(7) {
		ns := namespaces[r.IntN(3)]
		pod := &mesh.Workload{UID: fmt.Sprintf("Kubernetes//Pod/%s/p%d", ns, i), Name: fmt.Sprintf("p%d", i), Namespace: ns,
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}, Node: fmt.Sprintf("n%d", r.IntN(3)), Healthy: yes(85),
			Identity: mesh.Identity{TrustDomain: "td", Namespace: ns, ServiceAccount: []string{"sa", "other"}[r.IntN(2)]}, Capacity: uint32(r.IntN(4)),
			Services: map[mesh.ServiceName][]mesh.ServicePort{}}
		if yes(75) {
			pod.Tunnel = mesh.TunnelHBONE
			if yes(95) {
				carried[pod.Node][pod.UID] = true
			}
		} else if yes(20) {
			pod.HostNetwork = true
		}
		for _, s := range services {
			if yes(40) {
				pod.Services[s.Name] = []mesh.ServicePort{{Port: 81, Target: 9090}}
			}
		}
		for _, n := range policies {
			if yes(40) {
				pod.Policies = append(pod.Policies, n)
			}
		}
		if yes(3) {
			pod.Policies = append(pod.Policies, mesh.PolicyName{Namespace: ns, Name: "gone"})
		}
		b.PutWorkload(pod)
		w.pods = append(w.pods, pod)
		w.dsts = append(w.dsts, netip.AddrPortFrom(pod.Addrs[0], 8080))
	}
	for _, s := range services {
		if yes(15) {
			p := w.pods[r.IntN(len(w.pods))]
			s.Waypoint = &mesh.Gateway{Addr: mesh.NetAddr{Addr: p.Addrs[0]}, HBONEPort: 15008}
		}
		b.PutService(s)
		for _, port := range []uint16{80, 81, 82} {
			w.dsts = append(w.dsts, netip.AddrPortFrom(s.VIPs[0].Addr, port))
		}
	}
	w.dsts = append(w.dsts, netip.MustParseAddrPort("192.0.2.1:443"))
	now := b.Commit(7)
	behind := now
	if yes(30) && len(policies) > 0 {
		b := mesh.NewBuilder(now)
		b.DeletePolicy(policies[0])
		behind = b.Commit(6)
	}
	for i, name := range []string{"n0", "n1", "n2"} {
		w.nodes[name] = &Node{Name: name, Mesh: []*mesh.Snapshot{now, now, behind}[i], Captured: carried[name]}
	}
	return w
}

// happens does what the two nodes do to one connection, with the number that the client's agent draws.
func (w *world) happens(src *mesh.Workload, dst netip.AddrPort, drawn int) (outcome Outcome, draws int) {
	near := w.nodes[src.Node]
	draws = 1
	r := near.Mesh.Resolve(src, dst, func(n int) int { draws = n; return drawn })
	answer := func(ok bool) (Outcome, int) {
		if ok {
			return Allowed, draws
		}
		return Refused, draws
	}
	switch {
	case r.Kind == mesh.RouteRefuse:
		return answer(false)
	case r.Kind == mesh.RoutePassthrough, r.Why == mesh.WhyOwnPod:
		return answer(true)
	case r.Kind == mesh.RouteWaypoint:
		return w.through(near.Mesh, r.Workload, dst), draws
	}
	far := w.nodes[r.Workload.Node]
	carries := far.Captured[r.Workload.UID]
	if r.Kind == mesh.RouteHBONE && near.Captured[src.UID] {
		return answer(carries && far.Mesh.Authorize(mesh.Conn{Source: src.Identity, SourceIP: src.Addrs[0], Dst: r.Authority, DstWorkload: r.Workload}).Allow)
	}
	if !carries {
		return answer(true)
	}
	app := r.Dial
	if r.Kind == mesh.RouteHBONE {
		app = r.Authority
	}
	return answer(far.Mesh.Authorize(mesh.Conn{SourceIP: src.Addrs[0], Dst: app, DstWorkload: r.Workload, Plaintext: true}).Allow)
}

// behind are the endpoints to which a waypoint may send what comes for a service.
func (w *world) behind(s *mesh.Snapshot, dst netip.AddrPort) map[netip.AddrPort]*mesh.Workload {
	out := map[netip.AddrPort]*mesh.Workload{}
	svc := s.ServiceAt(mesh.NetAddr{Addr: dst.Addr()})
	for e, ports := range s.Endpoints(svc.Name) {
		for _, p := range slices.Concat(svc.Ports, ports) {
			if p.Port == dst.Port() && p.Target != 0 && len(e.Addrs) > 0 && e.Healthy {
				out[netip.AddrPortFrom(e.Addrs[0], p.Target)] = e
			}
		}
	}
	return out
}

// through does what a waypoint does to a connection that nothing keeps out, with each endpoint.
func (w *world) through(s *mesh.Snapshot, way *mesh.Workload, dst netip.AddrPort) Outcome {
	var out Outcome
	for app, e := range w.behind(s, dst) {
		got := Allowed
		if e.Tunnel == mesh.TunnelHBONE {
			far := w.nodes[e.Node]
			if !far.Captured[e.UID] || !far.Mesh.Authorize(mesh.Conn{Source: way.Identity, SourceIP: way.Addrs[0], Dst: app, DstWorkload: e}).Allow {
				got = Refused
			}
		}
		if out != "" && out != got {
			return Depends
		}
		out = got
	}
	return cmp.Or(out, Refused) // with 503
}

// envoy is the configuration of a waypoint that keeps nothing out.
func (w *world) envoy(t *testing.T, s *mesh.Snapshot, dst netip.AddrPort) *envoy.Config {
	t.Helper()
	parse := func(v any) envoy.Value {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out, err := envoy.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	type object = map[string]any
	tree := func(input, key string, on object) object {
		return object{"matcher_tree": object{"input": object{"name": input}, "exact_match_map": object{"map": object{key: on}}}}
	}
	var hosts []any
	for app := range w.behind(s, dst) {
		hosts = append(hosts, object{"health_status": object{"eds_health_status": "HEALTHY"},
			"address": object{"socket_address": object{"address": app.Addr().String(), "port_value": app.Port()}}})
	}
	port := tree("port", strconv.Itoa(int(dst.Port())), object{"action": object{"name": "chain"}})
	return &envoy.Config{
		Clusters: parse(object{"cluster_statuses": []any{object{"name": "endpoints", "host_statuses": hosts}}}),
		Listeners: parse(object{"configs": []any{object{"active_state": object{"listener": object{
			"name": "main_internal", "filter_chain_matcher": tree("ip", dst.Addr().String(), object{"matcher": port}),
			"filter_chains": []any{object{"name": "chain", "filters": []any{object{"typed_config": object{"@type": "x.TcpProxy", "cluster": "endpoints"}}}}},
		}}}}}),
	}
}

// What is explained is what Resolve and Authorize, on the states of the two nodes, do to a connection with every number
// that the client's agent may draw.
func TestExplanationIsWhatHappens(t *testing.T) {
	asked, wrong := 0, 0
	seen := map[Outcome]int{}
	for i := range *topologies {
		w := generate(rand.New(rand.NewPCG(1, uint64(i))))
		envoys := map[string]*envoy.Config{}
		for _, src := range w.pods {
			if src.HostNetwork {
				continue
			}
			for _, dst := range w.dsts {
				at := src.Node + " " + dst.String()
				if envoys[at] == nil && w.nodes[src.Node].Mesh.ServiceAt(mesh.NetAddr{Addr: dst.Addr()}) != nil {
					envoys[at] = w.envoy(t, w.nodes[src.Node].Mesh, dst)
				}
				a := Explain(Question{Source: src.UID, Dst: dst, Client: w.nodes[src.Node], Node: func(n string) *Node { return w.nodes[n] },
					Waypoint: func(*mesh.Workload) *envoy.Config { return envoys[at] }})
				if slices.ContainsFunc(a.Ends, func(e End) bool { return e.Why == mesh.WhyServiceWaypoint }) != (a.Ends[0].Way == "waypoint") {
					t.Errorf("%d: %s to %s: %+v", i, src.UID, dst, a)
				}
				if route := w.nodes[src.Node].Mesh.Resolve(src, dst, nil); route.Kind == mesh.RouteWaypoint && !w.nodes[src.Node].Captured[src.UID] {
					continue // goes around the waypoint: see below
				}
				var want Outcome
				for drawn, n := 0, 1; drawn < n; drawn++ {
					var got Outcome
					got, n = w.happens(src, dst, drawn)
					if want == "" {
						want = got
					} else if want != got {
						want = Depends
					}
				}
				asked++
				seen[want]++
				if a.Outcome != want {
					wrong++
					t.Errorf("topology %d: %s to %s is %s, explained as %s\n%+v", i, src.UID, dst, want, a.Outcome, a)
				}
				for _, e := range a.Ends {
					refused := slices.ContainsFunc(e.Steps, func(s Step) bool { return s.Result == "refused" && s.What != "" })
					if refused != (e.Outcome == Refused || e.Outcome == Depends) {
						t.Errorf("topology %d: %s to %s: outcome %s without a reason, or a reason without effect: %+v", i, src.UID, dst, e.Outcome, e)
					}
				}
				if wrong > 5 {
					t.FailNow()
				}
			}
		}
	}
	t.Logf("%d connections of %d topologies: %v", asked, *topologies, seen)
	for _, o := range []Outcome{Allowed, Refused, Depends} {
		if seen[o] == 0 {
			t.Errorf("no connection was %s", o)
		}
	}
	if err := results.Record("why-topologies", results.Row{Name: "why-topologies", Inputs: *topologies, Failures: wrong, Figure: float64(asked), Unit: "connections explained as Resolve and Authorize decide them"}); err != nil {
		t.Error(err)
	}
}

func TestWhatIsSaid(t *testing.T) {
	pod := func(ns, name, node string, ip byte, tunnel mesh.TunnelProtocol) *mesh.Workload {
		return &mesh.Workload{UID: name, Name: name, Namespace: ns, Node: node, Healthy: true, Tunnel: tunnel, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, ip})},
			Identity: mesh.Identity{TrustDomain: "td", Namespace: ns, ServiceAccount: name}, Services: map[mesh.ServiceName][]mesh.ServicePort{}}
	}
	ui, bot, db := pod("shop", "ui", "n1", 1, mesh.TunnelHBONE), pod("bots", "bot", "n1", 2, mesh.TunnelNone), pod("shop", "db", "n2", 3, mesh.TunnelHBONE)
	name := mesh.ServiceName{Namespace: "shop", Hostname: "db.shop.svc.cluster.local"}
	db.Services[name] = nil
	rule := func(m mesh.Match) mesh.Rule {
		return mesh.Rule{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}}
	}
	deny := &mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "no-ui"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
		Rules: []mesh.Rule{rule(mesh.Match{DestinationPorts: []uint16{1}}), rule(mesh.Match{ServiceAccounts: []mesh.ServiceAccountMatch{{Namespace: "shop", ServiceAccount: "ui"}}})}}
	strict := &mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "peer_authn_strict"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
		Rules: []mesh.Rule{rule(mesh.Match{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}})}}
	state := func(policies ...*mesh.Policy) *mesh.Snapshot {
		b := mesh.NewBuilder(nil)
		for _, w := range []*mesh.Workload{ui, bot, db} {
			b.PutWorkload(w)
		}
		b.PutService(&mesh.Service{Name: name, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}, Ports: []mesh.ServicePort{{Port: 5432, Target: 5432}}})
		for _, p := range policies {
			b.PutPolicy(p)
		}
		return b.Commit(1)
	}
	ask := func(src *mesh.Workload, dst string, near, far *mesh.Snapshot, certificates map[string]string) Answer {
		nodes := map[string]*Node{"n1": {Name: "n1", Mesh: near, Captured: map[string]bool{"ui": true}, Certificates: certificates},
			"n2": {Name: "n2", Mesh: far, Captured: map[string]bool{"db": true}}}
		return Explain(Question{Source: src.UID, Dst: netip.MustParseAddrPort(dst), Client: nodes["n1"], Node: func(n string) *Node { return nodes[n] }})
	}
	around := func() Answer {
		near := mesh.NewBuilder(state())
		near.PutService(&mesh.Service{Name: name, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}, Ports: []mesh.ServicePort{{Port: 5432, Target: 5432}},
			Waypoint: &mesh.Gateway{Addr: mesh.NetAddr{Addr: ui.Addrs[0]}}})
		s := near.Commit(2)
		if through := ask(ui, "10.96.0.1:5432", s, s, nil); through.Ends[0].Way != "none" && through.Ends[0].Way != "hbone" { // the waypoint is the client itself
			t.Errorf("%+v", through)
		}
		return ask(bot, "10.96.0.1:5432", s, s, nil) // is not captured
	}
	closed := func() *mesh.Snapshot {
		b := mesh.NewBuilder(state())
		b.SetConfig(mesh.Config{RegistryOnly: true})
		return b.Commit(2)
	}()
	for about, c := range map[string]struct {
		a       Answer
		outcome Outcome
		want    string // of a step, as node stage result object rule what
	}{
		"not declared":      {ask(ui, "1.2.3.4:443", closed, closed, nil), Refused, "n1 resolution refused  0 the mesh does not know the address, and pods may reach only what it knows (outboundTrafficPolicy REGISTRY_ONLY)"},
		"not held back":     {ask(bot, "1.2.3.4:443", closed, closed, nil), Allowed, "n1 resolution ok  0 the address is not in the mesh: plain TCP to 1.2.3.4:443"},
		"allowed":           {ask(ui, "10.96.0.1:5432", state(), state(), nil), Allowed, "n2 policy ok  0 no policy applies"},
		"denied":            {ask(ui, "10.96.0.1:5432", state(deny), state(deny), nil), Refused, "n2 policy refused AuthorizationPolicy shop/no-ui 2 denied, spiffe://td/ns/shop/sa/ui"},
		"strict":            {ask(bot, "10.96.0.1:5432", state(strict), state(strict), nil), Refused, "n2 policy refused PeerAuthentication, as shop/peer_authn_strict 0 STRICT: plaintext is refused"},
		"not captured":      {ask(bot, "10.96.0.1:5432", state(), state(), nil), Allowed, "n1 capture warning  0 bots/bot is not captured"},
		"no such port":      {ask(ui, "10.96.0.1:80", state(), state(), nil), Refused, "n1 resolution refused Service shop/db.shop.svc.cluster.local 0 the service has no such port"},
		"nodes differ":      {ask(ui, "10.96.0.1:5432", state(deny), state(), nil), Allowed, "n1 agreement warning  0 the client's node would say deny_policy by shop/no-ui"},
		"no certificate":    {ask(ui, "10.96.0.1:5432", state(), state(), map[string]string{}), Refused, "n1 tunnel refused  0 the client's certificate is missing: spiffe://td/ns/shop/sa/ui"},
		"outside":           {ask(ui, "192.0.2.1:443", state(), state(), nil), Allowed, "n1 resolution ok  0 the address is not in the mesh"},
		"around a waypoint": {around(), Allowed, "n2 policy ok  0 no policy applies"},
		"no state":          {ask(ui, "10.96.0.1:5432", mesh.NewBuilder(nil).Commit(0), state(), nil), Refused, "n1 capture refused  0 the node does not know the client"},
	} {
		var said []string
		for _, s := range c.a.Steps {
			said = append(said, fmt.Sprintln(s.Node, s.Stage, s.Result, s.Object, s.Rule, s.What))
		}
		for _, e := range c.a.Ends {
			for _, s := range e.Steps {
				said = append(said, fmt.Sprintln(s.Node, s.Stage, s.Result, s.Object, s.Rule, s.What))
			}
		}
		if c.a.Outcome != c.outcome || !slices.ContainsFunc(said, func(s string) bool { return strings.HasPrefix(s, c.want) }) {
			t.Errorf("%s: %s, want %s with %q\n%s", about, c.a.Outcome, c.outcome, c.want, strings.Join(said, ""))
		}
	}
}

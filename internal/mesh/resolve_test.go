package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func dst(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func first(int) int { return 0 }

const id = "spiffe://cluster.local/ns/shop/sa/"

func TestResolve(t *testing.T) {
	client := pod("client", "10.0.0.9 fd00::9")
	client.Locality = Locality{Region: "r", Zone: "z1"}
	waypointSvc := &Service{Name: svcName("wp"), VIPs: []NetAddr{at("10.96.0.99")}, Ports: []ServicePort{{Port: 15008, Target: 15008}}}
	wp := pod("wp", "10.0.0.90")
	wp.Services = map[ServiceName][]ServicePort{svcName("wp"): {{Port: 15008, Target: 15008}}}
	wp.Tunnel, wp.NativeTunnel = TunnelNone, true
	with := func(w *Workload, f func(*Workload)) *Workload { f(w); return w }
	withS := func(s *Service, f func(*Service)) *Service { f(s); return s }
	behind := &Gateway{Service: svcName("wp"), HBONEPort: 15008}

	for _, tc := range []struct {
		name  string
		parts []any
		src   *Workload
		dst   string
		tried []string
		want  Route
	}{
		{
			name: "unknown address", dst: "1.2.3.4:443",
			want: Route{Kind: RoutePassthrough, Dial: dst("1.2.3.4:443"), Why: WhyUnknown},
		}, {
			name: "captured pod", parts: []any{pod("a", "10.0.0.1")}, dst: "10.0.0.1:8080",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyWorkload},
		}, {
			name: "IPv4-mapped", parts: []any{pod("a", "10.0.0.1")}, dst: "[::ffff:10.0.0.1]:8080",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyWorkload},
		}, {
			name:  "pod that is not captured",
			parts: []any{with(pod("a", "10.0.0.1"), func(w *Workload) { w.Tunnel = TunnelNone })}, dst: "10.0.0.1:8080",
			want: Route{Kind: RouteDirect, Dial: dst("10.0.0.1:8080"), Why: WhyNotCaptured},
		}, {
			name: "own pod", parts: []any{client}, src: client, dst: "10.0.0.9:80",
			want: Route{Kind: RoutePassthrough, Dial: dst("10.0.0.9:80"), Why: WhyOwnPod},
		}, {
			name: "service", parts: []any{svc("api", "10.96.0.1"), pod("a", "10.0.0.1", "api")}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyEndpoint},
		}, {
			name: "service with SANs",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.SANs = []string{"spiffe://x/ns/y/sa/z"} }),
				pod("a", "10.0.0.1", "api")}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"),
				Want: []string{id + "a", "spiffe://x/ns/y/sa/z"}, Why: WhyEndpoint},
		}, {
			name: "service, the client is the endpoint", src: with(pod("a", "10.0.0.1", "api"), func(*Workload) {}),
			parts: []any{svc("api", "10.96.0.1"), pod("a", "10.0.0.1", "api")}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteDirect, Dial: dst("10.0.0.1:8080"), Why: WhyOwnPod},
		}, {
			name: "service of both families, IPv6", parts: []any{svc("api", "10.96.0.1", "fd01::1"), pod("a", "10.0.0.1 fd00::1", "api")}, dst: "[fd01::1]:80",
			want: Route{Kind: RouteHBONE, Dial: dst("[fd00::1]:15008"), Authority: dst("[fd00::1]:8080"), Want: []string{id + "a"}, Why: WhyEndpoint},
		}, {
			name: "IPv6 service, IPv4 endpoint", parts: []any{svc("api", "fd01::1"), pod("a", "10.0.0.1", "api")}, dst: "[fd01::1]:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyEndpoint},
		}, {
			name: "port that the service does not have", parts: []any{svc("api", "10.96.0.1"), pod("a", "10.0.0.1", "api")}, dst: "10.96.0.1:81",
			want: Route{Why: WhyNoPort},
		}, {
			name: "no endpoint", parts: []any{svc("api", "10.96.0.1")}, dst: "10.96.0.1:80",
			want: Route{Why: WhyNoEndpoint},
		}, {
			name: "named port that no endpoint has",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.Ports[0].Target = 0 }),
				with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Services[svcName("api")] = nil })}, dst: "10.96.0.1:80",
			want: Route{Why: WhyNoEndpoint},
		}, {
			name:  "no healthy endpoint",
			parts: []any{svc("api", "10.96.0.1"), with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Healthy = false })}, dst: "10.96.0.1:80",
			want: Route{Why: WhyNoHealthy},
		}, {
			name: "publishNotReadyAddresses",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.LB.AllowUnhealthy = true }),
				with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Healthy = false })}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyEndpoint},
		}, {
			name: "endpoint on the host network",
			parts: []any{svc("api", "10.96.0.1"), with(pod("a", "192.168.0.1", "api"), func(w *Workload) {
				w.HostNetwork, w.Tunnel = true, TunnelNone
			})}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteDirect, Dial: dst("192.168.0.1:8080"), Why: WhyHostNetwork},
		}, {
			name: "address of a node", parts: []any{with(pod("a", "192.168.0.1"), func(w *Workload) { w.HostNetwork = true })}, dst: "192.168.0.1:80",
			want: Route{Kind: RoutePassthrough, Dial: dst("192.168.0.1:80"), Why: WhyUnknown},
		}, {
			name: "internalTrafficPolicy Local, none on the node", src: client,
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.LB = LoadBalancing{Mode: LBStrict, Prefer: []LBScope{ScopeNode}} }),
				with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Node = "n2" })}, dst: "10.96.0.1:80",
			want: Route{Why: WhyNoLocal},
		}, {
			name: "failover prefers the zone", src: client,
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.LB = LoadBalancing{Mode: LBFailover, Prefer: []LBScope{ScopeRegion, ScopeZone}} }),
				with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Locality = Locality{"r", "z2", ""} }),
				with(pod("b", "10.0.0.2", "api"), func(w *Workload) { w.Locality = Locality{"r", "z1", ""} })}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.2:15008"), Authority: dst("10.0.0.2:8080"), Want: []string{id + "b"}, Why: WhyEndpoint},
		}, {
			name: "failover leaves the zone when it is tried", src: client, tried: []string{"c//Pod/shop/b"},
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.LB = LoadBalancing{Mode: LBFailover, Prefer: []LBScope{ScopeRegion, ScopeZone}} }),
				with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Locality = Locality{"r", "z2", ""} }),
				with(pod("b", "10.0.0.2", "api"), func(w *Workload) { w.Locality = Locality{"r", "z1", ""} })}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyEndpoint},
		}, {
			name: "every endpoint is tried", tried: []string{"c//Pod/shop/a"},
			parts: []any{svc("api", "10.96.0.1"), pod("a", "10.0.0.1", "api")}, dst: "10.96.0.1:80",
			want: Route{Why: WhyAllTried},
		}, {
			name: "endpoint on another network", src: client,
			parts: []any{svc("api", "10.96.0.1"), with(pod("a", "10.0.0.1", "api"), func(w *Workload) { w.Network = "far" })}, dst: "10.96.0.1:80",
			want: Route{Why: WhyOtherNetwork},
		}, {
			name:  "service that passes through",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.LB.Mode = LBPassthrough })}, dst: "10.96.0.1:80",
			want: Route{Kind: RoutePassthrough, Dial: dst("10.96.0.1:80"), Why: WhyServicePassthru},
		}, {
			name: "service that passes through to a pod that was tried in vain", tried: []string{"c//Pod/shop/a"},
			parts: []any{withS(svc("api", "10.0.0.1"), func(s *Service) { s.LB.Mode = LBPassthrough }), pod("a", "10.0.0.1")}, dst: "10.0.0.1:80",
			want: Route{Why: WhyAllTried},
		}, {
			name:  "waypoint of the service",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.Waypoint = behind }), pod("a", "10.0.0.1", "api"), waypointSvc, wp}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteWaypoint, Dial: dst("10.0.0.90:15008"), Authority: dst("10.96.0.1:80"), Want: []string{id + "wp"}, Why: WhyServiceWaypoint},
		}, {
			name: "the waypoint itself calls", src: wp,
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.Waypoint = behind }), pod("a", "10.0.0.1", "api"), waypointSvc, wp}, dst: "10.96.0.1:80",
			want: Route{Kind: RouteHBONE, Dial: dst("10.0.0.1:15008"), Authority: dst("10.0.0.1:8080"), Want: []string{id + "a"}, Why: WhyEndpoint},
		}, {
			name:  "waypoint by address",
			parts: []any{with(pod("a", "10.0.0.1"), func(w *Workload) { w.Waypoint = &Gateway{Addr: at("10.96.0.99"), HBONEPort: 15008} }), waypointSvc, wp}, dst: "10.0.0.1:80",
			want: Route{Kind: RouteWaypoint, Dial: dst("10.0.0.90:15008"), Authority: dst("10.0.0.1:80"), Want: []string{id + "wp"}, Why: WhyWorkloadWaypoint},
		}, {
			name:  "waypoint that is not there",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.Waypoint = behind }), pod("a", "10.0.0.1", "api")}, dst: "10.96.0.1:80",
			want: Route{Why: WhyWaypointMissing},
		}, {
			name:  "waypoint without a pod",
			parts: []any{withS(svc("api", "10.96.0.1"), func(s *Service) { s.Waypoint = behind }), pod("a", "10.0.0.1", "api"), waypointSvc}, dst: "10.96.0.1:80",
			want: Route{Why: WhyWaypointMissing},
		}, {
			name: "waypoint that takes no tunnel",
			parts: []any{with(pod("a", "10.0.0.1"), func(w *Workload) { w.Waypoint = &Gateway{Addr: at("10.0.0.2")} }),
				with(pod("b", "10.0.0.2"), func(w *Workload) { w.Tunnel = TunnelNone })}, dst: "10.0.0.1:80",
			want: Route{Why: WhyWaypointNotTunnel},
		}, {
			name:  "captured and without an identity",
			parts: []any{with(pod("a", "10.0.0.1"), func(w *Workload) { w.Identity = Identity{} })}, dst: "10.0.0.1:80",
			want: Route{Why: WhyNoIdentity},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := build(tc.parts...).ResolveExcluding(tc.src, dst(tc.dst), tc.tried, first)
			got.Service, got.Workload = nil, nil
			if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", tc.want) {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

func TestNothingIsKnown(t *testing.T) {
	s := NewBuilder(nil).Commit(0)
	if r := s.Resolve(nil, dst("1.2.3.4:80"), nil); r.Kind != RouteRefuse || r.Why != WhyNoState {
		t.Errorf("a connection before anything is known is routed: %+v", r)
	}
	if v := s.Authorize(Conn{DstWorkload: pod("a", "10.0.0.1")}); v.Allow {
		t.Errorf("a connection before anything is known is allowed: %+v", v)
	}
}

func TestCapacityIsAWeight(t *testing.T) {
	small, big := pod("a", "10.0.0.1", "api"), pod("b", "10.0.0.2", "api")
	big.Capacity = 3
	s := build(svc("api", "10.96.0.1"), small, big)
	got := map[string]int{}
	for n := range 4 {
		r := s.Resolve(nil, dst("10.96.0.1:80"), func(total int) int {
			if total != 4 {
				t.Fatalf("the total weight is %d, want 4", total)
			}
			return n
		})
		got[r.Workload.Name]++
	}
	if got["a"] != 1 || got["b"] != 3 {
		t.Errorf("chosen %v, want a 1 and b 3", got)
	}
}

// Under REGISTRY_ONLY only what the mesh knows is reached.
func TestRegistryOnly(t *testing.T) {
	host := pod("agent", "192.168.0.1")
	host.HostNetwork, host.Tunnel = true, TunnelNone
	api := pod("kubernetes/192.168.0.9", "192.168.0.9") // an endpoint that is no pod
	api.Node, api.HostNetwork, api.Tunnel = "", true, TunnelNone
	plain, far, client := pod("plain", "10.0.0.2"), pod("far", "10.7.0.1"), pod("client", "10.0.0.9")
	plain.Tunnel, far.Network = TunnelNone, "far"
	declared := svc("declared", "203.0.113.7")
	declared.LB.Mode = LBPassthrough
	wide := svc("wide")
	wide.LB.Mode, wide.VIPNets = LBPassthrough, []NetPrefix{{Prefix: netip.MustParsePrefix("198.51.100.0/24")}}
	parts := []any{host, api, plain, far, client, declared, wide, svc("api", "10.96.0.1"), pod("a", "10.0.0.1", "api")}
	only, every := build(append(parts, Config{RegistryOnly: true})...), build(append(parts, Config{})...)
	for _, tc := range []struct {
		dst  string
		kind RouteKind
		why  Reason
	}{
		{"1.2.3.4:443", RouteRefuse, WhyNotInRegistry},
		{"[2001:db8::1]:443", RouteRefuse, WhyNotInRegistry},
		{"[::ffff:1.2.3.4]:443", RouteRefuse, WhyNotInRegistry},
		{"169.254.169.254:80", RouteRefuse, WhyNotInRegistry},
		{"10.7.0.1:80", RouteRefuse, WhyNotInRegistry}, // of another network
		{"192.168.0.2:80", RouteRefuse, WhyNotInRegistry},
		{"192.168.0.1:10250", RoutePassthrough, WhyHostAddress},
		{"192.168.0.9:6443", RoutePassthrough, WhyHostAddress},
		{"10.0.0.9:80", RoutePassthrough, WhyOwnPod},
		{"10.0.0.2:80", RouteDirect, WhyNotCaptured},
		{"10.0.0.1:80", RouteHBONE, WhyWorkload},
		{"10.96.0.1:80", RouteHBONE, WhyEndpoint},
		{"10.96.0.1:81", RouteRefuse, WhyNoPort},
		{"203.0.113.7:443", RoutePassthrough, WhyServicePassthru},
		{"198.51.100.200:443", RoutePassthrough, WhyServicePassthru},
	} {
		r := only.Resolve(client, dst(tc.dst), first)
		if r.Kind != tc.kind || r.Why != tc.why {
			t.Errorf("%s: %d %s, want %d %s", tc.dst, r.Kind, r.Why, tc.kind, tc.why)
		}
		if tc.why == WhyNotInRegistry && r.Dial.IsValid() {
			t.Errorf("%s is refused, and has somewhere to dial: %s", tc.dst, r.Dial)
		}
		r = every.Resolve(client, dst(tc.dst), first)
		if open := tc.why == WhyNotInRegistry || tc.why == WhyHostAddress; open != (r.Why == WhyUnknown) || !open && r.Why != tc.why {
			t.Errorf("%s without REGISTRY_ONLY: %d %s", tc.dst, r.Kind, r.Why)
		}
	}
}

// What is for one namespace alone (exportTo) is unknown to the clients of others: its addresses and those of its endpoints.
func TestRegistryOnlyByNamespace(t *testing.T) {
	private := func(name string, vips ...string) *Service {
		s := svc(name, vips...)
		s.VisibleIn = []string{s.Name.Namespace}
		return s
	}
	listed := func(name, vip string, namespaces ...string) *Service {
		s := svc(name, vip)
		s.VisibleIn = append([]string{}, namespaces...)
		return s
	}
	entry := func(name, addr string, services ...string) *Workload { // an endpoint that is written in a ServiceEntry
		w := pod(name, addr, services...)
		w.Node, w.Tunnel = "", TunnelNone
		return w
	}
	ranged, names := private("ranged"), entry("names", "", "names")
	ranged.VIPNets, ranged.LB.Mode = []NetPrefix{{Prefix: netip.MustParsePrefix("198.51.100.0/24")}}, LBPassthrough
	names.Hostname = "names.example"
	other := pod("other", "10.0.0.8")
	other.Namespace = "elsewhere"
	client := pod("client", "10.0.0.9")
	parts := []any{client, other, ranged, private("static", "203.0.113.1"), entry("e1", "192.0.2.1", "static"),
		private("names", "203.0.113.2"), names, svc("open", "203.0.113.3"), entry("e2", "192.0.2.2", "open", "static"),
		private("pods", "203.0.113.4"), pod("p", "10.0.0.1", "pods"), listed("both", "203.0.113.5", "elsewhere", "shop"), entry("e3", "192.0.2.3", "both"),
		listed("theirs", "203.0.113.6", "elsewhere"), entry("e4", "192.0.2.4", "theirs"), listed("nobodys", "203.0.113.7"), entry("e5", "192.0.2.5", "nobodys")}
	only, every := build(append(parts, Config{RegistryOnly: true})...), build(append(parts, Config{})...)
	for _, tc := range []struct {
		dst              string
		own, others      Reason
		anyOwn, anyOther Reason // without REGISTRY_ONLY
	}{
		{"203.0.113.1:80", WhyNotCaptured, WhyNotInRegistry, WhyNotCaptured, WhyUnknown},
		{"192.0.2.1:80", WhyNotCaptured, WhyNotInRegistry, WhyNotCaptured, WhyNotCaptured},
		{"203.0.113.2:80", WhyServicePassthru, WhyNotInRegistry, WhyNoEndpoint, WhyUnknown}, // which is left alone
		{"203.0.113.2:81", WhyNoPort, WhyNotInRegistry, WhyNoPort, WhyUnknown},
		{"198.51.100.7:443", WhyServicePassthru, WhyNotInRegistry, WhyServicePassthru, WhyUnknown},
		{"203.0.113.3:80", WhyNotCaptured, WhyNotCaptured, WhyNotCaptured, WhyNotCaptured},
		{"192.0.2.2:80", WhyNotCaptured, WhyNotCaptured, WhyNotCaptured, WhyNotCaptured}, // of a service for all as well
		{"10.0.0.1:80", WhyWorkload, WhyWorkload, WhyWorkload, WhyWorkload},              // a pod
		{"203.0.113.5:80", WhyNotCaptured, WhyNotCaptured, WhyNotCaptured, WhyNotCaptured},
		{"192.0.2.3:80", WhyNotCaptured, WhyNotCaptured, WhyNotCaptured, WhyNotCaptured},
		{"203.0.113.6:80", WhyNotInRegistry, WhyNotCaptured, WhyUnknown, WhyNotCaptured},
		{"192.0.2.4:80", WhyNotInRegistry, WhyNotCaptured, WhyNotCaptured, WhyNotCaptured},
		{"203.0.113.7:80", WhyNotInRegistry, WhyNotInRegistry, WhyUnknown, WhyUnknown},
		{"192.0.2.5:80", WhyNotInRegistry, WhyNotInRegistry, WhyNotCaptured, WhyNotCaptured},
	} {
		for _, c := range []struct {
			s    *Snapshot
			from *Workload
			want Reason
		}{{only, client, tc.own}, {only, other, tc.others}, {every, client, tc.anyOwn}, {every, other, tc.anyOther}} {
			if r := c.s.Resolve(c.from, dst(tc.dst), first); r.Why != c.want {
				t.Errorf("%s from %s, REGISTRY_ONLY %t: %s, want %s", tc.dst, c.from.Namespace, c.s.Config().RegistryOnly, r.Why, c.want)
			}
		}
	}
}

// oracle is endpoint choice written down naively: every endpoint that may be chosen.
func oracle(s *Snapshot, src *Workload, svc *Service, port uint16, tried []string) []string {
	var svcPort *ServicePort
	for i := range svc.Ports {
		if svc.Ports[i].Port == port {
			svcPort = &svc.Ports[i]
			break
		}
	}
	if svcPort == nil {
		return nil
	}
	shared := func(w *Workload) int {
		n := 0
		for _, scope := range svc.LB.Prefer {
			same := src != nil
			switch {
			case src == nil:
			case scope == ScopeNode:
				same = src.Node == w.Node
			case scope == ScopeZone:
				same = src.Locality.Zone == w.Locality.Zone
			case scope == ScopeNetwork:
				same = src.Network == w.Network
			}
			if !same {
				break
			}
			n++
		}
		return n
	}
	best := 0
	byRank := map[int][]string{}
	for w := range s.Workloads() {
		ports, ok := w.Services[svc.Name]
		if !ok || slices.Contains(tried, w.UID) || len(w.Addrs) == 0 {
			continue
		}
		target := svcPort.Target
		for _, p := range ports {
			if p.Port == port && p.Target != 0 {
				target = p.Target
			}
		}
		network := ""
		if src != nil {
			network = src.Network
		}
		if target == 0 || w.Network != network || !w.Healthy && !svc.LB.AllowUnhealthy {
			continue
		}
		rank := 0
		switch svc.LB.Mode {
		case LBFailover:
			rank = shared(w)
		case LBStrict:
			if shared(w) < len(svc.LB.Prefer) {
				continue
			}
		}
		byRank[rank] = append(byRank[rank], w.UID)
		best = max(best, rank)
	}
	return byRank[best]
}

func TestResolveAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBuilder(nil)
		for range rapid.IntRange(0, 30).Draw(t, "changes") {
			genParts(t, b)
		}
		s := b.Commit(1)
		var src *Workload
		if rapid.Bool().Draw(t, "known") {
			src = pod("p0", "10.0.0.200")
			src.Node = "n1"
		}
		var tried []string
		for i := range rapid.IntRange(0, 2).Draw(t, "tried") {
			tried = append(tried, fmt.Sprint("c//Pod/shop/p", i))
		}
		to := netip.AddrPortFrom(ip(fmt.Sprintf("10.96.0.%d", rapid.IntRange(0, 2).Draw(t, "vip"))), 80)
		svc := s.serviceFor(NetAddr{Addr: to.Addr()}, namespaceOf(src))
		if svc == nil || svc.LB.Mode == LBPassthrough {
			return
		}
		may := oracle(s, src, svc, 80, tried)
		seen := map[string]bool{}
		total := 0
		s.ResolveExcluding(src, to, tried, func(n int) int { total = n; return 0 })
		for n := range max(total, 1) {
			r := s.ResolveExcluding(src, to, tried, func(int) int { return n })
			switch {
			case r.Kind == RouteRefuse && len(may) > 0 && r.Why != WhyNoIdentity:
				t.Fatalf("refused for %s, although %v may be chosen", r.Why, may)
			case r.Kind != RouteRefuse && !slices.Contains(may, r.Workload.UID):
				t.Fatalf("%s was chosen of %v", r.Workload.UID, may)
			case r.Kind == RouteHBONE && !slices.Equal(r.Want, []string{r.Workload.Identity.String()}):
				t.Fatalf("%s is expected to be %v", r.Workload.UID, r.Want)
			}
			if r.Workload != nil {
				seen[r.Workload.UID] = true
			}
		}
		if len(seen) != len(may) {
			t.Fatalf("only %v of %v are ever chosen", seen, may)
		}
	})
}

// Shares says of each number which endpoint Resolve picks by it, for whatever namespace the client is in.
func TestSharesAreWhatResolvePicks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBuilder(nil)
		for range rapid.IntRange(0, 30).Draw(t, "changes") {
			genParts(t, b)
		}
		s := b.Commit(1)
		src := pod("p0", "10.0.0.200")
		src.Node = "n1"
		to := netip.AddrPortFrom(ip(fmt.Sprintf("10.96.0.%d", rapid.IntRange(0, 2).Draw(t, "vip"))), 80)
		total, shares := s.Shares(src, to)
		next := 0
		for _, x := range shares {
			if x.First != next {
				t.Fatalf("a share begins at %d, want %d: %+v", x.First, next, shares)
			}
			for range x.Count {
				for _, namespace := range []string{"shop", "other"} {
					client := *src
					client.Namespace = namespace
					r := s.Resolve(&client, to, func(n int) int {
						if n != total {
							t.Fatalf("Resolve picks of %d, want %d", n, total)
						}
						return next
					})
					if r.Workload == nil || r.Workload.UID != x.Workload.UID || r.Kind == RouteHBONE && r.Authority != x.At || r.Kind == RouteDirect && r.Dial != x.At {
						t.Fatalf("%d of %d: Resolve says %+v, Shares %+v", next, total, r, x)
					}
				}
				next++
			}
		}
		if next != total {
			t.Fatalf("the shares end at %d of %d", next, total)
		}
	})
}

func namespaceOf(w *Workload) string {
	if w == nil {
		return ""
	}
	return w.Namespace
}

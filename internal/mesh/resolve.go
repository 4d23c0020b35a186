package mesh

import (
	"math/rand/v2"
	"net/netip"
	"slices"
)

// HBONEPort is where a captured pod takes the tunnel.
const HBONEPort = 15008

// Why a Route is as it is.
const (
	WhyNoState           Reason = "no_state"            // refuse: nothing is known of the mesh yet
	WhyUnknown           Reason = "not_in_mesh"         // passthrough: no service and no workload has the address
	WhyNotInRegistry     Reason = "not_in_registry"     // refuse: the same, and the mesh lets pods reach only what it knows
	WhyHostAddress       Reason = "host_address"        // passthrough: the same, but something on a host's network has it
	WhyOwnPod            Reason = "own_pod"             // passthrough or direct: the client is its own server
	WhyServicePassthru   Reason = "service_passthrough" // passthrough: the service asks for the address itself
	WhyHostNetwork       Reason = "host_network"        // direct: the endpoint is on its node's network
	WhyNotCaptured       Reason = "not_captured"        // direct: the endpoint has no tunnel
	WhyEndpoint          Reason = "endpoint"            // HBONE: endpoint of the service
	WhyWorkload          Reason = "workload"            // HBONE: the pod that was asked for
	WhyServiceWaypoint   Reason = "service_waypoint"    // waypoint of the service
	WhyWorkloadWaypoint  Reason = "workload_waypoint"   // waypoint of the pod
	WhyNoPort            Reason = "no_such_port"        // refuse: the service has no such port
	WhyNoEndpoint        Reason = "no_endpoint"         // refuse: no endpoint serves the port
	WhyNoHealthy         Reason = "no_healthy_endpoint" // refuse: none of them is ready
	WhyNoLocal           Reason = "no_local_endpoint"   // refuse: none is where the service's policy demands
	WhyOtherNetwork      Reason = "other_network"       // refuse: all of them are on a network of their own
	WhyAllTried          Reason = "all_endpoints_tried" // refuse: ResolveExcluding has nothing left
	WhyWaypointMissing   Reason = "waypoint_missing"    // refuse: a waypoint is bound and not there
	WhyWaypointNotTunnel Reason = "waypoint_not_hbone"  // refuse: the waypoint does not take the tunnel
	WhyNoIdentity        Reason = "no_identity"         // refuse: nobody could be expected at the far end
)

// Resolve says where a connection of src to dst goes. src is the client's workload; nil where it is not
// known. pick returns a number in [0,n); nil is a random one.
//
// The address is looked up as a service's own, then as a workload's, then in the prefixes of services. A pod's
// address is nobody else's, except to clients of the service's own namespace. Who is not found is outside the mesh, and refused
// where Config.RegistryOnly is set, but for the addresses of hosts. Resolve does not allocate for services without SANs.
func (s *Snapshot) Resolve(src *Workload, dst netip.AddrPort, pick func(n int) int) Route {
	return s.ResolveExcluding(src, dst, nil, pick)
}

// ResolveExcluding is Resolve without the workloads of these UIDs, for another try while no byte was sent.
// It refuses where only those are left.
func (s *Snapshot) ResolveExcluding(src *Workload, dst netip.AddrPort, tried []string, pick func(n int) int) Route {
	if s.rev == 0 {
		return Route{Why: WhyNoState}
	}
	r := resolution{s: s, src: src, network: s.config.Network, tried: tried, pick: pick}
	var namespace string
	if src != nil {
		r.network, namespace = src.Network, src.Namespace
	}
	dst = netip.AddrPortFrom(dst.Addr().Unmap().WithZone(""), dst.Port())
	if src != nil && src.has(dst.Addr()) && !src.HostNetwork {
		return Route{Kind: RoutePassthrough, Dial: dst, Workload: src, Why: WhyOwnPod}
	}
	at := NetAddr{r.network, dst.Addr()}
	if svc := s.serviceFor(at, namespace); svc != nil && !s.foreign(svc, at, namespace) {
		return r.toService(svc, dst)
	}
	if m := s.memberFor(at, namespace); m != nil {
		return r.toWorkload(m, dst)
	}
	if svc := s.serviceByPrefix(at, namespace); svc != nil {
		return r.toService(svc, dst)
	}
	if !s.config.RegistryOnly {
		return Route{Kind: RoutePassthrough, Dial: dst, Why: WhyUnknown}
	}
	if _, ok := s.hosts.get(at); ok {
		return Route{Kind: RoutePassthrough, Dial: dst, Why: WhyHostAddress}
	}
	return Route{Why: WhyNotInRegistry}
}

// memberFor is memberAt as a client in a namespace sees it: where pods may reach only what the mesh knows, the endpoints
// of what is for some namespaces alone are nobody to the others.
func (s *Snapshot) memberFor(a NetAddr, namespace string) *member {
	at, ok := s.addrs.get(a)
	if !ok {
		return nil
	}
	for _, m := range at.list {
		if !s.config.RegistryOnly || s.known(m.Workload, namespace) {
			return m
		}
	}
	return nil
}

// Private reports whether nothing but services for some namespaces alone have a workload that is no pod.
func (s *Snapshot) Private(w *Workload) bool {
	return s.hidden(w, func(svc *Service) bool { return svc.Limited() })
}

// known reports whether the pods of a namespace know a workload: all know pods, of others they know those of services they know.
func (s *Snapshot) known(w *Workload, namespace string) bool {
	return !s.hidden(w, func(svc *Service) bool { return !svc.Visible(namespace) })
}

// hidden reports whether all services that have a workload which is no pod are such ones.
func (s *Snapshot) hidden(w *Workload, such func(*Service) bool) bool {
	if w.Node != "" || w.HostNetwork || len(w.Services) == 0 {
		return false
	}
	for name := range w.Services {
		if svc := s.Service(name); svc == nil || !such(svc) {
			return false
		}
	}
	return true
}

// foreign reports whether a service has the address of a pod that is neither of its namespace nor is the client: who
// may write objects in one namespace must not draw to himself what others send to the pods of a third.
func (s *Snapshot) foreign(svc *Service, at NetAddr, client string) bool {
	if svc.Name.Namespace == client {
		return false
	}
	m := s.memberAt(at)
	return m != nil && m.pod() && m.Namespace != svc.Name.Namespace
}

type resolution struct {
	s       *Snapshot
	src     *Workload
	network string
	tried   []string
	pick    func(n int) int
}

func (r *resolution) toService(svc *Service, dst netip.AddrPort) Route {
	if svc.Waypoint != nil && !r.isWaypoint(svc.Waypoint) {
		route := r.toWaypoint(svc.Waypoint, dst, WhyServiceWaypoint)
		route.Service = svc
		return route
	}
	if svc.LB.Mode == LBPassthrough {
		// No endpoint is chosen; a pod that has the very address still gets its tunnel.
		if m := r.s.memberAt(NetAddr{r.network, dst.Addr()}); m != nil {
			if r.excluded(m) { // not past its tunnel
				return Route{Service: svc, Workload: m.Workload, Why: WhyAllTried}
			}
			route := r.toEndpoint(m, svc, dst.Addr(), dst.Port(), WhyEndpoint)
			route.Service = svc
			return route
		}
		return Route{Kind: RoutePassthrough, Dial: dst, Service: svc, Why: WhyServicePassthru}
	}
	m, port, why := r.choose(svc, dst.Port())
	if m == nil && why == WhyNoEndpoint && svc.Limited() && r.s.config.RegistryOnly && r.s.onlyNames(svc.Name) {
		// It is here only because other namespaces must not have it: what nodes do not resolve leaves as it came.
		return Route{Kind: RoutePassthrough, Dial: dst, Service: svc, Why: WhyServicePassthru}
	}
	if m == nil {
		return Route{Service: svc, Why: why}
	}
	addr, _ := m.addrLike(dst.Addr())
	route := r.toEndpoint(m, svc, addr, port, WhyEndpoint)
	route.Service = svc
	return route
}

func (r *resolution) toWorkload(m *member, dst netip.AddrPort) Route {
	if r.excluded(m) {
		return Route{Workload: m.Workload, Why: WhyAllTried}
	}
	if m.Waypoint != nil && !r.isWaypoint(m.Waypoint) {
		route := r.toWaypoint(m.Waypoint, dst, WhyWorkloadWaypoint)
		return route
	}
	return r.toEndpoint(m, nil, dst.Addr(), dst.Port(), WhyWorkload)
}

// toEndpoint is the last step: the workload is chosen, how is it reached?
func (r *resolution) toEndpoint(m *member, svc *Service, addr netip.Addr, port uint16, why Reason) Route {
	app := netip.AddrPortFrom(addr, port)
	switch {
	case r.src != nil && m.UID == r.src.UID:
		return Route{Kind: RouteDirect, Dial: app, Workload: m.Workload, Why: WhyOwnPod}
	case m.Tunnel == TunnelHBONE:
		if m.want == nil {
			return Route{Workload: m.Workload, Why: WhyNoIdentity}
		}
		return Route{
			Kind: RouteHBONE, Dial: netip.AddrPortFrom(addr, HBONEPort), Authority: app,
			Want: wanted(m, svc), Workload: m.Workload, Why: why,
		}
	case m.HostNetwork:
		return Route{Kind: RouteDirect, Dial: app, Workload: m.Workload, Why: WhyHostNetwork}
	default:
		return Route{Kind: RouteDirect, Dial: app, Workload: m.Workload, Why: WhyNotCaptured}
	}
}

// wanted are the identities of which the peer must have one: the workload's, and the service's SANs.
func wanted(m *member, svc *Service) []string {
	if svc == nil || len(svc.SANs) == 0 {
		return m.want
	}
	return append(append(make([]string, 0, len(m.want)+len(svc.SANs)), m.want...), svc.SANs...)
}

// onlyNames reports whether a service has endpoints, and all of them are names.
func (s *Snapshot) onlyNames(n ServiceName) bool {
	set, ok := s.endpoints.get(n)
	return ok && !slices.ContainsFunc(set.list, func(e endpoint) bool { return len(e.Addrs) > 0 })
}

// toWaypoint goes through a gateway; the authority stays what the application asked for.
func (r *resolution) toWaypoint(g *Gateway, dst netip.AddrPort, why Reason) Route {
	port := g.HBONEPort
	if port == 0 {
		port = HBONEPort
	}
	svc, m := r.gateway(g)
	var addr netip.Addr
	if svc != nil {
		if m, port, _ = r.choose(svc, port); m == nil {
			return Route{Why: WhyWaypointMissing}
		}
		addr, _ = m.addrLike(dst.Addr())
	} else {
		if m == nil || r.excluded(m) {
			return Route{Why: WhyWaypointMissing}
		}
		addr = g.Addr.Addr
	}
	if m.Tunnel != TunnelHBONE && !m.NativeTunnel {
		return Route{Workload: m.Workload, Why: WhyWaypointNotTunnel}
	}
	if m.want == nil {
		return Route{Workload: m.Workload, Why: WhyNoIdentity}
	}
	return Route{
		Kind: RouteWaypoint, Dial: netip.AddrPortFrom(addr, port), Authority: dst,
		Want: wanted(m, svc), Workload: m.Workload, Why: why,
	}
}

// gateway finds what a Gateway names: a service, or a workload by its address, or neither.
func (r *resolution) gateway(g *Gateway) (*Service, *member) {
	if g.Service != (ServiceName{}) {
		return r.s.Service(g.Service), nil
	}
	if at, ok := r.s.vips.get(g.Addr); ok {
		return at.list[0], nil
	}
	return nil, r.s.memberAt(g.Addr)
}

// isWaypoint reports whether the client is the gateway itself, which must not be sent back to itself.
func (r *resolution) isWaypoint(g *Gateway) bool {
	if r.src == nil {
		return false
	}
	svc, m := r.gateway(g)
	if svc != nil {
		_, behind := r.src.Services[svc.Name]
		return behind
	}
	return m != nil && m.UID == r.src.UID
}

func (r *resolution) excluded(m *member) bool {
	return len(r.tried) > 0 && slices.Contains(r.tried, m.UID)
}

// choose picks an endpoint of svc for a port and the port it serves that on. The nearest group of endpoints
// that the service's locality preference knows takes the connection, within it by capacity.
func (r *resolution) choose(svc *Service, port uint16) (*member, uint16, Reason) {
	i := slices.IndexFunc(svc.Ports, func(p ServicePort) bool { return p.Port == port })
	if i < 0 {
		return nil, 0, WhyNoPort
	}
	target := svc.Ports[i].Target
	set, ok := r.s.endpoints.get(svc.Name)
	if !ok {
		return nil, 0, WhyNoEndpoint
	}
	best, weight, why := r.nearest(svc, set, port, target)
	if best < 0 {
		return nil, 0, why
	}
	n := r.number(weight)
	for i := range set.list {
		e := &set.list[i]
		if rank, _ := r.rank(svc, e, port, target); rank != best {
			continue
		}
		if n -= e.weight(); n < 0 {
			return e.member, e.target(port, target), ""
		}
	}
	return nil, 0, WhyNoEndpoint
}

// nearest is the best rank that an endpoint has, and the weight of those that have it. Where there is none, it is -1 and
// the reason that of the endpoint which came closest.
func (r *resolution) nearest(svc *Service, set *endpointSet, port, target uint16) (best, weight int, why Reason) {
	best, why = -1, WhyNoEndpoint
	for i := range set.list {
		e := &set.list[i]
		rank, reason := r.rank(svc, e, port, target)
		switch {
		case rank < 0:
			if closeness(reason) > closeness(why) {
				why = reason
			}
		case rank > best:
			best, weight = rank, e.weight()
		case rank == best:
			weight += e.weight()
		}
	}
	return best, weight, why
}

// Share is what one endpoint has of the numbers that Resolve picks from: Count of them, from First on.
type Share struct {
	First, Count int
	Workload     *Workload
	At           netip.AddrPort
}

// Shares returns from how many numbers Resolve picks one for a connection of src to a Service's own address, and which of
// them choose which endpoint. It is the same for all clients that are where src is. 0: Resolve chooses in another way,
// by the client's namespace too, or not at all.
func (s *Snapshot) Shares(src *Workload, dst netip.AddrPort) (total int, shares []Share) {
	at := NetAddr{src.Network, dst.Addr()}
	there, ok := s.vips.get(at)
	if !ok || len(there.list) != 1 || s.memberAt(at) != nil {
		return 0, nil
	}
	svc := there.list[0]
	i := slices.IndexFunc(svc.Ports, func(p ServicePort) bool { return p.Port == dst.Port() })
	set, ok := s.endpoints.get(svc.Name)
	if svc.Limited() || svc.Waypoint != nil || svc.LB.Mode == LBPassthrough || i < 0 || !ok {
		return 0, nil
	}
	r := resolution{s: s, src: src, network: src.Network}
	port, target := dst.Port(), svc.Ports[i].Target
	best, total, _ := r.nearest(svc, set, port, target)
	if best < 0 {
		return 0, nil
	}
	first := 0
	for i := range set.list {
		e := &set.list[i]
		if rank, _ := r.rank(svc, e, port, target); rank != best {
			continue
		}
		addr, _ := e.addrLike(dst.Addr())
		shares = append(shares, Share{First: first, Count: e.weight(), Workload: e.Workload, At: netip.AddrPortFrom(addr, e.target(port, target))})
		first += e.weight()
	}
	return total, shares
}

// rank says how near an endpoint is: the number of preferred scopes, from the first, that it shares with the
// client. An endpoint that cannot be used has rank -1 and a reason.
func (r *resolution) rank(svc *Service, e *endpoint, port, target uint16) (int, Reason) {
	if e.target(port, target) == 0 || len(e.Addrs) == 0 {
		return -1, WhyNoEndpoint
	}
	if e.Network != r.network {
		return -1, WhyOtherNetwork
	}
	if !e.Healthy && !svc.LB.AllowUnhealthy {
		return -1, WhyNoHealthy
	}
	rank := 0
	if svc.LB.Mode == LBStrict || svc.LB.Mode == LBFailover {
		for rank < len(svc.LB.Prefer) && r.shares(svc.LB.Prefer[rank], e.Workload) {
			rank++
		}
		if svc.LB.Mode == LBStrict && rank < len(svc.LB.Prefer) {
			return -1, WhyNoLocal
		}
	}
	if r.excluded(e.member) {
		return -1, WhyAllTried
	}
	return rank, ""
}

// closeness orders the reasons against an endpoint by how late rank gives them.
func closeness(why Reason) int {
	switch why {
	case WhyOtherNetwork:
		return 1
	case WhyNoHealthy:
		return 2
	case WhyNoLocal:
		return 3
	case WhyAllTried:
		return 4
	default:
		return 0
	}
}

// shares reports whether the client and w are in one scope. Where the client is not known they are not.
func (r *resolution) shares(scope LBScope, w *Workload) bool {
	if r.src == nil {
		return false
	}
	of := func(w *Workload) string { return scope.Of(&w.Locality, w.Node, w.Cluster, w.Network) }
	return of(r.src) == of(w)
}

func (r *resolution) number(n int) int {
	if r.pick != nil {
		return r.pick(n)
	}
	return rand.IntN(n)
}

// target is the port an endpoint serves a service port on: its own word, else the service's, else 0.
func (e *endpoint) target(port, fallback uint16) uint16 {
	for _, p := range e.ports {
		if p.Port == port && p.Target != 0 {
			return p.Target
		}
	}
	return fallback
}

func (w *Workload) weight() int {
	if w.Capacity == 0 {
		return 1
	}
	return int(w.Capacity)
}

// addrLike returns an address of the family of like, or else the first one.
func (w *Workload) addrLike(like netip.Addr) (netip.Addr, bool) {
	for _, a := range w.Addrs {
		if a.Is4() == like.Is4() {
			return a, true
		}
	}
	if len(w.Addrs) == 0 {
		return netip.Addr{}, false
	}
	return w.Addrs[0], true
}

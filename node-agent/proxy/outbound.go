package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// The stages of an outbound connection, in the order of this file:
//
//  1. serveOutbound: the client's connection has been accepted; its local address is the destination.
//  2. decide: the Snapshot says where it goes. The result is a Request; nothing has been sent yet.
//  3. connect: the Request is executed. Where that fails, another endpoint of the Service is tried.
//  4. relay, and the report when it ends.

// Request is everything that was decided about an outbound connection.
type Request struct {
	Src    netip.AddrPort // the client's own
	Dst    netip.AddrPort // what it asked for
	Client *mesh.Workload
	Drawn  int // as in Sockets
	Route  mesh.Route
}

// serveOutbound serves a connection until its end, which may come long after it has returned.
func (h *PodHandle) serveOutbound(down *netns.Sock) {
	dst, src := down.Local, down.Remote
	p := h.p
	c := &conn{dir: Outbound, pod: h}
	c.begin(ConnInfo{Pod: h.Pod().WorkloadUID, Src: src, OriginalDst: dst, Direction: Outbound})
	p.conns.register(c)
	relayed, over := false, func() { p.conns.release(c); h.over() }
	defer func() {
		if !relayed {
			over()
		}
	}()
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	c.onEnd(func() { cancel(); down.Abort() })

	if !dst.Addr().IsValid() || h.own(dst.Addr()) && agentPort(dst.Port()) {
		// Somebody in the pod dialled a port of the agent's: there is no destination to be had.
		down.Abort()
		h.refuse(Outbound, src, dst, fail(RequestInvalid, "%s is a port of the node agent", dst))
		return
	}
	req, err := h.decide(ctx, Request{Src: src, Dst: dst, Drawn: p.cfg.Sockets.Drawn(down)}, nil)
	var up net.Conn
	via := hop{addr: dst} // where it is refused before it goes anywhere
	if err == nil {
		up, via, req, err = h.connect(ctx, req)
	}
	c.setInfo(func(i *ConnInfo) { i.ActualDst, i.Protocol, i.Peer = via.addr, via.protocol(), via.peer })
	r := p.open(c, outboundKey(h.Pod().Identity, req, via), true, via.addr, via.authority)
	if err != nil {
		down.Abort()
		if ended := c.endedBy(); ended != nil {
			err = ended
		}
		r.close(err)
		return
	}
	c.onEnd(func() { reset(up); down.Abort() })
	r.established()
	st, ok := up.(*hbone.Stream)
	if !ok {
		tcp, err := down.TCPConn()
		if err != nil { // somebody has ended it
			reset(up)
			r.close(r.ended(err))
			return
		}
		c.onEnd(func() { reset(up); abort(tcp) })
		r.close(r.relay(tcp, up))
		return
	}
	tn := p.peers.carrier(st)
	if tn != nil {
		c.via.Store(tn)
		tn.conns.Add(1)
	}
	relayed = true
	hbone.RelaySocket(st, down, &c.bytes.AtoB, &c.bytes.BtoA, func(err error) {
		r.close(r.ended(err))
		if tn != nil {
			tn.conns.Add(-1)
		}
		over()
	})
}

// decide asks the Snapshot where a connection goes. It leaves out the endpoints that were tried in vain.
func (h *PodHandle) decide(ctx context.Context, req Request, tried []string) (Request, error) {
	s, client, err := h.state(ctx)
	req.Client, req.Route = client, mesh.Route{}
	if err != nil {
		return req, err
	}
	req.Route = h.p.route(s, req, tried)
	switch {
	case req.Route.Why == mesh.WhyNotInRegistry:
		return req, fail(NotInRegistry, "the mesh does not know %s, and pods may reach only what it knows (outboundTrafficPolicy REGISTRY_ONLY): declare it by a ServiceEntry", req.Dst)
	case req.Route.Kind == mesh.RouteRefuse:
		return req, fail(RouteRefused, "no route to %s: %s", req.Dst, req.Route.Why)
	}
	return req, nil
}

// hop is the way a connection took.
type hop struct {
	addr      netip.AddrPort
	authority string
	peer      mesh.Identity
	mtls      bool
}

func (v hop) protocol() string {
	if v.mtls {
		return "HBONE"
	}
	return "TCP"
}

// connect executes req, and where that fails before any byte was sent, what is decided without the endpoint
// that failed. The Request it returns is the last one tried.
func (h *PodHandle) connect(ctx context.Context, req Request) (net.Conn, hop, Request, error) {
	var tried []string
	for attempt := 1; ; attempt++ {
		up, via, err := h.attempt(ctx, req, tried, attempt == h.p.cfg.Attempts)
		if ctx.Err() == nil {
			h.p.judge(req.Route.Workload, err)
		}
		if err == nil || ctx.Err() != nil {
			return up, via, req, err
		}
		again, other := interrupted(err), another(req.Route, err)
		if !again && !other {
			return nil, via, req, err
		}
		if attempt == h.p.cfg.Attempts {
			h.p.metrics.failover(false)
			return nil, via, req, err
		}
		if other {
			tried = append(tried, req.Route.Workload.UID)
			next, none := h.decide(ctx, req, tried)
			if none == nil {
				h.p.metrics.failover(true)
				req = next
				continue
			}
		}
		if !again {
			h.p.metrics.failover(false)
			return nil, via, req, err // the first failure says more than that nothing else is there
		}
		// The peer's agent is being replaced: its successor has the same listener.
		h.p.metrics.failover(true)
		select {
		case <-ctx.Done():
			return nil, via, req, err
		case <-time.After(time.Duration(attempt) * 20 * time.Millisecond):
		}
	}
}

// attempt executes req, and gives up early where there is another endpoint that nobody suspects. The last one
// is patient: where a whole node's agent is away for a while, connections wait.
func (h *PodHandle) attempt(ctx context.Context, req Request, tried []string, last bool) (net.Conn, hop, error) {
	if last || req.Route.Service == nil || req.Route.Workload == nil {
		return h.execute(ctx, req)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	impatience := time.AfterFunc(patience, func() {
		without := slices.Concat(tried, []string{req.Route.Workload.UID}, h.p.suspects.list())
		if r := h.p.store.Load().ResolveExcluding(req.Client, req.Dst, without, nil); r.Kind != mesh.RouteRefuse {
			cancel(errImpatient)
		}
	})
	defer impatience.Stop()
	up, via, err := h.execute(ctx, req)
	if err != nil && context.Cause(ctx) == errImpatient {
		err = fail(PeerUnreachable, "%s: %w after %s", via.addr, errImpatient, patience)
	}
	return up, via, err
}

// interrupted reports whether the tunnel ended under a request that nobody had answered: the same endpoint may
// be tried again.
func interrupted(err error) bool {
	var open *hbone.OpenError
	return errors.As(err, &open) && open.Status == 0 && outcomeOf(err, PeerUnreachable) == TunnelFailed
}

// another reports whether another endpoint may be tried after err: where the application chose a Service and
// not an endpoint, and nobody has said no.
func another(r mesh.Route, err error) bool {
	if r.Service == nil || r.Workload == nil {
		return false
	}
	var open *hbone.OpenError
	if errors.As(err, &open) {
		return open.Retryable()
	}
	return outcomeOf(err, PeerUnreachable) == PeerUnreachable
}

func (h *PodHandle) execute(ctx context.Context, req Request) (net.Conn, hop, error) {
	r := req.Route
	switch r.Kind {
	case mesh.RoutePassthrough, mesh.RouteDirect:
		up, err := h.dial(ctx, r.Dial)
		if err != nil {
			return nil, hop{addr: r.Dial}, err
		}
		return up, hop{addr: r.Dial}, nil
	case mesh.RouteHBONE, mesh.RouteWaypoint:
		return h.tunnel(ctx, req)
	default:
		return nil, hop{addr: r.Dial}, fail(RouteRefused, "no way to take route kind %d", r.Kind)
	}
}

func (h *PodHandle) tunnel(ctx context.Context, req Request) (net.Conn, hop, error) {
	r := req.Route
	via := hop{addr: r.Dial, authority: r.Authority.String(), mtls: true}
	if r.Workload != nil {
		via.peer = r.Workload.Identity
	}
	fwd := hbone.Forwarded{For: req.Src}
	if r.Service != nil {
		fwd.Host = r.Service.Name.Hostname
	}
	st, _, err := h.p.pool.Open(ctx,
		hbone.Key{Src: h.Pod().Identity, Want: hbone.WantKey(r.Want), Addr: r.Dial, SrcIP: req.Src.Addr(), Pod: h.Pod().UID},
		hbone.Request{Authority: via.authority, Header: hbone.Header{
			{Name: hbone.HeaderBaggage, Value: baggage(req.Client)},
			{Name: hbone.HeaderForwarded, Value: fwd.String()},
		}})
	if err != nil {
		return nil, via, tunnelFailure(err)
	}
	return st, via, nil
}

// tunnelFailure gives a failure to open a stream its outcome.
func tunnelFailure(err error) error {
	var known *failure
	if errors.As(err, &known) {
		return &failure{outcome: known.outcome, err: err}
	}
	o := TunnelFailed
	var open *hbone.OpenError
	if errors.As(err, &open) {
		switch {
		case open.Status == 401 || open.Status == 403:
			o = PolicyDenied
		case open.Status >= 500:
			o = AppRefused
		case open.Status >= 400:
			o = RequestInvalid
		}
	}
	return &failure{outcome: o, err: err}
}

func outboundKey(id mesh.Identity, req Request, via hop) seriesKey {
	k := seriesKey{dir: Outbound, src: req.Client, dst: req.Route.Workload, service: req.Route.Service, mtls: via.mtls}
	if via.mtls {
		k.peer = id
	}
	return k
}

var workloadKinds = map[mesh.WorkloadKind]string{
	mesh.KindDeployment: "deployment", mesh.KindCronJob: "cronjob", mesh.KindPod: "pod", mesh.KindJob: "job",
}

// baggage says who a workload is, for the peer's telemetry.
func baggage(w *mesh.Workload) string {
	b := hbone.Baggage{
		Cluster: w.Cluster, Namespace: w.Namespace, WorkloadKind: workloadKinds[w.Kind], Workload: w.WorkloadName,
		Service: w.CanonicalName, Version: w.CanonicalRevision, Region: w.Locality.Region, Zone: w.Locality.Zone,
	}
	if b.Workload == "" {
		b.WorkloadKind = ""
	}
	return b.String()
}

// own reports whether an address is one of the pod's.
func (h *PodHandle) own(a netip.Addr) bool {
	for _, x := range h.Pod().Addrs {
		if x == a {
			return true
		}
	}
	return false
}

// agentPort reports whether a port of a pod belongs to the node agent.
func agentPort(p uint16) bool { return p == OutboundPort || p == PlaintextPort || p == HBONEPort }

// maxErrorLog is what is logged of an error: some of it may be a peer's words.
const maxErrorLog = 1000

// fold shortens an error to one line that is not too long.
func fold(s string) string {
	if len(s) > maxErrorLog {
		s = strings.ToValidUTF8(s[:maxErrorLog], "") + "…"
	}
	return strings.ReplaceAll(s, "\n", "; ")
}

package proxy

import (
	"net/netip"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Flow is a connection that the kernel decided about without the agent: one between two pods of this node, or one
// in plaintext that it refused.
type Flow struct {
	Client, Server       netip.AddrPort // the client's port is 0 where the connection was refused before it had one
	ClientPod, ServerPod string         // Kubernetes' uid; ClientPod is empty for a client from elsewhere
	Source               mesh.Identity  // asserted by the kernel; zero for plaintext from elsewhere
}

// flow is an open Flow as each of its two ends reports it.
type flow struct {
	out, in *report
}

// flowKey names an open flow: no two have both ends in common.
type flowKey struct{ client, server netip.AddrPort }

// FlowOpened reports a connection that the kernel carries. As the agent has no part in it, and nothing encrypts it,
// connection_security_policy is "unknown", as for plaintext; source_principal is the identity that the kernel asserts,
// which policies were evaluated for. Its bytes are counted when it ends.
func (p *Proxy) FlowOpened(f Flow, at time.Time) {
	x := p.flow(f, at)
	if x == nil {
		return
	}
	p.flowsMu.Lock()
	old := p.flows[flowKey{f.Client, f.Server}]
	p.flows[flowKey{f.Client, f.Server}] = x
	p.flowsMu.Unlock()
	if old != nil { // its end was not told: events can be lost
		old.close(nil)
	}
}

// FlowClosed reports its end. sent and received are bytes as the client sees them.
func (p *Proxy) FlowClosed(f Flow, opened time.Time, sent, received uint64) {
	p.flowsMu.Lock()
	x := p.flows[flowKey{f.Client, f.Server}]
	delete(p.flows, flowKey{f.Client, f.Server})
	p.flowsMu.Unlock()
	if x == nil { // opened before this agent, or the event of it was lost
		if x = p.flow(f, opened); x == nil {
			return
		}
	}
	for _, r := range x.both() {
		r.c.bytes.AtoB.Store(int64(sent))
		r.c.bytes.BtoA.Store(int64(received))
	}
	var err error
	if v := p.authorizeFlow(f); v.Why != mesh.WhyNoWorkload && !v.Allow {
		err = fail(PolicyRevoked, "a policy change ended the connection: %s", denial(v))
	}
	x.close(err)
}

// FlowDenied reports a connection that the kernel refused.
func (p *Proxy) FlowDenied(f Flow, at time.Time, v mesh.Verdict) {
	if x := p.flow(f, at); x != nil {
		x.close(fail(PolicyDenied, "%s", denial(v)))
	}
}

// flow begins the reports of both ends, those of which are pods of this node. It is nil where neither is any more.
func (p *Proxy) flow(f Flow, at time.Time) *flow {
	s := p.store.Load()
	client, server := p.podByUID(f.ClientPod), p.podByUID(f.ServerPod)
	workload := func(h *PodHandle) *mesh.Workload {
		if h == nil {
			return nil
		}
		return s.Workload(h.Pod().WorkloadUID)
	}
	src, dst := workload(client), workload(server)
	if src == nil && server != nil {
		src = s.WorkloadAt(mesh.NetAddr{Network: server.Pod().Network, Addr: f.Client.Addr()})
	}
	key := seriesKey{src: src, dst: dst, service: serviceOf(s, dst, f.Server.Port(), ""), peer: f.Source}
	begin := func(h *PodHandle, dir Direction) *report {
		if h == nil {
			return nil
		}
		c := &conn{dir: dir, pod: h}
		c.begin(ConnInfo{Direction: dir, Pod: h.Pod().WorkloadUID, Src: f.Client, OriginalDst: f.Server, ActualDst: f.Server, Protocol: "TCP", Peer: f.Source})
		c.start = at
		k := key
		k.dir = dir
		r := p.open(c, k, true, f.Server, "")
		r.kernel = true
		return r
	}
	x := &flow{out: begin(client, Outbound), in: begin(server, Inbound)}
	if x.out == nil && x.in == nil {
		return nil
	}
	if x.in != nil && dst != nil {
		p.note(x.in.c, p.authorizeFlow(f))
	}
	return x
}

// authorizeFlow is what policies say about a flow now, AUDIT and dry runs included.
func (p *Proxy) authorizeFlow(f Flow) mesh.Verdict {
	h := p.podByUID(f.ServerPod)
	if h == nil {
		return mesh.Verdict{Why: mesh.WhyNoWorkload}
	}
	s := p.store.Load()
	return s.Authorize(mesh.Conn{Source: f.Source, SourceIP: f.Client.Addr(), Dst: f.Server, Plaintext: f.Source.IsZero(),
		DstWorkload: s.Workload(h.Pod().WorkloadUID)})
}

func (x *flow) both() []*report {
	var out []*report
	for _, r := range [2]*report{x.out, x.in} {
		if r != nil {
			out = append(out, r)
		}
	}
	return out
}

func (x *flow) close(err error) {
	for _, r := range x.both() {
		r.close(err)
	}
}

// forgetFlows ends the reports of a pod's flows: it is gone, and their ends may not have been told.
func (p *Proxy) forgetFlows(h *PodHandle) {
	p.flowsMu.Lock()
	var left []*flow
	for k, x := range p.flows {
		for _, r := range x.both() {
			if r.c.pod == h {
				left = append(left, x)
				delete(p.flows, k)
				break
			}
		}
	}
	p.flowsMu.Unlock()
	for _, x := range left {
		x.close(nil)
	}
}

// Flows returns how many connections are open that the kernel carries, as far as their beginnings were told.
func (p *Proxy) Flows() int {
	p.flowsMu.Lock()
	defer p.flowsMu.Unlock()
	return len(p.flows)
}

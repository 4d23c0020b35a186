package proxy

import (
	"cmp"
	"errors"
	"net/netip"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
)

// Flow is a connection that the kernel decided about without the agent: one between two pods of this node, or one
// in plaintext that it refused.
type Flow struct {
	Client, Server       netip.AddrPort // the client's port is 0 where the connection was refused before it had one
	Service              netip.AddrPort // of the Service that the client asked for; zero: of the server itself
	ClientPod, ServerPod string         // Kubernetes' uid; ClientPod is empty for a client from elsewhere
	Source               mesh.Identity  // asserted by the kernel; zero for plaintext from elsewhere
}

// flow is an open Flow as each of its two ends reports it.
type flow struct {
	out, in *report
	allowed uint64 // revision of the state that allows it, 0: not asked
}

// flowKey names an open flow: no two have both ends in common.
type flowKey struct{ client, server netip.AddrPort }

// FlowOpened reports a connection that the kernel carries. As the agent has no part in it, and nothing encrypts it,
// connection_security_policy is "unknown", as for plaintext; source_principal is the identity that the kernel asserts,
// which policies were evaluated for. Its bytes are counted by MeasureFlows and when it ends.
func (p *Proxy) FlowOpened(f Flow, at time.Time) {
	x := p.flow(f, at)
	if x == nil {
		return
	}
	for r := range x.both {
		r.established()
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
	for r := range x.both {
		r.c.bytes.AtoB.Store(int64(sent))
		r.c.bytes.BtoA.Store(int64(received))
	}
	var err error
	if s := p.store.Load(); x.allowed == 0 || x.allowed != s.Revision() {
		if v := p.authorizeFlow(s, f); v.Why != mesh.WhyNoWorkload && !v.Allow {
			err = fail(PolicyRevoked, "a policy change ended the connection: %s", denial(v))
		}
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
	key := seriesKey{src: src, dst: dst, peer: f.Source}
	asked := f.Server
	if f.Service.IsValid() {
		asked = f.Service
		if h := cmp.Or(client, server); h != nil {
			key.service = s.ServiceAt(mesh.NetAddr{Network: h.Pod().Network, Addr: f.Service.Addr()})
		}
	} else {
		key.service = serviceOf(s, dst, f.Server.Port(), "")
	}
	begin := func(h *PodHandle, dir Direction, asked netip.AddrPort) *report {
		if h == nil {
			return nil
		}
		c := &conn{dir: dir, pod: h}
		c.begin(ConnInfo{Direction: dir, Pod: h.Pod().WorkloadUID, Src: f.Client, OriginalDst: asked, ActualDst: f.Server, Protocol: "TCP", Peer: f.Source})
		c.start = at
		k := key
		k.dir = dir
		r := p.open(c, k, true, f.Server, "")
		r.kernel = true
		return r
	}
	x := &flow{out: begin(client, Outbound, asked), in: begin(server, Inbound, f.Server)}
	if x.out == nil && x.in == nil {
		return nil
	}
	if x.in != nil && dst != nil {
		v := p.authorizeFlow(s, f)
		if p.note(x.in.c, v); v.Allow {
			x.allowed = s.Revision()
		}
	}
	return x
}

// authorizeFlow is what policies say about a flow, AUDIT and dry runs included.
func (p *Proxy) authorizeFlow(s *mesh.Snapshot, f Flow) mesh.Verdict {
	h := p.podByUID(f.ServerPod)
	if h == nil {
		return mesh.Verdict{Why: mesh.WhyNoWorkload}
	}
	return s.Authorize(mesh.Conn{Source: f.Source, SourceIP: f.Client.Addr(), Dst: f.Server, Plaintext: f.Source.IsZero(),
		DstWorkload: s.Workload(h.Pod().WorkloadUID)})
}

// both yields the reports that there are.
func (x *flow) both(yield func(*report) bool) {
	if x.out != nil && !yield(x.out) {
		return
	}
	if x.in != nil {
		yield(x.in)
	}
}

func (x *flow) close(err error) {
	for r := range x.both {
		r.close(err)
	}
}

// forgetFlows ends the reports of a pod's flows: it is gone, and their ends may not have been told.
func (p *Proxy) forgetFlows(h *PodHandle) {
	p.flowsMu.Lock()
	var left []*flow
	for k, x := range p.flows {
		for r := range x.both {
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

// MeasureFlows counts what the connections have carried until now that the kernel carries: they may last for days,
// and their metrics do not wait.
func (p *Proxy) MeasureFlows() error {
	type open struct {
		key flowKey
		*flow
	}
	byServer := map[*PodHandle][]open{}
	p.flowsMu.Lock()
	for k, x := range p.flows {
		if x.in != nil {
			byServer[x.in.c.pod] = append(byServer[x.in.c.pod], open{k, x})
		}
	}
	p.flowsMu.Unlock()
	var errs []error
	for h, flows := range byServer {
		carried, err := traffic(h.Pod().NetNS)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		p.flowsMu.Lock()
		for _, f := range flows {
			s, ok := carried[f.key]
			if !ok || p.flows[f.key] != f.flow {
				continue
			}
			for r := range f.both {
				r.c.bytes.AtoB.Store(int64(s.Received))
				r.c.bytes.BtoA.Store(int64(s.Acked))
			}
		}
		p.flowsMu.Unlock()
	}
	return errors.Join(errs...)
}

// traffic is what the connections of a namespace's servers have carried. The kernel counts a FIN as a byte, the peer's
// once it has come and its own once that is acknowledged: the state says which.
func traffic(ns *netns.Handle) (map[flowKey]netns.TCPSocket, error) {
	d, err := netns.OpenDiag(ns)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	socks, err := d.ListTraffic(netns.Carrying | 1<<netns.TCPLastAck | 1<<netns.TCPClosing)
	if err != nil {
		return nil, err
	}
	out := make(map[flowKey]netns.TCPSocket, len(socks))
	for _, s := range socks {
		switch s.State {
		case netns.TCPCloseWait, netns.TCPLastAck, netns.TCPClosing:
			s.Received--
		case netns.TCPFinWait2:
			s.Acked--
		}
		out[flowKey{client: s.Remote, server: s.Local}] = s
	}
	return out, nil
}

// Flows returns how many connections are open that the kernel carries, as far as their beginnings were told.
func (p *Proxy) Flows() int {
	p.flowsMu.Lock()
	defer p.flowsMu.Unlock()
	return len(p.flows)
}

package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// The stages of an inbound connection, in the order of this file:
//
//  1. serveTunnel: TLS with the peer, under the pod's certificate; then HTTP/2.
//  2. serveStream: one CONNECT. What is wrong with the request itself is a 400.
//  3. admit: register, authorize (401), connect to the application (503).
//  4. 200, relay, and the report when it ends.

const forever = 10 * 365 * 24 * time.Hour

// serveTunnel serves one tunnel connection.
func (h *PodHandle) serveTunnel(raw *net.TCPConn) {
	p := h.p
	local, remote := ends(raw)
	raw.SetKeepAliveConfig(keepAlive)
	ctx, cancel := context.WithTimeout(p.ctx, p.cfg.HandshakeTimeout)
	defer cancel()
	bundle, err := p.cfg.Certs.Bundle(ctx, h.Pod().Identity)
	if err != nil {
		abort(raw)
		h.refuse(Inbound, remote, local, fail(IdentityUnavailable, "certificate of %s: %w", h.Pod().Identity, err))
		return
	}
	p.shaking.begin(remote.Addr(), raw)
	tc := hbone.TLSServer(raw, bundle.ServerTLS(identity.Peers{TrustDomains: p.trustDomains(bundle)}))
	err = tc.HandshakeContext(ctx)
	if !p.shaking.end(remote.Addr(), raw) {
		err = errManyHandshakes
	}
	if err != nil {
		abort(raw)
		p.metrics.peerRefused(Inbound, identity.Reason(err))
		h.refuse(Inbound, remote, local, fail(TLSFailed, "TLS with %s: %w", remote, err))
		return
	}
	peer, err := identity.PeerIdentity(tc.ConnectionState())
	if err != nil {
		abort(raw)
		h.refuse(Inbound, remote, local, fail(TLSFailed, "identity of %s: %w", remote, err))
		return
	}
	cancel()
	if left := p.penalty.left(party{peer, remote.Addr()}, time.Now()); left > 0 {
		abort(raw)
		h.refuse(Inbound, remote, local, fail(PeerUntrusted, "%s was cut off for a flood of frames, and may come again in %s", peer, left.Round(time.Millisecond)))
		return
	}
	accepting, retire := context.WithCancel(h.accepting)
	defer retire()
	tn := &tunnel{dir: Inbound, own: h.Pod().Identity, party: party{peer, remote.Addr()}, tls: tc, retire: retire}
	defer p.peers.remove(tn, tc)
	if err := p.enter(tn, tc, bundle); err != nil {
		abort(raw)
		p.metrics.peerRefused(Inbound, identity.Reason(err))
		h.refuse(Inbound, remote, local, fail(TLSFailed, "TLS with %s: %w", remote, err))
		return
	}
	err = hbone.Serve(accepting, tc, hbone.ServerConfig{
		DrainTimeout: forever, // Proxy.Close and PodHandle.Close say when open streams end
		MaxFrame:     p.cfg.MaxFrame,
		Memory:       p.memory,
		Loops:        p.loops,
		Workers:      &p.workers,
		Handler: func(ctx context.Context, s *hbone.ServerStream) {
			n := h.open.Add(1)
			if n > int64(p.cfg.MaxConns) {
				s.Reject(503)
				h.refuse(Inbound, remote, local, fail(Overloaded, "the pod has %d connections", n))
				h.open.Add(-1)
				return
			}
			h.serveStream(ctx, s, tn, remote, local)
		},
	})
	if hbone.Flooded(err) {
		p.penalty.impose(tn.party, time.Now())
		h.refuse(Inbound, remote, local, fail(PeerUntrusted, "%s was cut off: %w", peer, err))
	} else if err != nil && !errors.Is(err, io.EOF) {
		p.log.Debug("tunnel ended", "peer", remote, "identity", peer, "error", err)
	}
}

// trustDomains are those whose identities may come in: the mesh's, and before that is known the pod's own.
func (p *Proxy) trustDomains(b *identity.Bundle) []string {
	cfg := p.store.Load().Config()
	if cfg.TrustDomain == "" {
		return []string{b.ID.TrustDomain}
	}
	return cfg.TrustDomains()
}

// serveStream serves one CONNECT of a peer, which is one less in open when it has ended: that may be long after it has returned.
func (h *PodHandle) serveStream(ctx context.Context, st *hbone.ServerStream, tn *tunnel, remote, local netip.AddrPort) {
	relayed, over := false, func() { h.open.Add(-1) }
	defer func() {
		if !relayed {
			over()
		}
	}()
	p, peer := h.p, tn.party.id
	app, err := h.target(st.Request)
	if err != nil {
		if m := st.Request.Method; m == "" || m == "CONNECT" {
			st.Reject(400)
		} else {
			st.Reply(400, []byte(err.Error()+"\n"), hbone.Field{Name: "content-type", Value: "text/plain"})
		}
		h.refuse(Inbound, remote, local, err)
		return
	}
	s, dst, err := h.state(ctx)
	if err != nil {
		st.Reject(503)
		h.refuse(Inbound, remote, local, err)
		return
	}
	fwd, _ := hbone.ParseForwarded(st.Request.Header.Get(hbone.HeaderForwarded))
	// The address is the one that TLS was spoken with; the header only adds the port.
	client := netip.AddrPortFrom(remote.Addr(), 0)
	if fwd.For.Addr().Unmap() == remote.Addr() {
		client = netip.AddrPortFrom(remote.Addr(), fwd.For.Port())
	}
	c := &conn{dir: Inbound, pod: h, auth: mesh.Conn{Source: peer, SourceIP: client.Addr(), Dst: app, DstWorkload: dst}}
	c.begin(ConnInfo{Direction: Inbound, Pod: h.Pod().WorkloadUID, Src: client, OriginalDst: local, ActualDst: app, Protocol: "HBONE", Peer: peer})
	c.via.Store(tn)
	p.conns.register(c)
	over = func() { p.conns.release(c); h.open.Add(-1) }
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c.onEnd(cancel)

	src, shared := h.source(s, client.Addr(), peer, st.Request.Header.Get(hbone.HeaderBaggage))
	key := seriesKey{dir: Inbound, src: src, dst: dst, service: serviceOf(s, dst, app.Port(), fwd.Host), peer: peer, mtls: true}
	r := p.open(c, key, shared, local, st.Request.Authority)
	up, err := h.admit(ctx, c, client, app)
	if err != nil {
		st.Reject(status(err))
		r.close(err)
		return
	}
	down, err := st.Accept(hbone.Field{Name: hbone.HeaderBaggage, Value: baggage(dst)})
	if err != nil {
		up.Abort()
		r.close(fail(TunnelFailed, "answer the peer: %w", err))
		return
	}
	c.onEnd(func() { down.Reset(); up.Abort() })
	r.established()
	relayed = true
	hbone.RelaySocket(down, up, &c.bytes.BtoA, &c.bytes.AtoB, func(err error) {
		r.close(r.ended(err))
		over()
	})
}

// target is the address that a CONNECT asks for. It has to be one of the pod's, and no port of the agent's:
// a tunnel is a way to a pod, not out of it.
func (h *PodHandle) target(r hbone.Request) (netip.AddrPort, error) {
	if r.Method != "" && r.Method != "CONNECT" {
		return netip.AddrPort{}, fail(RequestInvalid, "method %q instead of CONNECT", r.Method)
	}
	ap, err := netip.ParseAddrPort(r.Authority)
	if err != nil {
		return netip.AddrPort{}, fail(RequestInvalid, "authority %q is not an address and port", r.Authority)
	}
	if a := ap.Addr(); a.Zone() != "" || a.Is4In6() || !h.own(a) {
		return netip.AddrPort{}, fail(RequestInvalid, "authority %s is not an address of this pod", ap)
	}
	if ap.Port() == 0 || agentPort(ap.Port()) {
		return netip.AddrPort{}, fail(RequestInvalid, "authority %s has a port that no application may have", ap)
	}
	return ap, nil
}

// source is the workload at the other end, for telemetry: the one that has the address, if it has the
// identity that the peer proved, or else what the peer says about itself, under the identity it proved.
// shared says that it is the Snapshot's.
func (h *PodHandle) source(s *mesh.Snapshot, a netip.Addr, peer mesh.Identity, header string) (_ *mesh.Workload, shared bool) {
	if w := s.WorkloadAt(mesh.NetAddr{Network: h.Pod().Network, Addr: a}); w != nil && w.Identity == peer {
		return w, true
	}
	b, err := hbone.ParseBaggage(header)
	if err != nil {
		b = hbone.Baggage{}
	}
	return &mesh.Workload{Namespace: peer.Namespace, Cluster: b.Cluster, WorkloadName: b.Workload,
		CanonicalName: b.Service, CanonicalRevision: b.Version}, false
}

// admit decides about a registered connection and connects it to the application. The error is what ended
// it, be it meanwhile by end.
func (h *PodHandle) admit(ctx context.Context, c *conn, client, app netip.AddrPort) (*netns.Sock, error) {
	s := h.p.store.Load()
	v := c.authorize(s)
	h.p.note(c, v)
	if !v.Allow {
		return nil, fail(PolicyDenied, "%s", denial(v))
	}
	if c.auth.Plaintext {
		h.p.noteException(c, s)
	}
	up, err := h.dialApp(ctx, client, app)
	if ended := c.endedBy(); ended != nil {
		if err == nil {
			up.Abort()
		}
		return nil, ended
	}
	return up, err
}

// status is the answer to a CONNECT that failed.
func status(err error) int {
	switch outcomeOf(err, AppRefused) {
	case PolicyDenied, PolicyRevoked, PeerUntrusted:
		return 401
	case RequestInvalid:
		return 400
	default:
		return 503
	}
}

// serviceOf is the Service through which a connection came, as far as that can be known: the one the client
// named, or the only one of the workload that leads to the port.
func serviceOf(s *mesh.Snapshot, w *mesh.Workload, port uint16, named string) *mesh.Service {
	if w == nil {
		return nil
	}
	var only *mesh.Service
	n := 0
	for name, ports := range w.Services {
		if named != "" && name.Hostname != named {
			continue
		}
		for _, p := range ports {
			if p.Target == port {
				if svc := s.Service(name); svc != nil {
					only = svc
					n++
				}
				break
			}
		}
	}
	if n == 1 {
		return only
	}
	return nil
}

// relay copies until both directions have ended and returns what ended it, nil for an orderly end.
func (r *report) relay(down, up net.Conn) error {
	return r.ended(hbone.Relay(down, up, &r.c.bytes))
}

// ended is what the end of a relay was, nil for an orderly end.
func (r *report) ended(err error) error {
	if ended := r.c.endedBy(); ended != nil {
		return ended
	}
	if err != nil {
		return &failure{outcome: Reset, err: err}
	}
	return nil
}

// reset closes any kind of upstream connection hard.
func reset(c net.Conn) {
	switch c := c.(type) {
	case *net.TCPConn:
		abort(c)
	case interface{ Reset() }:
		c.Reset()
	default:
		c.Close()
	}
}

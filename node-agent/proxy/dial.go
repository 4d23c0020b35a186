package proxy

import (
	"context"
	"net"
	"net/netip"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// Sockets makes the agent's sockets inside a pod's network namespace; *datapath.Datapath implements it.
type Sockets interface {
	// Dial connects to dst as the pod would, without being captured.
	Dial(ctx context.Context, ns *netns.Handle, dst netip.AddrPort) (*net.TCPConn, error)
	// DialInbound connects to the pod's own application and shows it src as the peer. Port 0 lets the kernel choose.
	DialInbound(ctx context.Context, ns *netns.Handle, src, dst netip.AddrPort) (*netns.Sock, error)
	// Drawn is one more than the number by which the kernel has chosen an endpoint of a Service for a captured
	// connection, 0 if it has not.
	Drawn(s *netns.Sock) int
}

func (h *PodHandle) dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, h.p.cfg.ConnectTimeout)
	defer cancel()
	c, err := h.p.cfg.Sockets.Dial(ctx, h.Pod().NetNS, to)
	if err != nil {
		return nil, fail(PeerUnreachable, "connect to %s: %w", to, err)
	}
	c.SetKeepAliveConfig(keepAlive)
	return c, nil
}

// dialApp connects to the pod's own application as if client did. No probes keep the connection alive: both its ends are
// in this kernel, and one that is gone has said so.
func (h *PodHandle) dialApp(ctx context.Context, client, app netip.AddrPort) (*netns.Sock, error) {
	if client.Addr().Is4() != app.Addr().Is4() {
		return nil, fail(AppRefused, "client %s and application %s are not of one address family", client, app)
	}
	ctx, cancel := context.WithTimeout(ctx, h.p.cfg.ConnectTimeout)
	defer cancel()
	c, err := h.p.cfg.Sockets.DialInbound(ctx, h.Pod().NetNS, client, app)
	if err != nil {
		return nil, fail(AppRefused, "connect to the application at %s: %w", app, err)
	}
	return c, nil
}

// dialTunnel makes a tunnel connection for the pool: TCP from the source pod's namespace, then TLS under its
// identity, with a peer that proves one of the wanted identities.
func (p *Proxy) dialTunnel(ctx context.Context, k hbone.Key) (net.Conn, error) {
	h := p.podByUID(k.Pod)
	if h == nil {
		return nil, fail(SourceUnknown, "pod %s is not served any more", k.Pod)
	}
	bundle, err := p.cfg.Certs.Bundle(ctx, k.Src)
	if err != nil {
		return nil, fail(IdentityUnavailable, "certificate of %s: %w", k.Src, err)
	}
	c, err := h.dial(ctx, k.Addr)
	if err != nil {
		return nil, err
	}
	hctx, cancel := context.WithTimeout(ctx, p.cfg.HandshakeTimeout)
	defer cancel()
	tc := hbone.TLSClient(c, bundle.ClientTLS(k.Wanted()))
	if err := tc.HandshakeContext(hctx); err != nil {
		abort(c)
		p.metrics.peerRefused(Outbound, identity.Reason(err))
		return nil, fail(TLSFailed, "TLS with %s: %w", k.Addr, err)
	}
	peer, err := identity.PeerIdentity(tc.ConnectionState())
	if err != nil {
		abort(c)
		return nil, fail(TLSFailed, "identity of %s: %w", k.Addr, err)
	}
	tn := &tunnel{dir: Outbound, own: k.Src, party: party{peer, k.Addr.Addr()}, key: k, tls: tc}
	if err := p.enter(tn, tc, bundle); err != nil { // the pool tells of connections that it has had only
		p.peers.remove(tn, tc)
		abort(c)
		return nil, fail(TLSFailed, "%s: %w", k.Addr, err)
	}
	return tc, nil
}

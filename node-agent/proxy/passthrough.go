package proxy

import (
	"context"
	"net"
	"net/netip"

	"github.com/warrenmesh/warren/internal/mesh"
)

// servePlaintext serves a connection that reached the pod outside the tunnel. Nothing is known about who
// sent it but its address: policies that need an identity, STRICT among them, do not let it in.
func (h *PodHandle) servePlaintext(down *net.TCPConn) {
	app, client := ends(down)
	p := h.p
	if !h.own(app.Addr()) || agentPort(app.Port()) {
		abort(down)
		h.refuse(Inbound, client, app, fail(RequestInvalid, "%s is not an address of the pod that a client may ask for", app))
		return
	}
	s, dst, err := h.state(p.ctx)
	if err != nil {
		abort(down)
		h.refuse(Inbound, client, app, err)
		return
	}
	c := &conn{dir: Inbound, pod: h, auth: mesh.Conn{SourceIP: client.Addr(), Dst: app, DstWorkload: dst, Plaintext: true}}
	c.begin(ConnInfo{Direction: Inbound, Pod: h.Pod().WorkloadUID, Src: client, OriginalDst: app, ActualDst: app, Protocol: "TCP"})
	p.conns.register(c)
	defer p.conns.release(c)
	ctx, cancel := context.WithCancel(p.ctx)
	defer cancel()
	c.onEnd(func() { cancel(); abort(down) })

	key := seriesKey{dir: Inbound, src: s.WorkloadAt(mesh.NetAddr{Network: h.Pod().Network, Addr: client.Addr()}), dst: dst,
		service: serviceOf(s, dst, app.Port(), "")}
	r := p.open(c, key, true, app, "")
	sock, err := h.admit(ctx, c, netip.AddrPortFrom(client.Addr(), 0), app)
	var up *net.TCPConn
	if err == nil {
		up, err = sock.TCPConn()
	}
	if err != nil {
		abort(down)
		r.close(err)
		return
	}
	c.onEnd(func() { abort(up); abort(down) })
	r.established()
	r.close(r.relay(down, up))
}

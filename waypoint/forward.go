package waypoint

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	proxyprotocolv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/proxy_protocol/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What a DestinationRule has connections begin with: a question to a proxy for the server that it is to bring them to, and a line that
// tells the client's address. Where a gateway sends by a service's waypoint, the waypoint does it.

// last reports whether what is sent to a service goes to its endpoints from here.
func (b *builder) last(t target) bool {
	svc := b.lookup(t.service)
	return svc == nil || !b.goesThrough(svc)
}

// asks is the proxy that connections to a target go by, nil for none. To is empty where it cannot be asked: a proxy that is asked by POST in
// HTTP/1.1, and ends its answer before the client has ended what it sends, has Envoy 1.40 end by a segmentation fault.
func (b *builder) asks(t target) *mesh.Forward {
	if t.http || !b.last(t) {
		return nil
	}
	f := b.traffic(t).Forward
	if f != nil && f.Post && !b.http2(t) {
		return &mesh.Forward{}
	}
	return f
}

// sameForward reports whether the second is to be asked for what the first is, and can be.
func sameForward(f, o *mesh.Forward) bool {
	return f == nil && o == nil || f != nil && o != nil && *f == *o && f.To != ""
}

// ask has connections ask the proxies that they go to for a server.
func ask(p *tcpproxyv3.TcpProxy, f *mesh.Forward) {
	if f != nil && f.To != "" {
		p.TunnelingConfig = &tcpproxyv3.TcpProxy_TunnelingConfig{Hostname: f.To, UsePost: f.Post}
	}
}

// proxied has the client's address told to endpoints before anything else is, TLS included.
func (b *builder) proxied(t target, inner *corev3.TransportSocket) *corev3.TransportSocket {
	version := b.traffic(t).Proxied
	if version == 0 || !b.last(t) {
		return inner
	}
	return b.transport("envoy.transport_sockets.upstream_proxy_protocol", &proxyprotocolv3.ProxyProtocolUpstreamTransport{
		Config: &corev3.ProxyProtocolConfig{Version: corev3.ProxyProtocolConfig_Version(version - 1)}, TransportSocket: inner,
	})
}

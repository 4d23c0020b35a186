package proxy

import (
	"context"
	"log/slog"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// DatagramDenied logs a UDP datagram that the kernel dropped by policy: it is of no connection, and in no metric of
// connections. The kernel counts them all (udp_denied) and tells of some.
func (p *Proxy) DatagramDenied(f Flow, at time.Time, v mesh.Verdict) {
	ctx := context.Background()
	h := p.podByUID(f.ServerPod)
	if h == nil || !p.access.Enabled(ctx, slog.LevelError) {
		return
	}
	may, suppressed := h.denials.allow(at)
	if !may {
		return
	}
	s := p.store.Load()
	dst := s.Workload(h.Pod().WorkloadUID)
	src := s.WorkloadAt(mesh.NetAddr{Network: h.Pod().Network, Addr: f.Client.Addr()})
	if c := p.podByUID(f.ClientPod); c != nil {
		src = s.Workload(c.Pod().WorkloadUID)
	}
	var a []slog.Attr
	for _, x := range [][2]string{
		{"protocol", "UDP"}, {"src.addr", f.Client.String()}, {"src.workload", podName(src)}, {"src.namespace", namespaceOf(src)},
		{"src.identity", f.Source.String()}, {"dst.addr", f.Server.String()}, {"dst.workload", podName(dst)},
		{"dst.namespace", namespaceOf(dst)}, {"direction", Inbound.String()}, {"outcome", PolicyDenied.String()},
		{"error", fold(denial(v))}, {"path", "kernel"},
	} {
		if x[1] != "" {
			a = append(a, slog.String(x[0], x[1]))
		}
	}
	if suppressed > 0 {
		a = append(a, slog.Int("suppressed", suppressed))
	}
	p.access.LogAttrs(ctx, slog.LevelError, "datagram denied", a...)
}

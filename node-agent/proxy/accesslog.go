package proxy

import (
	"context"
	"log/slog"
	"net/netip"
	"strconv"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// report is what the metrics and the access log say about one connection. The zero address fields are left out.
type report struct {
	p       *Proxy
	c       *conn
	key     seriesKey
	series  *series
	dstAddr netip.AddrPort // what was connected to, or for inbound what the peer connected to
	hbone   string         // authority of the CONNECT
	kernel  bool           // the agent has no part in it
}

// open counts the connection. shared says that the objects of k belong to the Snapshot.
func (p *Proxy) open(c *conn, k seriesKey, shared bool, dst netip.AddrPort, hbone string) *report {
	return &report{p: p, c: c, key: k, series: p.metrics.opened(c, k, shared), dstAddr: dst, hbone: hbone}
}

// close counts the end and writes the line.
func (r *report) close(err error) {
	o := outcomeOf(err, PeerUnreachable)
	r.p.metrics.closed(r.c, r.series, o)
	level, msg := slog.LevelInfo, "connection complete"
	if o.flag() != flagNone {
		level = slog.LevelError
	}
	log := r.p.access
	ctx := context.Background()
	if !log.Enabled(ctx, level) {
		return
	}
	var suppressed int
	if o == PolicyDenied {
		var may bool
		if may, suppressed = r.c.pod.denials.allow(time.Now()); !may {
			return
		}
	}
	// The keys are ztunnel's. Its log turns the metrics' point of view around: bytes_sent is what this
	// reporter's own workload sent.
	sent, recv := r.c.bytes.AtoB.Load(), r.c.bytes.BtoA.Load()
	if r.c.dir == Inbound {
		sent, recv = recv, sent
	}
	a := make([]slog.Attr, 0, 20)
	str := func(k, v string) {
		if v != "" {
			a = append(a, slog.String(k, v))
		}
	}
	str("src.addr", r.c.info.Src.String())
	str("src.workload", podName(r.key.src))
	str("src.namespace", namespaceOf(r.key.src))
	str("src.identity", r.key.peer.String())
	str("src.cluster", clusterOf(r.key.src))
	str("dst.addr", r.dstAddr.String())
	str("dst.hbone_addr", r.hbone)
	if r.key.service != nil {
		str("dst.service", r.key.service.Name.Hostname)
	}
	str("dst.workload", podName(r.key.dst))
	str("dst.namespace", namespaceOf(r.key.dst))
	if !r.key.peer.IsZero() && r.key.dst != nil {
		str("dst.identity", r.key.dst.Identity.String())
	}
	str("dst.cluster", clusterOf(r.key.dst))
	str("direction", r.c.dir.String())
	a = append(a, slog.Int64("bytes_sent", sent), slog.Int64("bytes_recv", recv),
		slog.String("duration", strconv.FormatInt(time.Since(r.c.start).Milliseconds(), 10)+"ms"))
	if o != Completed {
		str("outcome", o.String())
	}
	if err != nil && o.flag() != flagNone {
		str("error", fold(err.Error()))
	}
	if r.kernel {
		str("path", "kernel")
	}
	if r.c.excepted != (mesh.PolicyName{}) {
		str("authz.exception", r.c.excepted.String())
	}
	str("authz.audit", names(r.c.noted.Audit))
	str("authz.dry_run", dryRuns(r.c.noted.DryRun))
	if suppressed > 0 {
		a = append(a, slog.Int("suppressed", suppressed)) // lines like this one that were left out before it
	}
	log.LogAttrs(ctx, level, msg, a...)
}

// refuse logs and counts a connection that ended before anything was known about its ends.
func (h *PodHandle) refuse(dir Direction, src, dst netip.AddrPort, err error) {
	o := outcomeOf(err, RequestInvalid)
	h.p.metrics.outcome(dir, o)
	may, suppressed := h.refusals.allow(time.Now())
	if !may {
		return
	}
	a := []slog.Attr{slog.String("src.addr", src.String()), slog.String("dst.addr", dst.String()),
		slog.String("direction", dir.String()), slog.String("outcome", o.String()), slog.String("error", fold(err.Error()))}
	if suppressed > 0 {
		a = append(a, slog.Int("suppressed", suppressed))
	}
	h.p.access.LogAttrs(context.Background(), slog.LevelWarn, "connection failed", a...)
}

// podName is the name that the log shows: the pod's, or the canonical service of a peer known by baggage alone.
func podName(w *mesh.Workload) string {
	if w == nil {
		return ""
	}
	if w.Name != "" {
		return w.Name
	}
	if w.WorkloadName != "" {
		return w.WorkloadName
	}
	return w.CanonicalName
}

func namespaceOf(w *mesh.Workload) string {
	if w == nil {
		return ""
	}
	return w.Namespace
}

func clusterOf(w *mesh.Workload) string {
	if w == nil {
		return ""
	}
	return w.Cluster
}

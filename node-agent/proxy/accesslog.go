package proxy

import (
	"context"
	"log/slog"
	"net/netip"
	"strconv"
	"sync"
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
	shared  bool           // the objects of key belong to the Snapshot

	connected bool   // both ends are
	id        uint64 // for watchers; 0: nobody was told that it is open
}

// open counts the connection. shared says that the objects of k belong to the Snapshot.
func (p *Proxy) open(c *conn, k seriesKey, shared bool, dst netip.AddrPort, hbone string) *report {
	return &report{p: p, c: c, key: k, series: p.metrics.opened(c, k, shared), dstAddr: dst, hbone: hbone, shared: shared}
}

// close counts the end and writes the line.
func (r *report) close(err error) {
	o := outcomeOf(err, PeerUnreachable)
	r.p.metrics.closed(r.c, r.series, o)
	r.ending(o, err)
	level, msg := slog.LevelInfo, "connection complete"
	if o.flag() != flagNone {
		level = slog.LevelError
	}
	ctx := context.Background()
	if !r.p.access.Enabled(ctx, level) {
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
	a := make([]slog.Attr, 0, 16)
	str := func(k, v string) {
		if v != "" {
			a = append(a, slog.String(k, v))
		}
	}
	str("src.addr", r.c.info.Src.String())
	str("dst.addr", r.dstAddr.String())
	str("dst.hbone_addr", r.hbone)
	a = append(a, slog.Int64("bytes_sent", sent), slog.Int64("bytes_recv", recv),
		slog.String("duration", strconv.FormatInt(time.Since(r.c.start).Milliseconds(), 10)+"ms"))
	if o != Completed {
		str("outcome", o.String())
	}
	if err != nil && o.flag() != flagNone {
		str("error", fold(err.Error()))
	}
	if r.c.excepted != (mesh.PolicyName{}) {
		str("authz.exception", r.c.excepted.String())
	}
	str("authz.audit", names(r.c.noted.Audit))
	str("authz.dry_run", dryRuns(r.c.noted.DryRun))
	if suppressed > 0 {
		a = append(a, slog.Int("suppressed", suppressed)) // lines like this one that were left out before it
	}
	// Without a Logger, which would find out from where it is called, at the price of the rest of the line.
	line := slog.NewRecord(time.Now(), level, msg, 0)
	line.AddAttrs(a...)
	_ = r.p.parties.handler(r.p.access.Handler(), r.key, r.kernel, r.shared).Handle(ctx, line)
}

// parties are those who have connections: what a line says about both ends is put together once for all their
// connections.
type parties struct {
	mu sync.Mutex
	of map[partiesKey]slog.Handler
}

type partiesKey struct {
	seriesKey
	kernel bool
}

// maxParties is after how many all are forgotten: they hold on to workloads that may have gone.
const maxParties = 512

// handler adds to log what is known about both ends. It is kept if the objects of k are the Snapshot's.
func (t *parties) handler(log slog.Handler, k seriesKey, kernel, shared bool) slog.Handler {
	if !shared {
		return describe(log, k, kernel)
	}
	x := partiesKey{k, kernel}
	t.mu.Lock()
	defer t.mu.Unlock()
	known := t.of[x]
	if known == nil {
		if known = describe(log, k, kernel); t.of == nil || len(t.of) >= maxParties {
			t.of = map[partiesKey]slog.Handler{}
		}
		t.of[x] = known
	}
	return known
}

func describe(log slog.Handler, k seriesKey, kernel bool) slog.Handler {
	a := make([]slog.Attr, 0, 12)
	str := func(key, v string) {
		if v != "" {
			a = append(a, slog.String(key, v))
		}
	}
	str("direction", k.dir.String())
	str("src.workload", podName(k.src))
	str("src.namespace", namespaceOf(k.src))
	str("src.identity", k.peer.String())
	str("src.cluster", clusterOf(k.src))
	if k.service != nil {
		str("dst.service", k.service.Name.Hostname)
	}
	str("dst.workload", podName(k.dst))
	str("dst.namespace", namespaceOf(k.dst))
	if !k.peer.IsZero() && k.dst != nil {
		str("dst.identity", k.dst.Identity.String())
	}
	str("dst.cluster", clusterOf(k.dst))
	if kernel {
		str("path", "kernel")
	}
	return log.WithAttrs(a)
}

// refuse logs and counts a connection that ended before anything was known about its ends.
func (h *PodHandle) refuse(dir Direction, src, dst netip.AddrPort, err error) {
	o := outcomeOf(err, RequestInvalid)
	h.p.metrics.outcome(dir, o)
	h.refused(dir, src, dst, o, err)
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

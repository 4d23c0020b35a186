package proxy

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/tap"
)

// maxWatchers is how many may look on at once, and watchQueue how many events one of them may be behind: half a megabyte.
const (
	maxWatchers = 8
	watchQueue  = 1024
)

// ErrManyWatchers is returned where maxWatchers look on already.
var ErrManyWatchers = errors.New("as many look on already as may")

// watchers are those who look on while connections begin and end. No connection waits for them: what one does not
// take in time, it misses and is told so. While there are none, a connection costs two atomic loads.
type watchers struct {
	n  atomic.Int32
	id atomic.Uint64 // of the last connection that was told to be open

	mu  sync.Mutex
	all map[*Watcher]struct{}
}

// Watcher is somebody who looks on.
type Watcher struct {
	of     *watchers
	filter tap.Filter
	events chan tap.Event
	missed uint64 // guarded by watchers.mu
}

// Watch tells of connections that begin or end from now on. The caller stops the Watcher.
func (p *Proxy) Watch(f tap.Filter) (*Watcher, error) {
	t := &p.watchers
	w := &Watcher{of: t, filter: f, events: make(chan tap.Event, watchQueue)}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.all) >= maxWatchers {
		return nil, ErrManyWatchers
	}
	if t.all == nil {
		t.all = map[*Watcher]struct{}{}
	}
	t.all[w] = struct{}{}
	t.n.Add(1)
	return w, nil
}

// Events are what happens. The channel is never closed.
func (w *Watcher) Events() <-chan tap.Event { return w.events }

// Missed returns how many events were left out since it was last called.
func (w *Watcher) Missed() uint64 {
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	n := w.missed
	w.missed = 0
	return n
}

// Stop ends it.
func (w *Watcher) Stop() {
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	if _, ok := w.of.all[w]; ok {
		delete(w.of.all, w)
		w.of.n.Add(-1)
	}
}

func (t *watchers) watched() bool { return t.n.Load() > 0 }

func (t *watchers) tell(e *tap.Event) {
	e.Time = time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	for w := range t.all {
		if !w.filter.Match(e) {
			continue
		}
		select {
		case w.events <- *e:
		default:
			w.missed++
		}
	}
}

// established says that both ends are connected.
func (r *report) established() {
	r.connected = true
	if t := &r.p.watchers; t.watched() {
		r.id = t.id.Add(1)
		e := r.event(tap.Open)
		t.tell(&e)
	}
}

// ending tells of the end, or of the refusal.
func (r *report) ending(o Outcome, err error) {
	t := &r.p.watchers
	if !t.watched() {
		return
	}
	what := tap.Close
	if !r.connected && o.flag() != flagNone {
		what = tap.Failed
	}
	e := r.event(what)
	e.Outcome = o.String()
	if err != nil && o.flag() != flagNone {
		e.Error = fold(err.Error())
	}
	e.Sent, e.Received = r.c.bytes.AtoB.Load(), r.c.bytes.BtoA.Load()
	e.DurationMS = time.Since(r.c.start).Milliseconds()
	t.tell(&e)
}

func (r *report) event(what tap.What) tap.Event {
	r.c.mu.Lock()
	i := r.c.info
	r.c.mu.Unlock()
	e := tap.Event{What: what, ID: r.id, Direction: r.key.dir.String(), Path: "plaintext"}
	e.Source = end(r.key.src, i.Src)
	e.Source.Identity = r.key.peer.String() // what was proven or asserted, and nothing else
	e.Destination = end(r.key.dst, i.ActualDst)
	if r.key.dir == Outbound {
		e.Asked = i.OriginalDst
		// Behind the tunnel is the application, or the Service that a waypoint is asked for.
		if a, err := netip.ParseAddrPort(r.hbone); err == nil {
			e.Destination.Addr = a
		}
	}
	switch {
	case r.kernel:
		e.Path = "kernel"
	case r.key.mtls:
		e.Path = "tunnel"
	}
	if r.key.dst != nil && !r.key.peer.IsZero() {
		e.Destination.Identity = r.key.dst.Identity.String()
	}
	if r.key.service != nil {
		e.Service = r.key.service.Name.Hostname
	}
	return e
}

// refused tells of a connection that ended before anything was known of its other end.
func (h *PodHandle) refused(dir Direction, src, dst netip.AddrPort, o Outcome, err error) {
	t := &h.p.watchers
	if !t.watched() {
		return
	}
	e := tap.Event{What: tap.Failed, Direction: dir.String(), Source: end(nil, src), Destination: end(nil, dst), Outcome: o.String(), Error: fold(err.Error())}
	own := h.p.store.Load().Workload(h.Pod().WorkloadUID)
	if dir == Outbound {
		e.Source = end(own, src)
	} else {
		e.Destination = end(own, dst)
	}
	t.tell(&e)
}

func end(w *mesh.Workload, a netip.AddrPort) tap.End {
	e := tap.End{Addr: a}
	if w != nil {
		e.Namespace, e.Pod, e.Workload = w.Namespace, w.Name, w.WorkloadName
	}
	return e
}

package proxy

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	// patience is how long a connection to a Service waits for one endpoint while there is another. A killed agent
	// is back sooner than that as a rule; a node that has lost power never is.
	patience = 2 * time.Second
	// suspicion is how long an endpoint that could not be reached is passed over: until then the control plane
	// has usually heard of it too.
	suspicion = 10 * time.Second
)

// errImpatient ends an attempt for the sake of another endpoint.
var errImpatient = errors.New("no answer, and there is another endpoint")

// suspects are the workloads that could not be reached a moment ago. Without them every new connection to a
// Service would find out for itself that a node is dead, and wait for that.
type suspects struct {
	n     atomic.Int32 // of until: the usual case, none, takes no lock
	mu    sync.Mutex
	until map[string]time.Time
}

func (s *suspects) add(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.until == nil {
		s.until = map[string]time.Time{}
	}
	s.until[uid] = time.Now().Add(suspicion)
	s.n.Store(int32(len(s.until)))
}

// clear says that the workload has been reached.
func (s *suspects) clear(uid string) {
	if s.n.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.until, uid)
	s.n.Store(int32(len(s.until)))
}

// list returns the suspects of now.
func (s *suspects) list() []string {
	if s.n.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	var out []string
	for uid, t := range s.until {
		if now.After(t) {
			delete(s.until, uid)
			continue
		}
		out = append(out, uid)
	}
	s.n.Store(int32(len(s.until)))
	return out
}

// route is the Snapshot's answer without the workloads that were tried, and without suspects as long as
// anything else is left.
func (p *Proxy) route(s *mesh.Snapshot, req Request, tried []string) mesh.Route {
	var pick func(int) int
	if req.Drawn > 0 && tried == nil {
		pick = func(n int) int {
			if req.Drawn <= n {
				return req.Drawn - 1
			}
			return rand.IntN(n) // the endpoints are others by now
		}
	}
	if avoid := p.suspects.list(); avoid != nil {
		if r := s.ResolveExcluding(req.Client, req.Dst, slices.Concat(tried, avoid), pick); r.Kind != mesh.RouteRefuse && r.Service != nil {
			return r
		}
	}
	return s.ResolveExcluding(req.Client, req.Dst, tried, pick)
}

// judge remembers how an attempt at a workload ended.
func (p *Proxy) judge(w *mesh.Workload, err error) {
	switch {
	case w == nil:
	case err == nil:
		p.suspects.clear(w.UID)
	case outcomeOf(err, PeerUnreachable) == PeerUnreachable:
		p.suspects.add(w.UID)
	}
}

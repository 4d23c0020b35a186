package proxy

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/warrenmesh/warren/internal/mesh"
)

// watch goes through the open connections whenever policies, or what binds them, change.
func (p *Proxy) watch(changed <-chan struct{}, last *mesh.Snapshot) {
	defer p.store.Unwatch(changed)
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-changed:
		}
		s := p.store.Load()
		p.mu.Lock()
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
		p.conns.reevaluate(s, compare(s, last))
		if !s.Config().Equal(last.Config()) {
			p.TrustChanged() // trust domains are part of it
		}
		p.dropVanished(s, last)
		last = s
		p.checked.reach(s.Revision())
	}
}

// Rechecked returns when every open connection that the state of a revision, or of a later one, does not allow
// has been ended.
func (p *Proxy) Rechecked(ctx context.Context, revision uint64) error {
	return p.checked.await(ctx, revision)
}

// difference is what changed from one Snapshot to another as far as Authorize looks at it.
type difference struct {
	all        bool // a policy of the whole mesh
	namespaces map[string]bool
	policies   map[mesh.PolicyName]bool // of chosen workloads
	workloads  map[string]bool          // by UID
	last, now  uint64                   // revisions
}

func compare(s, last *mesh.Snapshot) difference {
	d := difference{namespaces: map[string]bool{}, policies: map[mesh.PolicyName]bool{}, workloads: map[string]bool{},
		last: last.Revision(), now: s.Revision()}
	d.all = last.Revision() == 0 || !s.Config().Equal(last.Config())
	workloads, _, policies := s.Changes(last)
	for c := range policies {
		for _, p := range [2]*mesh.Policy{c.Old, c.New} {
			switch {
			case p == nil:
				continue
			case p.Scope == mesh.ScopeMesh:
				d.all = true
			case p.Scope == mesh.ScopeNamespace:
				d.namespaces[p.Name.Namespace] = true
			}
			d.policies[p.Name] = true // whatever its scope: a name that is missing denies
		}
	}
	for c := range workloads {
		if c.New != nil {
			d.workloads[c.New.UID] = true
		} else {
			d.workloads[c.Old.UID] = true
		}
	}
	return d
}

func (d *difference) none() bool {
	return !d.all && len(d.namespaces)+len(d.policies)+len(d.workloads) == 0 && !d.skips()
}

// skips reports whether there were states in between, which may have let in what neither of the two does: a policy that
// came and went is no difference.
func (d *difference) skips() bool { return d.now > d.last+1 }

// skipped reports whether one of those may have decided about a connection.
func (d *difference) skipped(c *conn) bool {
	by := c.by.Load()
	return d.skips() && (by == 0 || d.last < by && by < d.now)
}

// concerns reports whether something may be decided otherwise about a workload, by the newer Snapshot.
func (d *difference) concerns(s *mesh.Snapshot, uid string) bool {
	if d.all || d.workloads[uid] {
		return true
	}
	w := s.Workload(uid)
	if w == nil {
		return true
	}
	if d.namespaces[w.Namespace] {
		return true
	}
	if len(d.policies) == 0 {
		return false
	}
	for _, n := range w.Policies {
		if d.policies[n] {
			return true
		}
	}
	return false
}

// reevaluate resets the inbound connections that s does not allow, of those that the difference concerns or hides, and
// returns how many were looked at and how many reset. Connections that are alike are decided once: a pod has many
// connections of few clients.
func (t *connTable) reevaluate(s *mesh.Snapshot, d difference) (looked, ended int) {
	if d.none() {
		return 0, 0
	}
	var denied []ending
	concerned := map[string]bool{}
	verdicts := map[mesh.Conn]mesh.Verdict{}
	for _, c := range t.list(func(c *conn) bool { return c.dir == Inbound }) {
		uid := c.pod.Pod().WorkloadUID
		is, known := concerned[uid]
		if !known {
			is = d.concerns(s, uid)
			concerned[uid] = is
		}
		if !is && !d.skipped(c) {
			continue
		}
		looked++
		a := c.auth
		a.DstWorkload = s.Workload(uid) // one that is gone has no policies that could allow anything
		v, known := verdicts[a]
		if !known {
			v = s.Authorize(a)
			verdicts[a] = v
		}
		if !v.Allow {
			denied = append(denied, ending{c, PolicyRevoked, "a policy change ended the connection: " + denial(v)})
		}
	}
	endEach(denied)
	return looked, len(denied)
}

// ending is a connection that is to be reset, and why.
type ending struct {
	c   *conn
	o   Outcome
	why string
}

// endEach resets connections, on all processors: each takes some system calls, and there may be ten thousands.
func endEach(all []ending) {
	const few = 64
	var next atomic.Int64
	work := func() {
		for {
			from := int(next.Add(few) - few)
			if from >= len(all) {
				return
			}
			for _, e := range all[from:min(from+few, len(all))] {
				e.c.end(e.o, e.why)
			}
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(all)/few) {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

package proxy

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

// Whatever two applications say to each other arrives, all of it, in order and once, or the connection ends with a
// reset: with halves that end in either order, slow readers and resets in the middle, while policies change,
// connections are decided anew and certificates are renewed.
func TestBytesArriveAsTheyWereSent(t *testing.T) {
	n, parallel, most := 600, 24, 4<<20
	switch {
	case *long:
		n, parallel, most = 100_000, 48, 16<<20
	case raceEnabled:
		n = 300
	}
	l := newLab(t)
	p := newParlour(most, time.Minute)
	for _, name := range []string{"catalog-1", "catalog-2"} {
		l.pods[name].listen(appPort, p.host)
	}
	var changes atomic.Int64
	stop := make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() { l.unrest(stop, &changes) })

	var next, failed atomic.Int64
	first := rand.Uint64()
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				from := l.pods[[]string{"ui", "load", "catalog-1"}[i%3]]
				to := []netip.AddrPort{service(false), service(true), netip.AddrPortFrom(l.pods["catalog-1"].v4, appPort),
					netip.AddrPortFrom(l.pods["catalog-2"].v6, appPort)}[rand.N(4)]
				if from.name == "catalog-1" {
					to = netip.AddrPortFrom(l.pods["catalog-2"].v4, appPort)
				}
				if err := p.converse(from, to, first+uint64(i)); err != nil {
					if failed.Add(1) <= 5 {
						t.Errorf("%s to %s: %v", from.name, to, err)
					}
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	others.Wait()
	t.Logf("%d talks, %d failed, %d MiB, beside %d changes of policy, workloads and certificates", n, failed.Load(), p.bytes.Load()>>20, changes.Load())
	if changes.Load() < 10 {
		t.Errorf("%d changes only", changes.Load())
	}
	l.calm(t)
	check(t, results.Record("byte-integrity",
		results.Row{Name: "talks of random sizes with half-closes, resets and slow readers, while policies and certificates change", Inputs: n, Failures: int(failed.Load()), Figure: float64(p.bytes.Load()) / (1 << 30), Unit: "GiB"}))
}

// unrest changes what the mesh knows, in ways that forbid nothing, and renews certificates, until stop is closed.
func (l *lab) unrest(stop <-chan struct{}, count *atomic.Int64) {
	policy := mesh.PolicyName{Namespace: "shop", Name: "nobody-there"}
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(50 * time.Millisecond):
		}
		count.Add(1)
		switch i % 4 {
		case 0:
			l.builder.PutPolicy(&mesh.Policy{Name: policy, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
				Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Principals: []mesh.StringMatch{{Value: "cluster.local/ns/elsewhere/sa/nobody"}}}}}}}}})
			l.commit()
		case 1:
			l.builder.DeletePolicy(policy)
			l.commit()
		case 2:
			l.builder.PutWorkload(l.workload("catalog-1"))
			l.commit()
		case 3:
			name := []string{"ui", "load", "catalog-1", "catalog-2"}[i/4%4]
			id := l.pods[name].id
			l.ca.mu.Lock()
			l.ca.bundles[id] = l.ca.sign(id, time.Now().Add(-time.Minute), time.Now().Add(time.Hour), nil)
			l.ca.mu.Unlock()
			for _, n := range l.nodes {
				n.proxy.Renewed(id)
			}
		}
	}
}

// calm waits until nothing is left of any connection.
func (l *lab) calm(t *testing.T) { t.Helper(); l.calmBut(t, 0) }

// calmBut waits until so many connections are left.
func (l *lab) calmBut(t *testing.T, left int) {
	t.Helper()
	for _, n := range l.nodes {
		open, streams := 0, 0
		for range 1500 {
			_, streams = n.proxy.Tunnels()
			if open = n.proxy.conns.len(); open <= left && streams <= left {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if open > left || streams > left {
			t.Errorf("%d connections and %d streams are open on %s, want %d", open, streams, n.name, left)
		}
	}
}

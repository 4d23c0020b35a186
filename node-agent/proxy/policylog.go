package proxy

import (
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What AUDIT policies and dry runs say is never enforced. It is counted by policy, in the words that Istio's Envoy
// has for dry runs, and stands in the connection's line of the access log.

// note counts what was not enforced of a verdict and keeps it for the connection's line.
func (p *Proxy) note(c *conn, v mesh.Verdict) {
	if len(v.Audit)+len(v.DryRun) == 0 {
		return
	}
	c.noted = mesh.Verdict{Audit: v.Audit, DryRun: v.DryRun}
	s := p.store.Load()
	for _, name := range v.Audit {
		p.metrics.unenforced(unenforced{policy: name, action: "audit", result: "matched"})
	}
	for _, d := range v.DryRun {
		u := unenforced{policy: d.Policy, action: "deny", result: shadow(d.Allow)}
		if pol := s.Policy(d.Policy); pol != nil && pol.Action == mesh.Allow || pol == nil && d.Allow {
			u.action = "allow"
		}
		p.metrics.unenforced(u)
	}
}

// noteException counts a plaintext connection that a DENY policy would refuse from any other address, and keeps the
// policy for the connection's line: STRICT excepts the API server's calls to webhooks so, and that is less than an
// identity.
func (p *Proxy) noteException(c *conn, s *mesh.Snapshot) {
	a := c.auth
	a.SourceIP = netip.Addr{}
	if v := s.Authorize(a); !v.Allow && v.Why == mesh.WhyDenied {
		c.excepted = v.By
		p.metrics.unenforced(unenforced{policy: v.By, action: "exception"})
	}
}

// shadow is Envoy's word for the result of a dry run.
func shadow(allow bool) string {
	if allow {
		return "allowed"
	}
	return "denied"
}

// names lists policies for the log.
func names(ps []mesh.PolicyName) string {
	words := make([]string, len(ps))
	for i, p := range ps {
		words[i] = p.String()
	}
	return strings.Join(words, ",")
}

// dryRuns lists the results of dry runs for the log, as policy=result.
func dryRuns(ds []mesh.DryRun) string {
	words := make([]string, len(ds))
	for i, d := range ds {
		words[i] = d.Policy.String() + "=" + shadow(d.Allow)
	}
	return strings.Join(words, ",")
}

// Lines about denied or refused connections of one pod: so many at once, so many a second. Who is denied tries again.
const (
	denialBurst = 100
	denialRate  = 20
)

// lineBudget bounds how many lines are written. The zero value has its whole burst left.
type lineBudget struct {
	mu         sync.Mutex
	used       float64
	at         time.Time
	suppressed int
}

// allow reports whether a line may be written, and how many were left out since the last one.
func (b *lineBudget) allow(now time.Time) (may bool, suppressed int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.at.IsZero() {
		b.used = max(0, b.used-denialRate*now.Sub(b.at).Seconds())
	}
	b.at = now
	if b.used+1 > denialBurst {
		b.suppressed++
		return false, 0
	}
	b.used++
	suppressed, b.suppressed = b.suppressed, 0
	return true, suppressed
}

package mesh

import (
	"net/netip"
	"slices"
	"strings"
)

// Why a Verdict is as it is.
const (
	WhyNoPolicy      Reason = "no_policy"          // allow: nothing applies
	WhyAllowed       Reason = "allow_policy"       // allow: Verdict.By matched
	WhyDenied        Reason = "deny_policy"        // deny: Verdict.By matched
	WhyNoAllow       Reason = "no_allow_match"     // deny: there are ALLOW policies and none matched
	WhyPolicyMissing Reason = "policy_missing"     // deny: the workload names Verdict.By, which is not there
	WhyNoWorkload    Reason = "unknown_workload"   // deny: it is not known which policies apply
	WhyStateMissing  Reason = "no_state_for_authz" // deny: nothing is known of the mesh yet
)

// Authorize says whether a connection may be, by the policies of this Snapshot for c.DstWorkload.
//
// As in Istio: a matching DENY denies; else, where there is no ALLOW policy, it is allowed; else one of them
// must match. AUDIT policies and dry runs are evaluated and reported, never enforced; a dry-run ALLOW alone
// does not make the workload closed. Where a policy that the workload names is not there, it is denied:
// nobody can tell what that policy says. Authorize does not allocate without AUDIT or dry-run policies.
func (s *Snapshot) Authorize(c Conn) Verdict {
	if s.rev == 0 {
		return Verdict{Why: WhyStateMissing}
	}
	if c.DstWorkload == nil {
		return Verdict{Why: WhyNoWorkload}
	}
	// The caller's value may be of an earlier Snapshot.
	w := s.Workload(c.DstWorkload.UID)
	if w == nil {
		return Verdict{Why: WhyNoWorkload}
	}
	var e evaluation
	if l, ok := s.byScope.get(""); ok {
		for _, p := range l.list {
			e.add(p, &c)
		}
	}
	if l, ok := s.byScope.get(w.Namespace); ok && w.Namespace != "" {
		for _, p := range l.list {
			e.add(p, &c)
		}
	}
	for _, n := range w.Policies {
		p := s.Policy(n)
		if p == nil {
			return Verdict{By: n, Why: WhyPolicyMissing}
		}
		if p.Scope == ScopeWorkload { // the others are counted already
			e.add(p, &c)
		}
	}
	for _, n := range w.Audits {
		if p := s.Policy(n); p != nil && p.Scope == ScopeWorkload && p.Action == Audit {
			e.add(p, &c)
		}
	}
	return e.verdict()
}

// evaluation gathers what the policies say.
type evaluation struct {
	deny, allow *Policy
	needAllow   bool
	audited     []PolicyName
	dry         []DryRun
}

func (e *evaluation) add(p *Policy, c *Conn) {
	switch {
	case p.Action == Audit:
		if p.matches(c) {
			e.audited = append(e.audited, p.Name)
		}
	case p.DryRun:
		// What an ALLOW that does not match would have decided: that it is not the one to let the connection in.
		if m := p.matches(c); m || p.Action == Allow {
			e.dry = append(e.dry, DryRun{Policy: p.Name, Allow: m && p.Action == Allow})
		}
	case p.Action == Deny:
		if e.deny == nil && p.matches(c) {
			e.deny = p
		}
	case p.Action == Allow:
		e.needAllow = true
		if e.allow == nil && p.matches(c) {
			e.allow = p
		}
	default: // an action of a later version: nobody can tell what it says
		if e.deny == nil {
			e.deny = p
		}
	}
}

func (e *evaluation) verdict() Verdict {
	v := Verdict{Audit: e.audited, DryRun: e.dry}
	switch {
	case e.deny != nil:
		v.By, v.Why = e.deny.Name, WhyDenied
	case !e.needAllow:
		v.Allow, v.Why = true, WhyNoPolicy
	case e.allow != nil:
		v.Allow, v.By, v.Why = true, e.allow.Name, WhyAllowed
	default:
		v.Why = WhyNoAllow
	}
	return v
}

// Matches reports whether the policy's rules cover the connection, whatever its action.
func (p *Policy) Matches(c Conn) bool { return p.matches(&c) }

func (p *Policy) matches(c *Conn) bool {
	for i := range p.Rules {
		if p.Rules[i].matches(c) {
			return true
		}
	}
	return false
}

func (r *Rule) matches(c *Conn) bool {
	for i := range r.Clauses {
		if !r.Clauses[i].matches(c) {
			return false
		}
	}
	return true
}

func (cl *Clause) matches(c *Conn) bool {
	for i := range cl.Matches {
		if cl.Matches[i].matches(c) {
			return true
		}
	}
	return len(cl.Matches) == 0
}

func (m *Match) matches(c *Conn) bool {
	return !m.empty() &&
		within(m.DestinationIPs, m.NotDestinationIPs, c.Dst.Addr()) &&
		within(m.SourceIPs, m.NotSourceIPs, c.SourceIP) &&
		one(m.DestinationPorts, m.NotDestinationPorts, c.Dst.Port()) &&
		accounts(m.ServiceAccounts, m.NotServiceAccounts, c.Source) &&
		principals(m.Principals, m.NotPrincipals, c.Source) &&
		namespaces(m.Namespaces, m.NotNamespaces, c.Source.Namespace)
}

// empty reports whether nothing is set. Such a match comes from attributes that a sender could not express;
// it matches nothing.
func (m *Match) empty() bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+
		len(m.ServiceAccounts)+len(m.NotServiceAccounts)+len(m.SourceIPs)+len(m.NotSourceIPs)+
		len(m.DestinationIPs)+len(m.NotDestinationIPs)+len(m.DestinationPorts)+len(m.NotDestinationPorts) == 0
}

func within(is, not []netip.Prefix, a netip.Addr) bool {
	a = a.Unmap()
	return (len(is) == 0 || contains(is, a)) && !contains(not, a)
}

func contains(nets []netip.Prefix, a netip.Addr) bool {
	for _, p := range nets {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

func one(is, not []uint16, port uint16) bool {
	return (len(is) == 0 || slices.Contains(is, port)) && !slices.Contains(not, port)
}

func accounts(is, not []ServiceAccountMatch, id Identity) bool {
	if id.IsZero() { // has none
		return len(is) == 0
	}
	sa := ServiceAccountMatch{id.Namespace, id.ServiceAccount}
	return (len(is) == 0 || slices.Contains(is, sa)) && !slices.Contains(not, sa)
}

func namespaces(is, not []StringMatch, ns string) bool {
	return (len(is) == 0 || slices.ContainsFunc(is, func(m StringMatch) bool { return m.matches(ns) })) &&
		!slices.ContainsFunc(not, func(m StringMatch) bool { return m.matches(ns) })
}

func (m *StringMatch) matches(s string) bool {
	switch m.Kind {
	case MatchExact:
		return m.Value == s
	case MatchPrefix:
		return strings.HasPrefix(s, m.Value)
	case MatchSuffix:
		return strings.HasSuffix(s, m.Value)
	case MatchPresence:
		return s != ""
	default:
		return false
	}
}

func principals(is, not []StringMatch, id Identity) bool {
	if len(is) == 0 && len(not) == 0 {
		return true
	}
	var room [256]byte
	p := room[:0]
	if !id.IsZero() {
		p = append(p, id.TrustDomain...)
		p = append(p, "/ns/"...)
		p = append(p, id.Namespace...)
		p = append(p, "/sa/"...)
		p = append(p, id.ServiceAccount...)
	}
	return (len(is) == 0 || anyPrincipal(is, p)) && !anyPrincipal(not, p)
}

// anyPrincipal matches without making a string of p. A peer that did not authenticate, p empty, has no
// principal that anything could match.
func anyPrincipal(ms []StringMatch, p []byte) bool {
	if len(p) == 0 {
		return false
	}
	for i := range ms {
		switch v := ms[i].Value; ms[i].Kind {
		case MatchExact:
			if string(p) == v {
				return true
			}
		case MatchPrefix:
			if len(p) >= len(v) && string(p[:len(v)]) == v {
				return true
			}
		case MatchSuffix:
			if len(p) >= len(v) && string(p[len(p)-len(v):]) == v {
				return true
			}
		case MatchPresence:
			return true
		}
	}
	return false
}

package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func policy(name string, scope Scope, action Action, rules ...Rule) *Policy {
	return &Policy{Name: PolicyName{"shop", name}, Scope: scope, Action: action, Rules: rules}
}

func when(matches ...Match) Rule { return Rule{Clauses: []Clause{{Matches: matches}}} }

func from(sa string) Match {
	return Match{Principals: []StringMatch{{MatchExact, "cluster.local/ns/shop/sa/" + sa}}}
}

func TestAuthorize(t *testing.T) {
	all := Rule{}
	strict := when(Match{NotPrincipals: []StringMatch{{Kind: MatchPresence}}})
	bound := func(names ...string) *Workload {
		w := pod("server", "10.0.0.1")
		for _, n := range names {
			w.Policies = append(w.Policies, PolicyName{"shop", n})
		}
		return w
	}
	audited := func(name string) *Workload {
		w := pod("server", "10.0.0.1")
		w.Audits = []PolicyName{{"shop", name}}
		return w
	}
	ui := Identity{"cluster.local", "shop", "ui"}
	for _, tc := range []struct {
		name  string
		parts []any
		src   Identity
		port  uint16
		want  string
	}{
		{"no policy", []any{bound()}, ui, 80, "allow no_policy"},
		{"allowed", []any{bound("a"), policy("a", ScopeWorkload, Allow, when(from("ui")))}, ui, 80, "allow allow_policy shop/a"},
		{"not allowed", []any{bound("a"), policy("a", ScopeWorkload, Allow, when(from("x")))}, ui, 80, "deny no_allow_match"},
		{"allow nothing", []any{bound(), policy("a", ScopeNamespace, Allow)}, ui, 80, "deny no_allow_match"},
		{"allow all", []any{bound(), policy("a", ScopeMesh, Allow, all)}, Identity{}, 80, "allow allow_policy shop/a"},
		{"deny before allow", []any{bound("a", "d"), policy("a", ScopeWorkload, Allow, all), policy("d", ScopeWorkload, Deny, when(from("ui")))}, ui, 80, "deny deny_policy shop/d"},
		{"deny that does not match", []any{bound("d"), policy("d", ScopeWorkload, Deny, when(from("x")))}, ui, 80, "allow no_policy"},
		{"deny with no rule", []any{bound(), policy("d", ScopeMesh, Deny)}, ui, 80, "allow no_policy"},
		{"policy of another namespace", []any{bound(), &Policy{Name: PolicyName{"other", "d"}, Scope: ScopeNamespace, Action: Deny, Rules: []Rule{all}}}, ui, 80, "allow no_policy"},
		{"selector policy that is not bound", []any{bound(), policy("d", ScopeWorkload, Deny, all)}, ui, 80, "allow no_policy"},
		{"bound policy that is not there", []any{bound("a", "gone"), policy("a", ScopeWorkload, Allow, all)}, ui, 80, "deny policy_missing shop/gone"},
		{"STRICT, mTLS", []any{bound(), policy("s", ScopeNamespace, Deny, strict)}, ui, 80, "allow no_policy"},
		{"STRICT, plaintext", []any{bound(), policy("s", ScopeNamespace, Deny, strict)}, Identity{}, 80, "deny deny_policy shop/s"},
		{"empty match matches nothing", []any{bound(), policy("d", ScopeMesh, Deny, when(Match{}))}, ui, 80, "allow no_policy"},
		{"port", []any{bound(), policy("a", ScopeMesh, Allow, when(Match{DestinationPorts: []uint16{81}}))}, ui, 80, "deny no_allow_match"},
		{"not port", []any{bound(), policy("a", ScopeMesh, Allow, when(Match{NotDestinationPorts: []uint16{81}}))}, ui, 80, "allow allow_policy shop/a"},
		{"audit decides nothing", []any{bound(), policy("u", ScopeMesh, Audit, all)}, ui, 80, "allow no_policy audit shop/u"},
		{"audit does not close", []any{bound(), policy("u", ScopeMesh, Audit)}, ui, 80, "allow no_policy"},
		{"audit that binds and decides nothing", []any{audited("u"), policy("u", ScopeWorkload, Audit, all)}, ui, 80, "allow no_policy audit shop/u"},
		{"audit that is not there", []any{audited("u")}, ui, 80, "allow no_policy"},
		{"a policy that denies is no audit", []any{audited("u"), policy("u", ScopeWorkload, Deny, all)}, ui, 80, "allow no_policy"},
		{"dry-run deny", []any{bound(), dry(policy("d", ScopeMesh, Deny, all))}, ui, 80, "allow no_policy dry shop/d=false"},
		{"dry-run allow does not close", []any{bound(), dry(policy("a", ScopeMesh, Allow, when(from("x"))))}, ui, 80, "allow no_policy dry shop/a=false"},
		{"dry-run allow that matches", []any{bound(), dry(policy("a", ScopeMesh, Allow, all))}, ui, 80, "allow no_policy dry shop/a=true"},
		{"action of a later version", []any{bound(), policy("f", ScopeMesh, Audit+1)}, ui, 80, "deny deny_policy shop/f"},
		{"workload that is not known", []any{svc("x")}, ui, 80, "deny unknown_workload"},
		{"clauses are all needed", []any{bound(), policy("a", ScopeMesh, Allow, Rule{Clauses: []Clause{{Matches: []Match{from("ui")}}, {Matches: []Match{{DestinationPorts: []uint16{81}}}}}})}, ui, 80, "deny no_allow_match"},
		{"any match is enough", []any{bound(), policy("a", ScopeMesh, Allow, when(from("x"), from("ui")))}, ui, 80, "allow allow_policy shop/a"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := build(tc.parts...).Authorize(Conn{
				Source: tc.src, SourceIP: ip("10.0.0.9"), Dst: netip.AddrPortFrom(ip("10.0.0.1"), tc.port), DstWorkload: bound(),
			})
			if got := v.text(); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func dry(p *Policy) *Policy { p.DryRun = true; return p }

func (v Verdict) text() string {
	words := []string{"deny", string(v.Why)}
	if v.Allow {
		words[0] = "allow"
	}
	if v.By != (PolicyName{}) {
		words = append(words, v.By.String())
	}
	for _, a := range v.Audit {
		words = append(words, "audit", a.String())
	}
	for _, d := range v.DryRun {
		words = append(words, "dry", fmt.Sprintf("%s=%v", d.Policy, d.Allow))
	}
	return strings.Join(words, " ")
}

// The oracle: Istio's rules written down without regard to speed.
func oracleVerdict(s *Snapshot, w *Workload, c Conn) string {
	var apply []*Policy
	for p := range s.Policies() {
		if p.Scope == ScopeMesh || p.Scope == ScopeNamespace && p.Name.Namespace == w.Namespace {
			apply = append(apply, p)
		}
	}
	for _, n := range w.Policies {
		p := s.Policy(n)
		if p == nil {
			return "deny"
		}
		if p.Scope == ScopeWorkload && !slices.Contains(apply, p) {
			apply = append(apply, p)
		}
	}
	closed, open := false, false
	for _, p := range apply {
		switch {
		case p.DryRun || p.Action == Audit:
		case p.Action == Deny && oracleMatches(p, c):
			return "deny"
		case p.Action == Allow:
			closed = true
			open = open || oracleMatches(p, c)
		}
	}
	if closed && !open {
		return "deny"
	}
	return "allow"
}

func oracleMatches(p *Policy, c Conn) bool {
	str := func(m StringMatch, v string, present bool) bool {
		if !present {
			return false
		}
		return m.Kind == MatchExact && m.Value == v || m.Kind == MatchPrefix && strings.HasPrefix(v, m.Value) ||
			m.Kind == MatchSuffix && strings.HasSuffix(v, m.Value) || m.Kind == MatchPresence && v != ""
	}
	field := func(is, not int, hit func(i int, negative bool) bool) bool {
		ok := is == 0
		for i := range is {
			ok = ok || hit(i, false)
		}
		for i := range not {
			ok = ok && !hit(i, true)
		}
		return ok
	}
	pick := func(negative bool, is, not []StringMatch, i int) StringMatch {
		if negative {
			return not[i]
		}
		return is[i]
	}
	matches := func(m Match) bool {
		fields := len(m.Namespaces) + len(m.NotNamespaces) + len(m.Principals) + len(m.NotPrincipals) + len(m.ServiceAccounts) +
			len(m.NotServiceAccounts) + len(m.SourceIPs) + len(m.NotSourceIPs) + len(m.DestinationIPs) + len(m.NotDestinationIPs) +
			len(m.DestinationPorts) + len(m.NotDestinationPorts)
		if fields == 0 {
			return false
		}
		known := c.Source != Identity{}
		sa := func(x ServiceAccountMatch) bool {
			return known && x.Namespace == c.Source.Namespace && x.ServiceAccount == c.Source.ServiceAccount
		}
		return field(len(m.Namespaces), len(m.NotNamespaces), func(i int, neg bool) bool {
			return str(pick(neg, m.Namespaces, m.NotNamespaces, i), c.Source.Namespace, true)
		}) && field(len(m.Principals), len(m.NotPrincipals), func(i int, neg bool) bool {
			return str(pick(neg, m.Principals, m.NotPrincipals, i), c.Source.Principal(), known)
		}) && field(len(m.ServiceAccounts), len(m.NotServiceAccounts), func(i int, neg bool) bool {
			if neg {
				return sa(m.NotServiceAccounts[i])
			}
			return sa(m.ServiceAccounts[i])
		}) && field(len(m.SourceIPs), len(m.NotSourceIPs), func(i int, neg bool) bool {
			if neg {
				return m.NotSourceIPs[i].Contains(c.SourceIP)
			}
			return m.SourceIPs[i].Contains(c.SourceIP)
		}) && field(len(m.DestinationIPs), len(m.NotDestinationIPs), func(i int, neg bool) bool {
			if neg {
				return m.NotDestinationIPs[i].Contains(c.Dst.Addr())
			}
			return m.DestinationIPs[i].Contains(c.Dst.Addr())
		}) && field(len(m.DestinationPorts), len(m.NotDestinationPorts), func(i int, neg bool) bool {
			if neg {
				return m.NotDestinationPorts[i] == c.Dst.Port()
			}
			return m.DestinationPorts[i] == c.Dst.Port()
		})
	}
	for _, r := range p.Rules {
		all := true
		for _, cl := range r.Clauses {
			all = all && (len(cl.Matches) == 0 || slices.ContainsFunc(cl.Matches, matches))
		}
		if all {
			return true
		}
	}
	return false
}

func TestAuthorizeAgainstOracle(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBuilder(nil)
		w := pod("server", "10.0.0.3")
		for i := range rapid.IntRange(0, 2).Draw(t, "bound") {
			w.Policies = append(w.Policies, PolicyName{"shop", fmt.Sprint("w", i)})
		}
		b.PutWorkload(w)
		for range rapid.IntRange(0, 8).Draw(t, "policies") {
			b.PutPolicy(genPolicy(t))
		}
		s := b.Commit(1)
		for range 8 {
			c := Conn{
				SourceIP: ip(fmt.Sprintf("10.0.0.%d", rapid.IntRange(0, 3).Draw(t, "src"))),
				Dst:      netip.AddrPortFrom(ip("10.0.0.3"), []uint16{80, 81}[rapid.IntRange(0, 1).Draw(t, "port")]), DstWorkload: w,
			}
			if rapid.Bool().Draw(t, "mtls") {
				c.Source = Identity{"cluster.local", []string{"shop", "other"}[rapid.IntRange(0, 1).Draw(t, "ns")], fmt.Sprint("p", rapid.IntRange(0, 1).Draw(t, "sa"))}
			}
			v := s.Authorize(c)
			if got := strings.Fields(v.text())[0]; got != oracleVerdict(s, w, c) {
				t.Fatalf("%+v: %s, the oracle says %s", c, v.text(), oracleVerdict(s, w, c))
			}
			policies, missing := s.PoliciesOf(w)
			if (missing != nil) != (v.Why == WhyPolicyMissing) {
				t.Fatalf("missing is %v, the verdict %s", missing, v.text())
			}
			if v.Why == WhyDenied && !slices.ContainsFunc(slices.Collect(policies), func(p *Policy) bool { return p.Name == v.By }) {
				t.Fatalf("%s decided and is none of the policies that apply", v.By)
			}
		}
	})
}

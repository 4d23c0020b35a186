package policy

import (
	"strconv"
	"strings"

	securityv1beta1 "istio.io/api/security/v1beta1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// ruleCompiler compiles the rules of one policy and collects what it could not.
type ruleCompiler struct {
	mesh      Mesh
	namespace string
	deny      bool
	audit     bool
	unseen    map[string]bool // attributes that need a waypoint
	invalid   []string        // values that do not parse
}

func (b *ruleCompiler) effect() string {
	switch {
	case b.deny:
		return "a DENY rule that has this denies as if it were not there, so that more is denied than was asked for"
	case b.audit:
		return "a rule that has this matches nothing"
	}
	return "an ALLOW rule that has this matches nothing, so that less is allowed than was asked for"
}

// partial is one Match under construction.
type partial struct {
	mesh.Match
	domains []mesh.StringMatch // trust domains, beside Principals: they make a clause of their own
	never   bool               // it can match nothing (an ALLOW with a value that does not parse)
}

func (p *partial) empty() bool { return p.Match.Equal(mesh.Match{}) }

// rule returns nothing where the rule cannot match any connection. More than one mesh.Rule is what a list of
// trust domains beside one of principals takes.
func (b *ruleCompiler) rule(r *securityv1beta1.Rule) []mesh.Rule {
	unseenHere := false
	for l := range lists(r) {
		if l.http && len(l.values) > 0 {
			if !strings.HasPrefix(l.path, "when") {
				b.unseen[l.name] = true
			}
			unseenHere = true
		}
	}
	var to, from []partial
	for _, t := range r.To {
		op := t.GetOperation()
		var m partial
		m.DestinationPorts = positive(b, &m, op.GetPorts(), parsePort)
		m.NotDestinationPorts = negative(b, &m, op.GetNotPorts(), parsePort)
		to = append(to, m)
	}
	for _, f := range r.From {
		s := f.GetSource()
		var m partial
		m.SourceIPs = positive(b, &m, s.GetIpBlocks(), mesh.ParseRange)
		m.NotSourceIPs = negative(b, &m, s.GetNotIpBlocks(), mesh.ParseRange)
		m.Namespaces = positive(b, &m, s.GetNamespaces(), parseMatch)
		m.NotNamespaces = negative(b, &m, s.GetNotNamespaces(), parseMatch)
		m.Principals = positive(b, &m, b.mesh.principals(s.GetPrincipals()), parseMatch)
		m.NotPrincipals = negative(b, &m, b.mesh.principals(s.GetNotPrincipals()), parseMatch)
		m.ServiceAccounts = positive(b, &m, s.GetServiceAccounts(), b.parseServiceAccount)
		m.NotServiceAccounts = negative(b, &m, s.GetNotServiceAccounts(), b.parseServiceAccount)
		unseenHere = b.trustDomains(&m, s.GetTrustDomains(), s.GetNotTrustDomains()) || unseenHere
		from = append(from, m)
	}
	var clauses [][]partial
	if len(to) > 0 {
		clauses = append(clauses, to)
	}
	for _, w := range r.When {
		var m partial
		switch w.GetKey() {
		case "source.namespace":
			m.Namespaces = positive(b, &m, w.Values, parseMatch)
			m.NotNamespaces = negative(b, &m, w.NotValues, parseMatch)
		case "source.principal":
			m.Principals = positive(b, &m, b.mesh.principals(w.Values), parseMatch)
			m.NotPrincipals = negative(b, &m, b.mesh.principals(w.NotValues), parseMatch)
		case "source.serviceAccount":
			m.ServiceAccounts = positive(b, &m, w.Values, b.parseServiceAccount)
			m.NotServiceAccounts = negative(b, &m, w.NotValues, b.parseServiceAccount)
		case "source.trustDomain":
			unseenHere = b.trustDomains(&m, w.Values, w.NotValues) || unseenHere
		case "source.ip":
			m.SourceIPs = positive(b, &m, w.Values, mesh.ParseRange)
			m.NotSourceIPs = negative(b, &m, w.NotValues, mesh.ParseRange)
		case "destination.ip":
			m.DestinationIPs = positive(b, &m, w.Values, mesh.ParseRange)
			m.NotDestinationIPs = negative(b, &m, w.NotValues, mesh.ParseRange)
		case "destination.port":
			m.DestinationPorts = positive(b, &m, w.Values, parsePort)
			m.NotDestinationPorts = negative(b, &m, w.NotValues, parsePort)
		default: // of HTTP, or one that nobody knows
			b.unseen[short(w.GetKey())] = true
			unseenHere = true
			continue
		}
		clauses = append(clauses, []partial{m})
	}
	if unseenHere && !b.deny {
		return nil
	}
	var out []mesh.Rule
	for _, sources := range splitDomains(from) {
		all := clauses
		if len(from) > 0 {
			all = append(all[:len(all):len(all)], sources...)
		}
		if rule, ok := b.assemble(all); ok {
			out = append(out, rule)
		}
	}
	return out
}

// splitDomains takes the sources with a list of trust domains beside principals out into rules of their own,
// each of which has a clause for either. The first holds what the others are not needed for.
func splitDomains(from []partial) [][][]partial {
	var plain []partial
	var out [][][]partial
	for _, m := range from {
		if len(m.domains) == 0 {
			plain = append(plain, m)
			continue
		}
		domains := partial{Match: mesh.Match{Principals: m.domains}}
		out = append(out, [][]partial{{m}, {domains}})
	}
	if len(plain) > 0 || len(from) == 0 {
		out = append([][][]partial{{plain}}, out...)
	}
	return out
}

// assemble makes a rule of clauses; false where it matches nothing.
func (b *ruleCompiler) assemble(clauses [][]partial) (out mesh.Rule, ok bool) {
	for _, c := range clauses {
		var matches []mesh.Match
		always := false
		for _, m := range c {
			switch {
			case m.never:
			case m.empty():
				// No condition that a node sees is left. A DENY goes without it; for an ALLOW an empty match
				// is a mistake of its author, and matches nothing.
				always = always || b.deny
			default:
				matches = append(matches, m.Match)
			}
		}
		switch {
		case always:
		case len(matches) == 0:
			return mesh.Rule{}, false
		default:
			out.Clauses = append(out.Clauses, mesh.Clause{Matches: matches})
		}
	}
	return out, true
}

// trustDomains adds conditions on the trust domain, which is how a principal begins. It reports whether one of
// them cannot be said that way.
func (b *ruleCompiler) trustDomains(m *partial, values, notValues []string) (unseen bool) {
	parse := func(v string) (mesh.StringMatch, bool) {
		p, ok := parseMatch(v)
		switch {
		case !ok || strings.Contains(v, "/"):
			return p, false
		case p.Kind == mesh.MatchExact:
			p.Kind, p.Value = mesh.MatchPrefix, p.Value+"/"
		case p.Kind == mesh.MatchSuffix:
			b.unseen["trust domains that begin with *"] = true
			unseen = true
			p = mesh.StringMatch{Kind: mesh.MatchPresence} // replaced below
		}
		return p, true
	}
	domains := positive(b, m, b.mesh.domains(values), parse)
	broken := unseen
	unseen = false
	not := negative(b, m, b.mesh.domains(notValues), parse)
	if broken { // what was not understood must not narrow what a DENY denies
		domains = nil
	}
	if unseen {
		not = nil
	}
	m.NotPrincipals = append(m.NotPrincipals, not...)
	if len(m.Principals) == 0 {
		m.Principals = domains
	} else {
		m.domains = domains
	}
	return broken || unseen
}

// positive compiles a list of which one value has to match. A value that does not parse matches nothing in
// an ALLOW; in a DENY the whole list is given up, so that the rule denies more rather than less.
func positive[T any](b *ruleCompiler, m *partial, values []string, parse func(string) (T, bool)) []T {
	var out []T
	broken := false
	for _, v := range values {
		t, ok := parse(v)
		if !ok {
			b.invalid = append(b.invalid, quote(v))
			broken = true
			continue
		}
		out = append(out, t)
	}
	switch {
	case broken && b.deny:
		return nil
	case broken && len(out) == 0:
		m.never = true
	}
	return out
}

// negative compiles a list of which no value may match. A value that does not parse makes an ALLOW match
// nothing; a DENY goes without the exception.
func negative[T any](b *ruleCompiler, m *partial, values []string, parse func(string) (T, bool)) []T {
	var out []T
	for _, v := range values {
		t, ok := parse(v)
		if !ok {
			b.invalid = append(b.invalid, quote(v))
			m.never = m.never || !b.deny
			continue
		}
		out = append(out, t)
	}
	return out
}

// quote shortens what is absurdly long: it ends in conditions and events.
func quote(v string) string {
	if len(v) > 64 {
		return strconv.Quote(v[:64]) + "..."
	}
	return strconv.Quote(v)
}

// short is quote for what reads better bare.
func short(v string) string {
	if len(v) > 64 {
		return quote(v)
	}
	return v
}

func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

func parseMatch(s string) (mesh.StringMatch, bool) {
	switch {
	case s == "":
		return mesh.StringMatch{}, false
	case s == "*":
		return mesh.StringMatch{Kind: mesh.MatchPresence}, true
	case strings.HasPrefix(s, "*"):
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: s[1:]}, true
	case strings.HasSuffix(s, "*"):
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: s[:len(s)-1]}, true
	}
	return mesh.StringMatch{Kind: mesh.MatchExact, Value: s}, true
}

func (b *ruleCompiler) parseServiceAccount(s string) (mesh.ServiceAccountMatch, bool) {
	ns, sa, ok := strings.Cut(s, "/")
	if !ok {
		ns, sa = b.namespace, s
	}
	return mesh.ServiceAccountMatch{Namespace: ns, ServiceAccount: sa}, ns != "" && sa != "" && !strings.Contains(sa, "/")
}

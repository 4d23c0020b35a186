package index

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	securityv1beta1 "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

const annotationDryRun = "istio.io/dry-run"

// authorizationFact is an AuthorizationPolicy compiled for the nodes.
type authorizationFact struct {
	key
	uid      string
	selector map[string]string
	policy   *mesh.Policy // nil where no node can enforce any of it
	// warning says what of the policy the nodes cannot enforce, and what they do instead.
	warning string
}

// authorizationFactOf compiles a policy for enforcement at layer 4. What cannot be seen there makes the
// policy stricter, never weaker: an ALLOW rule that needs it matches nothing, a DENY rule matches without it.
// A policy with targetRefs is for waypoints and gateways and yields nil.
func (c *compiled) authorizationFactOf(p *securityv1.AuthorizationPolicy) *authorizationFact {
	spec := &p.Spec
	if len(spec.TargetRefs) > 0 || spec.TargetRef != nil {
		return nil
	}
	f := &authorizationFact{key: keyOf(p), uid: string(p.UID)}
	if spec.Selector != nil {
		f.selector = spec.Selector.MatchLabels
	}
	out := &mesh.Policy{Name: mesh.PolicyName(f.key)}
	switch {
	case len(f.selector) > 0:
		out.Scope = mesh.ScopeWorkload
	case p.Namespace == c.RootNamespace:
		out.Scope = mesh.ScopeMesh
	default:
		out.Scope = mesh.ScopeNamespace
	}
	switch spec.Action {
	case securityv1beta1.AuthorizationPolicy_ALLOW:
		out.Action = mesh.Allow
	case securityv1beta1.AuthorizationPolicy_DENY:
		out.Action = mesh.Deny
	default:
		f.warning = fmt.Sprintf("nodes do not enforce the action %s; attach the policy to a waypoint with targetRefs", spec.Action)
		return f
	}
	if v, ok := p.Annotations[annotationDryRun]; ok {
		dry, err := strconv.ParseBool(v)
		if err != nil {
			f.warning = fmt.Sprintf("annotation %s=%q is not a boolean; the policy is enforced", annotationDryRun, v)
		}
		out.DryRun = dry
	}
	b := ruleCompiler{namespace: p.Namespace, deny: out.Action == mesh.Deny, unseen: map[string]bool{}}
	for _, r := range spec.Rules {
		if r == nil {
			continue
		}
		if rule, ok := b.rule(r); ok {
			out.Rules = append(out.Rules, rule)
		}
	}
	f.policy = out
	if w := b.warning(); w != "" {
		f.warning = strings.TrimPrefix(f.warning+"; "+w, "; ")
	}
	return f
}

// ruleCompiler compiles the rules of one policy and collects what it could not.
type ruleCompiler struct {
	namespace string
	deny      bool
	unseen    map[string]bool // attributes that need a waypoint
	invalid   []string        // values that do not parse
}

func (b *ruleCompiler) warning() string {
	var parts []string
	if len(b.unseen) > 0 {
		effect := "ALLOW rules with them match nothing"
		if b.deny {
			effect = "DENY rules are enforced without them"
		}
		parts = append(parts, fmt.Sprintf("nodes do not see %s, which need a waypoint: %s, so the policy is stricter than asked for",
			strings.Join(slices.Sorted(maps.Keys(b.unseen)), ", "), effect))
	}
	if len(b.invalid) > 0 {
		parts = append(parts, "not understood: "+strings.Join(b.invalid, ", "))
	}
	return strings.Join(parts, "; ")
}

// partial is one Match under construction.
type partial struct {
	mesh.Match
	never bool // it can match nothing (an ALLOW with a value that does not parse)
}

func (p *partial) empty() bool {
	m := &p.Match
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.Principals)+len(m.NotPrincipals)+
		len(m.ServiceAccounts)+len(m.NotServiceAccounts)+len(m.SourceIPs)+len(m.NotSourceIPs)+
		len(m.DestinationIPs)+len(m.NotDestinationIPs)+len(m.DestinationPorts)+len(m.NotDestinationPorts) == 0
}

// rule returns false where the rule cannot match any connection.
func (b *ruleCompiler) rule(r *securityv1beta1.Rule) (mesh.Rule, bool) {
	var out mesh.Rule
	unseenHere := false

	var to, from []partial
	for _, t := range r.To {
		op := t.GetOperation()
		if op == nil {
			op = &securityv1beta1.Operation{}
		}
		l7 := b.needsHTTP(map[string][]string{
			"hosts": op.Hosts, "notHosts": op.NotHosts, "methods": op.Methods, "notMethods": op.NotMethods,
			"paths": op.Paths, "notPaths": op.NotPaths,
		})
		unseenHere = unseenHere || l7
		var m partial
		m.DestinationPorts = positive(b, &m, op.Ports, parsePort)
		m.NotDestinationPorts = negative(b, &m, op.NotPorts, parsePort)
		to = append(to, m)
	}
	for _, f := range r.From {
		s := f.GetSource()
		if s == nil {
			s = &securityv1beta1.Source{}
		}
		l7 := b.needsHTTP(map[string][]string{
			"remoteIpBlocks": s.RemoteIpBlocks, "notRemoteIpBlocks": s.NotRemoteIpBlocks,
			"requestPrincipals": s.RequestPrincipals, "notRequestPrincipals": s.NotRequestPrincipals,
		})
		unseenHere = unseenHere || l7
		var m partial
		m.SourceIPs = positive(b, &m, s.IpBlocks, parsePrefix)
		m.NotSourceIPs = negative(b, &m, s.NotIpBlocks, parsePrefix)
		m.Namespaces = positive(b, &m, s.Namespaces, parseMatch)
		m.NotNamespaces = negative(b, &m, s.NotNamespaces, parseMatch)
		m.Principals = positive(b, &m, s.Principals, parseMatch)
		m.NotPrincipals = negative(b, &m, s.NotPrincipals, parseMatch)
		m.ServiceAccounts = positive(b, &m, s.ServiceAccounts, b.parseServiceAccount)
		m.NotServiceAccounts = negative(b, &m, s.NotServiceAccounts, b.parseServiceAccount)
		from = append(from, m)
	}
	clauses := [][]partial{}
	if len(to) > 0 {
		clauses = append(clauses, to)
	}
	if len(from) > 0 {
		clauses = append(clauses, from)
	}
	for _, w := range r.When {
		var m partial
		switch w.GetKey() {
		case "source.namespace":
			m.Namespaces = positive(b, &m, w.Values, parseMatch)
			m.NotNamespaces = negative(b, &m, w.NotValues, parseMatch)
		case "source.principal":
			m.Principals = positive(b, &m, w.Values, parseMatch)
			m.NotPrincipals = negative(b, &m, w.NotValues, parseMatch)
		case "source.serviceAccount":
			m.ServiceAccounts = positive(b, &m, w.Values, b.parseServiceAccount)
			m.NotServiceAccounts = negative(b, &m, w.NotValues, b.parseServiceAccount)
		case "source.ip":
			m.SourceIPs = positive(b, &m, w.Values, parsePrefix)
			m.NotSourceIPs = negative(b, &m, w.NotValues, parsePrefix)
		case "destination.ip":
			m.DestinationIPs = positive(b, &m, w.Values, parsePrefix)
			m.NotDestinationIPs = negative(b, &m, w.NotValues, parsePrefix)
		case "destination.port":
			m.DestinationPorts = positive(b, &m, w.Values, parsePort)
			m.NotDestinationPorts = negative(b, &m, w.NotValues, parsePort)
		default:
			b.unseen[w.GetKey()] = true
			unseenHere = true
			continue
		}
		clauses = append(clauses, []partial{m})
	}
	if unseenHere && !b.deny {
		return mesh.Rule{}, false
	}
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

func (b *ruleCompiler) needsHTTP(attributes map[string][]string) bool {
	found := false
	for name, values := range attributes {
		if len(values) > 0 {
			b.unseen[name] = true
			found = true
		}
	}
	return found
}

// positive compiles a list of which one value has to match. A value that does not parse matches nothing in
// an ALLOW; in a DENY the whole list is given up, so that the rule denies more rather than less.
func positive[T any](b *ruleCompiler, m *partial, values []string, parse func(string) (T, bool)) []T {
	var out []T
	broken := false
	for _, v := range values {
		t, ok := parse(v)
		if !ok {
			b.invalid = append(b.invalid, strconv.Quote(v))
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
			b.invalid = append(b.invalid, strconv.Quote(v))
			m.never = m.never || !b.deny
			continue
		}
		out = append(out, t)
	}
	return out
}

func parsePort(s string) (uint16, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil && n > 0
}

func parsePrefix(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		if p.Addr().Is4In6() {
			if p.Bits() < 96 {
				return netip.Prefix{}, false
			}
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		return p.Masked(), true
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, false
	}
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()), true
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

package wds

import (
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/internal/mesh"
)

// EncodePolicy writes a policy; its resource name is Name.String(). An action or scope that the wire cannot
// say is an error: anything written in its place would mean something else. AUDIT is one: see EncodeAudit.
func EncodePolicy(p *mesh.Policy) (*security.Authorization, error) {
	if p.Action > mesh.Deny || p.Scope > mesh.ScopeWorkload {
		return nil, fmt.Errorf("encoding the policy %s: there is no action %d or scope %d", p.Name, p.Action, p.Scope)
	}
	a := encodeBody(p)
	if p.Action == mesh.Deny {
		a.Action = security.Action_DENY
	}
	return a, nil
}

func encodeBody(p *mesh.Policy) *security.Authorization {
	return &security.Authorization{
		Name: p.Name.Name, Namespace: p.Name.Namespace,
		Scope: security.Scope(p.Scope), DryRun: p.DryRun,
		Groups: encodeAll(p.Rules, func(r mesh.Rule) *security.Group {
			return &security.Group{Rules: encodeAll(r.Clauses, func(c mesh.Clause) *security.Rules {
				return &security.Rules{Matches: encodeAll(c.Matches, encodeMatch)}
			})}
		}),
	}
}

// EncodeAudit writes an AUDIT policy; its resource name is Name.String().
func EncodeAudit(p *mesh.Policy) (*node.AuditPolicy, error) {
	if p.Action != mesh.Audit || p.Scope > mesh.ScopeWorkload {
		return nil, fmt.Errorf("encoding the audit policy %s: it has the action %d and the scope %d", p.Name, p.Action, p.Scope)
	}
	return &node.AuditPolicy{Policy: encodeBody(p)}, nil
}

// DecodeAudit reads an AUDIT policy.
func DecodeAudit(a *node.AuditPolicy) (*mesh.Policy, error) {
	p, err := DecodePolicy(a.GetPolicy())
	if err != nil {
		return nil, err
	}
	p.Action, p.DryRun = mesh.Audit, false
	return p, nil
}

func encodeMatch(m mesh.Match) *security.Match {
	return &security.Match{
		Namespaces: encodeAll(m.Namespaces, encodeString), NotNamespaces: encodeAll(m.NotNamespaces, encodeString),
		Principals: encodeAll(m.Principals, encodeString), NotPrincipals: encodeAll(m.NotPrincipals, encodeString),
		ServiceAccounts:    encodeAll(m.ServiceAccounts, encodeAccount),
		NotServiceAccounts: encodeAll(m.NotServiceAccounts, encodeAccount),
		SourceIps:          encodeAll(m.SourceIPs, encodePrefix), NotSourceIps: encodeAll(m.NotSourceIPs, encodePrefix),
		DestinationIps:    encodeAll(m.DestinationIPs, encodePrefix),
		NotDestinationIps: encodeAll(m.NotDestinationIPs, encodePrefix),
		DestinationPorts:  encodeAll(m.DestinationPorts, widen), NotDestinationPorts: encodeAll(m.NotDestinationPorts, widen),
	}
}

func widen(p uint16) uint32 { return uint32(p) }

func encodeString(m mesh.StringMatch) *security.StringMatch {
	switch m.Kind {
	case mesh.MatchPrefix:
		return &security.StringMatch{MatchType: &security.StringMatch_Prefix{Prefix: m.Value}}
	case mesh.MatchSuffix:
		return &security.StringMatch{MatchType: &security.StringMatch_Suffix{Suffix: m.Value}}
	case mesh.MatchPresence:
		return &security.StringMatch{MatchType: &security.StringMatch_Presence{Presence: &emptypb.Empty{}}}
	default:
		return &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: m.Value}}
	}
}

func encodeAccount(m mesh.ServiceAccountMatch) *security.ServiceAccountMatch {
	return &security.ServiceAccountMatch{Namespace: m.Namespace, ServiceAccount: m.ServiceAccount}
}

func encodePrefix(p netip.Prefix) *security.Address {
	return &security.Address{Address: encodeAddr(p.Addr()), Length: uint32(p.Bits())}
}

// DecodePolicy reads a policy. With an error it returns one that denies everything in the scope that could be
// read, or nil where not even that could: for a node that has no earlier version to go on with.
func DecodePolicy(a *security.Authorization) (*mesh.Policy, error) {
	p := &mesh.Policy{Name: mesh.PolicyName{Namespace: a.GetNamespace(), Name: a.GetName()}, DryRun: a.GetDryRun()}
	if _, err := ParsePolicyName(p.Name.String()); err != nil {
		return nil, err
	}
	switch a.Scope {
	case security.Scope_GLOBAL:
		p.Scope = mesh.ScopeMesh
	case security.Scope_NAMESPACE:
		p.Scope = mesh.ScopeNamespace
	case security.Scope_WORKLOAD_SELECTOR:
		p.Scope = mesh.ScopeWorkload
	default:
		return nil, bad("the policy %s has the scope %d", p.Name, a.Scope)
	}
	if err := decodeRules(p, a); err != nil {
		standIn := &mesh.Policy{Name: p.Name, Scope: p.Scope, Action: mesh.Deny, DryRun: p.DryRun, Rules: []mesh.Rule{{}}}
		return standIn, bad("the policy %s: %w", p.Name, err)
	}
	return p, nil
}

func decodeRules(p *mesh.Policy, a *security.Authorization) error {
	switch a.Action {
	case security.Action_ALLOW:
		p.Action = mesh.Allow
	case security.Action_DENY:
		p.Action = mesh.Deny
	default:
		return bad("the action %d", a.Action)
	}
	var err error
	p.Rules, err = decodeAll(a.Groups, func(g *security.Group) (mesh.Rule, error) {
		clauses, err := decodeAll(g.GetRules(), func(r *security.Rules) (mesh.Clause, error) {
			matches, err := decodeAll(r.GetMatches(), decodeMatch)
			return mesh.Clause{Matches: matches}, errors.Join(err, understood(r))
		})
		return mesh.Rule{Clauses: clauses}, errors.Join(err, understood(g))
	})
	return err
}

// understood refuses a part of a rule that has fields of a later version: an ALLOW would match more without
// them, a DENY nothing.
func understood(m proto.Message) error {
	if unknown := m.ProtoReflect().GetUnknown(); len(unknown) > 0 {
		n, _, _ := protowire.ConsumeTag(unknown)
		return bad("a %s with the field %d", m.ProtoReflect().Descriptor().Name(), n)
	}
	return nil
}

func decodeMatch(m *security.Match) (d mesh.Match, err error) {
	if err := understood(m); err != nil {
		return d, err
	}
	lists := []struct {
		to   *[]mesh.StringMatch
		from []*security.StringMatch
	}{
		{&d.Namespaces, m.Namespaces}, {&d.NotNamespaces, m.NotNamespaces},
		{&d.Principals, m.Principals}, {&d.NotPrincipals, m.NotPrincipals},
	}
	for _, l := range lists {
		if *l.to, err = decodeAll(l.from, decodeString); err != nil {
			return d, err
		}
	}
	prefixes := []struct {
		to   *[]netip.Prefix
		from []*security.Address
	}{
		{&d.SourceIPs, m.SourceIps}, {&d.NotSourceIPs, m.NotSourceIps},
		{&d.DestinationIPs, m.DestinationIps}, {&d.NotDestinationIPs, m.NotDestinationIps},
	}
	for _, l := range prefixes {
		*l.to, err = decodeAll(l.from, func(a *security.Address) (netip.Prefix, error) {
			p, err := decodePrefix(a.GetAddress(), a.GetLength())
			return p, errors.Join(err, understood(a))
		})
		if err != nil {
			return d, err
		}
	}
	if d.ServiceAccounts, err = decodeAll(m.ServiceAccounts, decodeAccount); err != nil {
		return d, err
	}
	if d.NotServiceAccounts, err = decodeAll(m.NotServiceAccounts, decodeAccount); err != nil {
		return d, err
	}
	if d.DestinationPorts, err = decodeAll(m.DestinationPorts, decodePort); err != nil {
		return d, err
	}
	d.NotDestinationPorts, err = decodeAll(m.NotDestinationPorts, decodePort)
	return d, err
}

func decodeString(m *security.StringMatch) (mesh.StringMatch, error) {
	switch t := m.GetMatchType().(type) {
	case *security.StringMatch_Exact:
		return mesh.StringMatch{Kind: mesh.MatchExact, Value: t.Exact}, nil
	case *security.StringMatch_Prefix:
		return mesh.StringMatch{Kind: mesh.MatchPrefix, Value: t.Prefix}, nil
	case *security.StringMatch_Suffix:
		return mesh.StringMatch{Kind: mesh.MatchSuffix, Value: t.Suffix}, nil
	case *security.StringMatch_Presence:
		return mesh.StringMatch{Kind: mesh.MatchPresence}, nil
	default:
		return mesh.StringMatch{}, bad("a string match of a kind that is not known")
	}
}

func decodeAccount(m *security.ServiceAccountMatch) (mesh.ServiceAccountMatch, error) {
	return mesh.ServiceAccountMatch{Namespace: m.GetNamespace(), ServiceAccount: m.GetServiceAccount()}, understood(m)
}

// decodePrefix reads a prefix. Bits beyond its length are cleared, as they are when it is matched.
func decodePrefix(b []byte, length uint32) (netip.Prefix, error) {
	raw, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Prefix{}, bad("an address of %d bytes", len(b))
	}
	if length > uint32(raw.BitLen()) {
		return netip.Prefix{}, bad("the prefix %s/%d", raw, length)
	}
	if raw.Is4In6() && length >= 96 {
		raw, length = raw.Unmap(), length-96
	}
	return netip.PrefixFrom(raw, int(length)).Masked(), nil
}

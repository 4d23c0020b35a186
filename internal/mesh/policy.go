package mesh

import (
	"net/netip"
	"strings"
)

// PolicyName is the key of a Policy.
type PolicyName struct{ Namespace, Name string }

// String returns "namespace/name", the wire form.
func (n PolicyName) String() string { return n.Namespace + "/" + n.Name }

// OfPeerAuthentication reports whether the policy is made of a PeerAuthentication. The name of an AuthorizationPolicy,
// being one of Kubernetes, has no '_'.
func (n PolicyName) OfPeerAuthentication() bool { return strings.Contains(n.Name, "_") }

// Action is what a policy does with what it matches.
type Action uint8

const (
	Allow Action = iota
	Deny
	Audit
	Custom // a provider decides; of an AccessPolicy alone
)

// Scope is what a policy binds to.
type Scope uint8

const (
	ScopeMesh      Scope = iota // every workload
	ScopeNamespace              // every workload of the policy's namespace
	ScopeWorkload               // the workloads that name it in Workload.Policies
)

// Policy is one compiled L4 authorization policy, shaped as istio.security.Authorization:
// it matches when any Rule matches; a Rule matches when all its Clauses do; a Clause when any Match does;
// a Match when all its non-empty fields do. A policy without rules matches nothing.
type Policy struct {
	Name     PolicyName
	Scope    Scope
	Action   Action
	DryRun   bool
	Rules    []Rule
	Revision uint64
}

// Rule is an AND of clauses. No clause matches everything.
type Rule struct{ Clauses []Clause }

// Clause is an OR of matches. No match matches everything.
type Clause struct{ Matches []Match }

// Match is an AND of its non-empty fields; each field is an OR of its elements, a Not field is true when
// none of its elements match. A Match without any field matches nothing. A peer that did not authenticate has
// no principal and no service account, and the empty namespace.
type Match struct {
	Namespaces, NotNamespaces             []StringMatch
	Principals, NotPrincipals             []StringMatch // without spiffe://
	ServiceAccounts, NotServiceAccounts   []ServiceAccountMatch
	SourceIPs, NotSourceIPs               []netip.Prefix
	DestinationIPs, NotDestinationIPs     []netip.Prefix
	DestinationPorts, NotDestinationPorts []uint16
}

// StringMatchKind is how a StringMatch compares.
type StringMatchKind uint8

const (
	MatchExact StringMatchKind = iota
	MatchPrefix
	MatchSuffix
	MatchPresence
)

// StringMatch compares one string attribute. Presence needs a non-empty attribute.
type StringMatch struct {
	Kind  StringMatchKind
	Value string
}

// ServiceAccountMatch names a service account exactly.
type ServiceAccountMatch struct{ Namespace, ServiceAccount string }

// ParseRange reads a range in CIDR notation, or an address, which is a range of one. One of IPv4 may be written in IPv6's mapped form
// (RFC 4291, 2.5.5.2); zones have no meaning in a mesh.
func ParseRange(s string) (netip.Prefix, bool) {
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

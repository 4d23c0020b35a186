package mesh

import "net/netip"

// AccessPolicy is an authorization policy of a service as its waypoint decides it, request by request: what a Deny policy
// matches is denied; where there is an Allow policy, one of them has to match. A policy matches where one of its rules does.
type AccessPolicy struct {
	Name   PolicyName
	Action Action // Allow or Deny
	Rules  []AccessRule
}

// AccessRule holds where all its clauses do; without any it holds always.
type AccessRule struct{ Clauses []AccessClause }

// AccessClause holds where one of its lists of tests does, every test of it. It is either about who asks or about what is
// asked for.
type AccessClause struct {
	Who bool
	Any [][]AccessTest
}

// AccessAttribute is what a test looks at.
type AccessAttribute uint8

const (
	AccessPrincipal      AccessAttribute = iota // the peer's identity without spiffe://
	AccessNamespace                             // the peer's
	AccessServiceAccount                        // the peer's, as namespace/name
	AccessTrustDomain                           // the peer's
	AccessSourceIP
	AccessRemoteIP
	AccessDestinationIP
	AccessPort // of the service
	AccessHost
	AccessMethod
	AccessPath
	AccessHeader
)

// HTTP reports whether only a request has the attribute.
func (a AccessAttribute) HTTP() bool { return a >= AccessHost || a == AccessRemoteIP }

// Who reports whether the attribute is the client's.
func (a AccessAttribute) Who() bool { return a <= AccessRemoteIP }

// AccessTest compares an attribute with values, of which one has to match, or none if Not.
type AccessTest struct {
	On     AccessAttribute
	Header string // whose, of AccessHeader
	Not    bool
	Text   []TextMatch
	Nets   []netip.Prefix
	Ports  []uint16
}

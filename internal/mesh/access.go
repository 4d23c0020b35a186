package mesh

import (
	"net/netip"
	"time"
)

// AccessPolicy is an authorization policy of a service as its waypoint decides it, request by request: what a Deny policy
// matches is denied; where there is an Allow policy, one of them has to match. What an Audit policy matches is noted, and
// nothing decided. A policy matches where one of its rules does.
type AccessPolicy struct {
	Name   PolicyName
	Action Action
	DryRun bool          // what it would do is noted, and not done
	Ask    *AuthProvider // of a Custom policy: decides about what it matches, before the others
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
	AccessTokenPrincipal // issuer/subject of a verified token
	AccessClaim          // of a verified token
	AccessDestinationIP
	AccessPort // of the service
	AccessHost
	AccessMethod
	AccessPath
	AccessHeader
)

// HTTP reports whether only a request has the attribute.
func (a AccessAttribute) HTTP() bool {
	return a >= AccessHost || a == AccessRemoteIP || a == AccessTokenPrincipal || a == AccessClaim
}

// Who reports whether the attribute is the client's.
func (a AccessAttribute) Who() bool { return a <= AccessClaim }

// AccessTest compares an attribute with values, of which one has to match, or none if Not.
type AccessTest struct {
	On     AccessAttribute
	Header string   // whose, of AccessHeader
	Claim  []string // whose, of AccessClaim: its name, and the names inside it
	Not    bool
	Text   []TextMatch
	Nets   []netip.Prefix
	Ports  []uint16
}

// AuthProvider is a service that decides about requests. What it does not answer is denied.
type AuthProvider struct {
	Service    ServiceName
	Port       uint16
	GRPC       bool
	Timeout    time.Duration
	PathPrefix string // of what is asked by HTTP

	// Sees are the headers of a request that it gets, where a route asks it. None: by gRPC all of them, by HTTP those that every
	// question has (host, method, path, authorization).
	Sees              []TextMatch
	Add               []HTTPHeader // that it gets by HTTP, beside those of the request
	ToApplication     []TextMatch  // headers of its answer that the application gets
	ToClientOnAllow   []TextMatch
	ToClientOnDeny    []TextMatch
	MaxBody           uint32 // that it gets; 0: none
	PartOfBody, Bytes bool
}

// TokenRule says how the tokens of one issuer are verified. A request whose token is not valid is refused; one without a
// token is not, and has no attributes of one.
type TokenRule struct {
	Issuer    string   // "" for any
	Audiences []string // one of them; empty: any
	Keys      string   // a JSON Web Key Set; "" while there is none, and no token is valid

	FromHeaders []TokenHeader // none of the three: the header Authorization and the parameter access_token
	FromParams  []string
	FromCookies []string

	Forward       bool   // the application gets the token too
	PayloadHeader string // that the application gets the payload in
	Claims        []TokenClaim
	SpaceLists    []string // claims that are lists written with spaces
}

// TokenHeader is where a token is, after a prefix.
type TokenHeader struct{ Name, Prefix string }

// TokenClaim is a claim that the application gets in a header.
type TokenClaim struct{ Header, Claim string }

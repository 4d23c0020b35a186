package mesh

import "time"

// RateLimit is how many requests each process of a waypoint or a gateway lets through, or all of them together: the rest is answered
// with 429. Where each process counts for itself, a service has a bucket of its own for each port, a gateway for each listener. Where By
// is not empty, there is one for each client. Of several limits that a request is counted by, all have to let it through.
type RateLimit struct {
	Name      string        // of all limits of a service or a gateway this one's alone: namespace/object/number
	Requests  uint32        // in Per; at least 1
	Per       time.Duration // a second, a minute or an hour
	Burst     uint32        // that may come at once after a pause, and as the first; at least 1. Who counts for all of them does not know it
	Match     LimitMatch
	By        []LimitKey    // what tells clients apart; empty: all have the same bucket
	CountedBy *LimitCounter // nil: each process for itself
}

// LimitCounter counts for all processes together. It speaks envoy.service.ratelimit.v3, and is told the limit with each request.
type LimitCounter struct {
	Service  ServiceName // none: it is as one that does not answer
	Port     uint16
	Domain   string
	Timeout  time.Duration // within which it has to answer
	FailOpen bool          // what it says nothing about is let through, rather than answered with 503
}

// LimitMatch says which requests are counted: those for which one of each list that is not empty holds, and every header.
type LimitMatch struct {
	Methods []string
	Paths   []TextMatch // without the query; TextExact, TextPath or TextRegex
	Headers []NamedMatch
}

// LimitAttribute is what tells clients apart.
type LimitAttribute uint8

const (
	LimitPrincipal LimitAttribute = iota // the identity in the client's certificate
	LimitNamespace                       // the one in that identity
	LimitAddress                         // the client's, as the connection has it
	LimitHeader                          // of the request
)

// LimitKey is one attribute of the client. Those who do not have it are one client.
type LimitKey struct {
	On     LimitAttribute
	Header string // whose value, of LimitHeader; in lower case
}

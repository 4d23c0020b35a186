package mesh

import (
	"slices"
	"time"
)

// Traffic is how a waypoint uses the endpoints of a service, or of a subset and a port of it. Zero fields leave what is
// otherwise done.
type Traffic struct {
	Subset string // "": of all endpoints
	Port   uint16 // of the service; 0: of those that have no Traffic of their own
	From   string // for what this namespace sends alone, see HTTPBackend; "": for all others

	Balance Balance
	Hash    *HashKey // instead of Balance

	ConnectTimeout           time.Duration // to endpoints without a tunnel
	IdleTimeout              time.Duration // of connections without a request
	MaxConnections           uint32
	MaxPending               uint32 // requests that wait for a connection
	MaxRequests              uint32 // at a time
	MaxRetries               uint32 // at a time
	MaxRequestsPerConnection uint32

	Outliers *Outliers
	TLS      *BackendTLS // nil: none but the mesh's own
}

// Balance says which endpoint is next.
type Balance uint8

const (
	BalanceLeastRequests Balance = iota
	BalanceRandom
	BalanceRoundRobin
)

// HashKey is what requests share that are to meet the same endpoint: one of its fields.
type HashKey struct {
	Header, Query    string
	Cookie           string
	CookiePath       string
	CookieTTL        *time.Duration // nil: the waypoint sets no cookie
	SourceIP         bool
	Maglev           bool // rather than a ring
	RingSize, Tables uint64
}

// Outliers says when an endpoint is taken out for a time. Nil counts leave the default, 0 switches off.
type Outliers struct {
	Consecutive5xx, ConsecutiveGateway, ConsecutiveLocal *uint32
	SplitLocal                                           bool // failures to connect count for themselves
	Interval, Ejection                                   time.Duration
	MaxPercent                                           uint32 // of endpoints that are out at a time
	MinHealthyPercent                                    uint32 // below which all are used
}

// RuledBy reports whether a namespace has a DestinationRule of its own for what it sends to a service of another one.
func (s *Service) RuledBy(namespace string) bool {
	return namespace != "" && (slices.ContainsFunc(s.Subsets, func(o Subset) bool { return o.From == namespace }) ||
		slices.ContainsFunc(s.Traffic, func(o Traffic) bool { return o.From == namespace }))
}

// RuledFor reports whether what is said by a rule, that of a namespace which sends or ("") the service's own, is for the waypoints and
// gateways of a namespace.
func (s *Service) RuledFor(from, namespace string) bool {
	return from != "" || s.RuleIn == nil || slices.Contains(s.RuleIn, namespace)
}

// TrafficFor is what holds for a subset and a port of a service by the rule of a namespace that sends to it ("": by the service's
// own); nil for nothing.
func (s *Service) TrafficFor(from, subset string, port uint16) *Traffic {
	var best *Traffic
	rank := -1
	for i := range s.Traffic {
		t := &s.Traffic[i]
		if t.From != from || t.Subset != "" && t.Subset != subset || t.Port != 0 && t.Port != port {
			continue
		}
		r := 0
		if t.Subset != "" { // what is said of the subset has what is said of the service in it
			r = 2
		}
		if t.Port != 0 {
			r++
		}
		if r > rank {
			best, rank = t, r
		}
	}
	return best
}

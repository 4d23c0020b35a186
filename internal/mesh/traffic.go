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

	Balance  Balance
	Hash     *HashKey    // instead of Balance
	Warmup   *Warmup     // of endpoints that are new
	Locality *LocalityLB // nil: what the service prefers, or else the nearest where Outliers are

	ConnectTimeout           time.Duration // to endpoints without a tunnel
	Keepalive                *Keepalive    // of connections to endpoints without a tunnel
	ConnectionDuration       time.Duration // after which connections are ended
	TCPIdleTimeout           time.Duration // of connections that are not HTTP
	IdleTimeout              time.Duration // of connections without a request
	Ping, PingTimeout        time.Duration // of HTTP/2: how often the endpoint is asked whether it is there, and for how long
	Speak                    Speak
	MaxStreams               uint32 // at a time on a connection of HTTP/2
	MaxConnections           uint32
	MaxPending               uint32       // requests that wait for a connection
	MaxRequests              uint32       // at a time
	MaxRetries               uint32       // at a time
	RetryBudget              *RetryBudget // instead of MaxRetries
	MaxRequestsPerConnection uint32

	Outliers *Outliers
	TLS      *BackendTLS // nil: none but the mesh's own
	Forward  *Forward    // of connections, not of requests: the endpoints are proxies that bring them elsewhere
	Proxied  uint8       // version of the PROXY protocol's header, by which endpoints are told the client's address; 0: none
}

// Forward asks a proxy for a connection to an address, as DestinationRules have it for servers that only such a proxy reaches.
type Forward struct {
	To   string // host:port
	Post bool   // by POST rather than by CONNECT
}

// Speak is which HTTP endpoints are spoken to in, where their port does not say it.
type Speak uint8

const (
	SpeakDefault Speak = iota // what the waypoint's client speaks; HTTP/1.1 from gateways and by TLS
	SpeakClient               // what the client speaks, everywhere
	SpeakHTTP2
)

// Warmup has an endpoint that is new get fewer requests at first.
type Warmup struct {
	Over       time.Duration
	Percent    *float64 // of its share that it begins with; nil: 10
	Aggression *float64 // above 1 it gets more earlier; nil: 1, the same more each second
}

// Keepalive are the kernel's probes of connections (tcp(7)). What is 0 is as the kernel has it.
type Keepalive struct {
	Probes         uint32
	Idle, Interval time.Duration // in seconds, to the kernel
}

// RetryBudget bounds retries by the requests there are.
type RetryBudget struct {
	Percent float64       // of the requests at a time
	Over    time.Duration // 0: of those at a time alone; else of those that began within it, too
	Least   uint32        // retries at a time that there may always be
}

// LocalityLB says which endpoints of a service are used from where, as Istio's LocalityLoadBalancerSetting. Localities are
// "region/zone/subzone", the last ones "*" or left out for all; or, with Zones, as its ZoneAwareLoadBalancerSetting.
type LocalityLB struct {
	Off        bool           // all endpoints are alike
	Distribute []Distribution // the first that is for the proxy holds; for others all endpoints are alike
	Failover   []RegionFailover
	Labels     []string // instead of the locality: keys, or key=value, of which an endpoint shares the more from the first with the proxy the nearer it is
	// Zones has a proxy send to its own zone as much as keeps all endpoints of its region evenly busy, where these are at least Least. Labels
	// then come before regions, and not instead of them.
	Zones bool
	Least uint32
}

// Distribution shares out what is sent from a locality. What is not listed gets nothing.
type Distribution struct {
	From string
	To   []LocalityShare
}

// LocalityShare is what endpoints of a locality get together.
type LocalityShare struct {
	Locality string
	Percent  uint32
}

// RegionFailover is the region that is next to another.
type RegionFailover struct{ From, To string }

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
	CookieAttributes []HTTPHeader   // of the cookie that it sets; no value: the name alone
	SourceIP         bool
	Maglev           bool // rather than a ring
	RingSize, Tables uint64
}

// Outliers says when an endpoint is taken out for a time. Nil counts leave the default, 0 switches off.
type Outliers struct {
	Consecutive5xx, ConsecutiveGateway, ConsecutiveLocal *uint32
	SplitLocal                                           bool // failures to connect count for themselves
	Interval, Ejection                                   time.Duration
	MaxPercent                                           uint32   // of endpoints that are out at a time
	MinHealthyPercent                                    uint32   // below which all are used
	Errors                                               []uint32 // the statuses that are failures; empty: those from 500
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

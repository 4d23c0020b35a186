package mesh

import (
	"net/netip"
	"reflect"
	"slices"
	"time"
)

// HTTPRule is one rule of a service's HTTP routing. Of a service's rules the first that matches a request decides; a
// request that none matches is answered with 404. Nodes know nothing of them: they are for waypoints.
type HTTPRule struct {
	Name    string      // for logs: who wrote it, and the rule's own name
	Matches []HTTPMatch // one of them has to match; empty: every request does
	Port    uint16      // of the service: the rule is there for requests to it alone; 0: for all ports
	// From is the namespace of the clients that the rule is there for. They meet no rule without one, as long as their
	// namespace has any for the port. "": for all others.
	From string
	GRPC bool // it is about calls of gRPC: those that fail are answered in its words

	// What becomes of a request: exactly one of these.
	Backends []HTTPBackend
	Redirect *HTTPRedirect
	Direct   *HTTPDirect
	Invalid  string // why the rule cannot be followed: its requests are answered with 500

	Rewrite  *HTTPRewrite
	Request  HTTPHeaders
	Response HTTPHeaders
	Timeout  time.Duration // 0: none
	Retries  *HTTPRetries  // nil: the default
	Delay    *HTTPDelay
	Abort    *HTTPAbort
	Mirrors  []HTTPMirror
	Session  *HTTPSession // nil: none
	CORS     *HTTPCORS
	Ask      *AuthProvider // decides about its requests, beside all policies; nil: nobody
}

// TextKind says how a TextMatch compares.
type TextKind uint8

const (
	TextAny    TextKind = iota // whatever the value is
	TextExact                  // the whole value
	TextPrefix                 // its beginning
	TextPath                   // its beginning, up to a slash or the end
	TextRegex                  // the whole value, RE2
	TextAbsent                 // there is no value
	TextSuffix                 // its end
)

// TextMatch is a condition on one value.
type TextMatch struct {
	Kind  TextKind
	Value string
}

// NamedMatch is a condition on a header or a query parameter.
type NamedMatch struct {
	Name   string
	Match  TextMatch
	Invert bool
}

// HTTPMatch holds where all its conditions do.
type HTTPMatch struct {
	Port       uint16 // of the service; 0: any
	Path       TextMatch
	IgnoreCase bool // of the path
	Method     TextMatch
	Scheme     TextMatch
	Authority  TextMatch
	Headers    []NamedMatch
	Query      []NamedMatch
	Source     string            // namespace of the client, as its identity says; "": any
	Labels     map[string]string // of the client, which At are the addresses of; empty: any client
	At         []netip.Addr      // sorted
}

// HTTPBackend is where a share of the requests goes.
type HTTPBackend struct {
	Service  ServiceName
	Subset   string // "" for all endpoints
	Port     uint16 // 0: that of the request
	From     string // namespace whose DestinationRule for the service holds, where there is one; "": only the service's own
	Weight   uint32
	Request  HTTPHeaders
	Response HTTPHeaders
	Invalid  string // why nothing can be sent there: its share is answered with 500
}

// Routed is a port of a service of which connections are shared out to backends.
type Routed struct {
	Port     uint16
	Names    []string    // only those with TLS that ask for one of these server names, perhaps "*.domain"; empty: all others
	From     string      // only those of clients of this namespace, who meet no other of its kind (with Names, without); "": all others
	Only     *RoutedOnly // those of which this holds, too; of several for the same the first has them. nil: all
	Beside   bool        // only those that are no requests, where both may come; false: whatever is in them
	Backends []HTTPBackend
}

// RoutedOnly is what has to hold of connections, all of it.
type RoutedOnly struct {
	Source   string         // namespace of the client, as its identity says; "": any
	From, To []netip.Prefix // of the client's address, and of the one that it asks for; empty: any
}

// RoutedAt is what says where connections of a namespace's clients ("": of all others) to a port go that neither a server name nor anything else of them decides
// about; nil where that is the service itself.
func (s *Service) RoutedAt(from string, port uint16) *Routed {
	for i := range s.Routed {
		if s.Routed[i].From == from && s.Routed[i].Port == port && len(s.Routed[i].Names) == 0 && s.Routed[i].Only == nil {
			return &s.Routed[i]
		}
	}
	return nil
}

// HTTPHeader is a header and its value.
type HTTPHeader struct{ Name, Value string }

// HTTPHeaders changes headers; what is set replaces, what is added comes beside.
type HTTPHeaders struct {
	Set, Add []HTTPHeader
	Remove   []string
}

// HTTPRedirect answers with another address. Empty fields keep what the request has.
type HTTPRedirect struct {
	Scheme, Host, Path string
	Prefix             *string // replaces what was matched of the path
	Port               uint16
	Code               uint32
	// OwnPort has a redirect without Port lead to that of its Scheme, or else to the one that was asked, whatever the
	// request says of it.
	OwnPort bool
}

// HTTPDirect answers without a backend.
type HTTPDirect struct {
	Status uint32
	Body   string
}

// HTTPRewrite changes the request on its way. At most one of Prefix, Path and Regex is set.
type HTTPRewrite struct {
	Host         string
	Prefix       *string // replaces the prefix that was matched
	Path         *string // replaces the whole path
	Regex        string  // what of the path is replaced by Substitution
	Substitution string
}

// HTTPRetries says when a request is tried again.
type HTTPRetries struct {
	Attempts    uint32 // beside the first; 0: none
	PerTry      time.Duration
	Backoff     time.Duration // the least time between two; 0: the default
	On          string        // Envoy's words; "": the default
	StatusCodes []uint32
}

// HTTPDelay holds up a share of requests.
type HTTPDelay struct {
	Fixed      time.Duration
	Millionths uint32
}

// HTTPAbort fails a share of requests.
type HTTPAbort struct {
	Status, GRPC uint32 // one of them
	Millionths   uint32
}

// HTTPMirror sends a copy of a share of requests to another backend, whose answers nobody reads.
type HTTPMirror struct {
	Backend    HTTPBackend
	Millionths uint32
}

// HTTPSession has the requests of a session meet the endpoint that the first of them met, as long as it is there. Endpoints are told apart by what a
// proxy writes into answers, and finds in requests.
type HTTPSession struct {
	Name   string        // of the cookie or the header
	Header bool          // rather than a cookie
	TTL    time.Duration // of the cookie; 0: as long as the browser's session
}

// HTTPCORS answers preflight requests.
type HTTPCORS struct {
	Origins       []TextMatch
	Methods       []string
	AllowHeaders  []string
	ExposeHeaders []string
	MaxAge        time.Duration
	Credentials   bool
	Asked         bool // * for methods or headers is answered with what a preflight asks for: with credentials * is no wildcard to browsers
	Answer        bool // preflights of other origins are answered, without leave, rather than forwarded
}

// Million is all requests, where a share is given in millionths.
const Million = 1_000_000

// Subset are the endpoints of a service that have certain labels.
type Subset struct {
	Name   string
	Labels map[string]string
	From   string // for what this namespace sends alone, see HTTPBackend; "": for all others
}

func equalHTTP(a, b *Service) bool {
	return reflect.DeepEqual(a.HTTP, b.HTTP) && reflect.DeepEqual(a.Routed, b.Routed) && reflect.DeepEqual(a.Subsets, b.Subsets) && reflect.DeepEqual(a.RuleIn, b.RuleIn) && reflect.DeepEqual(a.Access, b.Access) && reflect.DeepEqual(a.Tokens, b.Tokens) && reflect.DeepEqual(a.Limits, b.Limits) && slices.Equal(a.Patches, b.Patches) && reflect.DeepEqual(a.Plugins, b.Plugins) && reflect.DeepEqual(a.Traffic, b.Traffic) &&
		reflect.DeepEqual(a.Telemetry, b.Telemetry) && reflect.DeepEqual(a.TLS, b.TLS) && a.OneAddress == b.OneAddress && a.Dynamic == b.Dynamic
}

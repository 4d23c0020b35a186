package mesh

// Telemetry is what a waypoint or a gateway tells of what it carries. Nil: all metrics, and a line of JSON on standard
// output for what is notable.
type Telemetry struct {
	Tracing *Tracing       // nil: no spans, and headers of traces pass as they come
	Logs    []AccessLog    // empty: none is written
	Metrics []MetricChange // in this order, later ones upon earlier ones
}

// TelemetryKind is what a provider takes, and how.
type TelemetryKind uint8

const (
	TelemetryUnsupported   TelemetryKind = iota // Problem says why
	TelemetryStdout                             // access logs, JSON
	TelemetryPrometheus                         // metrics, where they are scraped
	TelemetryOpenTelemetry                      // spans, OTLP by gRPC
	TelemetryZipkin                             // spans, Zipkin's API v2 in JSON
	TelemetryOTLPLogs                           // access logs, OTLP by gRPC
)

// TelemetryProvider is where spans, logs or metrics go. What it does not take is lost; no request fails for it.
type TelemetryProvider struct {
	Name string
	Kind TelemetryKind

	Service ServiceName // that it is sent to; the zero value for those that nothing is sent to
	Port    uint16

	LogName      string // of logs
	MaxPath      uint32 // bytes of a request's path in a span; 0: 256
	Path         string // of Zipkin's API
	ShortIDs     bool   // Zipkin: traces have ids of 64 bits
	TraceParents bool   // Zipkin: W3C's headers are read and written beside B3's

	Problem string // why nothing can be sent to it
}

// Tracing says which requests have spans and what is in them.
type Tracing struct {
	To      *TelemetryProvider
	Percent float64 // of the requests that come without a decision about their trace, 0 to 100
	Tags    []SpanTag

	NoWorkloads     bool // spans do not tell from whom to whom
	NoPropagation   bool // applications do not learn of the trace
	IgnoreRequestID bool // the id of a request, which those before may have had, does not decide
}

// SpanTag is a tag of spans. One of Literal, Header and Environment is its value.
type SpanTag struct {
	Name        string
	Literal     string
	Header      string // of the request
	Environment string // variable of the proxy's process
	Default     string // where the header or the variable is not there; "" leaves the tag out
}

// AccessLog is a place where lines go about requests, and connections when they end.
type AccessLog struct {
	To      *TelemetryProvider
	Filter  string // expression in CEL that has to hold; "": always
	Notable bool   // only of what failed or was refused, and of what AUDIT policies and dry runs are about
}

// MetricChange is how a metric differs from Istio's standard.
type MetricChange struct {
	Metric  string            // "" for all
	Disable *bool             // nil: as it was
	Remove  []string          // tags
	Set     map[string]string // tags, to these values
}

package waypoint

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	serviceconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/ratelimit/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	sfsvaluev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	h2mv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	localv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/local_ratelimit/v3"
	countedv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ratelimit/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	earlyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	// limitStats begins the names of Envoy's own counters of limits.
	limitStats = "warren"
	// counterPrefix begins the names of the filters that ask who counts for all processes.
	counterPrefix = "warren.counted."
	// limitEntry is the entry of a descriptor that says which limit counts.
	limitEntry = "limit"
	// unsaidClient are all clients that do not have what tells clients apart.
	unsaidClient = "-"
	// maxClients is how many clients of one limit are told apart; of more, the one that was away longest begins anew.
	maxClients = 10_000
	// longestKey is how much of a header tells clients apart, in bytes: it is kept for each of them.
	longestKey = "256"

	// provenHeader and stateNamespace are how the namespace in a client's certificate, which no formatter takes out of it,
	// comes from where the tunnel ends to the limits: the header is written before anything reads it, whatever a client says.
	provenHeader   = "x-warren-proven-principal"
	metaProven     = "warren.proven"
	stateNamespace = "warren.source.proven_namespace"
)

// limitFilter counts requests and refuses those that are too many, after all decisions about who may ask. What it knows is a
// resource of its own (ECDS): a change reaches the next request of connections that are open, and whatever else changes, the
// buckets stay as full as they are.
func (b *builder) limitFilter(c chain) *hcmv3.HttpFilter {
	return b.apart(c.name("limits"), buckets(c.svc.Limits))
}

// buckets are those of limits that each process counts by. Without any nothing is counted.
func buckets(list []mesh.RateLimit) *localv3.LocalRateLimit {
	out := &localv3.LocalRateLimit{StatPrefix: limitStats}
	list = slices.DeleteFunc(slices.Clone(list), func(l mesh.RateLimit) bool { return l.CountedBy != nil })
	if len(list) == 0 {
		return out
	}
	always := &corev3.RuntimeFractionalPercent{DefaultValue: &typev3.FractionalPercent{Numerator: 100}}
	out.FilterEnabled, out.FilterEnforced = always, always
	out.AlwaysConsumeDefaultTokenBucket = wrapperspb.Bool(false)
	out.EnableXRatelimitHeaders = ratelimitv3.XRateLimitHeadersRFCVersion_DRAFT_VERSION_03
	out.EnableRetryAfterHeader = true
	out.RateLimitedAsResourceExhausted = true
	for _, l := range list {
		out.RateLimits = append(out.RateLimits, &routev3.RateLimit{Actions: limitActions(l)})
		d := &ratelimitv3.LocalRateLimitDescriptor{
			Entries: []*ratelimitv3.RateLimitDescriptor_Entry{{Key: limitEntry, Value: l.Name}},
			TokenBucket: &typev3.TokenBucket{
				MaxTokens: l.Burst, TokensPerFill: wrapperspb.UInt32(l.Requests), FillInterval: durationpb.New(l.Per),
			},
		}
		for _, k := range l.By { // without a value: a bucket for each there is
			d.Entries = append(d.Entries, &ratelimitv3.RateLimitDescriptor_Entry{Key: limitKey(k)})
			out.MaxDynamicDescriptors = wrapperspb.UInt32(maxClients)
		}
		out.Descriptors = append(out.Descriptors, d)
	}
	return out
}

// counters are who counts for all processes, each once. The number of one is the stage at which it is asked.
func counters(list []mesh.RateLimit) (out []mesh.LimitCounter) {
	for _, l := range list {
		if l.CountedBy != nil && !slices.Contains(out, *l.CountedBy) {
			out = append(out, *l.CountedBy)
		}
	}
	return out
}

// maxStages is how many stages Envoy has.
const maxStages = 11

// counterFilters ask who counts for all processes, after what this one counts itself. What they ask is in the table of routes; whom, in
// the listener.
func (b *builder) counterFilters(c chain) (out []*hcmv3.HttpFilter) {
	all := counters(c.svc.Limits)
	if len(all) > maxStages && b.err == nil {
		b.err = fmt.Errorf("%s: its RateLimits are counted by %d services; %d may be asked for a request", c.name("http"), len(all), maxStages)
		return nil
	}
	for i, by := range all {
		cluster := b.calls(target{service: by.Service, port: by.Port, http: true, grpc: true})
		out = append(out, b.httpFilter(counterPrefix+strconv.Itoa(i), &countedv3.RateLimit{
			Domain: by.Domain, Stage: uint32(i), Timeout: durationpb.New(by.Timeout), FailureModeDeny: !by.FailOpen, StatPrefix: limitStats,
			RateLimitService:               &serviceconfigv3.RateLimitServiceConfig{GrpcService: grpcService(cluster, by.Timeout), TransportApiVersion: corev3.ApiVersion_V3},
			RateLimitedAsResourceExhausted: true, EnableXRatelimitHeaders: countedv3.RateLimit_DRAFT_VERSION_03,
			StatusOnError: &typev3.HttpStatus{Code: typev3.StatusCode_ServiceUnavailable},
		}))
	}
	return out
}

// limitUnits are the times that limits are by, to who counts for all.
var limitUnits = map[time.Duration]typev3.RateLimitUnit{
	time.Second: typev3.RateLimitUnit_SECOND, time.Minute: typev3.RateLimitUnit_MINUTE, time.Hour: typev3.RateLimitUnit_HOUR,
}

// askedOf is what who counts for all processes is asked about requests of a table of routes. The limit travels with the question, so that
// they need not be told of it.
func askedOf(list []mesh.RateLimit) (out []*routev3.RateLimit) {
	all := counters(list)
	for _, l := range list {
		if l.CountedBy == nil {
			continue
		}
		out = append(out, &routev3.RateLimit{
			Stage: wrapperspb.UInt32(uint32(slices.Index(all, *l.CountedBy))), Actions: limitActions(l),
			Limit: &routev3.RateLimit_Override{OverrideSpecifier: &routev3.RateLimit_Override_RateLimit{
				RateLimit: &routev3.RateLimit_Override_RateLimitOverride{RequestsPerUnit: l.Requests, Unit: limitUnits[l.Per]},
			}},
		})
	}
	return out
}

// limitActions find the bucket of a request; none where it is not counted.
func limitActions(l mesh.RateLimit) []*routev3.RateLimit_Action {
	var out []*routev3.RateLimit_Action
	if headers := counted(l.Match); len(headers) > 0 {
		out = append(out, &routev3.RateLimit_Action{ActionSpecifier: &routev3.RateLimit_Action_HeaderValueMatch_{
			HeaderValueMatch: &routev3.RateLimit_Action_HeaderValueMatch{DescriptorKey: limitEntry, DescriptorValue: l.Name, Headers: headers},
		}})
	} else {
		out = append(out, &routev3.RateLimit_Action{ActionSpecifier: &routev3.RateLimit_Action_GenericKey_{
			GenericKey: &routev3.RateLimit_Action_GenericKey{DescriptorKey: limitEntry, DescriptorValue: l.Name},
		}})
	}
	for _, k := range l.By {
		out = append(out, &routev3.RateLimit_Action{ActionSpecifier: &routev3.RateLimit_Action_GenericKey_{
			GenericKey: &routev3.RateLimit_Action_GenericKey{DescriptorKey: limitKey(k), DescriptorValue: limitValue(k), DefaultValue: unsaidClient},
		}})
	}
	return out
}

func limitKey(k mesh.LimitKey) string {
	switch k.On {
	case mesh.LimitNamespace:
		return "namespace"
	case mesh.LimitAddress:
		return "address"
	case mesh.LimitHeader:
		return "header/" + k.Header
	}
	return "principal"
}

// limitValue is a formatter of what tells clients apart. Envoy follows it where the bootstrap switches that on; with an older
// one all clients are the same.
func limitValue(k mesh.LimitKey) string {
	switch k.On {
	case mesh.LimitNamespace:
		return "%FILTER_STATE(" + stateNamespace + ":PLAIN)%"
	case mesh.LimitAddress:
		return "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"
	case mesh.LimitHeader:
		return "%REQ(" + k.Header + "):" + longestKey + "%"
	}
	return "%FILTER_STATE(" + statePrincipal + ":PLAIN)%"
}

// counted are the headers that requests have that are counted; empty: all are.
func counted(m mesh.LimitMatch) []*routev3.HeaderMatcher {
	var out []*routev3.HeaderMatcher
	any := func(name, r string) {
		out = append(out, &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: regexMatcher(r)}})
	}
	if len(m.Methods) > 0 {
		var all []string
		for _, v := range m.Methods {
			all = append(all, regexp.QuoteMeta(v))
		}
		any(":method", strings.Join(all, "|"))
	}
	if len(m.Paths) > 0 {
		var all []string
		for _, v := range m.Paths {
			all = append(all, countedPath(v))
		}
		any(":path", `(?s)(?:`+strings.Join(all, "|")+`)(?:\?.*)?`)
	}
	for _, h := range m.Headers {
		v := headerMatch(h.Name, h.Match, h.Invert)
		if v == nil {
			v = present(h.Name, h.Invert)
		}
		out = append(out, v)
	}
	return out
}

// countedPath is a regular expression of paths. As in a policy that denies, whatever an application may take for a slash is one.
func countedPath(v mesh.TextMatch) string {
	if v.Kind == mesh.TextRegex {
		return "(?:" + v.Value + ")"
	}
	prefix := v.Value
	if v.Kind == mesh.TextPath {
		prefix = strings.TrimRight(prefix, "/")
	}
	r := strings.ReplaceAll(regexp.QuoteMeta(prefix), "/", slashes)
	if v.Kind == mesh.TextPath {
		r += "(?:" + slashes + `[^?]*)?`
	}
	return r
}

// writePrincipal has a request for a tunnel say whose certificate it came with.
func (b *builder) writePrincipal() *corev3.TypedExtensionConfig {
	return &corev3.TypedExtensionConfig{
		Name: "envoy.http.early_header_mutation.header_mutation",
		TypedConfig: b.config(&earlyv3.HeaderMutation{Mutations: []*mutationv3.HeaderMutation{{
			Action: &mutationv3.HeaderMutation_Append{Append: &corev3.HeaderValueOption{
				Header:       &corev3.HeaderValue{Key: provenHeader, Value: "%DOWNSTREAM_PEER_URI_SAN%"},
				AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
			}},
		}}}),
	}
}

// readNamespace takes the namespace out of what [builder.writePrincipal] wrote.
func readNamespace() *h2mv3.Config_Rule {
	return &h2mv3.Config_Rule{Header: provenHeader, OnHeaderPresent: &h2mv3.Config_KeyValuePair{
		MetadataNamespace: metaProven, Key: "namespace", RegexValueRewrite: &matcherv3.RegexMatchAndSubstitute{
			Pattern: &matcherv3.RegexMatcher{Regex: `^(?:spiffe://[^/]+/ns/([^/]+)/sa/[^/]+|.*)$`}, Substitution: `\1`,
		},
	}}
}

// provenNamespace has it travel on.
func provenNamespace(value func(key, factory, format string) *sfsvaluev3.FilterStateValue) *sfsvaluev3.FilterStateValue {
	v := value(stateNamespace, "envoy.string", "%DYNAMIC_METADATA("+metaProven+":namespace)%")
	v.GetFormatString().OmitEmptyValues, v.SkipIfEmpty = true, true
	return v
}

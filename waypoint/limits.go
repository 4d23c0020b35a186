package waypoint

import (
	"regexp"
	"strings"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/ratelimit/v3"
	sfsvaluev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	h2mv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	localv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/local_ratelimit/v3"
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

// buckets are those of limits. Without any nothing is counted.
func buckets(list []mesh.RateLimit) *localv3.LocalRateLimit {
	out := &localv3.LocalRateLimit{StatPrefix: limitStats}
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

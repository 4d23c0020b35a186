package waypoint

import (
	"cmp"
	"time"

	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	extauthzv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What a provider is asked about is what a policy matches: the filter before notes which rule did.
const (
	askPrefix   = "istio_ext_authz_"
	askWithin   = 10 * time.Minute // as long as Istio waits where nobody says
	rbacResults = "envoy.filters.http.rbac"

	connectionResults = "envoy.filters.network.rbac"
)

// metadata is a value that a filter left, as it has to be.
func metadata(value *matcherv3.ValueMatcher, filter string, path ...string) *matcherv3.MetadataMatcher {
	out := &matcherv3.MetadataMatcher{Filter: filter, Value: value}
	for _, k := range path {
		out.Path = append(out.Path, &matcherv3.MetadataMatcher_PathSegment{Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: k}})
	}
	return out
}

func textValue(m *matcherv3.StringMatcher) *matcherv3.ValueMatcher {
	return &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_StringMatch{StringMatch: m}}
}

// askFilter asks nobody where no table of routes says whom. A provider that does not answer denies.
func (b *builder) askFilter() *hcmv3.HttpFilter {
	return b.routesFilter(askFilter, &extauthzv3.ExtAuthz{
		TransportApiVersion:   corev3.ApiVersion_V3,
		Services:              &extauthzv3.ExtAuthz_GrpcService{GrpcService: grpcService(blackHole, time.Second)},
		FilterEnabledMetadata: metadata(textValue(somebody()), rbacResults, askPrefix+"shadow_effective_policy_id"),
	})
}

func grpcService(cluster string, timeout time.Duration) *corev3.GrpcService {
	return &corev3.GrpcService{Timeout: durationpb.New(timeout), TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
		EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: cluster},
	}}
}

// ask says whom a policy asks, and how.
func (b *builder) ask(p *mesh.AuthProvider) *anypb.Any {
	cluster := b.calls(target{service: p.Service, port: p.Port, http: true})
	s := &extauthzv3.CheckSettings{WithRequestBody: askedBody(p)}
	if p.GRPC {
		s.ServiceOverride = &extauthzv3.CheckSettings_GrpcService{GrpcService: grpcService(cluster, askTimeout(p))}
	} else {
		s.ServiceOverride = &extauthzv3.CheckSettings_HttpService{HttpService: askedByHTTP(p, cluster)}
	}
	return b.config(&extauthzv3.ExtAuthzPerRoute{Override: &extauthzv3.ExtAuthzPerRoute_CheckSettings{CheckSettings: s}})
}

// notCopied are headers of an answer that are about the answer itself, its connection or where a request goes: a request has its own.
const notCopied = "host|connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|expect|content-.*"

// routeAsks is whom a route asks, and how. Which headers are asked about is a setting of the filter, not one that a route can
// override: so the route brings the filter with it.
func (b *builder) routeAsks(p *mesh.AuthProvider) *anypb.Any {
	cluster := b.calls(target{service: p.Service, port: p.Port, http: true, grpc: p.GRPC})
	f := &extauthzv3.ExtAuthz{
		TransportApiVersion: corev3.ApiVersion_V3, WithRequestBody: askedBody(p), AllowedHeaders: patterns(p.Sees), ValidateMutations: true,
		DecoderHeaderMutationRules: &mutationv3.HeaderMutationRules{
			DisallowSystem: wrapperspb.Bool(true), DisallowExpression: &matcherv3.RegexMatcher{Regex: notCopied},
		},
	}
	if p.GRPC {
		f.Services = &extauthzv3.ExtAuthz_GrpcService{GrpcService: grpcService(cluster, askTimeout(p))}
	} else {
		f.Services = &extauthzv3.ExtAuthz_HttpService{HttpService: askedByHTTP(p, cluster)}
	}
	action := b.extension(&compositev3.ExecuteFilterAction{TypedConfig: &corev3.TypedExtensionConfig{Name: askFilter, TypedConfig: b.config(f)}})
	action.Name = routeAskFilter
	return b.config(&compositev3.CompositePerRoute{Matcher: &xdsmatcherv3.Matcher{
		OnNoMatch: &xdsmatcherv3.Matcher_OnMatch{OnMatch: &xdsmatcherv3.Matcher_OnMatch_Action{Action: action}},
	}})
}

func askTimeout(p *mesh.AuthProvider) time.Duration { return cmp.Or(p.Timeout, askWithin) }

func askedBody(p *mesh.AuthProvider) *extauthzv3.BufferSettings {
	if p.MaxBody == 0 {
		return nil
	}
	return &extauthzv3.BufferSettings{MaxRequestBytes: p.MaxBody, AllowPartialMessage: p.PartOfBody, PackAsBytes: p.Bytes}
}

func askedByHTTP(p *mesh.AuthProvider, cluster string) *extauthzv3.HttpService {
	h := &extauthzv3.HttpService{
		ServerUri: &corev3.HttpUri{
			Uri: "http://" + p.Service.Hostname, Timeout: durationpb.New(askTimeout(p)), HttpUpstreamType: &corev3.HttpUri_Cluster{Cluster: cluster},
		},
		PathPrefix:            p.PathPrefix,
		AuthorizationRequest:  &extauthzv3.AuthorizationRequest{},
		AuthorizationResponse: &extauthzv3.AuthorizationResponse{AllowedUpstreamHeaders: patterns(p.ToApplication), AllowedClientHeaders: patterns(p.ToClientOnDeny), AllowedClientHeadersOnSuccess: patterns(p.ToClientOnAllow)},
	}
	for _, v := range p.Add {
		h.AuthorizationRequest.HeadersToAdd = append(h.AuthorizationRequest.HeadersToAdd, &corev3.HeaderValue{Key: v.Name, Value: v.Value})
	}
	return h
}

func patterns(l []mesh.TextMatch) *matcherv3.ListStringMatcher {
	out := &matcherv3.ListStringMatcher{}
	for _, v := range l {
		if m := stringMatcher(v); m != nil {
			m.IgnoreCase = v.Kind != mesh.TextRegex // of which Envoy does not take it
			out.Patterns = append(out.Patterns, m)
		}
	}
	if len(out.Patterns) == 0 {
		return nil
	}
	return out
}

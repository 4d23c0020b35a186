package waypoint

import (
	"maps"
	"slices"
	"strings"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tracev3 "github.com/envoyproxy/go-control-plane/envoy/config/trace/v3"
	celfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	otellogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/open_telemetry/v3"
	statsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
	streamlogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	uuidv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/request_id/uuid/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	tracingv3 "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	commonv1 "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What is told of requests and connections beyond what nobody asked for, see [mesh.Telemetry]. Where it is sent is a cluster
// like those of requests: its endpoints are reached by their tunnels, under the waypoint's own name.

// standard is what is told where nobody says.
var standard = mesh.Telemetry{Logs: []mesh.AccessLog{{To: &mesh.TelemetryProvider{Kind: mesh.TelemetryStdout}, Notable: true}}}

func (c chain) telemetry() *mesh.Telemetry {
	if c.svc.Telemetry != nil {
		return c.svc.Telemetry
	}
	return &standard
}

// sendTo is the cluster of a provider.
func (b *builder) sendTo(p *mesh.TelemetryProvider) string {
	return b.calls(target{service: p.Service, port: p.Port, http: true, grpc: p.Kind != mesh.TelemetryZipkin})
}

// serviceName is what traces and logs call this proxy, as Istio does: its workload and namespace.
func (b *builder) serviceName() string { return b.account() + "." + b.self.Namespace }

// tracing has Envoy make spans; nil where nobody asks for any.
func (b *builder) tracing(c chain) *hcmv3.HttpConnectionManager_Tracing {
	t := c.telemetry().Tracing
	if t == nil {
		return nil
	}
	all := &typev3.Percent{Value: 100}
	out := &hcmv3.HttpConnectionManager_Tracing{
		ClientSampling: all, RandomSampling: &typev3.Percent{Value: t.Percent}, OverallSampling: all,
		Provider: b.tracer(t.To), NoContextPropagation: t.NoPropagation,
		Operation: "%REQ(:AUTHORITY)%",
	}
	if b.ingress == nil {
		out.Operation = plain(c.svc.Name.Hostname)
	} else {
		out.SpawnUpstreamSpan = wrapperspb.Bool(true) // as Istio's gateways do, and its waypoints do not
	}
	if t.To.MaxPath > 0 {
		out.MaxPathTagLength = wrapperspb.UInt32(t.To.MaxPath)
	}
	if !t.NoWorkloads {
		out.CustomTags = b.workloadTags(c)
	}
	for _, tag := range t.Tags {
		next := &tracingv3.CustomTag{Tag: tag.Name}
		switch {
		case tag.Header != "":
			next.Type = &tracingv3.CustomTag_RequestHeader{RequestHeader: &tracingv3.CustomTag_Header{Name: tag.Header, DefaultValue: tag.Default}}
		case tag.Environment != "":
			next.Type = &tracingv3.CustomTag_Environment_{Environment: &tracingv3.CustomTag_Environment{Name: tag.Environment, DefaultValue: tag.Default}}
		default:
			next.Type = &tracingv3.CustomTag_Literal_{Literal: &tracingv3.CustomTag_Literal{Value: tag.Literal}}
		}
		out.CustomTags = slices.DeleteFunc(out.CustomTags, func(o *tracingv3.CustomTag) bool { return o.Tag == tag.Name }) // names are unique
		out.CustomTags = append(out.CustomTags, next)
	}
	return out
}

// plain is a text for where Envoy takes a format.
func plain(s string) string { return strings.ReplaceAll(s, "%", "%%") }

func (b *builder) tracer(p *mesh.TelemetryProvider) *tracev3.Tracing_Http {
	if p.Kind == mesh.TelemetryZipkin {
		z := &tracev3.ZipkinConfig{
			CollectorCluster: b.sendTo(p), CollectorEndpoint: p.Path, CollectorHostname: p.Service.Hostname,
			CollectorEndpointVersion: tracev3.ZipkinConfig_HTTP_JSON, TraceId_128Bit: !p.ShortIDs, SharedSpanContext: wrapperspb.Bool(false),
		}
		if p.TraceParents {
			z.TraceContextOption = tracev3.ZipkinConfig_USE_B3_WITH_W3C_PROPAGATION
		}
		return &tracev3.Tracing_Http{Name: "envoy.tracers.zipkin", ConfigType: &tracev3.Tracing_Http_TypedConfig{TypedConfig: b.config(z)}}
	}
	o := &tracev3.OpenTelemetryConfig{GrpcService: grpcService(b.sendTo(p), telemetryTimeout), ServiceName: b.serviceName()}
	return &tracev3.Tracing_Http{Name: "envoy.tracers.opentelemetry", ConfigType: &tracev3.Tracing_Http_TypedConfig{TypedConfig: b.config(o)}}
}

// telemetryTimeout is how long a provider may take.
const telemetryTimeout = 10 * time.Second

// workloadTags name both workloads, as Istio's waypoints do.
func (b *builder) workloadTags(c chain) []*tracingv3.CustomTag {
	var out []*tracingv3.CustomTag
	tag := func(name, value string) {
		out = append(out, &tracingv3.CustomTag{Tag: name, Type: &tracingv3.CustomTag_Value{Value: value}})
	}
	if g := b.ingress; g != nil {
		for _, v := range [][2]string{{"workload", g.Workload}, {"namespace", b.self.Namespace}, {"canonical_service", g.Workload}, {"canonical_revision", "latest"}, {"cluster_id", b.s.Config().Cluster}} {
			tag("istio.source_"+v[0], plain(v[1]))
		}
		tag("istio.destination_service", ofService("host"))
	} else {
		tag("istio.destination_service", plain(c.svc.Name.Hostname))
		tag("istio.source_principal", "%FILTER_STATE("+statePrincipal+":PLAIN)%")
	}
	for _, v := range [][2]string{{"workload", "workload"}, {"namespace", "namespace"}, {"canonical_service", "service"}, {"canonical_revision", "revision"}, {"cluster_id", "cluster"}} {
		if b.ingress == nil {
			tag("istio.source_"+v[0], "%FILTER_STATE("+statePeer(v[1])+":PLAIN)%")
		}
		tag("istio.destination_"+v[0], "%UPSTREAM_METADATA("+metaPeer+":"+v[1]+")%")
	}
	tag("istio.destination_principal", "%UPSTREAM_METADATA("+metaPeer+":principal)%")
	return out
}

// requestID says how the id of a request bears on its trace; nil is Envoy's default.
func (b *builder) requestID(c chain) *hcmv3.RequestIDExtension {
	if t := c.telemetry().Tracing; t == nil || !t.IgnoreRequestID {
		return nil
	}
	return &hcmv3.RequestIDExtension{TypedConfig: b.config(&uuidv3.UuidRequestIdConfig{UseRequestIdForTraceSampling: wrapperspb.Bool(false)})}
}

// tells are the loggers of a chain: metrics first, then lines.
func (b *builder) tells(c chain, http bool) []*accesslogv3.AccessLog {
	out := b.metrics(c, http)
	fields := b.logFields(c, http)
	for _, l := range c.telemetry().Logs {
		log := b.toStdout(fields)
		if l.To.Kind == mesh.TelemetryOTLPLogs {
			log = b.toOTLP(l.To, fields, http)
		}
		log.Filter = both(atEnd(http), b.filter(l.Filter))
		if l.Notable {
			log.Filter = both(log.Filter, notable(http))
		}
		out = append(out, log)
	}
	return out
}

// toStdout writes JSON.
func (b *builder) toStdout(fields map[string]string) *accesslogv3.AccessLog {
	format := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range fields {
		format.Fields[k] = structpb.NewStringValue(v)
	}
	return &accesslogv3.AccessLog{
		Name: "envoy.access_loggers.stdout",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: b.config(&streamlogv3.StdoutAccessLog{
			AccessLogFormat: &streamlogv3.StdoutAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
				Format: &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: format},
			}},
		})},
	}
}

// toOTLP sends the same fields as attributes.
func (b *builder) toOTLP(p *mesh.TelemetryProvider, fields map[string]string, http bool) *accesslogv3.AccessLog {
	text := func(s string) *commonv1.AnyValue {
		return &commonv1.AnyValue{Value: &commonv1.AnyValue_StringValue{StringValue: s}}
	}
	body := "%DOWNSTREAM_REMOTE_ADDRESS% %BYTES_RECEIVED% %BYTES_SENT% %RESPONSE_FLAGS%"
	if http {
		body = "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS%"
	}
	cfg := &otellogv3.OpenTelemetryAccessLogConfig{
		GrpcService: grpcService(b.sendTo(p), telemetryTimeout), LogName: p.LogName, Body: text(body), Attributes: &commonv1.KeyValueList{},
		ResourceAttributes: &commonv1.KeyValueList{Values: []*commonv1.KeyValue{
			{Key: "service.name", Value: text(b.serviceName())}, {Key: "k8s.namespace.name", Value: text(b.self.Namespace)}, {Key: "k8s.cluster.name", Value: text(b.s.Config().Cluster)},
		}},
		BufferFlushInterval: durationpb.New(time.Second),
	}
	for _, k := range slices.Sorted(maps.Keys(fields)) {
		cfg.Attributes.Values = append(cfg.Attributes.Values, &commonv1.KeyValue{Key: k, Value: text(fields[k])})
	}
	return &accesslogv3.AccessLog{Name: "envoy.access_loggers.open_telemetry", ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: b.config(cfg)}}
}

// filter is an expression that has to hold; nil for none.
func (b *builder) filter(expression string) *accesslogv3.AccessLogFilter {
	if expression == "" {
		return nil
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ExtensionFilter{ExtensionFilter: &accesslogv3.ExtensionFilter{
		Name: "envoy.access_loggers.extension_filters.cel", ConfigType: &accesslogv3.ExtensionFilter_TypedConfig{TypedConfig: b.config(&celfilterv3.ExpressionFilter{Expression: expression})},
	}}}
}

// notable holds for what failed or was refused, and for what AUDIT policies and dry runs are about.
func notable(http bool) *accesslogv3.AccessLogFilter {
	rbac := connectionResults
	any := []*accesslogv3.AccessLogFilter{
		{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{}}},
		said(metadata(&envoymatcherv3.ValueMatcher{MatchPattern: &envoymatcherv3.ValueMatcher_BoolMatch{BoolMatch: true}}, "envoy.common", "access_log_hint")),
	}
	if http {
		rbac = rbacResults
		any = append(any,
			&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{StatusCodeFilter: &accesslogv3.StatusCodeFilter{
				Comparison: &accesslogv3.ComparisonFilter{Op: accesslogv3.ComparisonFilter_GE, Value: &corev3.RuntimeUInt32{DefaultValue: 400, RuntimeKey: "warren.notable_status"}},
			}}},
			both(
				&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_HeaderFilter{HeaderFilter: &accesslogv3.HeaderFilter{Header: &routev3.HeaderMatcher{
					Name: "content-type", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: &envoymatcherv3.StringMatcher{
						MatchPattern: &envoymatcherv3.StringMatcher_Prefix{Prefix: "application/grpc"},
					}},
				}}}},
				&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_GrpcStatusFilter{GrpcStatusFilter: &accesslogv3.GrpcStatusFilter{
					Statuses: []accesslogv3.GrpcStatusFilter_Status{accesslogv3.GrpcStatusFilter_OK}, Exclude: true,
				}}},
			))
	}
	for _, deny := range []bool{true, false} {
		denied := textValue(&envoymatcherv3.StringMatcher{MatchPattern: &envoymatcherv3.StringMatcher_Exact{Exact: "denied"}})
		any = append(any, said(metadata(denied, rbac, dryRun(deny)+"shadow_engine_result")))
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_OrFilter{OrFilter: &accesslogv3.OrFilter{Filters: any}}}
}

// said holds where a filter left such a value.
func said(m *envoymatcherv3.MetadataMatcher) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_MetadataFilter{MetadataFilter: &accesslogv3.MetadataFilter{
		Matcher: m, MatchIfKeyNotFound: wrapperspb.Bool(false),
	}}}
}

// both are two filters, of which each may be nil.
func both(x, y *accesslogv3.AccessLogFilter) *accesslogv3.AccessLogFilter {
	switch {
	case x == nil:
		return y
	case y == nil:
		return x
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_AndFilter{AndFilter: &accesslogv3.AndFilter{Filters: []*accesslogv3.AccessLogFilter{x, y}}}}
}

// changed are the tags of a metric as somebody has changed them; false where it is not wanted.
func changed(changes []mesh.MetricChange, metric string, tags []*statsv3.Config_Tag) ([]*statsv3.Config_Tag, bool) {
	wanted := true
	for _, c := range changes {
		if c.Metric != "" && c.Metric != metric {
			continue
		}
		if c.Disable != nil {
			wanted = !*c.Disable
		}
		tags = slices.DeleteFunc(slices.Clone(tags), func(t *statsv3.Config_Tag) bool {
			_, set := c.Set[t.Name]
			return set || slices.Contains(c.Remove, t.Name)
		})
		for _, name := range slices.Sorted(maps.Keys(c.Set)) {
			tags = append(tags, &statsv3.Config_Tag{Name: name, ValueFormat: plain(c.Set[name])})
		}
	}
	return tags, wanted
}

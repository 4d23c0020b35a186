package waypoint

import (
	"maps"
	"slices"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	statsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
	sfsvaluev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	h2mv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	transformv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/actions/transform_stat/v3"
	statinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/stats/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Istio's standard metrics, from Envoy's own access logger for statistics. Where a request comes from is what its node
// says in the baggage of the tunnel: good for labels, and never for decisions. Where it goes is metadata of the endpoint.

const (
	metaPeer = "warren.peer" // of the tunnel's headers, and of endpoints

	maxSeries = 20_000 // of counters; what is beyond is not counted. Idle ones are dropped (bootstrap)
)

// peerFields are what baggage says of a workload, by name here.
var peerFields = []struct{ name, baggage string }{
	{"cluster", `k8s\.cluster\.name`},
	{"namespace", `k8s\.namespace\.name`},
	{"revision", `service\.version`},
	{"service", `service\.name`},
	{"workload", `k8s\.(?:deployment|statefulset|daemonset|pod|job|cronjob)\.name`},
}

func statePeer(field string) string { return "warren.source." + field }

// readBaggage takes a tunnel's baggage apart. What does not match has to be said too, or the whole header were the value.
func (b *builder) readBaggage() *hcmv3.HttpFilter {
	out := &h2mv3.Config{RequestRules: []*h2mv3.Config_Rule{readNamespace()}}
	for _, f := range peerFields {
		out.RequestRules = append(out.RequestRules, &h2mv3.Config_Rule{Header: "baggage", OnHeaderPresent: &h2mv3.Config_KeyValuePair{
			MetadataNamespace: metaPeer, Key: f.name, RegexValueRewrite: &envoymatcherv3.RegexMatchAndSubstitute{
				Pattern: &envoymatcherv3.RegexMatcher{Regex: `^(?:(?:.*,)?\s*` + f.baggage + `=([^,;|]*).*|.*)$`}, Substitution: `\1`,
			},
		}})
	}
	return b.httpFilter("envoy.filters.http.header_to_metadata", out)
}

// peerState has what a tunnel says of its client travel on.
func peerState(value func(key, factory, format string) *sfsvaluev3.FilterStateValue) []*sfsvaluev3.FilterStateValue {
	var out []*sfsvaluev3.FilterStateValue
	for _, f := range peerFields {
		v := value(statePeer(f.name), "envoy.string", "%DYNAMIC_METADATA("+metaPeer+":"+f.name+")%")
		v.GetFormatString().OmitEmptyValues, v.SkipIfEmpty = true, true
		out = append(out, v)
	}
	return out
}

// describe is what metrics and logs say of an endpoint.
func describe(w *mesh.Workload) *structpb.Struct {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range map[string]string{
		"workload": w.WorkloadName, "namespace": w.Namespace, "service": w.CanonicalName, "revision": w.CanonicalRevision, "cluster": w.Cluster,
	} {
		if v != "" {
			out.Fields[k] = structpb.NewStringValue(v)
		}
	}
	if w.Identity != (mesh.Identity{}) {
		out.Fields["principal"] = structpb.NewStringValue(w.Identity.String())
	}
	return out
}

func (b *builder) statsInput() *xdscore.TypedExtensionConfig {
	return &xdscore.TypedExtensionConfig{Name: "value", TypedConfig: b.config(&statinputsv3.StatTagValueInput{})}
}

// becomes replaces the value of a label.
func (b *builder) becomes(v string) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: &xdscore.TypedExtensionConfig{
		Name: v, TypedConfig: b.config(&transformv3.TransformStat{UpdateTag: &transformv3.TransformStat_UpdateTag{NewTagValue: v}}),
	}}}
}

// labels are those of Istio's metrics, in Istio's order. What is not known is empty here, and said by [Shown] where the metrics
// are shown: rules for it would be most of the configuration of a service.
func (b *builder) labels(c chain, http bool) []*statsv3.Config_Tag {
	tag := func(name, format string) *statsv3.Config_Tag {
		return &statsv3.Config_Tag{Name: name, ValueFormat: format}
	}
	source := func(f string) string { return "%FILTER_STATE(" + statePeer(f) + ":PLAIN)%" }
	destination := func(f string) string { return "%UPSTREAM_METADATA(" + metaPeer + ":" + f + ")%" }
	out := []*statsv3.Config_Tag{
		tag("reporter", "waypoint"),
		tag("source_workload", source("workload")),
		tag("source_canonical_service", source("service")),
		tag("source_canonical_revision", source("revision")),
		tag("source_workload_namespace", source("namespace")),
		tag("source_principal", "%FILTER_STATE("+statePrincipal+":PLAIN)%"),
		tag("source_app", source("service")),
		tag("source_version", source("revision")),
		tag("source_cluster", source("cluster")),
		tag("destination_service", c.svc.Name.Hostname),
		tag("destination_service_namespace", c.svc.Name.Namespace),
		tag("destination_service_name", c.svc.Short),
	}
	security := "mutual_tls"
	if g := b.ingress; g != nil { // a gateway speaks for itself, as the client of what it sends to
		cfg := b.s.Config()
		me := mesh.Identity{TrustDomain: cfg.TrustDomain, Namespace: b.self.Namespace, ServiceAccount: b.account()}
		out = []*statsv3.Config_Tag{
			tag("reporter", "source"), tag("source_workload", g.Workload), tag("source_canonical_service", g.Workload),
			tag("source_canonical_revision", "latest"), tag("source_workload_namespace", b.self.Namespace), tag("source_principal", me.String()),
			tag("source_app", g.Workload), tag("source_version", "latest"), tag("source_cluster", cfg.Cluster),
			tag("destination_service", ofService("host")), tag("destination_service_namespace", ofService("namespace")),
			tag("destination_service_name", ofService("name")),
		}
		security = "unknown" // what the hop to the destination has, its node reports
	}
	out = append(out,
		tag("destination_workload", destination("workload")),
		tag("destination_canonical_service", destination("service")),
		tag("destination_canonical_revision", destination("revision")),
		tag("destination_workload_namespace", destination("namespace")),
		tag("destination_principal", destination("principal")),
		tag("destination_app", destination("service")),
		tag("destination_version", destination("revision")),
		tag("destination_cluster", destination("cluster")),
	)
	if http {
		out = append(out, &statsv3.Config_Tag{Name: "request_protocol", ValueFormat: "%REQ(CONTENT-TYPE)%", Rules: &matcherv3.Matcher{
			MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
				Input: b.statsInput(), TreeType: &matcherv3.Matcher_MatcherTree_PrefixMatchMap{
					PrefixMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: map[string]*matcherv3.Matcher_OnMatch{"application/grpc": b.becomes("grpc")}},
				},
			}},
			OnNoMatch: b.becomes("http"),
		}}, tag("response_code", "%RESPONSE_CODE%"), tag("grpc_response_status", "%GRPC_STATUS_NUMBER%"))
	} else {
		out = append(out, tag("request_protocol", "tcp"))
	}
	return append(out, tag("response_flags", "%RESPONSE_FLAGS%"), tag("connection_security_policy", security))
}

// metrics counts what a chain serves. The scope is the same for all, or a change of one would begin the others anew.
func (b *builder) metrics(c chain, http bool) []*accesslogv3.AccessLog {
	before, changes := b.labels(c, http), c.telemetry().Metrics
	plain := grouped(before, before)
	tags := func(metric string) ([]*statsv3.Config_Tag, bool) {
		if len(changes) == 0 {
			return plain, true
		}
		after, wanted := changed(changes, metric, before)
		return grouped(after, before), wanted
	}
	var all []*accesslogv3.AccessLog
	logger := func(counters map[string]string, histograms map[string]statsv3.Config_Histogram_Unit, values map[string]string, on ...datav3.AccessLogType) {
		cfg := &statsv3.Config{StatsScope: &typev3.Scope{
			SharingName: "istio", EnableEviction: true, MaxCounters: wrapperspb.UInt32(maxSeries), MaxHistograms: wrapperspb.UInt32(maxSeries / 2),
		}}
		for _, name := range slices.Sorted(maps.Keys(counters)) {
			labels, wanted := tags(name)
			if !wanted {
				continue
			}
			counter := &statsv3.Config_Counter{Stat: &statsv3.Config_Stat{Name: name, Tags: labels}, ValueFormat: counters[name]}
			if counter.ValueFormat == "" {
				counter.ValueFixed = wrapperspb.UInt64(1)
			}
			cfg.Counters = append(cfg.Counters, counter)
		}
		for _, name := range slices.Sorted(maps.Keys(values)) {
			labels, wanted := tags(name)
			if !wanted {
				continue
			}
			cfg.Histograms = append(cfg.Histograms, &statsv3.Config_Histogram{Stat: &statsv3.Config_Stat{Name: name, Tags: labels}, Unit: histograms[name], ValueFormat: values[name]})
		}
		if len(cfg.Counters)+len(cfg.Histograms) == 0 {
			return
		}
		out := &accesslogv3.AccessLog{Name: "envoy.access_loggers.stats", ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: b.config(cfg)}}
		if len(on) > 0 {
			out.Filter = &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_LogTypeFilter{LogTypeFilter: &accesslogv3.LogTypeFilter{Types: on}}}
		}
		all = append(all, out)
	}
	if http {
		logger(map[string]string{"istio_requests_total": ""},
			map[string]statsv3.Config_Histogram_Unit{
				"istio_request_duration_milliseconds": statsv3.Config_Histogram_Milliseconds,
				"istio_request_bytes":                 statsv3.Config_Histogram_Bytes,
				"istio_response_bytes":                statsv3.Config_Histogram_Bytes,
			}, map[string]string{
				"istio_request_duration_milliseconds": "%DURATION%",
				"istio_request_bytes":                 "%DOWNSTREAM_WIRE_BYTES_RECEIVED%",
				"istio_response_bytes":                "%DOWNSTREAM_WIRE_BYTES_SENT%",
			})
		return all
	}
	logger(map[string]string{"istio_tcp_connections_opened_total": ""}, nil, nil, datav3.AccessLogType_TcpUpstreamConnected)
	logger(map[string]string{
		"istio_tcp_connections_closed_total": "",
		"istio_tcp_received_bytes_total":     "%BYTES_RECEIVED%",
		"istio_tcp_sent_bytes_total":         "%BYTES_SENT%",
	}, nil, nil, datav3.AccessLogType_TcpConnectionEnd)
	return all
}

// whoAndWhom are the fields of an access log that name both workloads.
func whoAndWhom(fields map[string]string) {
	for _, f := range []string{"workload", "namespace"} {
		fields["source_"+f] = "%FILTER_STATE(" + statePeer(f) + ":PLAIN)%"
		fields["destination_"+f] = "%UPSTREAM_METADATA(" + metaPeer + ":" + f + ")%"
	}
	fields["destination_principal"] = "%UPSTREAM_METADATA(" + metaPeer + ":principal)%"
}

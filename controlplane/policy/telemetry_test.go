package policy

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

var (
	otel   = &mesh.TelemetryProvider{Name: "otel", Kind: mesh.TelemetryOpenTelemetry, Service: mesh.ServiceName{Namespace: "o", Hostname: "otel"}, Port: 4317}
	logs   = &mesh.TelemetryProvider{Name: "logs", Kind: mesh.TelemetryOTLPLogs, Service: otel.Service, Port: 4317}
	telled = Mesh{RootNamespace: "istio-system", Telemetry: TelemetryProviders{ByName: map[string]*mesh.TelemetryProvider{
		"otel": otel, "logs": logs, "old": {Name: "old", Problem: "it is of another kind"},
	}}}
	stdout = telled.Telemetry.Find("envoy")
)

func telemetryOf(t *testing.T, spec string) *telemetryv1.Telemetry {
	t.Helper()
	out := &telemetryv1.Telemetry{}
	out.Namespace = "shop"
	if err := yaml.Unmarshal([]byte(spec), &out.Spec); err != nil {
		t.Fatal(err)
	}
	return out
}

// Of several objects the narrower one holds, field by field as in Istio.
func TestTell(t *testing.T) {
	yes := true
	notable := []mesh.AccessLog{{To: stdout, Notable: true}}
	for _, c := range []struct {
		name    string
		gateway bool
		specs   []string // the widest first
		want    *mesh.Telemetry
	}{
		{name: "nothing"},
		{name: "all lines", specs: []string{`accessLogging: [{providers: [{name: envoy}]}]`}, want: &mesh.Telemetry{Logs: []mesh.AccessLog{{To: stdout}}}},
		{name: "no lines", specs: []string{`accessLogging: [{disabled: true}]`}, want: &mesh.Telemetry{Logs: []mesh.AccessLog{}}},
		{name: "lines again", specs: []string{`accessLogging: [{disabled: true}]`, `accessLogging: [{disabled: false}]`}, want: &mesh.Telemetry{Logs: []mesh.AccessLog{{To: stdout}}}},
		{name: "one per cent", specs: []string{`tracing: [{providers: [{name: otel}]}]`},
			want: &mesh.Telemetry{Tracing: &mesh.Tracing{To: otel, Percent: 1}, Logs: notable}},
		{name: "none, and propagated", specs: []string{`tracing: [{providers: [{name: otel}], disableSpanReporting: true}]`}},
		{name: "each field for itself", specs: []string{
			`tracing: [{providers: [{name: otel}], randomSamplingPercentage: 10, customTags: {a: {literal: {value: x}}, b: {header: {name: x-b}}}}]`,
			`tracing: [{randomSamplingPercentage: 0, enableIstioTags: false, useRequestIdForTraceSampling: false}]`,
			`tracing: [{customTags: {c: {environment: {name: C, defaultValue: d}}}, disableContextPropagation: true}]`},
			want: &mesh.Telemetry{Tracing: &mesh.Tracing{To: otel, Tags: []mesh.SpanTag{{Name: "c", Environment: "C", Default: "d"}}, NoWorkloads: true, NoPropagation: true, IgnoreRequestID: true},
				Logs: notable}},
		{name: "gateways are clients", gateway: true, specs: []string{`tracing: [{match: {mode: SERVER}, providers: [{name: otel}]}]`, `accessLogging: [{match: {mode: CLIENT}, disabled: true}]`},
			want: &mesh.Telemetry{Logs: []mesh.AccessLog{}}},
		{name: "waypoints are servers", specs: []string{`tracing: [{match: {mode: SERVER}, providers: [{name: otel}]}]`, `accessLogging: [{match: {mode: CLIENT}, disabled: true}]`},
			want: &mesh.Telemetry{Tracing: &mesh.Tracing{To: otel, Percent: 1}, Logs: notable}},
		{name: "there alone", specs: []string{`accessLogging: [{filter: {expression: response.code >= 400}}]`, `accessLogging: [{providers: [{name: logs}]}]`},
			want: &mesh.Telemetry{Logs: []mesh.AccessLog{{To: logs}}}},
		{name: "both, one filtered", specs: []string{`accessLogging: [{providers: [{name: envoy}], filter: {expression: response.code >= 400}}, {providers: [{name: logs}]}]`},
			want: &mesh.Telemetry{Logs: []mesh.AccessLog{{To: stdout, Filter: "response.code >= 400"}, {To: logs}}}},
		{name: "a provider that cannot be had", specs: []string{`{tracing: [{providers: [{name: old}]}], accessLogging: [{providers: [{name: absent}]}]}`}, want: &mesh.Telemetry{Logs: []mesh.AccessLog{}}},
		{name: "metrics add up", specs: []string{`metrics: [{overrides: [{match: {metric: REQUEST_SIZE}, disabled: true}]}]`, `metrics: [{providers: [{name: prometheus}], overrides: [{tagOverrides: {a: {operation: REMOVE}, b: {value: '"c"'}}}]}]`},
			want: &mesh.Telemetry{Logs: notable, Metrics: []mesh.MetricChange{{Metric: "istio_request_bytes", Disable: &yes}, {Remove: []string{"a"}, Set: map[string]string{"b": "c"}}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var all []*Telemetry
			for _, spec := range c.specs {
				all = append(all, telled.CompileTelemetry(telemetryOf(t, spec)))
			}
			if d := cmp.Diff(c.want, telled.Tell(c.gateway, all)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

// What cannot be had is named where it stands, and what means nothing is refused.
func TestTelemetryIsJudged(t *testing.T) {
	for _, c := range []struct {
		spec, field string
		code        Code
		severity    Severity
	}{
		{`tracing: [{providers: [{name: absent}]}]`, "spec.tracing[0].providers[0].name", UnknownProvider, Warning},
		{`tracing: [{providers: [{name: old}]}]`, "spec.tracing[0].providers[0].name", UnknownProvider, Warning},
		{`tracing: [{providers: [{name: logs}]}]`, "spec.tracing[0].providers[0].name", BadTelemetry, Error},
		{`accessLogging: [{providers: [{name: otel}]}]`, "spec.accessLogging[0].providers[0].name", BadTelemetry, Error},
		{`tracing: [{randomSamplingPercentage: 101}]`, "spec.tracing[0].randomSamplingPercentage", BadTelemetry, Error},
		{`tracing: [{customTags: {a: {literal: {value: ""}}}}]`, "spec.tracing[0].customTags[a].literal.value", BadTelemetry, Error},
		{`tracing: [{customTags: {a: {header: {name: "x y"}}}}]`, "spec.tracing[0].customTags[a].header.name", BadTelemetry, Error},
		{`tracing: [{customTags: {a: {formatter: {value: "%REQ(A)%"}}}}]`, "spec.tracing[0].customTags[a].formatter", PartlyFollowed, Warning},
		{`accessLogging: [{filter: {expression: "response.code >="}}]`, "spec.accessLogging[0].filter.expression", BadFilter, Error},
		{`metrics: [{reportingInterval: 5s}]`, "spec.metrics[0].reportingInterval", PartlyFollowed, Warning},
		{`metrics: [{providers: [{name: otel}]}]`, "spec.metrics[0].providers[0].name", PartlyFollowed, Warning},
		{`metrics: [{overrides: [{match: {customMetric: mine}}]}]`, "spec.metrics[0].overrides[0].match.customMetric", PartlyFollowed, Warning},
		{`metrics: [{overrides: [{match: {metric: GRPC_RESPONSE_MESSAGES}}]}]`, "spec.metrics[0].overrides[0].match.metric", PartlyFollowed, Warning},
		{`metrics: [{overrides: [{tagOverrides: {a: {value: request.host}}}]}]`, "spec.metrics[0].overrides[0].tagOverrides[a].value", PartlyFollowed, Warning},
		{`metrics: [{overrides: [{tagOverrides: {"a b": {value: "'x'"}}}]}]`, "spec.metrics[0].overrides[0].tagOverrides[a b]", BadTelemetry, Error},
		{`selector: {matchLabels: {app: x}}`, "spec.selector", NeedsWaypoint, Warning},
		{`targetRefs: [{kind: Pod, name: x}]`, "spec.targetRefs[0]", BadTarget, Error},
	} {
		got := telled.Check(telemetryOf(t, c.spec))
		if len(got) != 1 || got[0].Field != c.field || got[0].Code != c.code || got[0].Severity != c.severity {
			t.Errorf("%s: %v", c.spec, got)
		}
	}
}

func TestFilters(t *testing.T) {
	for _, good := range []string{
		`response.code >= 400`, `request.method == "POST" && !request.url_path.startsWith("/health")`, `has(request.headers.x) || "y" in request.headers`,
		`response.code in [500, 503] ? true : request.duration > duration("100ms")`, `request.path.matches("^/a[0-9]+$")`, `metadata.filter_metadata["a"]["b"] == 'c'`,
	} {
		if problem := FilterProblem(good); problem != "" {
			t.Errorf("%s: %s", good, problem)
		}
	}
	for bad, want := range map[string]string{
		"": "empty", "response.code >=": "not CEL", "respons.code == 1": "attribute", "request.headers.exists(h, h == 'x')": "macros", "string(response.code) == '200'": "function",
		"request.path.matches('(')": "regular expression", "request.path.matches(request.host)": "in quotes", "request{}": "messages", strings.Repeat("a", 5000): "bytes",
		strings.Repeat("(", 200) + "1" + strings.Repeat(")", 200): "not CEL",
	} {
		if problem := FilterProblem(bad); !strings.Contains(problem, want) {
			t.Errorf("%.60s: %q, want %q", bad, problem, want)
		}
	}
}

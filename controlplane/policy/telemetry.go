package policy

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
	telemetryv1alpha1 "istio.io/api/telemetry/v1alpha1"
	typev1beta1 "istio.io/api/type/v1beta1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Telemetry is a Telemetry object as waypoints and gateways read it.
type Telemetry struct {
	Targets []Target
	// Selector says that it is for pods by their labels, which have no proxy of their own: it is for nothing.
	Selector bool
	// Problems are what of it is not followed, or means nothing.
	Problems []Problem
	// Services are those that it sends to, sorted.
	Services []mesh.ServiceName

	tracing []tracingPart
	logs    []logPart
	metrics []metricPart
}

// side is the part of a proxy that something is for: gateways are clients of what they send to, waypoints servers.
type side = telemetryv1alpha1.WorkloadMode

func at(s side, gateway bool) bool {
	return s == telemetryv1alpha1.WorkloadMode_CLIENT_AND_SERVER || gateway == (s == telemetryv1alpha1.WorkloadMode_CLIENT)
}

type tracingPart struct {
	on      side
	to      []*mesh.TelemetryProvider
	named   bool // it names providers, whatever they are
	percent *float64
	off     *bool
	tags    []mesh.SpanTag

	noWorkloads, noPropagation, ignoreRequestID *bool
}

type logPart struct {
	on     side
	to     []*mesh.TelemetryProvider
	named  bool
	off    *bool
	filter *string
}

type metricPart struct {
	on side
	mesh.MetricChange
}

// DefaultPercent is how many requests have a trace where nobody says, as in Istio.
const DefaultPercent = 1

// CompileTelemetry reads a Telemetry object.
func (m Mesh) CompileTelemetry(t *telemetryv1.Telemetry) *Telemetry {
	out := &Telemetry{Selector: len(t.Spec.GetSelector().GetMatchLabels()) > 0}
	refs := t.Spec.TargetRefs
	if len(refs) == 0 && t.Spec.TargetRef != nil {
		refs = []*typev1beta1.PolicyTargetReference{t.Spec.TargetRef}
	}
	for _, r := range refs[:min(len(refs), 16)] { // as many as the API allows
		out.Targets = append(out.Targets, targetOf(r))
	}
	c := &telemetryCompiler{providers: m.Telemetry, out: out}
	for i, s := range t.Spec.Tracing {
		c.tracing(fmt.Sprintf("spec.tracing[%d]", i), s)
	}
	for i, s := range t.Spec.AccessLogging {
		c.logging(fmt.Sprintf("spec.accessLogging[%d]", i), s)
	}
	for i, s := range t.Spec.Metrics {
		c.metrics(fmt.Sprintf("spec.metrics[%d]", i), s)
	}
	slices.SortFunc(out.Services, mesh.ServiceName.Compare)
	out.Services = slices.Compact(out.Services)
	return out
}

type telemetryCompiler struct {
	providers TelemetryProviders
	out       *Telemetry
}

func (c *telemetryCompiler) add(s Severity, code Code, field, format string, args ...any) {
	c.out.Problems = append(c.out.Problems, Problem{code, s, field, fmt.Sprintf(format, args...)})
}

// notFollowed names what has no effect.
func (c *telemetryCompiler) notFollowed(field, format string, args ...any) {
	c.add(Warning, PartlyFollowed, field, format, args...)
}

// find looks providers up, and says of those that are of no use why.
func (c *telemetryCompiler) find(field string, refs []*telemetryv1alpha1.ProviderRef, fits func(*mesh.TelemetryProvider) bool, what string) []*mesh.TelemetryProvider {
	var out []*mesh.TelemetryProvider
	for i, r := range refs {
		at := fmt.Sprintf("%s.providers[%d].name", field, i)
		switch p := c.providers.Find(r.GetName()); {
		case p == nil:
			c.add(Warning, UnknownProvider, at, "there is no %s in meshConfig.extensionProviders, so that nothing is sent to it", quote(r.GetName()))
		case p.Kind == mesh.TelemetryUnsupported:
			c.add(Warning, UnknownProvider, at, "%s: %s. Nothing is sent to it", short(p.Name), p.Problem)
		case !fits(p):
			c.add(Error, BadTelemetry, at, "the provider %s does not take %s; name one that does", short(p.Name), what)
		default:
			out = append(out, p)
			if p.Service != (mesh.ServiceName{}) {
				c.out.Services = append(c.out.Services, p.Service)
			}
		}
	}
	return out
}

func (c *telemetryCompiler) tracing(field string, s *telemetryv1alpha1.Tracing) {
	p := tracingPart{on: s.GetMatch().GetMode(), named: len(s.GetProviders()) > 0, to: c.find(field, s.GetProviders(), spans, "spans")}
	if len(p.to) > 1 {
		c.notFollowed(field+".providers", "spans go to one provider, %s; leave out the others", short(p.to[0].Name))
	}
	if v := s.GetRandomSamplingPercentage(); v != nil {
		percent := v.Value
		if !(percent >= 0 && percent <= 100) {
			c.add(Error, BadTelemetry, field+".randomSamplingPercentage", "%g is no percentage; give one from 0 to 100", percent)
			if percent = min(max(percent, 0), 100); math.IsNaN(percent) {
				percent = 0
			}
		}
		p.percent = &percent
	}
	if v := s.GetDisableSpanReporting(); v != nil {
		p.off = &v.Value
	}
	if v := s.GetUseRequestIdForTraceSampling(); v != nil {
		ignore := !v.Value
		p.ignoreRequestID = &ignore
	}
	if v := s.GetEnableIstioTags(); v != nil {
		none := !v.Value
		p.noWorkloads = &none
	}
	if v := s.GetDisableContextPropagation(); v != nil {
		p.noPropagation = &v.Value
	}
	for _, name := range slices.Sorted(maps.Keys(s.GetCustomTags())) {
		if tag, ok := c.tag(field+".customTags["+name+"]", name, s.GetCustomTags()[name]); ok {
			p.tags = append(p.tags, tag)
		}
	}
	c.out.tracing = append(c.out.tracing, p)
}

func (c *telemetryCompiler) tag(field, name string, t *telemetryv1alpha1.Tracing_CustomTag) (_ mesh.SpanTag, ok bool) {
	out := mesh.SpanTag{Name: name}
	if name == "" {
		c.add(Error, BadTelemetry, field, "the tag has no name")
		return out, false
	}
	switch {
	case t.GetLiteral() != nil:
		if out.Literal = t.GetLiteral().GetValue(); out.Literal == "" {
			c.add(Error, BadTelemetry, field+".literal.value", "the value is empty; remove the tag, or give it one")
			return out, false
		}
	case t.GetHeader() != nil:
		out.Header, out.Default = t.GetHeader().GetName(), t.GetHeader().GetDefaultValue()
		if !httpguts.ValidHeaderFieldName(out.Header) {
			c.add(Error, BadTelemetry, field+".header.name", "%s is not the name of a header", quote(out.Header))
			return out, false
		}
	case t.GetEnvironment() != nil:
		out.Environment, out.Default = t.GetEnvironment().GetName(), t.GetEnvironment().GetDefaultValue()
		if out.Environment == "" || strings.ContainsAny(out.Environment, "=\x00") {
			c.add(Error, BadTelemetry, field+".environment.name", "%s is not the name of a variable", quote(out.Environment))
			return out, false
		}
	case t.GetFormatter() != nil:
		c.notFollowed(field+".formatter", "formatters are not followed, and the tag is left out; use literal, header or environment")
		return out, false
	default:
		c.add(Error, BadTelemetry, field, "the tag has no value; give it one of literal, header and environment")
		return out, false
	}
	return out, true
}

func (c *telemetryCompiler) logging(field string, s *telemetryv1alpha1.AccessLogging) {
	p := logPart{on: s.GetMatch().GetMode(), named: len(s.GetProviders()) > 0, to: c.find(field, s.GetProviders(), lines, "access logs")}
	if v := s.GetDisabled(); v != nil {
		p.off = &v.Value
	}
	if s.GetFilter() != nil {
		expression := s.GetFilter().GetExpression()
		if problem := FilterProblem(expression); problem != "" {
			c.add(Error, BadFilter, field+".filter.expression", "%s; where it is stored nevertheless, every request is written about", problem)
			expression = ""
		}
		p.filter = &expression
	}
	c.out.logs = append(c.out.logs, p)
}

// metricNames are Istio's standard metrics as the API names them, in its order.
var metricNames = map[telemetryv1alpha1.MetricSelector_IstioMetric]string{
	telemetryv1alpha1.MetricSelector_ALL_METRICS:            "",
	telemetryv1alpha1.MetricSelector_REQUEST_COUNT:          "istio_requests_total",
	telemetryv1alpha1.MetricSelector_REQUEST_DURATION:       "istio_request_duration_milliseconds",
	telemetryv1alpha1.MetricSelector_REQUEST_SIZE:           "istio_request_bytes",
	telemetryv1alpha1.MetricSelector_RESPONSE_SIZE:          "istio_response_bytes",
	telemetryv1alpha1.MetricSelector_TCP_OPENED_CONNECTIONS: "istio_tcp_connections_opened_total",
	telemetryv1alpha1.MetricSelector_TCP_CLOSED_CONNECTIONS: "istio_tcp_connections_closed_total",
	telemetryv1alpha1.MetricSelector_TCP_SENT_BYTES:         "istio_tcp_sent_bytes_total",
	telemetryv1alpha1.MetricSelector_TCP_RECEIVED_BYTES:     "istio_tcp_received_bytes_total",
}

func (c *telemetryCompiler) metrics(field string, s *telemetryv1alpha1.Metrics) {
	for i, r := range s.GetProviders() {
		if p := c.providers.Find(r.GetName()); p == nil || p.Kind != mesh.TelemetryPrometheus {
			c.notFollowed(fmt.Sprintf("%s.providers[%d].name", field, i), "metrics are there for Prometheus to scrape alone, and %s is nothing of the kind: the entry has no effect", quote(r.GetName()))
			return
		}
	}
	if s.GetReportingInterval() != nil {
		c.notFollowed(field+".reportingInterval", "TCP metrics are counted when a connection opens and when it ends; leave it out")
	}
	for i, o := range s.GetOverrides() {
		at := fmt.Sprintf("%s.overrides[%d]", field, i)
		p := metricPart{on: o.GetMatch().GetMode()}
		if custom := o.GetMatch().GetCustomMetric(); custom != "" {
			p.Metric = "istio_" + strings.TrimPrefix(custom, "istio_")
			if !slices.Contains(slices.Collect(maps.Values(metricNames)), p.Metric) {
				c.notFollowed(at+".match.customMetric", "there is no metric %s: metrics are Istio's standard ones", quote(custom))
				continue
			}
		} else if name, ok := metricNames[o.GetMatch().GetMetric()]; ok {
			p.Metric = name
		} else {
			c.notFollowed(at+".match.metric", "messages of gRPC are not counted")
			continue
		}
		if v := o.GetDisabled(); v != nil {
			p.Disable = &v.Value
		}
		for _, name := range slices.Sorted(maps.Keys(o.GetTagOverrides())) {
			switch t := o.GetTagOverrides()[name]; {
			case t.GetOperation() == telemetryv1alpha1.MetricsOverrides_TagOverride_REMOVE:
				p.Remove = append(p.Remove, name)
			case !tagName(name):
				c.add(Error, BadTelemetry, at+".tagOverrides["+name+"]", "%s is not the name of a tag: letters, digits and underscores", quote(name))
			default:
				value, ok := literal(t.GetValue())
				if !ok {
					c.notFollowed(at+".tagOverrides["+name+"].value", "values of tags are texts in quotes, as in \"'blue'\"; expressions are not followed, and the tag stays as it is")
					continue
				}
				if p.Set == nil {
					p.Set = map[string]string{}
				}
				p.Set[name] = value
			}
		}
		c.out.metrics = append(c.out.metrics, p)
	}
}

func tagName(s string) bool {
	for i, r := range s {
		if r != '_' && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return s != ""
}

// literal reads a text as CEL writes it, without escapes.
func literal(s string) (string, bool) {
	if len(s) < 2 || s[0] != s[len(s)-1] || s[0] != '\'' && s[0] != '"' {
		return "", false
	}
	s = s[1 : len(s)-1]
	return s, !strings.ContainsAny(s, "'\"\\\r\n")
}

// Tell merges the objects that are for a waypoint or a gateway, the widest first: what a narrower one says holds. Nil is the
// default.
func (m Mesh) Tell(gateway bool, all []*Telemetry) *mesh.Telemetry {
	out := &mesh.Telemetry{Tracing: m.tracing(gateway, all), Logs: m.logs(gateway, all)}
	for _, t := range all {
		for _, p := range t.metrics {
			if at(p.on, gateway) {
				out.Metrics = append(out.Metrics, p.MetricChange)
			}
		}
	}
	if out.Tracing == nil && len(out.Metrics) == 0 && len(out.Logs) == 1 && out.Logs[0].Notable {
		return nil
	}
	return out
}

func (m Mesh) tracing(gateway bool, all []*Telemetry) *mesh.Tracing {
	out := &mesh.Tracing{Percent: DefaultPercent}
	off := false
	for _, name := range m.Telemetry.Tracing {
		if p := m.Telemetry.Find(name); p != nil && p.Kind != mesh.TelemetryUnsupported {
			out.To = p
			break
		}
	}
	set := func(to *bool, v *bool) {
		if v != nil {
			*to = *v
		}
	}
	for _, t := range all {
		for _, p := range t.tracing {
			if !at(p.on, gateway) {
				continue
			}
			if p.named {
				out.To = nil
				if len(p.to) > 0 {
					out.To = p.to[0]
				}
			}
			if p.percent != nil {
				out.Percent = *p.percent
			}
			if len(p.tags) > 0 {
				out.Tags = p.tags
			}
			set(&off, p.off)
			set(&out.NoWorkloads, p.noWorkloads)
			set(&out.NoPropagation, p.noPropagation)
			set(&out.IgnoreRequestID, p.ignoreRequestID)
		}
	}
	if off || out.To == nil {
		return nil
	}
	return out
}

func (m Mesh) logs(gateway bool, all []*Telemetry) []mesh.AccessLog {
	type log struct {
		mesh.AccessLog
		off bool
	}
	var out []log
	if m.Telemetry.Logs == nil {
		out = append(out, log{AccessLog: mesh.AccessLog{To: m.Telemetry.Find(StdoutProvider), Notable: true}})
	}
	for _, name := range m.Telemetry.Logs {
		if p := m.Telemetry.Find(name); p != nil && p.Kind != mesh.TelemetryUnsupported {
			out = append(out, log{AccessLog: mesh.AccessLog{To: p}})
		}
	}
	for _, t := range all {
		parts := slices.DeleteFunc(slices.Clone(t.logs), func(p logPart) bool { return !at(p.on, gateway) })
		if slices.ContainsFunc(parts, func(p logPart) bool { return p.named }) { // the object says where to: there alone
			was := out
			out = nil
			for _, p := range parts {
				for _, to := range p.to {
					if slices.ContainsFunc(out, func(l log) bool { return l.To.Name == to.Name }) {
						continue
					}
					next := log{AccessLog: mesh.AccessLog{To: to}}
					if i := slices.IndexFunc(was, func(l log) bool { return l.To.Name == to.Name }); i >= 0 {
						next = was[i]
					}
					out = append(out, next)
				}
			}
		}
		for _, p := range parts {
			for i := range out {
				if p.named && !slices.ContainsFunc(p.to, func(to *mesh.TelemetryProvider) bool { return to.Name == out[i].To.Name }) {
					continue
				}
				out[i].Notable = false
				if p.off != nil {
					out[i].off = *p.off
				}
				if p.filter != nil {
					out[i].Filter = *p.filter
				}
			}
		}
	}
	logs := []mesh.AccessLog{}
	for _, l := range out {
		if !l.off {
			logs = append(logs, l.AccessLog)
		}
	}
	return logs
}

// telemetry checks a Telemetry object.
func (c *checker) telemetry(t *telemetryv1.Telemetry) {
	c.attachment(t.Namespace, t.Spec.Selector, t.Spec.TargetRef, t.Spec.TargetRefs)
	compiled := c.mesh.CompileTelemetry(t)
	if compiled.Selector {
		c.warn(NeedsWaypoint, "spec.selector", "pods have no proxy of their own, so that this applies to nothing: name waypoints, gateways or Services in targetRefs, or leave both out for all of the namespace. "+Waypoints)
	}
	for _, p := range compiled.Problems {
		c.add(p.Severity, p.Code, p.Field, "%s", p.Message)
	}
}

// problemText is what a condition says of problems.
func problemText(all []Problem, most int) string {
	var out []string
	for _, p := range all[:min(len(all), most)] {
		out = append(out, p.Field+": "+p.Message)
	}
	if n := len(all) - most; n > 0 {
		out = append(out, "and "+strconv.Itoa(n)+" more")
	}
	return strings.Join(out, "; ")
}

// ProblemText says what of the object is not followed; "" where all of it is.
func (t *Telemetry) ProblemText() string { return problemText(t.Problems, 5) }

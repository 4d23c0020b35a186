package policy

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/warrenmesh/warren/internal/mesh"
)

// TelemetryProviders are what Telemetry objects may name, and what holds where they name nothing.
type TelemetryProviders struct {
	ByName  map[string]*mesh.TelemetryProvider
	Tracing []string
	Logs    []string // nil: standard output
}

// Find returns a provider by its name, those included that there are without being configured; nil for none.
func (p TelemetryProviders) Find(name string) *mesh.TelemetryProvider {
	if have := p.ByName[name]; have != nil {
		return have
	}
	switch name {
	case StdoutProvider:
		return &mesh.TelemetryProvider{Name: name, Kind: mesh.TelemetryStdout}
	case "prometheus":
		return &mesh.TelemetryProvider{Name: name, Kind: mesh.TelemetryPrometheus}
	}
	return nil
}

// StdoutProvider is Istio's name for the access log on standard output.
const StdoutProvider = "envoy"

// TelemetrySource is what is read of an extension provider of Istio's MeshConfig that takes spans, logs or metrics.
type TelemetrySource struct {
	OpenTelemetry *struct {
		telemetryAddress
		HTTP              map[string]any `json:"http"`
		GRPC              map[string]any `json:"grpc"`
		ResourceDetectors map[string]any `json:"resourceDetectors"`
		Sampler           map[string]any `json:"dynatraceSampler"`
	} `json:"opentelemetry"`
	Zipkin *struct {
		telemetryAddress
		Enable64BitTraceID bool   `json:"enable64bitTraceId"`
		Path               string `json:"path"`
		TraceContextOption string `json:"traceContextOption"`
		Timeout            string `json:"timeout"`
		Headers            []any  `json:"headers"`
	} `json:"zipkin"`
	File *struct {
		Path      string         `json:"path"`
		LogFormat map[string]any `json:"logFormat"`
	} `json:"envoyFileAccessLog"`
	OTLPLogs *struct {
		telemetryAddress
		LogName   string         `json:"logName"`
		LogFormat map[string]any `json:"logFormat"`
	} `json:"envoyOtelAls"`
	Prometheus map[string]any `json:"prometheus"`
}

type telemetryAddress struct {
	Service      string `json:"service"`
	Port         uint32 `json:"port"`
	MaxTagLength uint32 `json:"maxTagLength"`
}

// Provider converts one. Those of other kinds are kept too, with what is wrong with them: a Telemetry may name them.
func (s TelemetrySource) Provider(name, clusterDomain string) (*mesh.TelemetryProvider, error) {
	p := &mesh.TelemetryProvider{Name: name}
	at := func(kind mesh.TelemetryKind, a telemetryAddress) (err error) {
		if a.Port == 0 || a.Port > 65535 {
			return fmt.Errorf("%q: the port %d is none", name, a.Port)
		}
		p.Kind, p.Port, p.MaxPath = kind, uint16(a.Port), a.MaxTagLength
		if p.Service, err = ProviderService(a.Service, clusterDomain); err != nil {
			return fmt.Errorf("%q: %w", name, err)
		}
		return nil
	}
	cannot := func(what string) (*mesh.TelemetryProvider, error) {
		p.Kind, p.Problem = mesh.TelemetryUnsupported, what
		return p, nil
	}
	if name == "" {
		return nil, errors.New("a provider has no name")
	}
	switch {
	case s.OpenTelemetry != nil:
		if err := at(mesh.TelemetryOpenTelemetry, s.OpenTelemetry.telemetryAddress); err != nil {
			return nil, err
		}
		switch o := s.OpenTelemetry; {
		case o.HTTP != nil:
			return cannot("opentelemetry.http is not supported; leave it out, and give the port that takes OTLP by gRPC")
		case o.GRPC != nil || o.ResourceDetectors != nil || o.Sampler != nil:
			return cannot("of opentelemetry service, port and maxTagLength are supported; leave the rest out")
		}
	case s.Zipkin != nil:
		z := s.Zipkin
		if err := at(mesh.TelemetryZipkin, z.telemetryAddress); err != nil {
			return nil, err
		}
		p.Path, p.ShortIDs = cmp.Or(z.Path, "/api/v2/spans"), z.Enable64BitTraceID
		switch z.TraceContextOption {
		case "", "USE_B3":
		case "USE_B3_WITH_W3C_PROPAGATION":
			p.TraceParents = true
		default:
			return nil, fmt.Errorf("%q: traceContextOption is %q: it must be USE_B3 or USE_B3_WITH_W3C_PROPAGATION", name, z.TraceContextOption)
		}
		if z.Timeout != "" || len(z.Headers) > 0 {
			return cannot("timeout and headers of zipkin are not supported; leave them out")
		}
	case s.File != nil:
		p.Kind = mesh.TelemetryStdout
		if s.File.Path != "" && s.File.Path != "/dev/stdout" {
			return cannot("access logs are written to /dev/stdout, not to " + quote(s.File.Path))
		}
		if s.File.LogFormat != nil {
			return cannot("logFormat is not supported; leave it out: lines are JSON, with the fields that docs/waypoints.md names")
		}
	case s.OTLPLogs != nil:
		if err := at(mesh.TelemetryOTLPLogs, s.OTLPLogs.telemetryAddress); err != nil {
			return nil, err
		}
		p.LogName = cmp.Or(s.OTLPLogs.LogName, "otel_envoy_accesslog")
		if s.OTLPLogs.LogFormat != nil {
			return cannot("logFormat is not supported; leave it out: attributes are those of the log on standard output")
		}
	case s.Prometheus != nil:
		p.Kind = mesh.TelemetryPrometheus
	default:
		return cannot("opentelemetry, zipkin, envoyOtelAls, envoyFileAccessLog and prometheus are supported, and this provider is of another kind")
	}
	return p, nil
}

// ProviderService reads the name of a provider's service as Istio has it: a Service's full name, or namespace/host.
func ProviderService(service, clusterDomain string) (mesh.ServiceName, error) {
	ns, host, ok := strings.Cut(service, "/")
	if !ok {
		ns, host = "", service
		if rest, ok := strings.CutSuffix(host, ".svc."+clusterDomain); ok {
			_, ns, _ = strings.Cut(rest, ".")
		}
	}
	if ns == "" || host == "" {
		return mesh.ServiceName{}, fmt.Errorf("the service %q is neither name.namespace.svc.%s nor namespace/host", service, clusterDomain)
	}
	return mesh.ServiceName{Namespace: ns, Hostname: host}, nil
}

// Check reports defaults that are none.
func (p TelemetryProviders) Check() error {
	for _, name := range p.Tracing {
		if have := p.Find(name); have == nil || have.Kind != mesh.TelemetryUnsupported && !spans(have) {
			return fmt.Errorf("tracing: %s is no extension provider that takes spans", quote(name))
		}
	}
	for _, name := range p.Logs {
		if have := p.Find(name); have == nil || have.Kind != mesh.TelemetryUnsupported && !lines(have) {
			return fmt.Errorf("accessLogging: %s is no extension provider that takes access logs", quote(name))
		}
	}
	return nil
}

func spans(p *mesh.TelemetryProvider) bool {
	return p.Kind == mesh.TelemetryOpenTelemetry || p.Kind == mesh.TelemetryZipkin
}

func lines(p *mesh.TelemetryProvider) bool {
	return p.Kind == mesh.TelemetryStdout || p.Kind == mesh.TelemetryOTLPLogs
}

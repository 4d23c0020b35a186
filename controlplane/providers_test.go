package controlplane

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

func TestOutboundTrafficPolicy(t *testing.T) {
	for text, want := range map[string]bool{
		"": false, "outboundTrafficPolicy: {}": false, "outboundTrafficPolicy: {mode: ALLOW_ANY}": false, "outboundTrafficPolicy: {mode: REGISTRY_ONLY}": true,
	} {
		c, err := Config{}.Defaults().configured(configMaps{own: &corev1.ConfigMap{Data: map[string]string{"mesh": text}}})
		if err != nil || c.Mesh.RegistryOnly != want {
			t.Errorf("%q: %t, %v", text, c.Mesh.RegistryOnly, err)
		}
	}
	for _, mode := range []string{"registry_only", "NONE"} {
		_, err := Config{}.Defaults().configured(configMaps{own: &corev1.ConfigMap{Data: map[string]string{"mesh": "outboundTrafficPolicy: {mode: " + mode + "}"}}})
		if err == nil || !strings.Contains(err.Error(), "ALLOW_ANY or REGISTRY_ONLY") {
			t.Errorf("%s is taken: %v", mode, err)
		}
	}
}

func TestExtensionProviders(t *testing.T) {
	read := func(text string) (Config, error) {
		return Config{}.Defaults().configured(configMaps{own: &corev1.ConfigMap{Data: map[string]string{"mesh": "extensionProviders:\n" + text}}})
	}
	c, err := read(`
- {name: zipkin, zipkin: {service: zipkin.x.svc.cluster.local, port: 1}}
- {name: lines, envoyFileAccessLog: {path: /dev/stdout}}
- {name: file, envoyFileAccessLog: {path: /var/log/a}}
- {name: http, opentelemetry: {service: otel.x.svc.cluster.local, port: 4318, http: {path: /v1/traces}}}
- {name: other, skywalking: {service: s.x.svc.cluster.local, port: 1}}
- {name: h, envoyExtAuthzHttp: {service: a.b.svc.cluster.local, port: 8000, timeout: 1s, headersToUpstreamOnAllow: [x-a, "x-b*"], includeRequestBodyInCheck: {maxRequestBytes: 10}}}
- {name: g, envoyExtAuthzGrpc: {service: b/authz.example, port: 9000}}
`)
	if err != nil {
		t.Fatal(err)
	}
	h, g := c.Mesh.Providers["h"], c.Mesh.Providers["g"]
	if len(c.Mesh.Providers) != 2 || h.GRPC || h.Service.String() != "b/a.b.svc.cluster.local" || h.Timeout.String() != "1s" || len(h.ToApplication) != 2 || h.MaxBody != 10 ||
		!g.GRPC || g.Service.String() != "b/authz.example" || g.Port != 9000 {
		t.Errorf("%+v %+v", h, g)
	}
	for name, want := range map[string]mesh.TelemetryKind{"zipkin": mesh.TelemetryZipkin, "lines": mesh.TelemetryStdout, "file": mesh.TelemetryUnsupported, "http": mesh.TelemetryUnsupported, "other": mesh.TelemetryUnsupported} {
		if p := c.Mesh.Telemetry.ByName[name]; p == nil || p.Kind != want || (p.Problem != "") != (want == mesh.TelemetryUnsupported) {
			t.Errorf("%s: %+v", name, p)
		}
	}
	if p := c.Mesh.Telemetry.ByName["zipkin"]; p.Service.String() != "x/zipkin.x.svc.cluster.local" || p.Path != "/api/v2/spans" {
		t.Errorf("%+v", p)
	}
	for text, want := range map[string]string{
		`- {name: x, zipkin: {service: a.b.svc.cluster.local}}`:                                         "port",
		`- {name: x, opentelemetry: {service: a, port: 1}}`:                                             "service",
		`- {name: x, zipkin: {service: a.b.svc.cluster.local, port: 1, traceContextOption: W3C}}`:       "traceContextOption",
		"- {name: x, prometheus: {}}\ndefaultProviders: {tracing: [x]}":                                 "tracing",
		"- {name: x, prometheus: {}}\ndefaultProviders: {accessLogging: [y]}":                           "accessLogging",
		"- {name: x, prometheus: {}}\naccessLogFile: /var/log/envoy":                                    "accessLogFile",
		`- {name: x, envoyExtAuthzHttp: {service: a.b.svc.cluster.local}}`:                              "port",
		`- {name: x, envoyExtAuthzHttp: {service: a, port: 1}}`:                                         "service",
		`- {name: x, envoyExtAuthzHttp: {service: a.b.svc.cluster.local, port: 1, failOpen: true}}`:     "failOpen",
		`- {name: x, envoyExtAuthzGrpc: {service: a.b.svc.cluster.local, port: 1, timeout: "-1s"}}`:     "timeout",
		`- {envoyExtAuthzGrpc: {service: a.b.svc.cluster.local, port: 1}}`:                              "name",
		`- {name: x, envoyExtAuthzGrpc: {service: a.b.svc.cluster.local, port: 70000, timeout: "10s"}}`: "port",
	} {
		if _, err := read(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, want := range map[string][]string{
		"- {name: x, prometheus: {}}":                             nil,
		"- {name: x, prometheus: {}}\naccessLogFile: /dev/stdout": {"envoy"},
		"- {name: x, envoyOtelAls: {service: a.b.svc.cluster.local, port: 1}}\naccessLogFile: /dev/stdout\ndefaultProviders: {accessLogging: [x]}": {"x"},
	} {
		if c, err := read(text); err != nil || !slices.Equal(c.Mesh.Telemetry.Logs, want) {
			t.Errorf("%s: access logs go to %v: %v", text, c.Mesh.Telemetry.Logs, err)
		}
	}
}

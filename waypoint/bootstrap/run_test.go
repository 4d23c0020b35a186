package bootstrap

import (
	"strings"
	"testing"
)

func TestNamesOfMetrics(t *testing.T) {
	long := "envoy_other{x=\"" + strings.Repeat("y", 70_000) + "\"} 1\n"
	in := "# TYPE envoy_istio_requests_total counter\nenvoy_istio_requests_total{a=\"envoy_istio_\"} 3\n# TYPE envoy_other counter\n" + long + "envoy_istio_end 1"
	want := "# TYPE istio_requests_total counter\nistio_requests_total{a=\"envoy_istio_\"} 3\n# TYPE envoy_other counter\n" + long + "istio_end 1"
	in = `envoy_istio_requests_total{source_app="",a="=",response_flags="",grpc_response_status="",source_canonical_revision=""} 1` + "\n" + in
	want = `istio_requests_total{source_app="unknown",a="=",response_flags="-",grpc_response_status="",source_canonical_revision="latest"} 1` + "\n" + want
	var out strings.Builder
	if err := istioNames(&out, strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	if out.String() != want {
		t.Errorf("%.300s", out.String())
	}
}

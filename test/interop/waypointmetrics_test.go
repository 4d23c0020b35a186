package interop

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// scraped are the series of a metric that a waypoint shows, each as its labels.
func scraped(metric string) ([]map[string]string, error) {
	res, err := http.Get("http://127.0.0.1:15020/stats/prometheus")
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	var out []map[string]string
	for line := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(line, metric+"{")
		if !ok {
			continue
		}
		text, value, _ := strings.Cut(rest, "} ")
		labels := map[string]string{"": strings.TrimSpace(value)}
		for pair := range strings.SplitSeq(text, ",") {
			k, v, _ := strings.Cut(pair, "=")
			labels[k] = strings.Trim(v, `"`)
		}
		out = append(out, labels)
	}
	return out, nil
}

// waypointMetrics has a request counted under all labels that Istio's dashboards group by.
func waypointMetrics(t *testing.T, get func(authority, path string, headers ...string) (int, string, error)) {
	if code, _, err := get("10.96.0.9:80", "/items.v1.Items/Get", "content-type: application/grpc\r\n"); err != nil || code != 200 {
		t.Fatal(code, err)
	}
	want := map[string]string{
		"reporter": "waypoint", "response_code": "200", "request_protocol": "grpc", "response_flags": "-", "connection_security_policy": "mutual_tls",
		"source_workload": "client-v7", "source_workload_namespace": "shop", "source_canonical_service": "client", "source_canonical_revision": "v7", "source_app": "client",
		"source_version": "v7", "source_cluster": "Kubernetes", "source_principal": "spiffe://cluster.local/ns/shop/sa/client",
		"destination_service": "inventory.shop.svc.cluster.local", "destination_service_name": "inventory", "destination_service_namespace": "shop",
		"destination_workload_namespace": "shop", "destination_canonical_service": "inventory", "destination_app": "inventory",
		"destination_principal": "spiffe://cluster.local/ns/shop/sa/inventory", "destination_cluster": "Kubernetes",
	}
	for _, metric := range []string{"istio_requests_total", "istio_request_duration_milliseconds_count", "istio_request_bytes_count", "istio_response_bytes_sum"} {
		eventually(t, metric, time.Minute, func() error {
			all, err := scraped(metric)
			if err != nil {
				return err
			}
			why := fmt.Errorf("%d series", len(all))
			for _, have := range all {
				if have["request_protocol"] != "grpc" || have["response_code"] != "200" {
					continue
				}
				why = nil
				for k, v := range want {
					if have[k] != v {
						why = fmt.Errorf("%s is %q, want %q, in %v", k, have[k], v, have)
					}
				}
				if v := have["destination_version"]; why == nil && (v == "" || v == "unknown" || have["destination_workload"] == "" || have["destination_workload"] == "unknown" || have[""] == "0") {
					why = fmt.Errorf("the endpoint is not told: %v", have)
				}
				if why == nil {
					return nil
				}
			}
			return why
		})
	}
}

package interop

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// span is one as Zipkin's API has it.
type span struct {
	TraceID, Name, Kind string
	LocalEndpoint       struct{ ServiceName string }
	Tags                map[string]string
}

// spans is what came to a collector with Zipkin's API.
type spans struct {
	mu  sync.Mutex
	all []span
}

func (s *spans) of(traceID string) []span {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []span
	for _, x := range s.all {
		if strings.HasSuffix(x.TraceID, traceID) {
			out = append(out, x)
		}
	}
	return out
}

func collects(t *testing.T, at string) *spans {
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	s := &spans{}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var some []span
		if r.Method != http.MethodPost || r.URL.Path != "/api/v2/spans" || json.NewDecoder(r.Body).Decode(&some) != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		s.mu.Lock()
		s.all = append(s.all, some...)
		s.mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	return s
}

// waypointSpans has requests traced as a Telemetry asks for it, and no others.
func waypointSpans(t *testing.T, istio *istiofake.Clientset, s *spans, get func(authority, path string, headers ...string) (int, string, error)) {
	api := istio.TelemetryV1().Telemetries("shop")
	told := &telemetryv1.Telemetry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "all", UID: "t1", Generation: 1}}
	if err := yaml.Unmarshal([]byte(`tracing: [{providers: [{name: zipkin}], randomSamplingPercentage: 0, customTags: {team: {literal: {value: blue}}, tenant: {header: {name: x-tenant}}}}]`), &told.Spec); err != nil {
		t.Fatal(err)
	}
	if _, err := api.Create(t.Context(), told, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the Telemetry to be in effect", time.Minute, func() error {
		now, err := api.Get(t.Context(), "all", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range now.Status.Conditions {
			if c.Type == "Enforced" && c.Status == "True" && strings.Contains(c.Message, "1/1 pods of waypoint shop/way") {
				return nil
			}
		}
		return fmt.Errorf("%v", now.Status.Conditions)
	})
	const id, unwanted = "463ac35c9f6413ad48485a3953bb6124", "563ac35c9f6413ad48485a3953bb6124"
	for trace, sampled := range map[string]string{id: "1", unwanted: "0"} {
		code, body, err := get("10.96.0.9:80", "/traced", "x-b3-traceid: "+trace+"\r\nx-b3-spanid: a2fb4a1d1a96d312\r\nx-b3-sampled: "+sampled+"\r\nx-tenant: t1\r\n")
		if err != nil || code != 200 || !strings.Contains(strings.ToLower(body), "x-b3-traceid: "+trace) {
			t.Fatalf("%d %v: the application does not learn of the trace:\n%s", code, err, body)
		}
	}
	want := map[string]string{
		"istio.source_workload": "client-v7", "istio.source_namespace": "shop", "istio.source_principal": "spiffe://cluster.local/ns/shop/sa/client",
		"istio.destination_namespace": "shop", "istio.destination_canonical_service": "inventory", "istio.destination_principal": "spiffe://cluster.local/ns/shop/sa/inventory",
		"istio.destination_service": "inventory.shop.svc.cluster.local", "team": "blue", "tenant": "t1", "http.status_code": "200", "http.method": "GET",
	}
	eventually(t, "a span", time.Minute, func() error {
		got := s.of(id)
		if len(got) != 1 {
			return fmt.Errorf("%d spans", len(got))
		}
		for k, v := range want {
			if got[0].Tags[k] != v {
				return fmt.Errorf("%s is %q, want %q, in %+v", k, got[0].Tags[k], v, got[0])
			}
		}
		if got[0].Name != "inventory.shop.svc.cluster.local" || got[0].Tags["istio.destination_workload"] == "" {
			return fmt.Errorf("%+v", got[0])
		}
		return nil
	})
	if got := s.of(unwanted); len(got) > 0 {
		t.Errorf("a trace that nobody wants has spans: %+v", got)
	}
	if err := api.Delete(t.Context(), "all", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

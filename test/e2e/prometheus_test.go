package e2e

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// series is one element of the answer to an instant query.
type series struct {
	Metric map[string]string
	Value  [2]any // time, value
}

func (s series) value(t *testing.T) float64 {
	t.Helper()
	v, err := strconv.ParseFloat(fmt.Sprint(s.Value[1]), 64)
	must(t, err)
	return v
}

func query(ctx context.Context, ns, expr string) ([]series, error) {
	var data struct{ Result []series }
	err := mesh.AskPrometheus(ctx, ns, "query", url.Values{"query": {expr}}, &data)
	return data.Result, err
}

// tcpLabels is Istio's label set for TCP metrics as ztunnel has it.
var tcpLabels = []string{
	"reporter", "source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace", "source_principal",
	"source_app", "source_version", "source_cluster", "destination_service", "destination_service_namespace", "destination_service_name",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace",
	"destination_principal", "destination_app", "destination_version", "destination_cluster", "request_protocol", "response_flags",
	"connection_security_policy",
}

// A Prometheus that is configured as users have it finds the agents and the control plane, takes every line that
// they say, and counts connections and bytes under Istio's names and labels.
func TestPrometheus(t *testing.T) {
	ownCluster(t)
	program, err := mesh.Peer(t.Context(), "prometheus")
	must(t, err)
	out := namespace(t, "e2e-prometheus")
	t.Cleanup(func() {
		if _, err := mesh.Kubectl(context.WithoutCancel(t.Context()), "delete", "clusterrole,clusterrolebinding", "e2e-prometheus", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	must(t, mesh.RunPrometheus(t.Context(), program, out, nodes[1]))
	ns := namespace(t, "e2e-measured", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	must(t, mesh.AwaitReady(t.Context(), out, time.Minute))

	const n, marker = 40, "warren-demo-marker-7c1e\n"
	if r := startLoad(t, ns, "client", "-rate", "50", "-n", strconv.Itoa(n), "far:9000")(); r.failures() > 0 {
		t.Fatalf("%+v", r)
	}

	// Every target is up, and everything that it said was understood.
	var targets struct {
		ActiveTargets []struct {
			Labels                        map[string]string
			Health, LastError, ScrapeURL  string
			ScrapeInterval, ScrapeTimeout string
			LastScrapeDuration            float64
		}
	}
	must(t, lab.Eventually(t.Context(), 30*time.Second, func() error {
		if err := mesh.AskPrometheus(t.Context(), out, "targets", url.Values{"state": {"active"}}, &targets); err != nil {
			return err
		}
		up := map[string]bool{}
		for _, s := range targets.ActiveTargets {
			if s.Health == "up" && s.Labels["namespace"] == lab.Namespace {
				up[s.Labels["app"]+" on "+s.Labels["node"]] = true
			}
		}
		control := slices.ContainsFunc(slices.Collect(maps.Keys(up)), func(s string) bool { return strings.HasPrefix(s, "istiod on ") })
		if !up["ztunnel on "+nodes[0]] || !up["ztunnel on "+nodes[1]] || !control {
			return fmt.Errorf("targets: %+v", targets.ActiveTargets)
		}
		return nil
	}))

	tell := func(name, expr string, want float64, more func(series)) {
		t.Helper()
		failed := 0
		var found []series
		err := lab.Eventually(t.Context(), 20*time.Second, func() error { // a scrape or two
			var err error
			found, err = query(t.Context(), out, expr)
			if err != nil {
				return err
			}
			if len(found) != 1 || found[0].value(t) != want {
				return fmt.Errorf("%s is %v, want one series of %g", expr, found, want)
			}
			return nil
		})
		if err != nil {
			failed = 1
			t.Errorf("%s: %v", name, err)
		} else if more != nil {
			more(found[0])
		}
		record("metrics", name, n, failed, want, "")
	}
	for reporter, node := range map[string]string{"source": nodes[0], "destination": nodes[1]} {
		want := map[string]string{
			"reporter":        reporter,
			"source_workload": "client", "source_canonical_service": "client", "source_canonical_revision": "latest",
			"source_workload_namespace": ns, "source_principal": "spiffe://cluster.local/ns/" + ns + "/sa/client",
			"source_app": "client", "source_version": "latest", "source_cluster": "Kubernetes",
			"destination_service": "far." + ns + ".svc.cluster.local", "destination_service_namespace": ns, "destination_service_name": "far",
			"destination_workload": "far", "destination_canonical_service": "far", "destination_canonical_revision": "latest",
			"destination_workload_namespace": ns, "destination_principal": "spiffe://cluster.local/ns/" + ns + "/sa/server",
			"destination_app": "far", "destination_version": "latest", "destination_cluster": "Kubernetes",
			"request_protocol": "tcp", "response_flags": "-", "connection_security_policy": "mutual_tls",
		}
		check := func(s series) {
			for _, l := range tcpLabels {
				if s.Metric[l] != want[l] {
					t.Errorf("%s: %s is %q, want %q", s.Metric["__name__"], l, s.Metric[l], want[l])
				}
			}
			for l := range s.Metric { // others come from the scrape alone
				if _, ok := want[l]; !ok && (strings.HasPrefix(l, "source_") || strings.HasPrefix(l, "destination_")) {
					t.Errorf("%s has a label %s that Istio's has not", s.Metric["__name__"], l)
				}
			}
			if s.Metric["node"] != node {
				t.Errorf("reporter %s is on %q, want %s", reporter, s.Metric["node"], node)
			}
		}
		at := fmt.Sprintf(`{reporter=%q,source_workload_namespace=%q}`, reporter, ns)
		tell("istio_tcp_connections_opened_total, "+reporter, "istio_tcp_connections_opened_total"+at, n, check)
		tell("istio_tcp_connections_closed_total, "+reporter, "istio_tcp_connections_closed_total"+at, n, check)
		tell("istio_tcp_received_bytes_total, "+reporter, "istio_tcp_received_bytes_total"+at, n*float64(len(marker)), check)
		sent, err := query(t.Context(), out, "istio_tcp_sent_bytes_total"+at)
		must(t, err)
		if len(sent) != 1 || sent[0].value(t) <= n*float64(len(marker)) {
			t.Errorf("sent bytes, reporter %s: %v", reporter, sent)
		}
	}
	// What a graph of the mesh is made of.
	tell("sum by workloads", fmt.Sprintf(`sum by (source_workload, source_workload_namespace, destination_service_name, destination_workload) (istio_tcp_connections_opened_total{reporter="source",source_workload_namespace=%q})`, ns), n, nil)

	var metadata map[string][]struct{ Type, Help string }
	must(t, mesh.AskPrometheus(t.Context(), out, "metadata", nil, &metadata))
	own := 0
	for name, m := range metadata {
		if !strings.HasPrefix(name, "warren_") && !strings.HasPrefix(name, "istio_") {
			continue
		}
		own++
		for _, m := range m {
			if m.Help == "" || strings.HasSuffix(name, "_total") != (m.Type == "counter") {
				t.Errorf("%s is a %s, %q", name, m.Type, m.Help)
			}
		}
	}
	if own < 8 {
		t.Errorf("%d metrics are Warren's or Istio's: %v", own, slices.Sorted(maps.Keys(metadata)))
	}
	for _, s := range targets.ActiveTargets {
		if s.Labels["namespace"] == lab.Namespace && s.LastError != "" {
			t.Errorf("%s: %s", s.ScrapeURL, s.LastError)
		}
	}
}

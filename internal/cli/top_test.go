package cli

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// series is one line of metrics.
func series(name, reporter, source, destination, class string, v int) string {
	ns := func(w string) (string, string) {
		n, name, _ := strings.Cut(w, "/")
		return n, name
	}
	sn, sw := ns(source)
	dn, dw := ns(destination)
	key := "response_flags"
	if name == requestsMetric {
		key = "response_code"
	}
	return fmt.Sprintf("%s{reporter=%q,source_workload_namespace=%q,source_workload=%q,destination_workload_namespace=%q,destination_workload=%q,destination_service_namespace=\"shop\",destination_service_name=\"svc\",%s=%q} %d\n",
		name, reporter, sn, sw, dn, dw, key, class, v)
}

// countedBy tells what the agents and a waypoint count, the nth time that they are asked.
func countedBy(p *corev1.Pod, n int) string {
	switch p.Name {
	case "warren-node-a":
		return series(openedMetric, "source", "shop/ui", "shop/catalog", "-", 100+20*n) + series(closedMetric, "source", "shop/ui", "shop/catalog", "-", 90+20*n) +
			series(receivedMetric, "source", "shop/ui", "shop/catalog", "-", 4096*n) + series(sentMetric, "source", "shop/ui", "shop/catalog", "-", 3_000_000*n) +
			series(failedMetric, "source", "shop/ui", "bank/teller", "CONNECT", 7+2*n)
	case "warren-node-b":
		return series(openedMetric, "destination", "shop/ui", "shop/catalog", "-", 50+20*n) + series(closedMetric, "destination", "shop/ui", "shop/catalog", "-", 46+20*n) +
			series(receivedMetric, "destination", "shop/ui", "shop/catalog", "-", 4096*n) + series(sentMetric, "destination", "shop/ui", "shop/catalog", "-", 3_000_000*n) +
			series(failedMetric, "destination", "bank/teller", "shop/catalog", "DENY", 6*n) +
			series(requestsMetric, "destination", "shop/ui", "shop/catalog", "200", 1000*n) // not an agent's
	default:
		return series(requestsMetric, "waypoint", "shop/ui", "shop/catalog", "200", 9*n) + series(requestsMetric, "waypoint", "shop/ui", "shop/catalog", "503", 3*n) +
			series(requestsMetric, "waypoint", "shop/ui", "unknown/unknown", "404", 8*n) + series(openedMetric, "waypoint", "shop/ui", "shop/catalog", "-", 999*n)
	}
}

func TestTop(t *testing.T) {
	session(t, "testdata/top.txtar", func(t *testing.T, args ...string) (code int, stdout, stderr string) {
		synctest.Test(t, func(t *testing.T) {
			var out, errs bytes.Buffer
			a := &app{env: Env{Program: "warren", Args: args, Version: "test", Out: &out, Err: &errs}}
			var mu sync.Mutex
			times := map[string]int{}
			k := fake.NewClientset(append(installed(), pod("shop", "way-1", "node1", map[string]string{gatewayLabel: "way"}, nil))...)
			a.connect = func(*app) (*conn, error) {
				return &conn{Interface: k, ask: func(_ context.Context, p *corev1.Pod, port int, path string) ([]byte, error) {
					if port != metricsPort || path != "/stats/prometheus" {
						return nil, fmt.Errorf("unexpected question %s to port %d of %s", path, port, p.Name)
					}
					mu.Lock()
					defer mu.Unlock()
					times[p.Name]++
					return []byte(countedBy(p, times[p.Name]-1)), nil
				}}, nil
			}
			code = a.main(t.Context())
			stdout, stderr = out.String(), errs.String()
		})
		return code, stdout, stderr
	})
}

// What a pod has counted before it was asked is nothing that happened in between, and a series that begins anew begins at 0.
func TestCountersThatBeginAnew(t *testing.T) {
	at := time.Unix(100, 0)
	k := func(pod string) counter {
		return counter{pod: pod, metric: openedMetric, namespace: "shop", workload: pod}
	}
	before := &counted{at: at, pods: map[string]bool{"old": true, "anew": true, "first": true}, values: map[counter]float64{k("old"): 10, k("anew"): 50}}
	now := &counted{at: at.Add(2 * time.Second), values: map[counter]float64{k("old"): 14, k("anew"): 6, k("first"): 8, k("late"): 1000}}
	for _, l := range loads(before, now) {
		if want := map[string]float64{"old": 2, "anew": 3, "first": 4, "late": 0}[l.Workload]; l.New != want {
			t.Errorf("%s: %v new connections a second, want %v", l.Workload, l.New, want)
		}
	}
}

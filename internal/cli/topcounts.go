package cli

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
)

// The metrics that top adds up. Bytes are the client's (received) and the server's (sent) at both reporters.
const (
	openedMetric   = "istio_tcp_connections_opened_total"
	closedMetric   = "istio_tcp_connections_closed_total"
	failedMetric   = "istio_tcp_connections_failed_total"
	receivedMetric = "istio_tcp_received_bytes_total"
	sentMetric     = "istio_tcp_sent_bytes_total"
	requestsMetric = "istio_requests_total"
)

// counted is counters at a moment.
type counted struct {
	at     time.Time
	pods   map[string]bool // who was asked, by uid
	values map[counter]float64
}

// counter is one series, reduced to what top tells apart.
type counter struct {
	pod       string // who counts: when it starts anew, so do its counters
	metric    string
	client    bool // the workload is the connection's client
	namespace string
	workload  string
	class     string // response_flags, or the first digit of response_code
}

// scrape asks all pods at once.
func scrape(ctx context.Context, c *conn, agents, proxies []corev1.Pod) (*counted, error) {
	all := slices.Concat(agents, proxies)
	said := make([][]byte, len(all))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range all {
		g.Go(func() (err error) {
			said[i], err = c.ask(gctx, &all[i], metricsPort, "/stats/prometheus")
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	out := &counted{at: time.Now(), pods: map[string]bool{}, values: map[counter]float64{}}
	for i, b := range said {
		if err := out.add(string(all[i].UID), b, i < len(agents)); err != nil {
			return nil, fmt.Errorf("reading the metrics of %s: %w", all[i].Name, err)
		}
	}
	return out, nil
}

// add takes up what one pod says: of an agent connections, of an Envoy requests.
func (c *counted) add(pod string, text []byte, agent bool) error {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	c.pods[pod] = true
	families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
	if err != nil {
		return err
	}
	for name, f := range families {
		switch name {
		case openedMetric, closedMetric, failedMetric, receivedMetric, sentMetric:
			if !agent {
				continue
			}
		case requestsMetric:
			if agent {
				continue
			}
		default:
			continue
		}
		for _, m := range f.Metric {
			l := labelsOf(m)
			k := counter{pod: pod, metric: name, client: l["reporter"] == "source", class: l["response_flags"]}
			end := "destination"
			if k.client {
				end = "source"
			}
			k.namespace, k.workload = l[end+"_workload_namespace"], l[end+"_workload"]
			if name == requestsMetric {
				k.class = l["response_code"][:min(1, len(l["response_code"]))]
			}
			// A waypoint or a gateway answers for itself where it chose no endpoint.
			if k.workload == "unknown" && name == requestsMetric {
				k.namespace, k.workload = l["destination_service_namespace"], l["destination_service_name"]
			}
			c.values[k] += m.GetCounter().GetValue() + m.GetUntyped().GetValue()
		}
	}
	return nil
}

func labelsOf(m *dto.Metric) map[string]string {
	out := make(map[string]string, len(m.Label))
	for _, p := range m.Label {
		out[p.GetName()] = p.GetValue()
	}
	return out
}

// loads is what happened between two moments, by namespace and workload.
func loads(before, now *counted) []load {
	seconds := now.at.Sub(before.at).Seconds()
	type workload struct{ namespace, name string }
	rows := map[workload]*load{}
	for k, v := range now.values {
		w := workload{k.namespace, k.workload}
		l := rows[w]
		if l == nil {
			l = &load{Namespace: k.namespace, Workload: k.workload}
			rows[w] = l
		}
		old := before.values[k]
		switch {
		case !before.pods[k.pod]: // nobody knows since when it counts
			old = v
		case v < old: // the series had been given up, and is there again
			old = 0
		}
		delta := (v - old) / seconds
		switch k.metric {
		case openedMetric:
			l.Open += int64(v)
			l.New += delta
		case closedMetric:
			l.Open -= int64(v)
		case failedMetric:
			l.Failed += delta
			if k.class == "DENY" {
				l.Denied += delta
			}
		case receivedMetric, sentMetric:
			// The client's bytes are what it sent, and what a server received.
			if k.client == (k.metric == receivedMetric) {
				l.Sent += delta
			} else {
				l.Received += delta
			}
		case requestsMetric:
			l.Requests = plus(l.Requests, delta)
			if k.class == "5" {
				l.Errors = plus(l.Errors, delta)
			}
		}
	}
	out := make([]load, 0, len(rows))
	for _, l := range rows {
		if l.Requests != nil && l.Errors == nil {
			l.Errors = new(float64)
		}
		out = append(out, *l)
	}
	slices.SortFunc(out, func(x, y load) int {
		return strings.Compare(x.Namespace+"\x00"+x.Workload, y.Namespace+"\x00"+y.Workload)
	})
	return out
}

func plus(p *float64, v float64) *float64 {
	v += value(p)
	return &v
}

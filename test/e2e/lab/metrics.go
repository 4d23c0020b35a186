package lab

import (
	"context"
	"fmt"
	"strconv"
	"strings"
)

// Sample is one line of a /metrics page.
type Sample struct {
	Name   string
	Labels map[string]string
	Value  float64
	Node   string
}

// Metrics reads the metrics of every node agent.
func (l *Lab) Metrics(ctx context.Context) ([]Sample, error) {
	pods, err := l.Pods(ctx, Namespace, NodeApp)
	if err != nil {
		return nil, err
	}
	var all []Sample
	for _, p := range pods {
		if p.Terminating || !p.Ready {
			continue
		}
		page, err := l.Kubectl(ctx, "get", "--raw",
			"/api/v1/namespaces/"+Namespace+"/pods/"+p.Name+":15020/proxy/metrics")
		if err != nil {
			return nil, err
		}
		samples, err := parseMetrics(page)
		if err != nil {
			return nil, fmt.Errorf("metrics of %s: %w", p.Name, err)
		}
		for i := range samples {
			samples[i].Node = p.Node
		}
		all = append(all, samples...)
	}
	return all, nil
}

// parseMetrics reads Prometheus' text format as far as the tests need it.
func parseMetrics(page string) ([]Sample, error) {
	var out []Sample
	for line := range strings.Lines(page) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		s := Sample{Labels: map[string]string{}}
		rest := line
		if i := strings.IndexByte(line, '{'); i >= 0 {
			s.Name, rest = line[:i], line[i+1:]
			for rest != "" && rest[0] != '}' {
				k, r, ok := strings.Cut(rest, "=")
				if !ok {
					return nil, fmt.Errorf("label without a value: %s", line)
				}
				q, err := strconv.QuotedPrefix(r)
				if err != nil {
					return nil, fmt.Errorf("label %s: %w: %s", k, err, line)
				}
				v, err := strconv.Unquote(q)
				if err != nil {
					return nil, err
				}
				s.Labels[k] = v
				rest = strings.TrimPrefix(r[len(q):], ",")
			}
			rest = strings.TrimPrefix(rest, "}")
		} else {
			name, r, ok := strings.Cut(line, " ")
			if !ok {
				return nil, fmt.Errorf("no value: %s", line)
			}
			s.Name, rest = name, r
		}
		f := strings.Fields(rest)
		if len(f) == 0 {
			return nil, fmt.Errorf("no value: %s", line)
		}
		v, err := strconv.ParseFloat(f[0], 64)
		if err != nil {
			return nil, err
		}
		s.Value = v
		out = append(out, s)
	}
	return out, nil
}

// Sum adds the samples of a name whose labels have all the given values.
func Sum(samples []Sample, name string, labels map[string]string) float64 {
	var sum float64
next:
	for _, s := range samples {
		if s.Name != name {
			continue
		}
		for k, v := range labels {
			if s.Labels[k] != v {
				continue next
			}
		}
		sum += s.Value
	}
	return sum
}

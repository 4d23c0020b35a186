package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Files of a report's directory.
const (
	roundsFile = "rounds.json" // what was measured
	LatestFile = "latest.json" // medians and ratios
	tableFile  = "latest.md"
)

// Write merges a run into the directory and writes the whole report anew.
func Write(dir string, run *Series) (*Report, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	all, err := ReadSeries(filepath.Join(dir, roundsFile))
	if err != nil {
		return nil, err
	}
	all.Merge(run)
	head := struct {
		Machine
		Commit string `json:"commit"`
	}{all.Machine, all.Commit}
	if err := writeLines(filepath.Join(dir, roundsFile), head, "lines", all.Lines); err != nil {
		return nil, err
	}
	r := all.Report()
	latest := struct {
		Machine
		Commit string `json:"commit"`
		Rounds int    `json:"rounds"`
	}{r.Machine, r.Commit, r.Rounds}
	if err := writeLines(filepath.Join(dir, LatestFile), latest, "rows", r.Rows); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, tableFile), []byte(r.Markdown()), 0o644); err != nil {
		return nil, err
	}
	for name, plot := range r.plots() {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(plot.svg()), 0o644); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// row finds a figure.
func (r *Report) row(workload, variant, metric string) *Row {
	i := slices.IndexFunc(r.Rows, func(x Row) bool { return x.Workload == workload && x.Variant == variant && x.Metric == metric })
	if i < 0 {
		return nil
	}
	return &r.Rows[i]
}

// variants of the report, in its order.
func (r *Report) variants() []string {
	var out []string
	for _, row := range r.Rows {
		if !slices.Contains(out, row.Variant) {
			out = append(out, row.Variant)
		}
	}
	slices.SortFunc(out, func(a, b string) int { return compareVariants(&Variant{Name: a}, &Variant{Name: b}) })
	return out
}

// columns of the table.
var columns = []struct{ metric, head string }{
	{metricP50, "p50 µs"}, {metricP90, "p90 µs"}, {metricP99, "p99 µs"}, {metricP999, "p99.9 µs"}, {metricRate, "rate"},
	{metricCPU, "proxies' CPU ms/1000"}, {metricNode, "nodes' CPU ms/1000"}, {metricCPUGB, "proxies' CPU s/GB"}, {metricNodeGB, "nodes' CPU s/GB"},
	{metricRSS, "RSS MB"}, {metricRSSAnon, "RssAnon MB"}, {metricPerConn, "RssAnon KiB/connection"},
}

// Markdown is a table for every workload: median (lowest–highest), and × the ratio to no mesh.
func (r *Report) Markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Benchmark\n\n%s. Kernel %s. Commit %s, %d rounds.\n\n", r.Name, r.Kernel, r.Commit, r.Rounds)
	b.WriteString("Median of the rounds (lowest–highest) and, after ×, the median of the ratios to no mesh in the same round; same-node\nvariants are compared with no mesh on one node.\n")
	for _, w := range Workloads() {
		var used []int
		for i, c := range columns {
			if slices.ContainsFunc(r.Rows, func(x Row) bool { return x.Workload == w.Name && x.Metric == c.metric }) {
				used = append(used, i)
			}
		}
		if len(used) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s: %s\n\n| Variant |", w.Name, w.About)
		for _, i := range used {
			head := columns[i].head
			switch {
			case columns[i].metric == metricRate && w.bulk:
				head = "Gb/s"
			case columns[i].metric == metricRate && w.idle > 0:
				head = "connections"
			case columns[i].metric == metricRate:
				head = "per second"
			case columns[i].metric == metricCPU && w.rest > 0:
				head = "agent's CPU ms/1000 ms"
			}
			fmt.Fprintf(&b, " %s |", head)
		}
		b.WriteString("\n|---|" + strings.Repeat("---|", len(used)) + "\n")
		for _, v := range r.variants() {
			cells, any := "", false
			for _, i := range used {
				x := r.row(w.Name, v, columns[i].metric)
				any = any || x != nil
				cells += " " + x.cell() + " |"
			}
			if any {
				fmt.Fprintf(&b, "| %s |%s\n", v, cells)
			}
		}
	}
	return b.String()
}

func (x *Row) cell() string {
	if x == nil {
		return "–"
	}
	out := number(x.Median)
	if x.Min != x.Max {
		out += fmt.Sprintf(" (%s–%s)", number(x.Min), number(x.Max))
	}
	if x.Ratio != nil && x.Variant != Baseline && x.Variant != baselineNear {
		out += fmt.Sprintf(" ×%.2f", *x.Ratio)
	}
	return out
}

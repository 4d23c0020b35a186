package bench

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Workload is one kind of traffic.
type Workload struct {
	Name  string
	About string

	args    []string // of the load program, before the address
	tcp     bool     // not HTTP
	latency bool     // its times mean something
	bulk    bool     // its rate is in Gb/s
	long    int      // how many times the duration of a sample it needs
	idle    int      // connections that do nothing
	rest    int      // pods that do nothing
}

// Workloads are all there are, in the order of reports.
func Workloads() []Workload {
	http := func(c string) []string { return []string{"http", "-c", c} }
	return []Workload{
		{Name: "rr-c1", About: "1 byte there and 1 byte back on one connection", args: []string{"rr"}, tcp: true, latency: true},
		{Name: "http-1000qps", About: "1,000 requests/s for 1 KiB on 16 connections, by the clock", args: []string{"open", "-rate", "1000", "-c", "16"}, latency: true},
		{Name: "http-c1", About: "1 KiB requests, one after the other on 1 connection", args: http("1"), latency: true},
		{Name: "http-c16", About: "the same on 16 connections", args: http("16")},
		{Name: "http-c64", About: "the same on 64 connections", args: http("64")},
		{Name: "new-conn-200", About: "200 requests/s by the clock, each on a connection of its own", args: []string{"open", "-rate", "200", "-c", "16", "-each"}, latency: true, long: 2},
		{Name: "new-conn-c1", About: "a connection for every request, one after the other", args: []string{"http", "-c", "1", "-each"}, latency: true},
		{Name: "new-conn-c16", About: "the same, 16 at a time", args: []string{"http", "-c", "16", "-each"}},
		{Name: "bulk-1", About: "1 stream, in one direction, then in the other", args: []string{"bulk", "-c", "1"}, tcp: true, bulk: true},
		{Name: "bulk-4", About: "the same with 4 streams", args: []string{"bulk", "-c", "4"}, tcp: true, bulk: true},
		{Name: "idle-15k", About: "15,000 connections that do nothing", args: []string{"idle"}, tcp: true, idle: 15000},
		{Name: "rest-100", About: "100 pods on a node that do nothing", rest: 100},
	}
}

// SelectWorkloads finds workloads by name; no names are all.
func SelectWorkloads(names []string) ([]Workload, error) {
	all := Workloads()
	if len(names) == 0 {
		return all, nil
	}
	var out []Workload
	for _, n := range names {
		i := slices.IndexFunc(all, func(w Workload) bool { return w.Name == n })
		if i < 0 {
			var known []string
			for _, w := range all {
				known = append(known, w.Name)
			}
			return nil, fmt.Errorf("no workload is called %q; there are %s", n, strings.Join(known, ", "))
		}
		if !slices.ContainsFunc(out, func(w Workload) bool { return w.Name == n }) {
			out = append(out, all[i])
		}
	}
	// What comes last takes the others' pods away.
	slices.SortStableFunc(out, func(a, b Workload) int { return cmp.Compare(a.rest, b.rest) })
	return out, nil
}

// runs tells whether the workload can go through the variant, and if not, why.
func (w Workload) runs(v *Variant) (why string, ok bool) {
	switch {
	case w.tcp && v.TCP == "-":
		return "only HTTP goes through it", false
	case !w.tcp && v.HTTP == "-":
		return "no HTTP goes through it", false
	case w.idle > 0 && !v.Idle:
		return "its proxies need two descriptors for a connection, more than a process has", false
	case w.rest > 0 && !v.Rest:
		return "it is not measured at rest", false
	}
	return "", true
}

// command is the arguments for the load program.
func (w Workload) command(addr string, d time.Duration) []string {
	return append(slices.Clone(w.args), "-d", (d * time.Duration(max(1, w.long))).String(), addr)
}

// Metrics of rows, and what is good.
const (
	metricP50     = "p50"                         // µs
	metricP90     = "p90"                         // µs
	metricP99     = "p99"                         // µs
	metricP999    = "p999"                        // µs
	metricRate    = "rate"                        // requests or connections a second; of bulk Gb/s
	metricCPU     = "cpu_ms_per_1000"             // of the proxies, per 1,000 requests; at rest per 1,000 ms
	metricCPUGB   = "cpu_s_per_gb"                // of the proxies
	metricNode    = "node_cpu_ms_per_1000"        // of everything on the nodes, with softirq
	metricNodeGB  = "node_cpu_s_per_gb"           //
	metricRSS     = "rss_mb"                      // of the largest proxy process
	metricRSSAnon = "rss_anon_mb"                 // of it, what is not of files
	metricPerConn = "rss_anon_kib_per_connection" // by how much the largest grew
)

var metrics = []string{metricP50, metricP90, metricP99, metricP999, metricRate, metricCPU, metricNode, metricCPUGB, metricNodeGB, metricRSS, metricRSSAnon, metricPerConn}

// higherIsBetter tells which way a metric should go.
func higherIsBetter(metric string) bool { return metric == metricRate }

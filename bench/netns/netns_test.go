package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/warrenmesh/warren/bench"
)

// The agents are this program again.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "agent" {
		if err := runAgent(context.Background(), os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A moment of the benchmark: traffic gets through every way that Warren has, and the agents do the work where they
// are said to, and nowhere else.
func TestNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, cgroups and BPF")
	}
	dir := t.TempDir()
	load := filepath.Join(dir, "load")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", load, "../load").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	all, err := bench.Builtin()
	if err != nil {
		t.Fatal(err)
	}
	variants, err := bench.SelectVariants(append(all, wire), []string{"same-node", "same-node-encrypt", "cross-node", "wire"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := open(t.Context(), dir, load, "envoy", variants)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	})
	workloads, err := bench.SelectWorkloads([]string{"http-c16", "bulk-1"})
	if err != nil {
		t.Fatal(err)
	}
	series, err := bench.Run(t.Context(), s, bench.Options{Workloads: workloads, Variants: variants, Rounds: 1, Duration: 500 * time.Millisecond, Hold: time.Second})
	if err != nil {
		logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
		for _, f := range logs {
			b, _ := os.ReadFile(f)
			t.Logf("%s:\n%s", f, b)
		}
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, r := range series.Report().Rows {
		got[r.Workload+" "+r.Variant+" "+r.Metric] = r.Median
		t.Logf("%+v", r)
	}
	for _, v := range variants {
		if got["http-c16 "+v.Name+" rate"] <= 0 || got["bulk-1 "+v.Name+" rate"] <= 0 {
			t.Errorf("nothing went through %s", v.Name)
		}
	}
	// Per request the agents' share is the same whatever else the machine does.
	kernel, tunnel := got["bulk-1 same-node cpu_s_per_gb"], got["bulk-1 same-node-encrypt cpu_s_per_gb"]
	if tunnel == 0 || kernel > tunnel/4 {
		t.Errorf("agents need %.3f s/GB for what the kernel carries, and %.3f for what they encrypt", kernel, tunnel)
	}
}

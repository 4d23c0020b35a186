package e2e

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A short benchmark: no ratio to no mesh is worse than in the committed report. What is worse by more than the rounds
// differ among themselves has to be so a second time.
func TestBenchmark(t *testing.T) {
	ownCluster(t)
	args := []string{"--rounds", "3", "--duration", "500ms", "--variants", "same-node,cross-node",
		"--workloads", "rr-c1,http-c16,new-conn-c16,bulk-1", "--compare", filepath.Join(mesh.Root(), "bench", "results", "latest.json")}
	first := worse(t, args)
	if len(first) == 0 {
		return
	}
	second := worse(t, args)
	for figure, what := range second {
		if first[figure] != "" {
			t.Errorf("%s; before that: %s", what, first[figure])
		}
	}
}

// worse runs the benchmark and returns what it says of ratios that got worse, by workload, variant and metric.
func worse(t *testing.T, args []string) map[string]string {
	t.Helper()
	cmd, err := mesh.Bench(t.Context(), args...)
	must(t, err)
	var table, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &table, &said
	err = cmd.Run()
	t.Logf("%s\n%s", said.Bytes(), table.Bytes())
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || exit.ExitCode() != 3) {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(said.String()) {
		if what, ok := strings.CutPrefix(strings.TrimSpace(line), "worse: "); ok {
			figure, _, _ := strings.Cut(what, ":")
			out[figure] = what
		}
	}
	if (err != nil) != (len(out) > 0) {
		t.Fatalf("exit status %v, worse: %v", err, slices.Collect(strings.Lines(said.String())))
	}
	return out
}

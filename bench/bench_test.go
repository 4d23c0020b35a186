package bench

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestBuiltinVariants(t *testing.T) {
	all, err := Builtin()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, v := range all {
		names = append(names, v.Name)
	}
	if !slices.Equal(names, order) {
		t.Errorf("variants %v, want %v", names, order)
	}
	some, err := SelectVariants(all, []string{"same-node", "envoy-http"})
	if err != nil {
		t.Fatal(err)
	}
	names = nil
	for _, v := range some {
		names = append(names, v.Name)
	}
	if want := []string{"none-same-node", "same-node", "none", "envoy-http"}; !slices.Equal(names, want) {
		t.Errorf("selected %v, want %v: what they are compared with belongs to them", names, want)
	}
	if _, err := SelectVariants(all, []string{"nothing"}); err == nil || !strings.Contains(err.Error(), "cross-node") {
		t.Errorf("an unknown variant: %v", err)
	}
}

func TestReadVariant(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  string // of the error
	}{
		"good":          {files: map[string]string{"variant.yaml": "about: x\nhttp: 127.0.0.1:1\ntcp: '-'\n"}},
		"empty":         {want: "no variant.yaml"},
		"unknown field": {files: map[string]string{"variant.yaml": "about: x\nsamenod: true\n"}, want: "samenod"},
		"no word":       {files: map[string]string{"variant.yaml": "sameNode: true\n"}, want: "what it is about"},
		"Bad_Name":      {files: map[string]string{"variant.yaml": "about: x\n"}, want: "lower-case"},
		"template":      {files: map[string]string{"variant.yaml": "about: x\nhttp: '{{.Sever}}:1'\n"}, want: "Sever"},
		"no file":       {files: map[string]string{"variant.yaml": "about: x\nsidecar: {image: i, command: [c], files: {a: {client: c.yaml, server: s.yaml}}}\n"}, want: `no "c.yaml"`},
		"no command":    {files: map[string]string{"variant.yaml": "about: x\nsidecar: {image: i}\n"}, want: "no command"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), strings.ReplaceAll(name, " ", "-"))
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			for f, text := range c.files {
				if err := os.WriteFile(filepath.Join(dir, f), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			_, err := ReadVariant(dir)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

// series of one metric in two variants.
func series(workload, metric string, none, ours []float64) *Series {
	return &Series{Lines: []*Line{
		{Workload: workload, Variant: "none", Metric: metric, Baseline: "none", Rounds: none},
		{Workload: workload, Variant: "cross-node", Metric: metric, Baseline: "none", Rounds: ours},
	}}
}

func TestReport(t *testing.T) {
	s := series("http-c16", metricRate, []float64{1000, 2000, 1000}, []float64{400, 1000, 300})
	s.Merge(series("rr-c1", metricP50, []float64{10}, []float64{30}))
	s.Merge(series("rr-c1", metricP50, []float64{10, 20}, []float64{20, 40}))
	r := s.Report()
	if r.Rounds != 2 {
		t.Errorf("%d rounds, want the fewest of any workload", r.Rounds)
	}
	x := r.row("http-c16", "cross-node", metricRate)
	if x == nil || x.Median != 400 || x.Min != 300 || x.Max != 1000 || x.Ratio == nil || *x.Ratio != 0.4 {
		t.Errorf("http-c16: %+v", x)
	}
	if x := r.row("rr-c1", "cross-node", metricP50); x == nil || x.Median != 30 || *x.Ratio != 2 {
		t.Errorf("rr-c1: %+v: a later run replaces the workload", x)
	}
	dir := t.TempDir()
	for range 2 { // a second time the same
		if _, err := Write(dir, s); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, LatestFile))
	if err != nil {
		t.Fatal(err)
	}
	var shape map[string]any
	if err := json.Unmarshal(b, &shape); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	for _, k := range []string{"machine", "kernel", "commit", "rounds", "rows"} {
		if _, ok := shape[k]; !ok {
			t.Errorf("latest.json has no %s", k)
		}
	}
	if again, err := ReadReport(filepath.Join(dir, LatestFile)); err != nil || len(again.Rows) != len(r.Rows) {
		t.Errorf("read back %v, %v", again, err)
	}
	pictures, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil || len(pictures) == 0 {
		t.Fatalf("no plots: %v", err)
	}
	for _, p := range pictures {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		if err := xml.Unmarshal(b, new(struct{ XMLName xml.Name })); err != nil || strings.Contains(string(b), "NaN") || strings.Contains(string(b), "Inf") {
			t.Errorf("%s: %v\n%s", p, err, b)
		}
	}
}

func TestWorse(t *testing.T) {
	committed := series("http-c16", metricRate, []float64{1000}, []float64{400}).Report()
	for _, c := range []struct {
		name  string
		ours  []float64
		worse bool
	}{
		{"the same", []float64{400, 410, 390}, false},
		{"better", []float64{800, 810, 790}, false},
		{"within the slack", []float64{325, 325, 325}, false},
		{"within a wide spread", []float64{200, 300, 450}, false},
		{"worse", []float64{250, 260, 240}, true},
	} {
		got := Worse(series("http-c16", metricRate, []float64{1000, 1000, 1000}, c.ours), committed)
		if (len(got) > 0) != c.worse {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	latency := series("rr-c1", metricP50, []float64{10}, []float64{20}).Report()
	if got := Worse(series("rr-c1", metricP50, []float64{10}, []float64{30}), latency); len(got) != 1 {
		t.Errorf("a latency that went up: %v", got)
	}
	if got := Worse(series("rr-c1", metricP50, []float64{10}, []float64{10}), latency); len(got) != 0 {
		t.Errorf("a latency that went down: %v", got)
	}
}

// fakeSite answers every load with the same, and counts.
type fakeSite struct {
	staged []string
	loads  []string
	failed int64
	failAt int // this load, counted from 1, is an error
	cpu    time.Duration
}

type fakeStage struct {
	*fakeSite
	v *Variant
}

func (f *fakeSite) Machine(context.Context) (Machine, error) {
	return Machine{Name: "one", Kernel: "6.1"}, nil
}

func (f *fakeSite) Stage(_ context.Context, v *Variant) (Stage, error) {
	f.staged = append(f.staged, v.Name)
	return fakeStage{f, v}, nil
}

func (f *fakeSite) Rest(context.Context, *Variant, int) (func(context.Context) error, error) {
	return func(context.Context) error { return nil }, nil
}

func (f fakeStage) Targets() (string, string) { return "h", "t" }

func (f fakeStage) Load(_ context.Context, args ...string) (*Outcome, error) {
	f.loads = append(f.loads, f.v.Name+" "+strings.Join(args, " "))
	if len(f.loads) == f.failAt {
		return nil, errors.New("no")
	}
	return &Outcome{Done: 1000, Failed: f.failed, Seconds: 2, Latency: &Latency{P50: 10}}, nil
}

func (f fakeStage) Meter(context.Context) ([]Reading, error) {
	f.cpu += 50 * time.Millisecond
	r := []Reading{{Busy: 2 * f.cpu, BootTime: 1}}
	if f.v.Proxies.Container != "" {
		r[0].Processes = []Process{{PID: 7, CPU: f.cpu, RSS: 20e6}}
	}
	return r, nil
}

func TestRun(t *testing.T) {
	all, err := Builtin()
	if err != nil {
		t.Fatal(err)
	}
	variants, err := SelectVariants(all, []string{"cross-node"})
	if err != nil {
		t.Fatal(err)
	}
	workloads, err := SelectWorkloads([]string{"http-c1"})
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeSite{}
	var steps []Step
	o := Options{Workloads: workloads, Variants: variants, Rounds: 2, Duration: time.Second, Hold: time.Second, Progress: func(s Step) { steps = append(steps, s) }}
	s, err := Run(t.Context(), f, o)
	if err != nil {
		t.Fatal(err)
	}
	if last := steps[len(steps)-1]; last.Done != last.Total {
		t.Errorf("the last step is %+v", last)
	}
	x := s.Report().row("http-c1", "cross-node", metricCPU)
	if x == nil || x.Median != 50 || x.Ratio != nil {
		t.Errorf("CPU of the proxies: %+v", x)
	}
	if x := s.Report().row("http-c1", "cross-node", metricRate); x == nil || x.Median != 500 || *x.Ratio != 1 {
		t.Errorf("rate: %+v", x)
	}
	f.failed = 100
	o.Progress = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, f, o); err == nil {
		t.Error("a path that loses requests is measured")
	}
	f.failed, f.failAt = 0, len(f.loads)+10 // after the first workload
	if o.Workloads, err = SelectWorkloads([]string{"http-c1", "http-c16"}); err != nil {
		t.Fatal(err)
	}
	part, err := Run(t.Context(), f, o)
	if err == nil || part == nil || part.Report().row("http-c1", "cross-node", metricRate) == nil || part.Report().row("http-c16", "none", metricRate) != nil {
		t.Errorf("a run that failed in its second workload: %+v, %v", part, err)
	}
}

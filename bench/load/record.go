package main

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/warrenmesh/warren/bench"
)

// tally is what one client of a run counts; nothing in it is shared.
type tally struct {
	done, failed, bytes int64
	took, late          *hdrhistogram.Histogram // ns
	errors              []string
}

// newTally takes times between 100 ns and 100 s, three digits exact.
func newTally() *tally {
	h := func() *hdrhistogram.Histogram { return hdrhistogram.New(100, int64(100*time.Second), 3) }
	return &tally{took: h(), late: h()}
}

func (t *tally) ok(took time.Duration) {
	t.done++
	_ = t.took.RecordValue(min(int64(took), t.took.HighestTrackableValue()))
}

func (t *tally) wrong(err error) {
	t.failed++
	if len(t.errors) < 3 {
		t.errors = append(t.errors, err.Error())
	}
}

// outcome adds up the clients of a run.
func outcome(all []*tally, took time.Duration) *bench.Outcome {
	sum := newTally()
	for _, t := range all {
		sum.done += t.done
		sum.failed += t.failed
		sum.bytes += t.bytes
		sum.took.Merge(t.took)
		sum.late.Merge(t.late)
		sum.errors = append(sum.errors, t.errors...)
	}
	o := &bench.Outcome{Done: sum.done, Failed: sum.failed, Bytes: sum.bytes, Seconds: took.Seconds(), Errors: sum.errors[:min(3, len(sum.errors))]}
	if sum.took.TotalCount() > 0 {
		at := func(q float64) float64 { return float64(sum.took.ValueAtQuantile(q)) / 1e3 }
		o.Latency = &bench.Latency{P50: at(50), P90: at(90), P99: at(99), P999: at(99.9)}
	}
	if sum.late.TotalCount() > 0 {
		o.Late = float64(sum.late.ValueAtQuantile(99)) / 1e3
	}
	return o
}

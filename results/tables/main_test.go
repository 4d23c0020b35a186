package main

import (
	"errors"
	"testing"

	"github.com/warrenmesh/warren/results"
)

func suites(suite string) ([]results.Row, error) {
	if suite != "speed" {
		return nil, errors.New("no such suite")
	}
	return []results.Row{
		{Name: "speed", Inputs: 20003, Failures: 1, Figure: 1, Unit: results.Summed, Commit: "several"},
		{Name: "p50, without", Inputs: 20000, Figure: 0.213162, Unit: "ms", Commit: "abc"},
		{Name: "a|b", Inputs: 3, Failures: 1, Figure: 2131.38, Unit: "connections/s", Commit: "def"},
	}, nil
}

func TestFill(t *testing.T) {
	in := "text\n<!-- results\nspeed: p50, without\nspeed = all of it\nspeed\n-->\nwhat was here\n<!-- /results -->\nmore\n"
	want := "text\n<!-- results\nspeed: p50, without\nspeed = all of it\nspeed\n-->\n" + `| What | Tried | Failed | Measured | At commit |
|---|---|---|---|---|
| p50, without | 20000 | 0 | 0.213 ms | abc |
| all of it | 20003 | 1 |  | several |
| p50, without | 20000 | 0 | 0.213 ms | abc |
| a\|b | 3 | 1 | 2131 connections/s | def |
` + "<!-- /results -->\nmore\n"
	got, err := fill(in, suites)
	if err != nil || got != want {
		t.Errorf("%v\n%s", err, got)
	}
	if again, err := fill(got, suites); err != nil || again != got {
		t.Errorf("filled twice: %v\n%s", err, again)
	}
	for _, bad := range []string{
		"<!-- results\nspeed: none\n-->\n<!-- /results -->", "<!-- results\nother\n-->\n<!-- /results -->",
		"<!-- results\nspeed\n-->\n", "<!-- results\nspeed\n",
	} {
		if got, err := fill(bad, suites); err == nil {
			t.Errorf("%q became %q", bad, got)
		}
	}
}

package main

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What runs beside the tests is nice, says how it ended, and ends with its children.
func TestQuietly(t *testing.T) {
	r := quietly("sh", "-c", "nice; exit 3")(t.Context(), step{})
	if r.failed != 1 || !strings.HasPrefix(r.detail, "19\n") || !strings.HasSuffix(r.detail, "exit status 3") {
		t.Errorf("%d failed: %q", r.failed, r.detail)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	r = quietly("sh", "-c", "sleep 600 & echo $!; wait")(ctx, step{})
	pid, err := strconv.Atoi(strings.Fields(r.detail)[0])
	if r.failed != 1 || err != nil {
		t.Fatalf("%d failed: %q", r.failed, r.detail)
	}
	for deadline := time.Now().Add(10 * time.Second); syscall.Kill(pid, 0) != syscall.ESRCH; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("its child goes on")
		}
	}
}

// In a run of everything staticcheck has its verdict in the last stage, and in the first alone otherwise.
func TestBeside(t *testing.T) {
	has := func(s stage) bool {
		return slices.ContainsFunc(s.steps, func(s step) bool { return s.name == "staticcheck" })
	}
	if all := stages(); !has(all[0]) {
		t.Error("house has no staticcheck")
	}
	all, a := beside(stages())
	if has(all[0]) || !has(all[len(all)-1]) {
		t.Error("staticcheck is not in the last stage alone")
	}
	for i := range a.steps {
		a.steps[i].run, a.steps[i].limit = func(context.Context, step) result { return result{passed: i + 1} }, time.Minute
	}
	a.run(t.Context())
	for i, s := range all[len(all)-1].steps {
		if r := s.run(t.Context(), s); r.passed != i+1 {
			t.Errorf("%s: %d passed", s.name, r.passed)
		}
	}
}

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
	r := quietly(nil, "sh", "-c", "nice; exit 3")(t.Context(), step{})
	if r.failed != 1 || !strings.HasPrefix(r.detail, "19\n") || !strings.HasSuffix(r.detail, "exit status 3") {
		t.Errorf("%d failed: %q", r.failed, r.detail)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	r = quietly(nil, "sh", "-c", "sleep 600 & echo $!; wait")(ctx, step{})
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
	where := func(all []stage, name string) (in []string) {
		for _, st := range all {
			for _, s := range st.steps {
				if s.name == name {
					in = append(in, st.name)
				}
			}
		}
		return in
	}
	if in := where(stages(), staticcheck); !slices.Equal(in, []string{"house"}) {
		t.Errorf("staticcheck is in %q", in)
	}
	all, a := beside(stages())
	if in := where(all, staticcheck); !slices.Equal(in, []string{"beside"}) {
		t.Errorf("beside the others staticcheck is in %q", in)
	}
	if in := where(all, raceCompiled); !slices.Equal(in, []string{"unit"}) {
		t.Errorf("beside the others what compiles for the race detector is in %q", in)
	}
	for i := range a.steps {
		a.steps[i].run = func(context.Context, step) result { return result{detail: a.steps[i].name} }
	}
	a.run(t.Context())
	waited := 0
	for _, st := range all {
		for _, s := range st.steps {
			if s.name == raceCompiled || st.name == "beside" {
				waited++
				if r := s.run(t.Context(), s); r.detail != s.name {
					t.Errorf("%s waits for %s", s.name, r.detail)
				}
			}
		}
	}
	if waited != len(a.steps) {
		t.Errorf("%d of %d steps are waited for", waited, len(a.steps))
	}
}

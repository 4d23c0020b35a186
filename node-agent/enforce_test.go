package nodeagent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/internal/mesh"
)

func TestEveryStepIsTakenInOrderAndFailuresAreNamed(t *testing.T) {
	var did []string
	part := func(name string, err error) step {
		return step{name, func(context.Context, *mesh.Snapshot) error { did = append(did, name); return err }}
	}
	s := mesh.NewBuilder(nil).Commit(1)
	err := enforceAll(t.Context(), []step{part("kernel", errors.New("map is full")), part("open connections", nil)}, s)
	if !slices.Equal(did, []string{"kernel", "open connections"}) {
		t.Errorf("steps taken: %v", did)
	}
	if err == nil || !strings.Contains(err.Error(), "kernel: map is full") || strings.Contains(err.Error(), "connections") {
		t.Errorf("error is %v", err)
	}
	if err := enforceAll(t.Context(), []step{part("kernel", nil)}, s); err != nil {
		t.Error(err)
	}
}

func TestWhatIsElsewhereIsNotLookedAtAgain(t *testing.T) {
	b := mesh.NewBuilder(nil)
	done, fails := 0, false
	step := unlessSame("here", func() error {
		done++
		if fails {
			return errors.New("not now")
		}
		return nil
	})
	rev := uint64(0)
	for _, x := range []struct {
		name   string
		change func()
		want   int
	}{
		{"the first state", func() {}, 1},
		{"a pod elsewhere", func() { b.PutWorkload(&mesh.Workload{UID: "a", Node: "there"}) }, 1},
		{"a pod here", func() { b.PutWorkload(&mesh.Workload{UID: "b", Node: "here"}) }, 2},
		{"a policy, in vain", func() { fails = true; b.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "x", Name: "p"}}) }, 3},
		{"nothing, after a failure", func() { fails = false }, 4},
		{"nothing", func() {}, 4},
		{"the pod leaves", func() { b.DeleteWorkload("b") }, 5},
	} {
		x.change()
		rev++
		_ = step(t.Context(), b.Commit(rev))
		if done != x.want {
			t.Errorf("%s: done %d times, want %d", x.name, done, x.want)
		}
	}
}

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

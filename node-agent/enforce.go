package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// enforceAgain is how soon a state that could not be enforced is tried again.
const enforceAgain = time.Second

// step is one part of this node that has to follow the state of the mesh. It returns when its part holds.
type step struct {
	name string
	do   func(context.Context, *mesh.Snapshot) error
}

// steps are what must be done before a state holds on this node, in this order. The proxy decides about new
// connections by the Store from the moment of the Swap; the kernel comes next; open connections come last,
// because one that the kernel let in by the older state may have begun until then.
func (a *agent) steps() []step {
	return []step{
		{"destinations in the kernel", func(_ context.Context, s *mesh.Snapshot) error {
			return a.datapath.SetDestinations(datapath.Desired(s, a.network()))
		}},
		{"names in the kernel", func(_ context.Context, s *mesh.Snapshot) error { return a.datapath.SetNames(s, a.network()) }},
		{"policies in the kernel", func(_ context.Context, s *mesh.Snapshot) error { return a.datapath.SetPolicies(s) }},
		{"open connections", func(ctx context.Context, s *mesh.Snapshot) error {
			return a.proxy.Rechecked(ctx, s.Revision())
		}},
		{"connections from before enrolment", unlessSame(a.cfg.Node, a.registry.Recheck)},
	}
}

// unlessSame is do for the states that may decide otherwise about pods of a node than the one that it was done for
// last: it asks the kernel for the connections of each pod, and most states differ in what is elsewhere.
func unlessSame(node string, do func() error) func(context.Context, *mesh.Snapshot) error {
	var last *mesh.Snapshot
	return func(_ context.Context, s *mesh.Snapshot) error {
		if last != nil && !decidesOtherwise(s, last, node) {
			last = s
			return nil
		}
		err := do()
		if err == nil {
			last = s
		}
		return err
	}
}

func decidesOtherwise(s, last *mesh.Snapshot, node string) bool {
	workloads, _, policies := s.Changes(last)
	for range policies {
		return true
	}
	for c := range workloads {
		if c.New != nil && c.New.Node == node || c.Old != nil && c.Old.Node == node {
			return true
		}
	}
	return !s.Config().Equal(last.Config())
}

// enforce makes each state of the mesh hold on this node, and only then says that it does.
func (a *agent) enforce(ctx context.Context) error {
	changed := a.store.Watch()
	defer a.store.Unwatch(changed)
	steps := a.steps()
	for {
		var again <-chan time.Time
		if s := a.store.Load(); s.Revision() > 0 {
			err := enforceAll(ctx, steps, s)
			switch {
			case ctx.Err() != nil:
				return nil
			case errors.Is(err, datapath.ErrYielded): // the successor enforces, and reports
			case err != nil:
				a.cfg.Log.Error("the state of the mesh is not enforced in full", "revision", s.Revision(), "error", err)
				a.xds.Enforced(s.Revision(), err)
				again = time.After(enforceAgain)
			default:
				a.xds.Enforced(s.Revision(), nil)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}

// enforceAll does every step, also after one that failed: the others still make the node safer.
func enforceAll(ctx context.Context, steps []step, s *mesh.Snapshot) error {
	var errs []error
	for _, st := range steps {
		if err := st.do(ctx, s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", st.name, err))
		}
	}
	return errors.Join(errs...)
}

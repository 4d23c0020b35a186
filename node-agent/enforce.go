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
		{"policies in the kernel", func(_ context.Context, s *mesh.Snapshot) error { return a.datapath.SetPolicies(s) }},
		{"open connections", func(ctx context.Context, s *mesh.Snapshot) error {
			return a.proxy.Rechecked(ctx, s.Revision())
		}},
		{"connections from before enrolment", func(context.Context, *mesh.Snapshot) error { return a.registry.Recheck() }},
	}
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

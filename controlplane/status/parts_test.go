package status

import (
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	metav1alpha1 "istio.io/api/meta/v1alpha1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

// What waypoints do that another control plane tells, that one says, and the default one takes its word for this generation of
// an object alone.
func TestPartsOfOtherControlPlanes(t *testing.T) {
	ours, theirs := mesh.ServiceName{Namespace: "shop", Hostname: "ours.shop.svc"}, mesh.ServiceName{Namespace: "shop", Hostname: "theirs.shop.svc"}
	k := key("p")
	of := func(rev string, waypoints ...mesh.ServiceName) *Policies {
		p := NewPolicies(PoliciesConfig{
			Nodes: func() map[string]xds.Progress { return nil }, Forget: func(string) {}, Log: slog.New(slog.DiscardHandler), RootNamespace: "istio-system",
			Waypoint: func(w mesh.ServiceName) map[string]xds.Progress {
				if (w == theirs) != (rev == "next") {
					return nil // it is connected to the other
				}
				return map[string]xds.Progress{"pod": {Revision: 7, Connected: time.Now()}}
			},
			Owner: func(w mesh.ServiceName) string {
				if w == theirs {
					return "next"
				}
				return revision.Default
			},
			Revision: rev,
		})
		p.Take(&index.Update{Snapshot: mesh.NewBuilder(nil).Commit(1), Policies: map[index.PolicyKey]*index.PolicyState{k: {UID: "u", Generation: 3, Exact: true, Waypoints: waypoints}}}, 7)
		return p
	}
	says := func(p *Policies, have ...*metav1alpha1.IstioCondition) (want []condition, write bool) {
		o, start := Object{UID: "u", Generation: 3, Conditions: have, Targets: []string{"Service shop/x"}}, time.Now()
		mine := p.ours(k)
		p.assess(k, o, start, mine)
		want, _ = p.assess(k, o, start.Add(time.Minute), mine) // with all patience
		return want, want != nil
	}
	part := func(status, reason, message string, generation int64) *metav1alpha1.IstioCondition {
		return &metav1alpha1.IstioCondition{Type: "warren.io/Enforced-next", Status: status, Reason: reason, Message: message, ObservedGeneration: generation}
	}
	for name, c := range map[string]struct {
		part                    *metav1alpha1.IstioCondition
		status, reason, message string
	}{
		"it has said nothing":      {nil, "False", reasonPending, "waiting for the control plane of revision next"},
		"of what was before":       {part("True", reasonEnforced, "1/1 pods of waypoint shop/theirs", 2), "False", reasonPending, "waiting for the control plane of revision next"},
		"its waypoints do":         {part("True", reasonEnforced, "1/1 pods of waypoint shop/theirs", 3), "True", reasonEnforced, "1/1 pods of waypoint shop/ours, 1/1 pods of waypoint shop/theirs (the control plane of revision next)"},
		"its waypoints do not yet": {part("False", reasonPending, "0/1 pods of waypoint shop/theirs; waiting for pod", 3), "False", reasonPending, "says: 0/1 pods of waypoint shop/theirs"},
		"its waypoints cannot":     {part("False", reasonRefused, "pod says: no", 3), "False", reasonRefused, "the control plane of revision next says: pod says: no"},
	} {
		var have []*metav1alpha1.IstioCondition
		if c.part != nil {
			have = append(have, c.part)
		}
		want, _ := says(of(revision.Default, ours, theirs), have...)
		if len(want) != 2 || want[1].Type != ConditionEnforced || want[1].Status != c.status || want[1].Reason != c.reason || !strings.Contains(want[1].Message, c.message) {
			t.Errorf("%s: %+v", name, want)
		}
	}

	p := of(revision.Default, ours, theirs)
	for kind, mine := range map[string]bool{"Enforced": true, "WaypointAccepted": true, "warren.io/Enforced-next": false, "warren.io/Enforced-gone": true, "Foreign": false} {
		if p.ours(k)(kind) != mine {
			t.Errorf("the default one's to write: %s: %t", kind, !mine)
		}
	}

	next := of("next", ours, theirs)
	if next.ours(k)("Enforced") || !next.ours(k)("warren.io/Enforced-next") {
		t.Error("the second one writes what is the default one's, or not its own")
	}
	if want, _ := says(next); len(want) != 1 || want[0] != (condition{"warren.io/Enforced-next", "True", reasonEnforced, "1/1 pods of waypoint shop/theirs"}) {
		t.Errorf("the second one says %+v", want)
	}
	if _, write := says(next, part("True", reasonEnforced, "1/1 pods of waypoint shop/theirs", 3)); write {
		t.Error("it says so twice")
	}
	if want, write := says(of("next", ours)); write {
		t.Errorf("the second one says %+v of what is not its own", want)
	}
	if want, write := says(of("next", ours), part("True", reasonEnforced, "", 3)); !write || len(want) > 0 {
		t.Errorf("the second one leaves what it said of what was its own: %+v", want)
	}
}

// Of nodes whose agents ask another control plane, that one says what they do, and the default one takes its word.
func TestPartsOfNodes(t *testing.T) {
	for _, rev := range []string{revision.Default, "next"} {
		synctest.Test(t, func(t *testing.T) {
			a := newAPI(t)
			a.p.cfg.Owner, a.p.cfg.Revision = func(mesh.ServiceName) string { return revision.Default }, rev
			a.p.cfg.Away = func() map[string]string { return map[string]string{"n2": "next"} }
			a.lead()
			defer func() { a.stop() }()
			a.pods("n1", "n2")
			a.apply("p", 1, nil)
			const part = partPrefix + "next"
			if rev == "next" {
				a.reach("n2", 1, nil)
				time.Sleep(2 * time.Second)
				if got := a.says("p", part); got != "False NodesPending g1: 0/1 nodes; waiting for n2" {
					t.Errorf("the second one, while its node is behind: %q", got)
				}
				a.reach("n2", 0, nil)
				time.Sleep(2 * time.Second)
				if got := a.says("p", part); got != "True Enforced g1: 1/1 nodes" {
					t.Errorf("the second one: %q", got)
				}
				a.want("the second one about the rest", "")
				return
			}
			a.reach("n1", 0, nil)
			a.reach("n2", 0, nil) // as it was before it asked the other
			time.Sleep(2 * time.Second)
			a.want("nothing is said of n2", "False NodesPending g1: 1/2 nodes; waiting for the control plane of revision next")
			a.mu.Lock()
			o := a.objects[key("p")]
			o.Conditions = append(o.Conditions, &metav1alpha1.IstioCondition{Type: part, Status: "True", Reason: reasonEnforced, Message: "1/1 nodes at revision 9", ObservedGeneration: 1})
			a.objects[key("p")] = o
			a.mu.Unlock()
			time.Sleep(2 * pace)
			a.want("n2 does it", "True Enforced g1: 2/2 nodes, 1/1 nodes (the control plane of revision next)")
			if a.says("p", part) == "" {
				t.Error("what the other one said is gone")
			}
			if c := find(a.objects[key("p")].Conditions, part); c.ObservedGeneration != 1 {
				t.Errorf("what the other one said is of generation %d now", c.ObservedGeneration)
			}
		})
	}
}

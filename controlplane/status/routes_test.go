package status

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/routing"
)

func routeParent(name string) gatewayv1.ParentReference {
	group, kind := gatewayv1.Group(""), gatewayv1.Kind("Service")
	return gatewayv1.ParentReference{Group: &group, Kind: &kind, Name: gatewayv1.ObjectName(name)}
}

func everywhere(gatewayv1.ParentReference) bool { return true }

// TestRouteStatus writes what has changed, keeps what others wrote, and has nothing to say twice.
func TestRouteStatus(t *testing.T) {
	then, now := metav1.NewTime(time.Unix(1, 0)), metav1.NewTime(time.Unix(2, 0))
	o := RouteObject{UID: "u", Generation: 3, Parents: []gatewayv1.RouteParentStatus{
		{ParentRef: gatewayv1.ParentReference{Name: "gw"}, ControllerName: RouteController}, // of a class that is ours no more
		{ParentRef: routeParent("ui"), ControllerName: "other.example/controller"},
		{ParentRef: routeParent("gone"), ControllerName: RouteController},
		{ParentRef: routeParent("ui"), ControllerName: RouteController, Conditions: []metav1.Condition{
			{Type: "Accepted", Status: "True", Reason: "Accepted", LastTransitionTime: then}, {Type: "PartiallyInvalid", Status: "True"}, {Type: "Extra", Status: "True"}}},
	}}
	s := &index.RouteState{UID: "u", Parents: []index.RouteParent{
		{Ref: routeParent("ui"), Resolved: routing.Verdict{Reason: "BackendNotFound", Message: "Service shop/x was not found"}},
		{Ref: routeParent("new"), Accepted: routing.Verdict{Reason: "NoWaypoint", Message: "it has no effect"}, Partly: routing.Verdict{Reason: "UnsupportedValue", Message: "rules[0]: odd"}},
	}}
	got, changed := routeStatus(o, s, now, everywhere)
	if !changed || len(got) != 3 || got[0].ControllerName != "other.example/controller" {
		t.Fatalf("changed %t: %+v", changed, got)
	}
	ui, fresh := got[1].Conditions, got[2].Conditions
	accepted := meta.FindStatusCondition(ui, "Accepted")
	if accepted == nil || accepted.Status != "True" || accepted.ObservedGeneration != 3 || !accepted.LastTransitionTime.Equal(&then) {
		t.Errorf("Accepted %+v: it held before", accepted)
	}
	if c := meta.FindStatusCondition(ui, "ResolvedRefs"); c == nil || c.Status != "False" || c.Reason != "BackendNotFound" || !c.LastTransitionTime.Equal(&now) {
		t.Errorf("ResolvedRefs %+v", c)
	}
	if meta.FindStatusCondition(ui, "PartiallyInvalid") != nil || meta.FindStatusCondition(ui, "Extra") == nil {
		t.Errorf("conditions %+v", ui)
	}
	if c := meta.FindStatusCondition(fresh, "Accepted"); c == nil || c.Status != "False" || c.Reason != "NoWaypoint" {
		t.Errorf("Accepted %+v", c)
	}
	if c := meta.FindStatusCondition(fresh, "PartiallyInvalid"); c == nil || c.Status != "True" || c.Message != "Dropped Rule: rules[0]: odd" {
		t.Errorf("PartiallyInvalid %+v", c)
	}
	o.Parents = got
	if _, changed := routeStatus(o, s, metav1.Now(), everywhere); changed {
		t.Error("what is said already is written again")
	}
}

// TestPolicyStatus has a policy's status say the same as a route's by its own names, and no more than there is room for.
func TestPolicyStatus(t *testing.T) {
	parents := make([]gatewayv1.RouteParentStatus, 20)
	for i := range parents {
		parents[i] = gatewayv1.RouteParentStatus{ParentRef: gatewayv1.ParentReference{Name: "edge"}, ControllerName: RouteController, Conditions: []metav1.Condition{{Type: "Accepted"}}}
	}
	b, err := json.Marshal(statusOf(index.RouteKey{Kind: index.BackendTLSPolicy}, parents))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Ancestors []gatewayv1.PolicyAncestorStatus
	}
	if err := json.Unmarshal(b, &got); err != nil || len(got.Ancestors) != 16 || got.Ancestors[15].AncestorRef.Name != "edge" || len(got.Ancestors[0].Conditions) != 1 || got.Ancestors[0].ControllerName != RouteController {
		t.Errorf("%s %v", b, err)
	}
	if b, err := json.Marshal(statusOf(index.RouteKey{Kind: index.BackendTLSPolicy}, []gatewayv1.RouteParentStatus{})); err != nil || string(b) != `{"ancestors":[]}` {
		t.Errorf("for no Gateway: %s %v", b, err)
	}
}

// TestRoutesAreWrittenOnce follows an API server that keeps what is written.
func TestRoutesAreWrittenOnce(t *testing.T) {
	k := index.RouteKey{Kind: index.HTTPRoute, Namespace: "shop", Name: "r"}
	var mu sync.Mutex
	object, writes := RouteObject{UID: "u", ResourceVersion: "1", Generation: 1}, 0
	r := NewRoutes(RoutesConfig{
		Log: slog.New(slog.DiscardHandler),
		Object: func(index.RouteKey) (RouteObject, bool) {
			mu.Lock()
			defer mu.Unlock()
			return object, true
		},
		Write: func(_ context.Context, _ index.RouteKey, patch []byte) error {
			mu.Lock()
			defer mu.Unlock()
			var body struct {
				Metadata struct{ ResourceVersion string }
				Status   struct{ Parents []gatewayv1.RouteParentStatus }
			}
			if err := json.Unmarshal(patch, &body); err != nil || body.Metadata.ResourceVersion != object.ResourceVersion {
				t.Errorf("patch %s: %v", patch, err)
			}
			object.Parents, object.ResourceVersion = body.Status.Parents, object.ResourceVersion+"1"
			writes++
			return nil
		},
	})
	ctx, stop := context.WithCancel(t.Context())
	var run sync.WaitGroup
	run.Go(func() { r.Run(ctx) })
	state := func(v routing.Verdict) map[index.RouteKey]*index.RouteState {
		return map[index.RouteKey]*index.RouteState{k: {UID: "u", Parents: []index.RouteParent{{Ref: routeParent("ui"), Accepted: v}}}}
	}
	says := func(reason string) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			mu.Lock()
			if len(object.Parents) == 1 && meta.FindStatusCondition(object.Parents[0].Conditions, "Accepted").Reason == reason {
				mu.Unlock()
				return
			}
			mu.Unlock()
			if time.Now().After(end) {
				t.Fatalf("it does not say %s", reason)
			}
		}
	}
	r.Take(state(routing.Verdict{}))
	says("Accepted")
	r.Take(state(routing.Verdict{}))
	r.Take(state(routing.Verdict{Reason: "NoWaypoint", Message: "none"}))
	says("NoWaypoint")
	r.Take(map[index.RouteKey]*index.RouteState{k: nil})
	stop()
	run.Wait()
	if writes != 2 {
		t.Errorf("%d writes, want 2", writes)
	}
}

// What becomes of a route at another control plane's Gateway is left to that.
func TestRouteStatusOfOthers(t *testing.T) {
	gateway := func(name string) gatewayv1.ParentReference {
		return gatewayv1.ParentReference{Name: gatewayv1.ObjectName(name)}
	}
	ours := func(ref gatewayv1.ParentReference) bool { return ref.Name != "theirs" }
	o := RouteObject{UID: "u", Generation: 3, Parents: []gatewayv1.RouteParentStatus{
		{ParentRef: gateway("theirs"), ControllerName: RouteController, Conditions: []metav1.Condition{{Type: "Accepted", Status: "False", Reason: "Odd"}}}}}
	s := &index.RouteState{UID: "u", Parents: []index.RouteParent{{Ref: gateway("theirs")}, {Ref: gateway("ours")}}}
	got, changed := routeStatus(o, s, metav1.Now(), ours)
	if !changed || len(got) != 2 || got[0].ParentRef.Name != "theirs" || got[0].Conditions[0].Reason != "Odd" || got[1].ParentRef.Name != "ours" {
		t.Fatalf("changed %t: %+v", changed, got)
	}
	o.Parents = got
	if _, changed := routeStatus(o, s, metav1.Now(), ours); changed {
		t.Error("there is nothing left to say")
	}
	if got, changed := routeStatus(o, s, metav1.Now(), everywhere); !changed || meta.FindStatusCondition(got[0].Conditions, "Accepted").Reason != "Accepted" {
		t.Errorf("once all is ours: changed %t: %+v", changed, got)
	}
}

package status

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/warrenmesh/warren/controlplane/index"
)

// ConditionWaypointBound is Istio's condition on Services that ask for a waypoint.
const ConditionWaypointBound = "istio.io/WaypointBound"

// waypointsEvery is how often the wishes are compared with what has been said.
const waypointsEvery = 2 * time.Second

// Waypoints tells Services whether they have the waypoint that they ask for. What is sent to one that has not is refused.
type Waypoints struct {
	Kube   kubernetes.Interface
	Wishes func() []index.WaypointWish
	// Ready reports whether a waypoint has a pod that is ready; nil: none has.
	Ready func(namespace, name string) bool
	Log   *slog.Logger
}

// told is what was said to a Service.
type told struct{ namespace, name, uid, message string }

func (w *Waypoints) say(wish index.WaypointWish) (_ told, status, reason string) {
	t := told{namespace: wish.Namespace, name: wish.Name, uid: wish.UID}
	name := wish.Waypoint.Namespace + "/" + wish.Waypoint.Name
	if w.Ready != nil && w.Ready(wish.Waypoint.Namespace, wish.Waypoint.Name) {
		t.message = "Successfully attached to waypoint " + name
		return t, "True", "WaypointAccepted"
	}
	t.message = fmt.Sprintf("waypoint %q is not ready", name)
	return t, "False", "WaypointIsNotReady"
}

// Run writes until ctx ends. It is the leader's.
func (w *Waypoints) Run(ctx context.Context) {
	said := map[string]told{} // by UID
	for !w.recall(ctx, said) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(waypointsEvery):
		}
	}
	tick := time.NewTicker(waypointsEvery)
	defer tick.Stop()
	for {
		w.reconcile(ctx, said)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// recall reads what has been said before this replica led.
func (w *Waypoints) recall(ctx context.Context, said map[string]told) bool {
	list, err := w.Kube.CoreV1().Services("").List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		w.Log.Warn("conditions of Services not read", "error", err)
		return false
	}
	for _, s := range list.Items {
		for _, c := range s.Status.Conditions {
			if c.Type == ConditionWaypointBound {
				said[string(s.UID)] = told{s.Namespace, s.Name, string(s.UID), c.Message}
			}
		}
	}
	return true
}

func (w *Waypoints) reconcile(ctx context.Context, said map[string]told) {
	wished := map[string]bool{}
	for _, wish := range w.Wishes() {
		wished[wish.UID] = true
		want, status, reason := w.say(wish)
		if said[wish.UID] == want {
			continue
		}
		if w.write(ctx, want, map[string]any{"type": ConditionWaypointBound, "status": status, "reason": reason,
			"message": want.message, "lastTransitionTime": metav1.NewTime(time.Now().UTC())}) {
			said[wish.UID] = want
		}
	}
	for uid, was := range said {
		if !wished[uid] && w.write(ctx, was, map[string]any{"type": ConditionWaypointBound, "$patch": "delete"}) {
			delete(said, uid)
		}
	}
}

// write patches one condition; it reports whether there is nothing left to do.
func (w *Waypoints) write(ctx context.Context, t told, condition map[string]any) bool {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": t.uid}, "status": map[string]any{"conditions": []any{condition}}})
	if err == nil {
		_, err = w.Kube.CoreV1().Services(t.namespace).Patch(ctx, t.name, types.StrategicMergePatchType, patch,
			metav1.PatchOptions{FieldManager: fieldManager}, "status")
	}
	if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // gone, or another of that name
		return true
	}
	w.Log.Warn("condition not written to the Service", "namespace", t.namespace, "service", t.name, "error", err)
	return false
}

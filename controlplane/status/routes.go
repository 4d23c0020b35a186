package status

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/routing"
)

// RouteController is under which name conditions of routes are written: Istio's, which tools look for.
const RouteController gatewayv1.GatewayController = index.IngressController

// conditionPartly is the Gateway API's condition on routes of which some rules are not followed.
const conditionPartly = string(gatewayv1.RouteConditionPartiallyInvalid)

// RouteObject is a route as the watch has it.
type RouteObject struct {
	UID, ResourceVersion string
	Generation           int64
	Parents              []gatewayv1.RouteParentStatus
}

// RoutesConfig is what Routes need.
type RoutesConfig struct {
	// Object returns a route as the watch has it, false where it has none.
	Object func(index.RouteKey) (RouteObject, bool)
	// Write applies a merge patch to the status of a route.
	Write func(ctx context.Context, k index.RouteKey, patch []byte) error
	// Ours reports whether what becomes of a route at a parent is this control plane's to say; nil: it always is.
	Ours    func(index.RouteKey, gatewayv1.ParentReference) bool
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Routes writes on routes of the Gateway API, and on BackendTLSPolicies, what has become of them at each Service and Gateway
// that they are attached to.
type Routes struct {
	cfg    RoutesConfig
	writes *prometheus.CounterVec

	mu     sync.Mutex
	states map[index.RouteKey]*index.RouteState
	wrote  map[index.RouteKey]string // resourceVersion of the object that was last written over, until the watch has another
	queue  toWrite[index.RouteKey]   // nil where somebody else writes
}

// NewRoutes returns Routes that know none.
func NewRoutes(cfg RoutesConfig) *Routes {
	r := &Routes{cfg: cfg, states: map[index.RouteKey]*index.RouteState{}, wrote: map[index.RouteKey]string{},
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "warren_route_status_writes_total", Help: "Writes of the conditions of routes and BackendTLSPolicies of the Gateway API, by result.",
		}, []string{"result"})}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(r.writes)
	}
	return r
}

// Take follows an Update. It does not block.
func (r *Routes) Take(changed map[index.RouteKey]*index.RouteState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, s := range changed {
		if s == nil {
			delete(r.states, k)
			delete(r.wrote, k)
			continue
		}
		r.states[k] = s
		if r.queue != nil {
			r.queue.Add(k)
		}
	}
}

// Again has all routes looked at: other parents are ours now.
func (r *Routes) Again() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.states {
		if r.queue != nil {
			r.queue.Add(k)
		}
	}
}

// Run writes until ctx ends, beginning with everything. It is the leader's.
func (r *Routes) Run(ctx context.Context) {
	write(ctx, r.reconcile, func(q toWrite[index.RouteKey]) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.queue = q
		for k := range r.states {
			q.Add(k)
		}
	}, nil, nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.queue = nil
}

// reconcile writes what a route does not say yet.
func (r *Routes) reconcile(ctx context.Context, queue toWrite[index.RouteKey], limit flowcontrol.RateLimiter, k index.RouteKey) {
	o, ok := r.cfg.Object(k)
	r.mu.Lock()
	s, wrote := r.states[k], r.wrote[k]
	r.mu.Unlock()
	if !ok || s == nil || s.UID != o.UID {
		queue.Forget(k)
		return // gone; the index will say so
	}
	if wrote == o.ResourceVersion && wrote != "" { // the watch has not shown yet what was written
		queue.AddAfter(k, watchLag/10)
		return
	}
	ours := func(ref gatewayv1.ParentReference) bool { return r.cfg.Ours == nil || r.cfg.Ours(k, ref) }
	parents, changed := routeStatus(o, s, metav1.Now(), ours)
	if !changed {
		queue.Forget(k)
		return
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": o.UID, "resourceVersion": o.ResourceVersion}, "status": statusOf(k, parents),
	})
	if err == nil && limit.Wait(ctx) == nil {
		err = r.cfg.Write(ctx, k, patch)
	}
	result := "ok"
	switch {
	case err == nil:
		r.mu.Lock()
		r.wrote[k] = o.ResourceVersion
		r.mu.Unlock()
		queue.Forget(k)
		queue.AddAfter(k, watchLag/10) // for what came while it was written
	case apierrors.IsNotFound(err):
		result = "gone"
		queue.Forget(k)
	case apierrors.IsConflict(err): // it has changed; the watch will show how
		result = "conflict"
		queue.AddRateLimited(k)
	case ctx.Err() != nil:
		return
	default:
		result = "error"
		r.cfg.Log.Warn("conditions not written, trying again", "kind", k.Kind, "namespace", k.Namespace, "name", k.Name, "error", err)
		queue.AddRateLimited(k)
	}
	r.writes.WithLabelValues(result).Inc()
}

// routeStatus is what a route is to say of those of its parents that are ours. What others say stays.
func routeStatus(o RouteObject, s *index.RouteState, now metav1.Time, ours func(gatewayv1.ParentReference) bool) (parents []gatewayv1.RouteParentStatus, changed bool) {
	parents = []gatewayv1.RouteParentStatus{}
	had := map[int]gatewayv1.RouteParentStatus{}
	for _, p := range o.Parents {
		if p.ControllerName != RouteController || !ours(p.ParentRef) {
			parents = append(parents, p)
			continue
		}
		i := -1
		for j := range s.Parents {
			if _, taken := had[j]; !taken && index.SameParent(s.Parents[j].Ref, p.ParentRef) {
				i = j
			}
		}
		if i < 0 {
			changed = true // it is attached there no more
			continue
		}
		had[i] = p
	}
	for i, p := range s.Parents {
		if !ours(p.Ref) {
			continue
		}
		was, ok := had[i]
		next := gatewayv1.RouteParentStatus{ParentRef: p.Ref, ControllerName: RouteController, Conditions: append([]metav1.Condition{}, was.Conditions...)}
		changed = changed || !ok
		set := func(kind, fine, text string, v routing.Verdict, good metav1.ConditionStatus) {
			c := metav1.Condition{Type: kind, Status: good, Reason: fine, Message: text, ObservedGeneration: o.Generation, LastTransitionTime: now}
			if !v.OK() {
				c.Reason, c.Message = v.Reason, clipped(v.Message)
				c.Status = metav1.ConditionFalse
			}
			changed = meta.SetStatusCondition(&next.Conditions, c) || changed
		}
		set(string(gatewayv1.RouteConditionAccepted), string(gatewayv1.RouteReasonAccepted), "Route was valid", p.Accepted, metav1.ConditionTrue)
		set(string(gatewayv1.RouteConditionResolvedRefs), string(gatewayv1.RouteReasonResolvedRefs), "All references resolved", p.Resolved, metav1.ConditionTrue)
		if p.Partly.OK() {
			changed = meta.RemoveStatusCondition(&next.Conditions, conditionPartly) || changed
		} else {
			changed = meta.SetStatusCondition(&next.Conditions, metav1.Condition{
				Type: conditionPartly, Status: metav1.ConditionTrue, Reason: p.Partly.Reason, Message: clipped("Dropped Rule: " + p.Partly.Message),
				ObservedGeneration: o.Generation, LastTransitionTime: now,
			}) || changed
		}
		parents = append(parents, next)
	}
	return parents, changed
}

// mostAncestors is how many the status of a policy may have.
const mostAncestors = 16

// statusOf is the status of a route, or of a policy, which calls the same by other names. A policy for more Gateways than its
// status has room for says nothing of the last of them.
func statusOf(k index.RouteKey, parents []gatewayv1.RouteParentStatus) any {
	if k.Kind != index.BackendTLSPolicy {
		return map[string]any{"parents": parents}
	}
	out := []gatewayv1.PolicyAncestorStatus{}
	for _, p := range parents[:min(len(parents), mostAncestors)] {
		out = append(out, gatewayv1.PolicyAncestorStatus{AncestorRef: p.ParentRef, ControllerName: p.ControllerName, Conditions: p.Conditions})
	}
	return gatewayv1.PolicyStatus{Ancestors: out}
}

// clipped is a message as long as a condition may have it.
func clipped(s string) string {
	const most = 4096
	if r := []rune(s); len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return s
}

// RouteObjects is Object of RoutesConfig on what the index reads.
func RouteObjects(s *index.Source) func(index.RouteKey) (RouteObject, bool) {
	return func(k index.RouteKey) (RouteObject, bool) {
		o, ok := s.Object(k.Kind, k.Namespace, k.Name)
		if !ok {
			return RouteObject{}, false
		}
		of := func(m metav1.Object, s gatewayv1.RouteStatus) (RouteObject, bool) {
			return RouteObject{string(m.GetUID()), m.GetResourceVersion(), m.GetGeneration(), s.Parents}, true
		}
		switch r := o.(type) {
		case *gatewayv1.HTTPRoute:
			return of(r, r.Status.RouteStatus)
		case *gatewayv1.GRPCRoute:
			return of(r, r.Status.RouteStatus)
		case *gatewayv1.TLSRoute:
			return of(r, r.Status.RouteStatus)
		case *gatewayv1.TCPRoute:
			return of(r, r.Status.RouteStatus)
		case *gatewayv1.BackendTLSPolicy:
			var at gatewayv1.RouteStatus
			for _, a := range r.Status.Ancestors {
				at.Parents = append(at.Parents, gatewayv1.RouteParentStatus{ParentRef: a.AncestorRef, ControllerName: a.ControllerName, Conditions: a.Conditions})
			}
			return of(r, at)
		}
		return RouteObject{}, false
	}
}

// WriteRouteStatus is Write of RoutesConfig with a client of the API server.
func WriteRouteStatus(client gatewayclient.Interface) func(context.Context, index.RouteKey, []byte) error {
	return func(ctx context.Context, k index.RouteKey, patch []byte) (err error) {
		o := metav1.PatchOptions{FieldManager: fieldManager}
		switch k.Kind {
		case index.HTTPRoute:
			_, err = client.GatewayV1().HTTPRoutes(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.GRPCRoute:
			_, err = client.GatewayV1().GRPCRoutes(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.TLSRoute:
			_, err = client.GatewayV1().TLSRoutes(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.TCPRoute:
			_, err = client.GatewayV1().TCPRoutes(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.BackendTLSPolicy:
			_, err = client.GatewayV1().BackendTLSPolicies(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		default:
			err = fmt.Errorf("not a route: %s", k.Kind)
		}
		return err
	}
}

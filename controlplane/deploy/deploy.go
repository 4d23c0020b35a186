package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"
)

const fieldManager = "warren-control"

const (
	every = time.Second      // how often Gateways are looked at
	again = 30 * time.Second // how often what is there is applied though nothing asks for it
)

// Deployer makes waypoints. One replica of the control plane runs it.
type Deployer struct {
	Settings Settings
	Kube     kubernetes.Interface
	Gateways gatewayclient.Interface
	// List yields the Gateways of the class as the watch has them now; false before it has read them.
	List func() ([]*gatewayv1.Gateway, bool)
	// State is what the mesh knows of a waypoint: its virtual addresses and how many of its pods are ready.
	State func(namespace, name string) (addresses []string, ready int)
	Log   *slog.Logger
}

// done is what was applied for a Gateway.
type done struct {
	generation int64
	labels     string
	at         time.Time
	failed     string // what the API server said; "" for success
}

// Run works until ctx ends.
func (d *Deployer) Run(ctx context.Context) {
	applied, classed := map[types.UID]done{}, false
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if list, ok := d.List(); ok {
			if !classed {
				classed = d.class(ctx)
			}
			here := map[types.UID]bool{}
			for _, g := range list {
				here[g.UID] = true
				d.reconcile(ctx, g, applied)
			}
			for uid := range applied {
				if !here[uid] {
					delete(applied, uid) // the API server collects what the Gateway owned
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// class makes the GatewayClass and accepts it.
func (d *Deployer) class(ctx context.Context) bool {
	classes := d.Gateways.GatewayV1().GatewayClasses()
	body := object{
		"apiVersion": gatewayv1.GroupVersion.String(), "kind": "GatewayClass", "metadata": object{"name": Class},
		"spec": object{"controllerName": controller, "description": "waypoints: HTTP routing and policy for services of the mesh"},
	}
	err := apply(body, func(b []byte, o metav1.PatchOptions) error {
		_, err := classes.Patch(ctx, Class, types.ApplyPatchType, b, o)
		return err
	})
	if err == nil {
		var now *gatewayv1.GatewayClass
		if now, err = classes.Get(ctx, Class, metav1.GetOptions{}); err == nil {
			conditions := now.Status.Conditions
			if meta.SetStatusCondition(&conditions, condition("Accepted", true, "Accepted", "waypoints are made for it", now.Generation)) {
				err = merge(object{"status": object{"conditions": conditions}}, func(b []byte, o metav1.PatchOptions) error {
					_, err := classes.Patch(ctx, Class, types.MergePatchType, b, o, "status")
					return err
				})
			}
		}
	}
	if err != nil {
		d.Log.Warn("GatewayClass not written", "class", Class, "error", err)
	}
	return err == nil
}

func (d *Deployer) reconcile(ctx context.Context, g *gatewayv1.Gateway, applied map[types.UID]done) {
	reason, message := verdict(g)
	accepted := reason == gatewayv1.GatewayReasonAccepted
	labels := fmt.Sprint(g.Labels)
	was, ok := applied[g.UID]
	if accepted && (!ok || was.generation != g.Generation || was.labels != labels || was.failed != "" || time.Since(was.at) > again) {
		was = done{generation: g.Generation, labels: labels, at: time.Now()}
		if err := d.apply(ctx, g); err != nil {
			was.failed = err.Error()
			d.Log.Warn("waypoint not deployed", "namespace", g.Namespace, "gateway", g.Name, "error", err)
		}
		applied[g.UID] = was
	}
	d.tell(ctx, g, reason, message, was.failed)
}

func (d *Deployer) apply(ctx context.Context, g *gatewayv1.Gateway) error {
	for _, m := range d.Settings.manifests(g) {
		err := apply(m.body, func(b []byte, o metav1.PatchOptions) (err error) {
			switch m.kind {
			case serviceAccount:
				_, err = d.Kube.CoreV1().ServiceAccounts(g.Namespace).Patch(ctx, g.Name, types.ApplyPatchType, b, o)
			case service:
				_, err = d.Kube.CoreV1().Services(g.Namespace).Patch(ctx, g.Name, types.ApplyPatchType, b, o)
			case deployment:
				_, err = d.Kube.AppsV1().Deployments(g.Namespace).Patch(ctx, g.Name, types.ApplyPatchType, b, o)
			case budget:
				_, err = d.Kube.PolicyV1().PodDisruptionBudgets(g.Namespace).Patch(ctx, g.Name, types.ApplyPatchType, b, o)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("apply %s %s: %w", m.body["kind"], g.Name, err)
		}
	}
	return nil
}

func apply(body object, patch func([]byte, metav1.PatchOptions) error) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	force := true
	return patch(b, metav1.PatchOptions{FieldManager: fieldManager, Force: &force})
}

func merge(body object, patch func([]byte, metav1.PatchOptions) error) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return patch(b, metav1.PatchOptions{FieldManager: fieldManager})
}

func condition(kind string, ok bool, reason, message string, generation int64) metav1.Condition {
	c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: generation}
	if ok {
		c.Status = metav1.ConditionTrue
	}
	return c
}

// tell writes the status where it differs from what is there.
func (d *Deployer) tell(ctx context.Context, g *gatewayv1.Gateway, reason gatewayv1.GatewayConditionReason, message, failed string) {
	accepted := reason == gatewayv1.GatewayReasonAccepted
	addresses, ready := d.State(g.Namespace, g.Name)
	programmed := condition(string(gatewayv1.GatewayConditionProgrammed), true, string(gatewayv1.GatewayReasonProgrammed),
		fmt.Sprintf("%d of its pods are ready", ready), g.Generation)
	switch {
	case !accepted:
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonInvalid), message, g.Generation)
	case failed != "":
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonPending), failed, g.Generation)
	case len(addresses) == 0:
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonAddressNotAssigned), "its Service has no address yet", g.Generation)
	case ready == 0:
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonPending), "none of its pods is ready; connections that need it are refused until one is", g.Generation)
	}
	status := g.Status.DeepCopy()
	changed := meta.SetStatusCondition(&status.Conditions, condition(string(gatewayv1.GatewayConditionAccepted), accepted, string(reason), message, g.Generation))
	changed = meta.SetStatusCondition(&status.Conditions, programmed) || changed
	if len(status.Addresses) != len(addresses) {
		changed = true
	}
	kind := gatewayv1.IPAddressType
	next := []gatewayv1.GatewayStatusAddress{}
	for i, a := range addresses {
		changed = changed || status.Addresses[i].Value != a
		next = append(next, gatewayv1.GatewayStatusAddress{Type: &kind, Value: a})
	}
	listeners := []gatewayv1.ListenerStatus{}
	for i, l := range g.Spec.Listeners {
		s := gatewayv1.ListenerStatus{Name: l.Name, SupportedKinds: []gatewayv1.RouteGroupKind{}}
		if i < len(status.Listeners) && status.Listeners[i].Name == l.Name {
			s.Conditions = status.Listeners[i].Conditions
		} else {
			changed = true
		}
		changed = meta.SetStatusCondition(&s.Conditions, condition("Accepted", accepted, string(reason), message, g.Generation)) || changed
		changed = meta.SetStatusCondition(&s.Conditions, condition("Programmed", programmed.Status == metav1.ConditionTrue, programmed.Reason, programmed.Message, g.Generation)) || changed
		changed = meta.SetStatusCondition(&s.Conditions, condition("ResolvedRefs", true, "ResolvedRefs", "it refers to nothing", g.Generation)) || changed
		listeners = append(listeners, s)
	}
	if !changed {
		return
	}
	err := merge(object{"metadata": object{"resourceVersion": g.ResourceVersion}, "status": object{
		"conditions": status.Conditions, "addresses": next, "listeners": listeners,
	}}, func(b []byte, o metav1.PatchOptions) error {
		_, err := d.Gateways.GatewayV1().Gateways(g.Namespace).Patch(ctx, g.Name, types.MergePatchType, b, o, "status")
		return err
	})
	if err != nil && !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
		d.Log.Warn("status of a Gateway not written", "namespace", g.Namespace, "gateway", g.Name, "error", err)
	}
}

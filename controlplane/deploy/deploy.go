package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/warrenmesh/warren/controlplane/index"
)

const fieldManager = "warren-control"

const (
	every = time.Second      // how often Gateways are looked at
	again = 30 * time.Second // how often what is there is applied though nothing asks for it
)

// Deployer makes waypoints and gateways. One replica of the control plane runs it.
type Deployer struct {
	Settings Settings
	Kube     kubernetes.Interface
	Gateways gatewayclient.Interface
	// List yields the Gateways of our classes as the watch has them now; false before it has read them.
	List func() ([]*gatewayv1.Gateway, bool)
	// Classes yields the GatewayClasses for gateways that are ours.
	Classes func() []*gatewayv1.GatewayClass
	// State is what the mesh knows of a Service that was made: its virtual addresses and how many pods behind it are ready.
	State func(namespace, name string) (addresses []string, ready int)
	// Balanced is where a load balancer takes what is for a Service.
	Balanced func(namespace, name string) []corev1.LoadBalancerIngress
	// Sets yields the ListenerSets.
	Sets func() []*gatewayv1.ListenerSet
	// Exists reports whether there is a Gateway of that name, of whatever class.
	Exists func(namespace, name string) bool
	// Ingress is what the index makes of a gateway; nil before it has seen it.
	Ingress func(namespace, name string) *index.GatewayState
	// Claim tells whose a Gateway is; nil where there is no other control plane.
	Claim func(*gatewayv1.Gateway) Claim
	// Secondary leaves to another control plane what is no Gateway's: the classes, and ListenerSets whose Gateway is gone.
	Secondary bool
	// Parameters are what ConfigMaps say of what is made; nil where they are not followed.
	Parameters ParameterSource
	Log        *slog.Logger
}

// Claim is whose a Gateway is. That of another control plane, or of one that is not known yet, is the zero value.
type Claim struct {
	Mine bool
	// Problem is why it is nobody's, where it is on this control plane to say so.
	Problem string
}

// ParameterSource follows the ConfigMaps that say what Gateways are made with.
type ParameterSource interface {
	// Want has just these followed, beside the defaults of classes. It does not block.
	Want([]ParametersKey)
	// Get returns what one says; nil where there is none. known is false until it was looked for.
	Get(ParametersKey) (p *Parameters, known bool)
	// Defaults are those of a class, by the name of their ConfigMap.
	Defaults(class string) (all map[string]*Parameters, known bool)
}

// asked is what says how the objects of a Gateway are to be.
type asked struct {
	generation int64
	labels     string
	ports      string // that ListenerSets add
	wishes     string // the version of its Parameters
	scaled     bool   // by a HorizontalPodAutoscaler of ours
}

// done is what was applied for a Gateway.
type done struct {
	asked
	at     time.Time
	failed string // what the API server said; "" for success
}

// Run works until ctx ends.
func (d *Deployer) Run(ctx context.Context) {
	applied, classed := map[types.UID]done{}, false
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if list, ok := d.List(); ok {
			if !classed && !d.Secondary {
				classed = d.class(ctx, Class, controller, "waypoints: HTTP routing and policy for services of the mesh") &&
					d.class(ctx, index.IngressClass, index.IngressController, "gateways: ways into the mesh and out of it")
			}
			if !d.Secondary {
				for _, c := range d.Classes() {
					d.acceptClass(ctx, c)
				}
				d.tellOrphans(ctx, list)
			}
			here := map[types.UID]bool{}
			list = d.claimed(ctx, list)
			d.wantParameters(list)
			for _, g := range list {
				here[g.UID] = true
				d.reconcile(ctx, g, applied)
			}
			for uid := range applied {
				if !here[uid] {
					delete(applied, uid) // the API server collects what the Gateway owned, or another control plane goes on with it
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

// claimed are the Gateways that are this control plane's. It says of those that are nobody's why.
func (d *Deployer) claimed(ctx context.Context, list []*gatewayv1.Gateway) (mine []*gatewayv1.Gateway) {
	if d.Claim == nil {
		return list
	}
	for _, g := range list {
		switch c := d.Claim(g); {
		case c.Mine:
			mine = append(mine, g)
		case c.Problem != "":
			d.tellUnclaimed(ctx, g, c.Problem)
		}
	}
	return mine
}

// class makes a GatewayClass and accepts it.
func (d *Deployer) class(ctx context.Context, name, controller, description string) bool {
	classes := d.Gateways.GatewayV1().GatewayClasses()
	body := object{
		"apiVersion": gatewayv1.GroupVersion.String(), "kind": "GatewayClass", "metadata": object{"name": name},
		"spec": object{"controllerName": controller, "description": description},
	}
	err := apply(body, func(b []byte, o metav1.PatchOptions) error {
		_, err := classes.Patch(ctx, name, types.ApplyPatchType, b, o)
		return err
	})
	var now *gatewayv1.GatewayClass
	if err == nil {
		now, err = classes.Get(ctx, name, metav1.GetOptions{})
	}
	if err != nil {
		d.Log.Warn("GatewayClass not written", "class", name, "error", err)
		return false
	}
	return d.acceptClass(ctx, now)
}

// acceptClass says on a GatewayClass that Gateways of it are made.
func (d *Deployer) acceptClass(ctx context.Context, c *gatewayv1.GatewayClass) bool {
	conditions := slices.Clone(c.Status.Conditions)
	if !meta.SetStatusCondition(&conditions, condition("Accepted", true, "Accepted", "what its Gateways ask for is made", c.Generation)) {
		return true
	}
	err := mergeStatus(c, object{"conditions": conditions}, func(b []byte, o metav1.PatchOptions) error {
		_, err := d.Gateways.GatewayV1().GatewayClasses().Patch(ctx, c.Name, types.MergePatchType, b, o, "status")
		return err
	})
	if err != nil && !overtaken(err) {
		d.Log.Warn("status of a GatewayClass not written", "class", c.Name, "error", err)
	}
	return err == nil
}

func (d *Deployer) reconcile(ctx context.Context, g *gatewayv1.Gateway, applied map[types.UID]done) {
	w, problem, known := d.wishes(g)
	if !known {
		return // it will be
	}
	reason, message := verdict(g)
	var state *index.GatewayState
	if !isWaypoint(g) {
		if state = d.Ingress(g.Namespace, g.Name); state == nil || state.UID != string(g.UID) || state.Generation != g.Generation {
			return // it will be
		}
		reason, message = ingressVerdict(g, state, w)
	}
	if reason == gatewayv1.GatewayReasonAccepted && problem != "" { // what was made stays as it is
		reason, message = gatewayv1.GatewayReasonInvalidParameters, problem
	}
	accepted := reason == gatewayv1.GatewayReasonAccepted
	now := asked{g.Generation, fmt.Sprint(g.Labels), fmt.Sprint(addedPorts(state)), w.version(), w.scaled()}
	was, ok := applied[g.UID]
	if accepted && (!ok || was.asked != now || was.failed != "" || time.Since(was.at) > again) {
		before := was
		was = done{asked: now, at: time.Now()}
		err := d.apply(ctx, g, addedPorts(state), w)
		if err == nil && !now.scaled && (!ok || before.scaled || before.failed != "") {
			err = d.unscale(ctx, g)
		}
		if err != nil {
			was.failed = err.Error()
			d.Log.Warn("Gateway not deployed", "namespace", g.Namespace, "gateway", g.Name, "error", err)
		}
		applied[g.UID] = was
	}
	d.tell(ctx, g, state, w, reason, message, was.failed)
}

// wantParameters has those ConfigMaps followed that Gateways refer to.
func (d *Deployer) wantParameters(list []*gatewayv1.Gateway) {
	if d.Parameters == nil {
		return
	}
	var keys []ParametersKey
	for _, g := range list {
		if i := g.Spec.Infrastructure; i != nil && i.ParametersRef != nil && i.ParametersRef.Kind == "ConfigMap" {
			keys = append(keys, ParametersKey{g.Namespace, i.ParametersRef.Name})
		}
	}
	d.Parameters.Want(keys)
}

// unscale deletes the HorizontalPodAutoscaler that was made for a Gateway; another's of that name stays.
func (d *Deployer) unscale(ctx context.Context, g *gatewayv1.Gateway) error {
	all, name := d.Kube.AutoscalingV2().HorizontalPodAutoscalers(g.Namespace), nameOf(g)
	now, err := all.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err == nil && !metav1.IsControlledBy(now, g) {
		return nil
	}
	if err == nil {
		err = all.Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &now.UID}})
	}
	if err != nil && !overtaken(err) {
		return fmt.Errorf("delete HorizontalPodAutoscaler %s: %w", name, err)
	}
	return nil
}

func (d *Deployer) apply(ctx context.Context, g *gatewayv1.Gateway, added []gatewayv1.PortNumber, w wishes) error {
	name := nameOf(g)
	manifests, err := d.Settings.manifests(g, added, w)
	if err != nil {
		return err
	}
	for _, m := range manifests {
		err := apply(m.body, func(b []byte, o metav1.PatchOptions) (err error) {
			switch m.kind {
			case serviceAccount:
				_, err = d.Kube.CoreV1().ServiceAccounts(g.Namespace).Patch(ctx, name, types.ApplyPatchType, b, o)
			case service:
				_, err = d.Kube.CoreV1().Services(g.Namespace).Patch(ctx, name, types.ApplyPatchType, b, o)
			case deployment:
				_, err = d.Kube.AppsV1().Deployments(g.Namespace).Patch(ctx, name, types.ApplyPatchType, b, o)
			case budget:
				_, err = d.Kube.PolicyV1().PodDisruptionBudgets(g.Namespace).Patch(ctx, name, types.ApplyPatchType, b, o)
			case autoscaler:
				_, err = d.Kube.AutoscalingV2().HorizontalPodAutoscalers(g.Namespace).Patch(ctx, name, types.ApplyPatchType, b, o)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("apply %s %s: %w", m.body["kind"], name, err)
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

// mergeStatus writes a status; an error that is [overtaken] is no trouble.
func mergeStatus(of metav1.Object, status object, patch func([]byte, metav1.PatchOptions) error) error {
	b, err := json.Marshal(object{"metadata": object{"resourceVersion": of.GetResourceVersion()}, "status": status})
	if err != nil {
		return err
	}
	return patch(b, metav1.PatchOptions{FieldManager: fieldManager})
}

// overtaken reports whether an object is another by now, or gone: then there is more to say, or nothing.
func overtaken(err error) bool { return apierrors.IsConflict(err) || apierrors.IsNotFound(err) }

func condition(kind string, ok bool, reason, message string, generation int64) metav1.Condition {
	c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: generation}
	if ok {
		c.Status = metav1.ConditionTrue
	}
	return c
}

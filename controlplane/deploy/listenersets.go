package deploy

import (
	"context"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/index"
)

// reasonParentNotProgrammed is a word of the Gateway API that its Go types have not.
const reasonParentNotProgrammed = "ParentNotProgrammed"

// addedPorts are those that ListenerSets add to a Gateway.
func addedPorts(s *index.GatewayState) (out []gatewayv1.PortNumber) {
	if s == nil {
		return nil
	}
	for _, set := range s.Sets {
		for _, l := range set.Listeners {
			if l.Accepted.OK() && l.Conflicted.OK() {
				out = append(out, gatewayv1.PortNumber(l.Port))
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// attachedSets is how many ListenerSets a Gateway has; nil for a waypoint.
func attachedSets(s *index.GatewayState) *int32 {
	if s == nil {
		return nil
	}
	n := int32(0)
	for _, set := range s.Sets {
		if set.Accepted.OK() {
			n++
		}
	}
	return &n
}

// tellSet writes the status of a ListenerSet where it differs from what is there.
func (d *Deployer) tellSet(ctx context.Context, o *gatewayv1.ListenerSet, s *index.ListenerSetState, gateway metav1.Condition) {
	accepted := condition(string(gatewayv1.ListenerSetConditionAccepted), s.Accepted.OK(), s.Accepted.Reason, s.Accepted.Message, o.Generation)
	programmed := accepted
	programmed.Type = string(gatewayv1.ListenerSetConditionProgrammed)
	bad := invalidListeners(s.Listeners)
	if s.Accepted.OK() {
		accepted.Reason, accepted.Message = string(gatewayv1.ListenerSetReasonAccepted), "the Gateway has its listeners"
		if bad != "" {
			accepted.Reason, accepted.Message = string(gatewayv1.ListenerSetReasonListenersNotValid), "not all of its listeners can be served: "+bad
		}
		programmed.Status, programmed.Reason, programmed.Message = gateway.Status, string(gatewayv1.ListenerSetReasonProgrammed), gateway.Message
		if gateway.Status != metav1.ConditionTrue {
			programmed.Reason = reasonParentNotProgrammed
		}
	}
	status := o.Status.DeepCopy()
	changed := meta.SetStatusCondition(&status.Conditions, accepted)
	changed = meta.SetStatusCondition(&status.Conditions, programmed) || changed
	var was []gatewayv1.ListenerStatus
	for _, e := range status.Listeners {
		was = append(was, gatewayv1.ListenerStatus(e))
	}
	listeners := listenersNow(s.Listeners, gateway, o.Generation)
	if changed = settle(was, listeners) || changed; !changed {
		return
	}
	err := mergeStatus(o, object{"conditions": status.Conditions, "listeners": listeners}, func(b []byte, opts metav1.PatchOptions) error {
		_, err := d.Gateways.GatewayV1().ListenerSets(o.Namespace).Patch(ctx, o.Name, types.MergePatchType, b, opts, "status")
		return err
	})
	if err != nil && !overtaken(err) {
		d.Log.Warn("status of a ListenerSet not written", "namespace", o.Namespace, "listenerset", o.Name, "error", err)
	}
}

// tellSets tells the ListenerSets of a Gateway what became of them.
func (d *Deployer) tellSets(ctx context.Context, state *index.GatewayState, gateway metav1.Condition) {
	if state == nil || len(state.Sets) == 0 {
		return
	}
	objects := map[types.UID]*gatewayv1.ListenerSet{}
	for _, o := range d.Sets() {
		objects[o.UID] = o
	}
	for i := range state.Sets {
		s := &state.Sets[i]
		if o := objects[types.UID(s.UID)]; o != nil && o.Generation == s.Generation { // else it will be
			d.tellSet(ctx, o, s, gateway)
		}
	}
}

// tellOrphans tells ListenerSets whose Gateway is gone.
func (d *Deployer) tellOrphans(ctx context.Context, gateways []*gatewayv1.Gateway) {
	for _, o := range d.Sets() {
		c := meta.FindStatusCondition(o.Status.Conditions, string(gatewayv1.ListenerSetConditionAccepted))
		if c == nil || c.Status != metav1.ConditionTrue {
			continue
		}
		ns, name := o.Namespace, string(o.Spec.ParentRef.Name)
		if n := o.Spec.ParentRef.Namespace; n != nil {
			ns = string(*n)
		}
		if slices.ContainsFunc(gateways, func(g *gatewayv1.Gateway) bool { return g.Namespace == ns && g.Name == name }) || d.Exists(ns, name) {
			continue
		}
		s := &index.ListenerSetState{}
		s.Accepted.Reason, s.Accepted.Message = string(gatewayv1.ListenerSetReasonParentNotAccepted), fmt.Sprintf("there is no Gateway %s/%s", ns, name)
		d.tellSet(ctx, o, s, metav1.Condition{})
	}
}

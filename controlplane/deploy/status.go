package deploy

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/routing"
)

// ingressVerdict says whether a gateway can be made.
func ingressVerdict(g *gatewayv1.Gateway, s *index.GatewayState, w wishes) (reason gatewayv1.GatewayConditionReason, message string) {
	if !s.Accepted.OK() {
		return gatewayv1.GatewayConditionReason(s.Accepted.Reason), s.Accepted.Message
	}
	switch v := w.serviceType(g); corev1.ServiceType(v) {
	case "", corev1.ServiceTypeLoadBalancer:
	case corev1.ServiceTypeNodePort, corev1.ServiceTypeClusterIP:
		if len(addressesAsked(g)) > 0 {
			return gatewayv1.GatewayReasonUnsupportedAddress, fmt.Sprintf("addresses are asked of a load balancer, and its Service is to be of type %s", v)
		}
	default:
		return gatewayv1.GatewayReasonInvalidParameters, fmt.Sprintf("its Service cannot be of type %q, by the annotation %s or its parameters; use LoadBalancer, NodePort or ClusterIP", v, annotationType)
	}
	return gatewayv1.GatewayReasonAccepted, "the gateway is made as the Deployment " + nameOf(g)
}

// address is one at which a Gateway is reached.
type address struct {
	kind  gatewayv1.AddressType
	value string
}

// addresses are those of a Gateway, and how many pods are ready behind it.
func (d *Deployer) addresses(g *gatewayv1.Gateway, w wishes, accepted bool) (out []address, ready int) {
	virtual, ready := d.State(g.Namespace, nameOf(g))
	kind := corev1.ServiceType(w.serviceType(g))
	if isWaypoint(g) || kind == corev1.ServiceTypeClusterIP || kind == corev1.ServiceTypeNodePort {
		for _, v := range virtual {
			out = append(out, address{gatewayv1.IPAddressType, v})
		}
		return out, ready
	}
	if !accepted || len(virtual) == 0 { // not made yet
		return nil, ready
	}
	for _, i := range d.Balanced(g.Namespace, nameOf(g)) {
		switch {
		case i.IP != "":
			out = append(out, address{gatewayv1.IPAddressType, i.IP})
		case i.Hostname != "":
			out = append(out, address{gatewayv1.HostnameAddressType, i.Hostname})
		}
	}
	return out, ready
}

// missing are the addresses that a Gateway asks for and has not.
func missing(g *gatewayv1.Gateway, has []address) string {
	return strings.Join(slices.DeleteFunc(addressesAsked(g), func(v string) bool {
		return slices.ContainsFunc(has, func(a address) bool { return a.value == v })
	}), ", ")
}

// tell writes the status where it differs from what is there.
func (d *Deployer) tell(ctx context.Context, g *gatewayv1.Gateway, state *index.GatewayState, w wishes, reason gatewayv1.GatewayConditionReason, message, failed string) {
	accepted := reason == gatewayv1.GatewayReasonAccepted
	addresses, ready := d.addresses(g, w, accepted || state != nil && state.Accepted.OK()) // one whose parameters are wrong serves on
	programmed := condition(string(gatewayv1.GatewayConditionProgrammed), true, string(gatewayv1.GatewayReasonProgrammed),
		fmt.Sprintf("%d of its pods are ready", ready), g.Generation)
	switch {
	case !accepted:
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonInvalid), message, g.Generation)
	case failed != "":
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonPending), failed, g.Generation)
	case missing(g, addresses) != "":
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonAddressNotUsable), "the load balancer of its Service has not given it "+missing(g, addresses), g.Generation)
	case len(addresses) == 0:
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonAddressNotAssigned), "its Service has no address yet", g.Generation)
	case ready == 0:
		programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonPending), "none of its pods is ready; connections that need it are refused until one is", g.Generation)
	}
	acceptedNow := condition(string(gatewayv1.GatewayConditionAccepted), accepted, string(reason), message, g.Generation)
	if state != nil && accepted {
		bad := invalidListeners(state.Listeners)
		if bad != "" { // what of it can be served is
			acceptedNow.Reason, acceptedNow.Message = string(gatewayv1.GatewayReasonListenersNotValid), "not all of its listeners can be served: "+bad
		}
		if !slices.ContainsFunc(state.Listeners, func(l index.ListenerState) bool { return l.Accepted.OK() && l.Conflicted.OK() }) && len(addedPorts(state)) == 0 {
			acceptedNow.Status, acceptedNow.Message = metav1.ConditionFalse, "none of its listeners is valid: "+bad
			programmed = condition(programmed.Type, false, string(gatewayv1.GatewayReasonInvalid), acceptedNow.Message, g.Generation)
		}
	}
	status := g.Status.DeepCopy()
	changed := meta.SetStatusCondition(&status.Conditions, acceptedNow)
	changed = meta.SetStatusCondition(&status.Conditions, programmed) || changed
	if t := g.Spec.TLS; t != nil && t.Backend != nil && t.Backend.ClientCertificateRef != nil && state != nil {
		resolved := condition(string(gatewayv1.GatewayConditionResolvedRefs), true, string(gatewayv1.GatewayReasonResolvedRefs), "all references are resolved", g.Generation)
		if v := state.Resolved; !v.OK() {
			resolved.Status, resolved.Reason, resolved.Message = metav1.ConditionFalse, v.Reason, v.Message
		}
		changed = meta.SetStatusCondition(&status.Conditions, resolved) || changed
	} else {
		changed = meta.RemoveStatusCondition(&status.Conditions, string(gatewayv1.GatewayConditionResolvedRefs)) || changed
	}
	if ports := insecurePorts(g); ports != "" && state != nil {
		changed = meta.SetStatusCondition(&status.Conditions, condition(string(gatewayv1.GatewayConditionInsecureFrontendValidationMode), true,
			string(gatewayv1.GatewayReasonConfigurationChanged), "clients are let in without a valid certificate: "+ports, g.Generation)) || changed
	} else {
		changed = meta.RemoveStatusCondition(&status.Conditions, string(gatewayv1.GatewayConditionInsecureFrontendValidationMode)) || changed
	}
	next := []gatewayv1.GatewayStatusAddress{}
	for _, a := range addresses {
		next = append(next, gatewayv1.GatewayStatusAddress{Type: &a.kind, Value: a.value})
	}
	changed = changed || !slices.EqualFunc(status.Addresses, next, func(a, b gatewayv1.GatewayStatusAddress) bool { return a.Value == b.Value })
	listeners := waypointListeners(g, acceptedNow, programmed)
	if state != nil {
		listeners = listenersNow(state.Listeners, programmed, g.Generation)
	}
	changed = settle(status.Listeners, listeners) || changed
	sets := attachedSets(state)
	changed = changed || (sets == nil) != (status.AttachedListenerSets == nil) || sets != nil && *sets != *status.AttachedListenerSets
	d.tellSets(ctx, state, programmed)
	if changed {
		d.write(ctx, g, object{"conditions": status.Conditions, "addresses": next, "listeners": listeners, "attachedListenerSets": sets})
	}
}

// reasonNoRevision says that a Gateway is for a control plane that is not there.
const reasonNoRevision = "RevisionNotFound"

// tellUnclaimed says that nobody makes a Gateway, or changes what was made for it. That goes on as it is.
func (d *Deployer) tellUnclaimed(ctx context.Context, g *gatewayv1.Gateway, problem string) {
	status := g.Status.DeepCopy()
	message := "nobody makes or configures it: " + problem
	changed := meta.SetStatusCondition(&status.Conditions, condition(string(gatewayv1.GatewayConditionAccepted), false, reasonNoRevision, message, g.Generation))
	changed = meta.SetStatusCondition(&status.Conditions, condition(string(gatewayv1.GatewayConditionProgrammed), false, reasonNoRevision, message, g.Generation)) || changed
	if changed {
		d.write(ctx, g, object{"conditions": status.Conditions})
	}
}

// write patches the status of a Gateway.
func (d *Deployer) write(ctx context.Context, g *gatewayv1.Gateway, status object) {
	err := mergeStatus(g, status, func(b []byte, o metav1.PatchOptions) error {
		_, err := d.Gateways.GatewayV1().Gateways(g.Namespace).Patch(ctx, g.Name, types.MergePatchType, b, o, "status")
		return err
	})
	if err != nil && !overtaken(err) {
		d.Log.Warn("status of a Gateway not written", "namespace", g.Namespace, "gateway", g.Name, "error", err)
	}
}

// waypointListeners is what there is to say of a waypoint's listener: what is said of the waypoint.
func waypointListeners(g *gatewayv1.Gateway, accepted, programmed metav1.Condition) []gatewayv1.ListenerStatus {
	out := []gatewayv1.ListenerStatus{}
	for _, l := range g.Spec.Listeners {
		out = append(out, gatewayv1.ListenerStatus{Name: l.Name, SupportedKinds: []gatewayv1.RouteGroupKind{}, Conditions: []metav1.Condition{
			accepted, programmed,
			condition(string(gatewayv1.ListenerConditionResolvedRefs), true, string(gatewayv1.ListenerReasonResolvedRefs), "it refers to nothing", g.Generation),
		}})
	}
	return out
}

// listenersNow is what there is to say of listeners, of a Gateway's own or of a ListenerSet's, whose generation it is.
func listenersNow(states []index.ListenerState, programmed metav1.Condition, generation int64) []gatewayv1.ListenerStatus {
	out := []gatewayv1.ListenerStatus{}
	for i := range states {
		l := &states[i]
		out = append(out, gatewayv1.ListenerStatus{Name: l.Name, SupportedKinds: l.Kinds, AttachedRoutes: l.Attached, Conditions: listenerConditions(l, programmed, generation)})
	}
	return out
}

// settle has what is said of listeners now keep the times of what was said before, and reports whether it is something else.
func settle(was, now []gatewayv1.ListenerStatus) (changed bool) {
	changed = len(was) != len(now)
	for i := range now {
		s := &now[i]
		var before gatewayv1.ListenerStatus
		at := slices.IndexFunc(was, func(w gatewayv1.ListenerStatus) bool { return w.Name == s.Name })
		if at >= 0 {
			before = was[at]
		}
		changed = changed || at != i
		conditions := before.Conditions
		for _, c := range s.Conditions {
			changed = meta.SetStatusCondition(&conditions, c) || changed
		}
		s.Conditions = conditions
		changed = changed || before.AttachedRoutes != s.AttachedRoutes || len(before.SupportedKinds) != len(s.SupportedKinds)
	}
	return changed
}

// insecurePorts says where a Gateway lets clients in whatever their certificates are; "" for nowhere.
func insecurePorts(g *gatewayv1.Gateway) string {
	if g.Spec.TLS == nil || g.Spec.TLS.Frontend == nil {
		return ""
	}
	insecure := func(v *gatewayv1.FrontendTLSValidation) bool {
		return v != nil && v.Mode == gatewayv1.AllowInsecureFallback
	}
	var out []string
	if insecure(g.Spec.TLS.Frontend.Default.Validation) {
		out = append(out, "by default")
	}
	for _, p := range g.Spec.TLS.Frontend.PerPort {
		if insecure(p.TLS.Validation) {
			out = append(out, fmt.Sprintf("on port %d", p.Port))
		}
	}
	return strings.Join(out, ", ")
}

func invalidListeners(listeners []index.ListenerState) string {
	var bad []string
	for _, l := range listeners {
		if !l.Programmed() {
			bad = append(bad, string(l.Name))
		}
	}
	return strings.Join(bad, ", ")
}

// listenerConditions are those of a gateway's listener.
func listenerConditions(s *index.ListenerState, programmed metav1.Condition, generation int64) []metav1.Condition {
	is := func(kind gatewayv1.ListenerConditionType, fine gatewayv1.ListenerConditionReason, text string, v routing.Verdict) metav1.Condition {
		if v.OK() {
			return condition(string(kind), true, string(fine), text, generation)
		}
		return condition(string(kind), false, v.Reason, v.Message, generation)
	}
	out := []metav1.Condition{
		is(gatewayv1.ListenerConditionAccepted, gatewayv1.ListenerReasonAccepted, "the listener is valid", s.Accepted),
		is(gatewayv1.ListenerConditionResolvedRefs, gatewayv1.ListenerReasonResolvedRefs, "all references are resolved", s.Resolved),
		condition(string(gatewayv1.ListenerConditionConflicted), false, string(gatewayv1.ListenerReasonNoConflicts), "no other listener is in its way", generation),
	}
	if !s.Conflicted.OK() {
		out[0] = condition(string(gatewayv1.ListenerConditionAccepted), false, s.Conflicted.Reason, s.Conflicted.Message, generation)
		out[2] = condition(string(gatewayv1.ListenerConditionConflicted), true, s.Conflicted.Reason, s.Conflicted.Message, generation)
	}
	switch {
	case !s.Conflicted.OK():
		out = append(out, condition("Programmed", false, s.Conflicted.Reason, s.Conflicted.Message, generation))
	case !s.Programmed():
		out = append(out, condition("Programmed", false, string(gatewayv1.ListenerReasonInvalid), "it is not served, for what its other conditions say", generation))
	default:
		out = append(out, condition("Programmed", programmed.Status == metav1.ConditionTrue, programmed.Reason, programmed.Message, generation))
	}
	return out
}

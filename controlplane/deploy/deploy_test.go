package deploy

import (
	"log/slog"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/routing"
)

func gateway(change func(*gatewayv1.Gateway)) *gatewayv1.Gateway {
	g := &gatewayv1.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "way", UID: "u1", Generation: 3},
		Spec:       gatewayv1.GatewaySpec{GatewayClassName: Class, Listeners: []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: hboneProtocol}}},
	}
	if change != nil {
		change(g)
	}
	return g
}

func TestDeploys(t *testing.T) {
	g := gateway(nil)
	kube, gateways := fake.NewClientset(), gatewayfake.NewSimpleClientset()
	if _, err := gateways.GatewayV1().Gateways("shop").Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ready, addresses := 0, []string(nil)
	d := &Deployer{
		Settings: Settings{Image: "waypoint:dev", PullPolicy: "IfNotPresent", Service: "istiod.istio-system.svc:15012", Revision: "default"},
		Kube:     kube, Gateways: gateways, State: func(string, string) ([]string, int) { return addresses, ready }, Log: slog.New(slog.DiscardHandler),
	}
	applied := map[types.UID]done{}
	step := func() *gatewayv1.Gateway {
		t.Helper()
		now, err := gateways.GatewayV1().Gateways("shop").Get(t.Context(), "way", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		d.reconcile(t.Context(), now, applied)
		if now, err = gateways.GatewayV1().Gateways("shop").Get(t.Context(), "way", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		return now
	}
	says := func(g *gatewayv1.Gateway, kind, status, reason string) {
		t.Helper()
		if c := meta.FindStatusCondition(g.Status.Conditions, kind); c == nil || string(c.Status) != status || c.Reason != reason || c.ObservedGeneration != 3 {
			t.Errorf("%s: %+v, want %s %s", kind, c, status, reason)
		}
	}
	now := step()
	says(now, "Accepted", "True", "Accepted")
	says(now, "Programmed", "False", "AddressNotAssigned")
	dep, err := kube.AppsV1().Deployments("shop").Get(t.Context(), "way", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod := dep.Spec.Template
	if pod.Labels["networking.istio.io/tunnel"] != "http" || pod.Labels["istio.io/dataplane-mode"] != "none" || pod.Spec.ServiceAccountName != "way" || pod.Spec.Containers[0].Image != "waypoint:dev" {
		t.Errorf("pod: %+v", pod)
	}
	if dep.Spec.Replicas != nil && *dep.Spec.Replicas != 1 {
		t.Errorf("replicas %v are somebody else's to say", *dep.Spec.Replicas)
	}
	if o := dep.OwnerReferences; len(o) != 1 || o[0].UID != "u1" || o[0].Kind != "Gateway" {
		t.Errorf("owners: %+v", o)
	}
	for what, get := range map[string]func() error{
		"Service": func() error {
			_, err := kube.CoreV1().Services("shop").Get(t.Context(), "way", metav1.GetOptions{})
			return err
		},
		"ServiceAccount": func() error {
			_, err := kube.CoreV1().ServiceAccounts("shop").Get(t.Context(), "way", metav1.GetOptions{})
			return err
		},
		"PodDisruptionBudget": func() error {
			_, err := kube.PolicyV1().PodDisruptionBudgets("shop").Get(t.Context(), "way", metav1.GetOptions{})
			return err
		},
	} {
		if err := get(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	addresses = []string{"10.96.0.7"}
	says(step(), "Programmed", "False", "Pending")
	ready = 1
	now = step()
	says(now, "Programmed", "True", "Programmed")
	if a := now.Status.Addresses; len(a) != 1 || a[0].Value != "10.96.0.7" {
		t.Errorf("addresses %+v", a)
	}
	if l := now.Status.Listeners; len(l) != 1 || l[0].Name != "mesh" || !meta.IsStatusConditionTrue(l[0].Conditions, "Programmed") {
		t.Errorf("listeners %+v", l)
	}
	kube.ClearActions()
	gateways.ClearActions()
	step()
	for _, a := range append(kube.Actions(), gateways.Actions()...) {
		if a.GetVerb() != "get" {
			t.Errorf("%s of %s though nothing has changed", a.GetVerb(), a.GetResource().Resource)
		}
	}
}

func TestVerdicts(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*gatewayv1.Gateway)
		want   gatewayv1.GatewayConditionReason
	}{
		"as it should be": {nil, gatewayv1.GatewayReasonAccepted},
		"for pods":        {func(g *gatewayv1.Gateway) { g.Labels = map[string]string{labelFor: "workload"} }, gatewayv1.GatewayReasonInvalidParameters},
		"for what":        {func(g *gatewayv1.Gateway) { g.Labels = map[string]string{labelFor: "odd"} }, gatewayv1.GatewayReasonInvalidParameters},
		"no listener":     {func(g *gatewayv1.Gateway) { g.Spec.Listeners = nil }, gatewayv1.GatewayReasonListenersNotValid},
		"another port":    {func(g *gatewayv1.Gateway) { g.Spec.Listeners[0].Port = 80 }, gatewayv1.GatewayReasonListenersNotValid},
	} {
		if got, message := verdict(gateway(c.change)); got != c.want || message == "" {
			t.Errorf("%s: %s (%s), want %s", name, got, message, c.want)
		}
	}
}

// TestDeploysGateways makes what a Gateway of the class istio asks for, and says what the index makes of its listeners.
func TestDeploysGateways(t *testing.T) {
	g := gateway(func(g *gatewayv1.Gateway) {
		g.Name, g.Spec.GatewayClassName = "edge", "istio"
		g.Spec.Listeners = []gatewayv1.Listener{{Name: "http", Port: 80, Protocol: "HTTP"}, {Name: "odd", Port: 81, Protocol: "SCTP"}, {Name: "other", Port: 80, Protocol: "HTTP"}}
	})
	kube, gateways := fake.NewClientset(), gatewayfake.NewSimpleClientset()
	if _, err := gateways.GatewayV1().Gateways("shop").Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var state *index.GatewayState
	var balanced []corev1.LoadBalancerIngress
	d := &Deployer{
		Settings: Settings{Image: "waypoint:dev", PullPolicy: "IfNotPresent", Service: "istiod.istio-system.svc:15012", Revision: "default"},
		Kube:     kube, Gateways: gateways, State: func(_, name string) ([]string, int) { return []string{"10.96.0.9"}, len(name) / len("edge-istio") },
		Ingress:  func(string, string) *index.GatewayState { return state },
		Balanced: func(string, string) []corev1.LoadBalancerIngress { return balanced }, Log: slog.New(slog.DiscardHandler),
	}
	applied := map[types.UID]done{}
	step := func() *gatewayv1.Gateway {
		t.Helper()
		now, err := gateways.GatewayV1().Gateways("shop").Get(t.Context(), "edge", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		d.reconcile(t.Context(), now, applied)
		if now, err = gateways.GatewayV1().Gateways("shop").Get(t.Context(), "edge", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		return now
	}
	if now := step(); len(now.Status.Conditions) > 0 {
		t.Errorf("said before the index has seen it: %+v", now.Status)
	}
	state = &index.GatewayState{UID: "u1", Generation: 3, Listeners: []index.ListenerState{
		{Name: "http", Attached: 2, Kinds: []gatewayv1.RouteGroupKind{{Kind: "HTTPRoute"}}},
		{Name: "odd", Accepted: routing.Verdict{Reason: "UnsupportedProtocol", Message: "protocol SCTP is not supported"}},
		{Name: "other", Conflicted: routing.Verdict{Reason: "HostnameConflict", Message: "listener http has it"}},
	}}
	now := step()
	if c := meta.FindStatusCondition(now.Status.Conditions, "Programmed"); c == nil || c.Reason != "AddressNotAssigned" {
		t.Errorf("without an address: %+v", c)
	}
	svc, err := kube.CoreV1().Services("shop").Get(t.Context(), "edge-istio", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer || len(svc.Spec.Ports) != 3 || svc.Spec.Ports[1].Port != 80 {
		t.Errorf("Service: %+v", svc.Spec)
	}
	dep, err := kube.AppsV1().Deployments("shop").Get(t.Context(), "edge-istio", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if pod := dep.Spec.Template; pod.Labels["networking.istio.io/tunnel"] != "" || pod.Spec.ServiceAccountName != "edge-istio" || len(pod.Spec.SecurityContext.Sysctls) != 1 {
		t.Errorf("pod: %+v", pod)
	}
	balanced = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}, {Hostname: "edge.example"}}
	now = step()
	if c := meta.FindStatusCondition(now.Status.Conditions, "Accepted"); c == nil || c.Status != "True" || c.Reason != "ListenersNotValid" {
		t.Errorf("Accepted: %+v", c)
	}
	if a := now.Status.Addresses; len(a) != 2 || a[0].Value != "192.0.2.1" || *a[1].Type != gatewayv1.HostnameAddressType {
		t.Errorf("addresses %+v", a)
	}
	l := now.Status.Listeners
	if len(l) != 3 || l[0].AttachedRoutes != 2 || !meta.IsStatusConditionTrue(l[0].Conditions, "Programmed") ||
		!meta.IsStatusConditionFalse(l[1].Conditions, "Accepted") || !meta.IsStatusConditionTrue(l[2].Conditions, "Conflicted") || !meta.IsStatusConditionFalse(l[2].Conditions, "Programmed") {
		t.Errorf("listeners %+v", l)
	}

	set := &gatewayv1.ListenerSet{ObjectMeta: metav1.ObjectMeta{Namespace: "blog", Name: "more", UID: "u2", Generation: 2}}
	refused := &gatewayv1.ListenerSet{ObjectMeta: metav1.ObjectMeta{Namespace: "pay", Name: "more", UID: "u3"}}
	d.Sets = func() (out []*gatewayv1.ListenerSet) {
		for _, s := range []*gatewayv1.ListenerSet{set, refused} {
			now, err := gateways.GatewayV1().ListenerSets(s.Namespace).Get(t.Context(), s.Name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, now)
		}
		return out
	}
	for _, s := range []*gatewayv1.ListenerSet{set, refused} {
		s.Spec.ParentRef = gatewayv1.ParentGatewayReference{Name: "edge", Namespace: new(gatewayv1.Namespace("shop"))}
		if _, err := gateways.GatewayV1().ListenerSets(s.Namespace).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	notAllowed := routing.Verdict{Reason: "NotAllowed", Message: "allowedListeners"}
	state.Sets = []index.ListenerSetState{
		{Namespace: "blog", Name: "more", UID: "u2", Generation: 2, Listeners: []index.ListenerState{
			{Name: "a", Port: 8080, Attached: 1, Kinds: []gatewayv1.RouteGroupKind{{Kind: "HTTPRoute"}}},
			{Name: "b", Port: 80, Conflicted: routing.Verdict{Reason: "HostnameConflict", Message: "listener http has it"}},
		}},
		{Namespace: "pay", Name: "more", UID: "u3", Accepted: notAllowed},
	}
	if now = step(); now.Status.AttachedListenerSets == nil || *now.Status.AttachedListenerSets != 1 {
		t.Errorf("attached sets: %v", now.Status.AttachedListenerSets)
	}
	if svc, err = kube.CoreV1().Services("shop").Get(t.Context(), "edge-istio", metav1.GetOptions{}); err != nil || !slices.ContainsFunc(svc.Spec.Ports, func(p corev1.ServicePort) bool { return p.Port == 8080 }) {
		t.Errorf("with the port of a ListenerSet: %v: %+v", err, svc.Spec.Ports)
	}
	said := func(o *gatewayv1.ListenerSet, kind, status, reason string) {
		t.Helper()
		if c := meta.FindStatusCondition(o.Status.Conditions, kind); c == nil || string(c.Status) != status || c.Reason != reason || c.ObservedGeneration != o.Generation {
			t.Errorf("ListenerSet %s: %+v, want %s %s", o.Namespace, c, status, reason)
		}
	}
	sets := d.Sets()
	said(sets[0], "Accepted", "True", "ListenersNotValid")
	said(sets[0], "Programmed", "True", "Programmed")
	said(sets[1], "Accepted", "False", "NotAllowed")
	said(sets[1], "Programmed", "False", "NotAllowed")
	if e := sets[0].Status.Listeners; len(e) != 2 || e[0].AttachedRoutes != 1 || !meta.IsStatusConditionTrue(e[0].Conditions, "Programmed") ||
		!meta.IsStatusConditionTrue(e[1].Conditions, "Conflicted") || meta.FindStatusCondition(e[1].Conditions, "Programmed").Reason != "HostnameConflict" {
		t.Errorf("its listeners: %+v", e)
	}
	gateways.ClearActions()
	step()
	for _, a := range gateways.Actions() {
		if a.GetVerb() != "get" {
			t.Errorf("%s of %s though nothing has changed", a.GetVerb(), a.GetResource().Resource)
		}
	}
	there := true
	d.Exists = func(string, string) bool { return there }
	d.tellOrphans(t.Context(), nil)
	said(d.Sets()[0], "Accepted", "True", "ListenersNotValid")
	there = false
	d.tellOrphans(t.Context(), nil)
	said(d.Sets()[0], "Accepted", "False", "ParentNotAccepted")

	g.Spec.Addresses = []gatewayv1.GatewaySpecAddress{{Value: "192.0.2.9"}}
	if _, err := gateways.GatewayV1().Gateways("shop").Update(t.Context(), g, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	clear(applied) // as another generation would have it
	now = step()
	if c := meta.FindStatusCondition(now.Status.Conditions, "Programmed"); c == nil || c.Reason != "AddressNotUsable" {
		t.Errorf("without the address that it asks for: %+v", c)
	}
	if svc, err = kube.CoreV1().Services("shop").Get(t.Context(), "edge-istio", metav1.GetOptions{}); err != nil || svc.Spec.LoadBalancerIP != "192.0.2.9" {
		t.Errorf("its Service: %v: %+v", err, svc.Spec)
	}
	balanced = []corev1.LoadBalancerIngress{{IP: "192.0.2.9"}}
	if now = step(); !meta.IsStatusConditionTrue(now.Status.Conditions, "Programmed") {
		t.Errorf("with the address that it asks for: %+v", now.Status.Conditions)
	}

	state.Sets = nil
	state.Listeners[0].Accepted = routing.Verdict{Reason: "PortUnavailable", Message: "port 80 is another's"}
	now = step()
	for _, kind := range []string{"Accepted", "Programmed"} {
		if c := meta.FindStatusCondition(now.Status.Conditions, kind); c == nil || c.Status != "False" {
			t.Errorf("without a listener that can be accepted: %+v", c)
		}
	}
}

// Of Gateways those are made that are this control plane's, and of one that is nobody's it is said; what was made stays.
func TestClaims(t *testing.T) {
	gateways := gatewayfake.NewSimpleClientset()
	named := func(name string) *gatewayv1.Gateway {
		g := gateway(func(g *gatewayv1.Gateway) { g.Name, g.UID = name, types.UID(name) })
		if _, err := gateways.GatewayV1().Gateways("shop").Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		return g
	}
	all := []*gatewayv1.Gateway{named("ours"), named("theirs"), named("nobodys")}
	d := &Deployer{Gateways: gateways, Log: slog.New(slog.DiscardHandler)}
	if got := d.claimed(t.Context(), all); len(got) != 3 {
		t.Errorf("where there is no other control plane it has %d of 3", len(got))
	}
	d.Claim = func(g *gatewayv1.Gateway) Claim {
		return map[string]Claim{"ours": {Mine: true}, "nobodys": {Problem: "there is no such revision"}}[g.Name]
	}
	if got := d.claimed(t.Context(), all); len(got) != 1 || got[0].Name != "ours" {
		t.Errorf("claimed: %v", got)
	}
	for _, g := range all {
		now, err := gateways.GatewayV1().Gateways("shop").Get(t.Context(), g.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c := meta.FindStatusCondition(now.Status.Conditions, "Programmed")
		if (c != nil) != (g.Name == "nobodys") || c != nil && (c.Status != "False" || c.Reason != reasonNoRevision || c.ObservedGeneration != 3) {
			t.Errorf("%s says %+v", g.Name, now.Status.Conditions)
		}
		if g.Name == "nobodys" {
			gateways.ClearActions()
			d.claimed(t.Context(), []*gatewayv1.Gateway{now})
			if n := len(gateways.Actions()); n > 0 {
				t.Errorf("it is said again: %v", gateways.Actions())
			}
		}
	}
}

package cli

import (
	"strings"
	"testing"
	"testing/synctest"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func namespace(name string, labels map[string]string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func TestWaypoint(t *testing.T) {
	s := newSite(t, namespace("shop", map[string]string{modeLabel: "ambient"}), namespace("bank", nil),
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory"},
			Status: corev1.ServiceStatus{Conditions: []metav1.Condition{{Type: boundCondition, Status: metav1.ConditionFalse}}}},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "bank", Name: "desk", Labels: map[string]string{useLabel: "way", useNamespaceLabel: "shop"}}},
		pod("shop", "way-1", "node1", map[string]string{gatewayLabel: "way"}, nil))
	ingress := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
		"metadata": map[string]any{"namespace": "shop", "name": "ingress"}, "spec": map[string]any{"gatewayClassName": "istio"}}}
	if err := s.dynamic.Tracker().Create(gatewayResource, ingress, "shop"); err != nil {
		t.Fatal(err)
	}
	session(t, "testdata/waypoint.txtar", s.run)
}

// What is waited for is the condition of the Gateway as it is now, and the namespace asks for the waypoint only then.
func TestWaypointApplyWaits(t *testing.T) {
	s := newSite(t, namespace("shop", map[string]string{modeLabel: "ambient"}))
	synctest.Test(t, func(t *testing.T) {
		code, _, errs := s.run(t, "waypoint", "apply", "-n", "shop", "--enroll-namespace", "--wait", "--timeout", "2s")
		if code != ExitError || !strings.Contains(errs, "does not work: no control plane has said anything about it yet") {
			t.Errorf("code %d\n%s", code, errs)
		}
	})
	ns, err := s.kube.CoreV1().Namespaces().Get(t.Context(), "shop", metav1.GetOptions{})
	if err != nil || ns.Labels[useLabel] != "" {
		t.Errorf("the namespace asks for a waypoint that does not work: %v, %v", ns, err)
	}
	g := &unstructured.Unstructured{}
	g.SetGeneration(2)
	set := func(seen int64) {
		g.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Programmed", "status": "True", "message": "1 pod", "observedGeneration": seen}}}
	}
	g.Object = map[string]any{"metadata": map[string]any{"generation": int64(2)}}
	for seen, want := range map[int64]string{1: "Unknown", 2: "True"} {
		set(seen)
		if got, message := condition(g, "Programmed"); got != want {
			t.Errorf("about generation %d of 2: %s, %s", seen, got, message)
		}
	}
}

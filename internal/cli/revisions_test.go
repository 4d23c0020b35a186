package cli

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// gateway puts a Gateway into a site.
func (s *site) gateway(t *testing.T, namespace, name, class string, labels map[string]string) {
	t.Helper()
	g := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
		"metadata": map[string]any{"namespace": namespace, "name": name}, "spec": map[string]any{"gatewayClassName": class}}}
	g.SetLabels(labels)
	_ = s.dynamic.Tracker().Delete(gatewayResource, namespace, name) // the one before
	if err := s.dynamic.Tracker().Create(gatewayResource, g, namespace); err != nil {
		t.Fatal(err)
	}
}

// A control plane joins a mesh that is there, with what that was set to, and leaves it without a trace; neither goes while
// something needs it.
func TestRevisionJoinsAndLeaves(t *testing.T) {
	agent := pod("istio-system", "warren-node-canary-1", "node1", map[string]string{"app": "ztunnel", revision.Label: "next"}, nil)
	s := newSite(t, namespace("shop", nil), namespace("pay", map[string]string{revision.Label: "next"}))
	refused := func(want string, args ...string) {
		t.Helper()
		if code, _, errs := s.run(t, args...); code == ExitOK || !strings.Contains(errs, want) {
			t.Errorf("%v: code %d, want %q\n%s", args, code, want, errs)
		}
	}
	done := func(want string, args ...string) {
		t.Helper()
		if code, _, errs := s.run(t, args...); code != ExitOK || !strings.Contains(errs, want) {
			t.Fatalf("%v: code %d, want %q\n%s", args, code, want, errs)
		}
	}
	refused("there is no mesh in istio-system", "install", "--revision", "next")
	refused(`"Next" is no name`, "install", "--revision", "Next")
	done("revision 1 is ready", "install", "--set", "mesh.network=n1", "--set", "node.logLevel=debug")
	refused(`mesh.network ("n2", of the mesh "n1")`, "install", "--revision", "next", "--set", "mesh.network=n2")
	done("warren-next: revision 1 is ready", "install", "--revision", "next", "--set", "control.logLevel=debug")
	for _, have := range [][3]string{{"deployments", "istio-system", "warren-control-next"}, {"services", "istio-system", "istiod-next"}, {"configmaps", "istio-system", "istio-next"},
		{"clusterroles", "", "warren-control-next-istio-system"}, {"deployments", "istio-system", "warren-control"}, {"daemonsets", "istio-system", "warren-node"}} {
		if !s.has(t, have[0], have[1], have[2]) {
			t.Errorf("there is no %v", have)
		}
	}
	if s.has(t, "daemonsets", "istio-system", "warren-node-next") {
		t.Error("a second control plane brings agents")
	}
	list, err := release.Records{Client: s.kube, Namespace: "istio-system", Revision: "next"}.List(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	if mesh, _ := list[0].Config["mesh"].(map[string]any); mesh["network"] != "n1" || list[0].Config["node"] != nil || list[0].Config["revision"] != "next" || list[0].Name != "warren-next" {
		t.Errorf("%s was installed with %v", list[0].Name, list[0].Config)
	}
	if got := s.revisions(t); len(got) != 1 {
		t.Errorf("the mesh's release has revisions %v", got)
	}
	done("warren-next: revision 2 is ready", "upgrade", "--revision", "next")

	refused(`mesh.network ("n2", of the mesh "n1"): the control planes of a mesh have these in common; leave them out here, or uninstall those of revision next first`, "upgrade", "--set", "mesh.network=n2")
	done("revision 2 is ready", "upgrade", "--set", "control.logLevel=info")

	// What it owns keeps it.
	s.gateway(t, "shop", "way", waypointClass, map[string]string{revision.Label: "next"})
	s.gateway(t, "pay", "edge", "istio", nil)
	s.gateway(t, "pay", "mine", waypointClass, map[string]string{revision.Label: revision.Default})
	s.gateway(t, "pay", "foreign", "nginx", nil)
	refused("has the Gateways pay/edge, shop/way:", "uninstall", "--revision", "next")
	if _, err := s.kube.CoreV1().Pods("istio-system").Create(t.Context(), agent, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	refused("the agents of node1 ask the control plane of revision next", "uninstall", "--revision", "next")
	if err := s.kube.CoreV1().Pods("istio-system").Delete(t.Context(), agent.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	refused("--purge removes the whole mesh", "uninstall", "--revision", "next", "--purge")
	refused("warren uninstall --revision next goes first", "uninstall")
	if code, out, errs := s.run(t, "status"); !strings.Contains(out, "  of revision next: 1/1 ready") {
		t.Errorf("status: code %d\n%s%s", code, out, errs)
	}

	if _, out, errs := s.run(t, "check"); !strings.Contains(out, "revisions: beside the mesh's control plane next (1/1 ready, 2 Gateways)") {
		t.Errorf("check:\n%s%s", out, errs)
	}
	s.gateway(t, "shop", "lost", waypointClass, map[string]string{revision.Label: "nxt"})
	if _, out, errs := s.run(t, "check"); !strings.Contains(out, `revisions: nobody makes or configures the Gateway shop/lost: it asks for "nxt"`) {
		t.Errorf("check:\n%s%s", out, errs)
	}
	if err := s.dynamic.Tracker().Delete(gatewayResource, "shop", "lost"); err != nil {
		t.Fatal(err)
	}

	// Tags.
	session(t, "testdata/tags.txtar", s.run)
	refused("there is no control plane of revision nobody", "tag", "set", "x", "--revision", "nobody")
	refused("next is the name of a revision", "tag", "set", "next", "--revision", revision.Default)
	refused("--revision says which one", "tag", "set", "x")
	svc, err := s.kube.CoreV1().Services("istio-system").Get(t.Context(), "istiod-revision-tag-default", metav1.GetOptions{})
	if err != nil || svc.Spec.ClusterIP != corev1.ClusterIPNone || svc.Labels[revision.TagLabel] != revision.Default || svc.Labels[revision.Label] != "next" {
		t.Errorf("the tag default is %+v, %v", svc, err)
	}
	refused("the tags default are for revision next", "uninstall", "--revision", "next")
	done("the tag default is gone", "tag", "remove", "default")

	for _, g := range [][3]string{{"shop", "way", waypointClass}, {"pay", "edge", "istio"}} {
		s.gateway(t, g[0], g[1], g[2], map[string]string{revision.Label: revision.Default})
	}
	done("control plane of revision next: ", "uninstall", "--revision", "next")
	if s.has(t, "deployments", "istio-system", "warren-control-next") || s.has(t, "clusterroles", "", "warren-control-next-istio-system") || s.has(t, "configmaps", "istio-system", "istio-next") {
		t.Error("something of the second control plane is left")
	}
	if !s.has(t, "deployments", "istio-system", "warren-control") || !s.has(t, "daemonsets", "istio-system", "warren-node") {
		t.Error("something of the mesh is gone")
	}
	if list, err := (release.Records{Client: s.kube, Namespace: "istio-system", Revision: "next"}).List(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("records are left: %v, %v", list, err)
	}
	done("there is no control plane of revision next", "uninstall", "--revision", "next")
	done("removed", "uninstall")
}

package cli

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	k8stesting "k8s.io/client-go/testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// ambientSite is a cluster of two nodes with an Istio in ambient mode, where DaemonSets follow the label of nodes as their controller
// has them do, and evicted pods are made again: those of DaemonSets where they were, others on the other node.
type ambientSite struct {
	*site
	held  map[string]bool // pods that a budget holds once
	times int
}

// madeBy has a controller of that kind own a pod.
func madeBy(p *corev1.Pod, kind, name string) *corev1.Pod {
	yes := true
	p.OwnerReferences = []metav1.OwnerReference{{Kind: kind, Name: name, UID: types.UID(name), Controller: &yes}}
	return p
}

var ofIstioLabels = map[string]string{"app.kubernetes.io/part-of": "istio"}

func newAmbientSite(t *testing.T, objects ...runtime.Object) *ambientSite {
	t.Helper()
	labels := func(more ...string) map[string]string {
		out := maps.Clone(ofIstioLabels)
		for i := 0; i < len(more); i += 2 {
			out[more[i]] = more[i+1]
		}
		return out
	}
	set := func(name string, template map[string]string) *appsv1.DaemonSet {
		return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name, UID: types.UID(name), Labels: ofIstioLabels},
			Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: template}, Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: template}},
				UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.RollingUpdateDaemonSetStrategyType}}}
	}
	control := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istiod", Labels: labels("app", "istiod", revision.Label, "default")}}
	control.Spec.Template.Spec.Containers = []corev1.Container{{Env: []corev1.EnvVar{{Name: "CLUSTER_ID", Value: "c1"}}}}
	s := &ambientSite{held: map[string]bool{}, site: newSite(t, append(objects,
		namespace("istio-system", map[string]string{"topology.istio.io/network": "n1"}), namespace("shop", map[string]string{modeLabel: "ambient"}), control,
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istiod", Labels: labels("app", "istiod", revision.Label, "default")}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio-ca-root-cert"}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio-ca-secret"}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{
			"mesh": "{rootNamespace: istio-system, trustDomain: prod.example, enableTracing: true, outboundTrafficPolicy: {mode: REGISTRY_ONLY}, defaultConfig: {discoveryAddress: istiod.istio-system.svc:15012}}"}},
		set("ztunnel", map[string]string{"app": "ztunnel"}), set("istio-cni-node", map[string]string{"k8s-app": "istio-cni-node"}),
		madeBy(pod("shop", "ui-1", "node1", nil, map[string]string{redirection: "enabled"}), "ReplicaSet", "ui"),
		madeBy(pod("shop", "log-node1", "node1", nil, map[string]string{redirection: "enabled"}), "DaemonSet", "log"),
		madeBy(pod("other", "outside-1", "node1", nil, nil), "ReplicaSet", "outside"),
	)...)}
	for _, name := range []string{"node1", "node2"} {
		n := node("6.1.0")
		n.Name = name
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		if err := s.kube.Tracker().Create(corev1.SchemeGroupVersion.WithResource("nodes"), n, ""); apierrors.IsAlreadyExists(err) {
			err = s.kube.Tracker().Update(corev1.SchemeGroupVersion.WithResource("nodes"), n, "")
			if err != nil {
				t.Fatal(err)
			}
		}
		s.daemons(t, n)
	}
	s.kube.PrependReactor("update", "nodes", func(a k8stesting.Action) (bool, runtime.Object, error) {
		s.daemons(t, a.(k8stesting.UpdateAction).GetObject().(*corev1.Node))
		return false, nil, nil
	})
	s.kube.PrependReactor("create", "pods", func(a k8stesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "eviction" {
			return false, nil, nil
		}
		e := a.(k8stesting.CreateAction).GetObject().(*policyv1.Eviction)
		if s.held[e.Name] {
			delete(s.held, e.Name)
			return true, nil, apierrors.NewTooManyRequests("a budget", 1)
		}
		o, err := s.kube.Tracker().Get(pods, a.GetNamespace(), e.Name)
		if err != nil {
			return true, nil, err
		}
		p := o.(*corev1.Pod)
		s.drop(t, p)
		s.times++
		next := pod(p.Namespace, fmt.Sprintf("%s-again%d", p.Name, s.times), p.Spec.NodeName, nil, map[string]string{redirection: "enabled"})
		next.OwnerReferences, next.CreationTimestamp = p.OwnerReferences, metav1.NewTime(time.Now().Add(time.Minute))
		if o := metav1.GetControllerOf(p); o == nil {
			return true, nil, nil
		} else if o.Kind != "DaemonSet" {
			next.Spec.NodeName = map[string]string{"node1": "node2", "node2": "node1"}[p.Spec.NodeName]
		}
		return true, nil, s.kube.Tracker().Add(next)
	})
	return s
}

var pods = corev1.SchemeGroupVersion.WithResource("pods")

func (s *ambientSite) drop(t *testing.T, p *corev1.Pod) {
	t.Helper()
	if err := s.kube.Tracker().Delete(pods, p.Namespace, p.Name); err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
}

// daemons makes the pods of DaemonSets on a node what its label says.
func (s *ambientSite) daemons(t *testing.T, n *corev1.Node) {
	t.Helper()
	ours := map[string]string{"app": "ztunnel", "app.kubernetes.io/part-of": "warren"}
	holder := map[string]string{"app": "warren-holder", "app.kubernetes.io/part-of": "warren"}
	for _, d := range []struct {
		label, set string
		labels     map[string]string
	}{{"", "ztunnel", ofIstioLabels}, {"", "istio-cni-node", ofIstioLabels}, {moved, "warren-node", ours}, {moved, "warren-holder", holder}} {
		p := madeBy(pod("istio-system", d.set+"-"+n.Name, n.Name, d.labels, nil), "DaemonSet", d.set)
		p.Spec.HostNetwork = true
		if n.Labels[migrationLabel] != d.label {
			s.drop(t, p)
			continue
		}
		if err := s.kube.Tracker().Create(pods, p, p.Namespace); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Error(err)
		}
	}
}

func (s *ambientSite) nodeNow(t *testing.T, name string) *corev1.Node {
	t.Helper()
	n, err := s.kube.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// here are the pods of a node, with the DaemonSets that are nobody's matter left out.
func (s *ambientSite) here(t *testing.T, node string) string {
	t.Helper()
	list, err := s.kube.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range list.Items {
		if p.Spec.NodeName == node {
			names = append(names, p.Name)
		}
	}
	return strings.Join(names, " ")
}

func (s *ambientSite) must(t *testing.T, code int, want string, args ...string) string {
	t.Helper()
	got, out, errs := s.run(t, args...)
	if got != code || !strings.Contains(out+errs, want) {
		t.Fatalf("warren %s: code %d, want %d with %q\n%s%s", strings.Join(args, " "), got, code, want, out, errs)
	}
	return out + errs
}

// From Istio to Warren, node by node, back, and to the end: who runs where, what is remembered, and what Istio's own objects are
// after it.
func TestMigration(t *testing.T) {
	s := newAmbientSite(t)
	before, err := s.kube.AppsV1().DaemonSets("istio-system").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.must(t, ExitError, "migrate begin comes first", "migrate", "node", "node1")
	s.must(t, ExitError, "it would not work here", "install")
	said := s.must(t, ExitOK, "next: warren migrate node", "migrate", "begin", "--set", "node.logLevel=debug")
	if !strings.Contains(said, "enableTracing") {
		t.Errorf("what is not followed is not said:\n%s", said)
	}
	list, err := release.Records{Client: s.kube, Namespace: "istio-system"}.List(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	want := map[string]any{"besideIstio": map[string]any{"enabled": true, "configMap": "istio"}, "node": map[string]any{"logLevel": "debug"},
		"mesh": map[string]any{"trustDomain": "prod.example", "clusterID": "c1", "network": "n1"}, "meshConfig": map[string]any{"outboundTrafficPolicy": map[string]any{"mode": "REGISTRY_ONLY"}}}
	if d := cmp.Diff(want, list[0].Config); d != "" {
		t.Error(d)
	}
	s.must(t, ExitOK, "Istio, beside which Warren is installed", "check")

	s.held["ui-1"] = true
	said = s.must(t, ExitOK, "node node1: Warren captures; 2 pods moved or restarted", "migrate", "node", "node1")
	if !strings.Contains(said, "a PodDisruptionBudget holds shop/ui-1") {
		t.Errorf("it is not said why it waits:\n%s", said)
	}
	if got := s.here(t, "node1"); got != "outside-1 log-node1-again2 warren-holder-node1 warren-node-node1" && got != "warren-holder-node1 warren-node-node1 outside-1 log-node1-again2" {
		t.Errorf("node1 has %s", got)
	}
	if got := s.here(t, "node2"); !strings.Contains(got, "ztunnel-node2") || !strings.Contains(got, "ui-1-again1") || strings.Contains(got, "warren") {
		t.Errorf("node2 has %s", got)
	}
	n := s.nodeNow(t, "node1")
	if n.Spec.Unschedulable || n.Labels[migrationLabel] != moved || !strings.Contains(n.Annotations[moveNote], `"left":["istio-system/istio-cni-node","istio-system/ztunnel"]`) {
		t.Errorf("node1: %+v %+v", n.Spec, n.ObjectMeta)
	}
	for _, name := range []string{"ztunnel", "istio-cni-node"} {
		d, err := s.kube.AppsV1().DaemonSets("istio-system").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || !isApart(d) || d.Spec.UpdateStrategy.Type != appsv1.OnDeleteDaemonSetStrategyType {
			t.Errorf("%s: %+v, %v", name, d.Spec, err)
		}
	}
	s.must(t, ExitOK, "node1   warren     1          0         -\nnode2   istio      1          0         -", "migrate", "status")
	s.must(t, ExitError, "nodes are moved, and Istio leaves them alone (node1)", "uninstall")
	s.must(t, ExitError, "not moved yet: node2 (istio)", "migrate", "finish")

	s.must(t, ExitOK, "no node is Warren's: Istio's DaemonSets are as they were", "migrate", "node", "node1", "--back")
	n = s.nodeNow(t, "node1")
	if n.Spec.Unschedulable || n.Labels[migrationLabel] != "" || n.Annotations[moveNote] != "" || !strings.Contains(s.here(t, "node1"), "ztunnel-node1") {
		t.Errorf("node1 after the way back: %+v %+v, %s", n.Spec, n.ObjectMeta, s.here(t, "node1"))
	}
	after, err := s.kube.AppsV1().DaemonSets("istio-system").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range before.Items {
		for _, now := range after.Items {
			now.Annotations = map[string]string(nil)
			if now.Name == d.Name && cmp.Diff(d.Spec, now.Spec) != "" {
				t.Errorf("%s is not as it was: %s", d.Name, cmp.Diff(d.Spec, now.Spec))
			}
		}
	}

	s.must(t, ExitOK, "node node2: Warren captures", "migrate", "node", "--all")
	s.must(t, ExitOK, "every node is where it is to be", "migrate", "node", "--all")
	s.must(t, ExitError, "helm uninstall ztunnel istio-cni istiod -n istio-system", "migrate", "finish")
	s.must(t, ExitError, "without besideIstio.enabled Warren would take the names", "upgrade", "--force", "--set", "besideIstio.enabled=false")
	for _, gone := range []struct{ resource, name string }{{"daemonsets", "ztunnel"}, {"daemonsets", "istio-cni-node"}, {"deployments", "istiod"}} {
		if err := s.kube.Tracker().Delete(appsv1.SchemeGroupVersion.WithResource(gone.resource), "istio-system", gone.name); err != nil {
			t.Fatal(err)
		}
	}
	said = s.must(t, ExitError, "Service istio-system/istiod", "migrate", "finish")
	if strings.Contains(said, "Deployment") || !strings.Contains(said, "ConfigMap istio-system/istio") {
		t.Errorf("what is left of Istio: %s", said)
	}
	for _, gone := range []struct{ resource, name string }{{"services", "istiod"}, {"configmaps", "istio"}} {
		if err := s.kube.Tracker().Delete(corev1.SchemeGroupVersion.WithResource(gone.resource), "istio-system", gone.name); err != nil {
			t.Fatal(err)
		}
	}
	s.gateway(t, "shop", "way", waypointClass, map[string]string{revision.Label: revision.BesideIstio})
	s.must(t, ExitOK, "shop/way: the label istio.io/rev=warren may be taken away", "migrate", "finish")
	for _, have := range [][3]string{{"deployments", "istio-system", "warren-control"}, {"services", "istio-system", "istiod"}, {"configmaps", "istio-system", "istio"}} {
		if !s.has(t, have[0], have[1], have[2]) {
			t.Errorf("there is no %v", have)
		}
	}
	for _, gone := range [][3]string{{"deployments", "istio-system", "warren-control-warren"}, {"services", "istio-system", "istiod-warren"}, {"configmaps", "istio-system", "istio-warren"}} {
		if s.has(t, gone[0], gone[1], gone[2]) {
			t.Errorf("there still is %v", gone)
		}
	}
	for _, name := range []string{"node1", "node2"} {
		if n := s.nodeNow(t, name); n.Labels[migrationLabel] != "" || n.Annotations[moveNote] != "" {
			t.Errorf("%s: %+v", name, n.ObjectMeta)
		}
	}
	s.must(t, ExitOK, "Warren is the mesh alone", "migrate", "finish")
}

// What cannot end well is refused before anything is touched.
func TestMigrationIsRefused(t *testing.T) {
	lone := pod("shop", "lone", "node1", nil, map[string]string{redirection: "enabled"})
	static := pod("shop", "static-node1", "node1", nil, map[string]string{redirection: "enabled", corev1.MirrorPodAnnotationKey: "x"})
	needy := pod("old", "with-sidecar", "node2", nil, nil)
	needy.Spec.InitContainers = []corev1.Container{{Name: "istio-validation"}}
	s := newAmbientSite(t, lone, static, needy)
	s.must(t, ExitOK, "next:", "migrate", "begin")
	s.must(t, ExitUsage, "name nodes, or give --all", "migrate", "node")
	s.must(t, ExitError, "there is no node node9", "migrate", "node", "node9")
	n := s.nodeNow(t, "node2")
	n.Spec.Unschedulable = true
	if err := s.kube.Tracker().Update(corev1.SchemeGroupVersion.WithResource("nodes"), n, ""); err != nil {
		t.Fatal(err)
	}
	said := s.must(t, ExitError, "nothing makes the pods shop/lone again", "migrate", "node", "node1")
	for _, want := range []string{"shop/static-node1 are static pods", "no other node is there for its 1 pod", "old/with-sidecar have sidecars that need Istio's CNI plugin"} {
		if !strings.Contains(said, want) {
			t.Errorf("not said: %q\n%s", want, said)
		}
	}
	d, err := s.kube.AppsV1().DaemonSets("istio-system").Get(t.Context(), "ztunnel", metav1.GetOptions{})
	if err != nil || isApart(d) || s.nodeNow(t, "node1").Spec.Unschedulable {
		t.Errorf("something was touched: %+v, %v", d.Spec, err)
	}
	s.must(t, ExitOK, "node node1: Warren captures; 3 pods", "migrate", "node", "node1", "--force")
	if strings.Contains(s.here(t, "node1"), "lone") {
		t.Error("the pod that nothing makes again is still there")
	}
	if n := s.nodeNow(t, "node2"); !n.Spec.Unschedulable {
		t.Error("a node that was not moved was uncordoned")
	}
}

// A move that was interrupted goes on, also in the other direction; who had cordoned the node finds it cordoned.
func TestMigrationGoesOn(t *testing.T) {
	s := newAmbientSite(t)
	s.must(t, ExitOK, "next:", "migrate", "begin")
	s.held["ui-1"] = true
	if code, _, errs := s.run(t, "migrate", "node", "node1", "--timeout", "1ms"); code != ExitError || !strings.Contains(errs, "run it again to go on") {
		t.Fatalf("code %d\n%s", code, errs)
	}
	if n := s.nodeNow(t, "node1"); !n.Spec.Unschedulable || !strings.Contains(n.Annotations[moveNote], `"cordoned":true`) {
		t.Errorf("node1: %+v", n)
	}
	s.must(t, ExitFound, "a move was interrupted: run it again", "migrate", "status")
	s.must(t, ExitOK, "node node1: Istio captures", "migrate", "node", "--all", "--back")
	if n := s.nodeNow(t, "node1"); n.Spec.Unschedulable || n.Annotations[moveNote] != "" {
		t.Errorf("node1: %+v", n)
	}

	n := s.nodeNow(t, "node1")
	n.Spec.Unschedulable = true // somebody's own
	if err := s.kube.Tracker().Update(corev1.SchemeGroupVersion.WithResource("nodes"), n, ""); err != nil {
		t.Fatal(err)
	}
	s.must(t, ExitOK, "node node1: Warren captures", "migrate", "node", "node1")
	if n := s.nodeNow(t, "node1"); !n.Spec.Unschedulable {
		t.Error("a node that somebody else had cordoned was uncordoned")
	}
}

// A DaemonSet's own affinity holds beside what keeps it off, and helm's writing it anew is seen.
func TestIstiosAffinityStays(t *testing.T) {
	s := newAmbientSite(t)
	get := func() *appsv1.DaemonSet {
		d, err := s.kube.AppsV1().DaemonSets("istio-system").Get(t.Context(), "ztunnel", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	requires := func(keys ...string) *corev1.Affinity {
		sel := &corev1.NodeSelector{}
		for _, k := range keys {
			sel.NodeSelectorTerms = append(sel.NodeSelectorTerms, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: k, Operator: corev1.NodeSelectorOpExists}}})
		}
		return &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: sel}}
	}
	write := func(a *corev1.Affinity) {
		d := get()
		d.Spec.Template.Spec.Affinity = a
		if err := s.kube.Tracker().Update(appsv1.SchemeGroupVersion.WithResource("daemonsets"), d, "istio-system"); err != nil {
			t.Fatal(err)
		}
	}
	write(requires("pool", "zone"))
	s.must(t, ExitOK, "next:", "migrate", "begin")
	s.must(t, ExitOK, "Warren captures", "migrate", "node", "node1")
	terms := get().Spec.Template.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for i, key := range []string{"pool", "zone"} {
		if len(terms) != 2 || len(terms[i].MatchExpressions) != 2 || terms[i].MatchExpressions[0].Key != key || terms[i].MatchExpressions[1].Key != migrationLabel {
			t.Errorf("terms %+v", terms)
		}
	}
	write(requires("rack"))
	s.must(t, ExitFound, "DaemonSet istio-system/ztunnel is no longer kept off", "migrate", "status")
	s.must(t, ExitOK, "Warren captures", "migrate", "node", "node1")
	if !isApart(get()) {
		t.Error("it is not kept off again")
	}
	s.must(t, ExitOK, "as they were", "migrate", "node", "--all", "--back")
	d := get()
	if diff := cmp.Diff(requires("rack"), d.Spec.Template.Spec.Affinity); diff != "" || d.Spec.UpdateStrategy.Type != appsv1.RollingUpdateDaemonSetStrategyType {
		t.Errorf("%s %v", diff, d.Spec.UpdateStrategy)
	}
	if b, _ := json.Marshal(d.Annotations); strings.Contains(string(b), beforeNote) {
		t.Errorf("annotations %s", b)
	}
}

// What Warren cannot be beside is refused, with what to do.
func TestMigrationDoesNotBegin(t *testing.T) {
	cms, deployments := corev1.SchemeGroupVersion.WithResource("configmaps"), appsv1.SchemeGroupVersion.WithResource("deployments")
	for want, change := range map[string]func(s *ambientSite) error{
		"give -n with that namespace": func(s *ambientSite) error {
			d, err := s.kube.AppsV1().Deployments("istio-system").Get(t.Context(), "istiod", metav1.GetOptions{})
			if err != nil {
				return err
			}
			d.Namespace = "mesh"
			if err := s.kube.Tracker().Delete(deployments, "istio-system", "istiod"); err != nil {
				return err
			}
			return s.kube.Tracker().Create(deployments, d, "mesh")
		},
		"there are several control planes of Istio, istio-system/istiod, istio-system/istiod-canary": func(s *ambientSite) error {
			return s.kube.Tracker().Create(deployments, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istiod-canary", Labels: map[string]string{"app": "istiod"}}}, "istio-system")
		},
		"neither a Secret cacerts nor istio-ca-secret": func(s *ambientSite) error {
			return s.kube.Tracker().Delete(corev1.SchemeGroupVersion.WithResource("secrets"), "istio-system", "istio-ca-secret")
		},
		"more than one network": func(s *ambientSite) error {
			return s.kube.Tracker().Update(cms, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": "{}", "meshNetworks": "networks: {n1: {}, n2: {}}"}}, "istio-system")
		},
		"a CA elsewhere signs for Istio": func(s *ambientSite) error {
			return s.kube.Tracker().Update(cms, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": "caAddress: ca.example:443"}}, "istio-system")
		},
		"which is Warren's name beside it": func(s *ambientSite) error {
			d, err := s.kube.AppsV1().Deployments("istio-system").Get(t.Context(), "istiod", metav1.GetOptions{})
			if err != nil {
				return err
			}
			d.Labels[revision.Label] = revision.BesideIstio
			return s.kube.Tracker().Update(deployments, d, "istio-system")
		},
	} {
		s := newAmbientSite(t)
		if err := change(s); err != nil {
			t.Fatal(err)
		}
		s.must(t, ExitError, want, "migrate", "begin")
	}
	s := newAmbientSite(t)
	s.must(t, ExitOK, "revision 1 is ready", "install", "--force", "--set", "mesh.trustDomain=prod.example")
	s.must(t, ExitError, "is a mesh by itself", "migrate", "begin")
	if n := s.nodeNow(t, "node1"); n.Labels[migrationLabel] != "" {
		t.Errorf("%+v", n.ObjectMeta)
	}
}

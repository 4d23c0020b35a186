package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	appsv1 "k8s.io/api/apps/v1"
	authv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
	fakediscovery "k8s.io/client-go/discovery/fake"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// site is a cluster without machines: what is applied is there, and Deployments and DaemonSets are ready at once, unless
// broken says otherwise of an image.
type site struct {
	kube    *fake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
	mapper  *meta.DefaultRESTMapper
	broken  string
	refuse  string // kind whose objects are refused
	ask     func(ctx context.Context, pod *corev1.Pod, port int, path string) ([]byte, error)
}

var everything = sync.OnceValues(func() (*release.Rendered, error) {
	return release.Render(nil, release.Target{Namespace: "istio-system"})
})

func newSite(t *testing.T, objects ...runtime.Object) *site {
	t.Helper()
	s := &site{kube: fake.NewClientset(append(objects, node("6.1.0"))...), mapper: meta.NewDefaultRESTMapper(nil)}
	s.kube.Discovery().(*fakediscovery.FakeDiscovery).FakedServerVersion = &version.Info{Major: "1", Minor: "36", GitVersion: "v1.36.3"}
	s.kube.PrependReactor("create", "selfsubjectaccessreviews", func(k8stesting.Action) (bool, runtime.Object, error) {
		return true, &authv1.SelfSubjectAccessReview{Status: authv1.SubjectAccessReviewStatus{Allowed: true}}, nil
	})
	// The nodes are clean at once.
	s.kube.PrependReactor("create", "daemonsets", func(a k8stesting.Action) (bool, runtime.Object, error) {
		d := a.(k8stesting.CreateAction).GetObject().(*appsv1.DaemonSet)
		d.Status.ObservedGeneration = 1
		return false, nil, nil
	})
	lists := map[schema.GroupVersionResource]string{}
	all, err := everything()
	if err != nil {
		t.Fatal(err)
	}
	gateway := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": map[string]any{"namespace": "any"}}}
	for _, o := range append(slices.Clone(all.Objects), release.NamespaceObject("istio-system"), gateway) {
		scope := meta.RESTScope(meta.RESTScopeNamespace)
		if o.GetNamespace() == "" {
			scope = meta.RESTScopeRoot
		}
		gvk := o.GroupVersionKind()
		if gvk.Kind == "Gateway" { // whose plural is not guessed
			s.mapper.AddSpecific(gvk, gatewayResource, gatewayResource.GroupVersion().WithResource("gateway"), scope)
		} else {
			s.mapper.Add(gvk, scope)
		}
		m, err := s.mapper.RESTMapping(o.GroupVersionKind().GroupKind(), o.GroupVersionKind().Version)
		if err != nil {
			t.Fatal(err)
		}
		lists[m.Resource] = o.GetKind() + "List"
	}
	s.dynamic = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists)
	s.dynamic.PrependReactor("patch", "*", func(a k8stesting.Action) (bool, runtime.Object, error) {
		p := a.(k8stesting.PatchAction)
		o := &unstructured.Unstructured{}
		if err := json.Unmarshal(p.GetPatch(), &o.Object); err != nil {
			return true, nil, err
		}
		if o.GetKind() == s.refuse {
			return true, nil, errors.New("not today")
		}
		tracker := s.dynamic.Tracker()
		if err := tracker.Create(a.GetResource(), o, a.GetNamespace()); err != nil {
			if err := tracker.Update(a.GetResource(), o, a.GetNamespace()); err != nil {
				return true, nil, err
			}
		}
		return true, o, s.mirror(o)
	})
	s.dynamic.PrependReactor("delete", "*", func(a k8stesting.Action) (bool, runtime.Object, error) {
		err := s.kube.Tracker().Delete(a.GetResource(), a.GetNamespace(), a.(k8stesting.DeleteAction).GetName())
		if apierrors.IsNotFound(err) { // it was not mirrored
			err = nil
		}
		return false, nil, err
	})
	return s
}

// mirror makes workloads and Services that were applied visible to the typed client.
func (s *site) mirror(o *unstructured.Unstructured) error {
	b, err := o.MarshalJSON()
	if err != nil {
		return err
	}
	put := func(resource string, obj runtime.Object) error {
		gvr := appsv1.SchemeGroupVersion.WithResource(resource)
		if resource == "services" {
			gvr = corev1.SchemeGroupVersion.WithResource(resource)
		}
		if err := s.kube.Tracker().Create(gvr, obj, o.GetNamespace()); err != nil {
			return s.kube.Tracker().Update(gvr, obj, o.GetNamespace())
		}
		return nil
	}
	works := s.broken == "" || !bytes.Contains(b, []byte(s.broken))
	switch o.GetKind() {
	case "Deployment":
		d := &appsv1.Deployment{}
		if err := json.Unmarshal(b, d); err != nil {
			return err
		}
		if works {
			d.Status = appsv1.DeploymentStatus{Replicas: 1, UpdatedReplicas: 1, AvailableReplicas: 1, ReadyReplicas: 1}
		}
		return put("deployments", d)
	case "DaemonSet":
		d := &appsv1.DaemonSet{}
		if err := json.Unmarshal(b, d); err != nil {
			return err
		}
		d.Status = appsv1.DaemonSetStatus{DesiredNumberScheduled: 2, ObservedGeneration: 1}
		if works {
			d.Status.UpdatedNumberScheduled, d.Status.NumberReady = 2, 2
		}
		return put("daemonsets", d)
	case "Service":
		svc := &corev1.Service{}
		if err := json.Unmarshal(b, svc); err != nil {
			return err
		}
		return put("services", svc)
	}
	return nil
}

func (s *site) run(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{env: Env{Program: "warren", Args: args, Version: "test", Out: &out, Err: &errs}}
	a.connect = func(*app) (*conn, error) {
		return &conn{Interface: s.kube, objects: release.Cluster{Client: s.dynamic, Mapper: s.mapper}, ask: s.ask}, nil
	}
	code = a.main(t.Context())
	return code, out.String(), errs.String()
}

func (s *site) has(t *testing.T, resource, namespace, name string) bool {
	t.Helper()
	m, err := s.mapper.ResourceFor(schema.GroupVersionResource{Resource: resource})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.dynamic.Tracker().Get(m, namespace, name)
	return err == nil
}

func (s *site) revisions(t *testing.T) (out []string) {
	t.Helper()
	list, err := release.Records{Client: s.kube, Namespace: "istio-system"}.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list {
		out = append(out, fmt.Sprintf("%d %s", r.Version, r.Info.Status))
	}
	return out
}

func node(kernel string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"},
		Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KernelVersion: kernel, OperatingSystem: "linux"}}}
}

func TestInstallUpgradeUninstall(t *testing.T) {
	s := newSite(t)
	code, _, errs := s.run(t, "install", "--set", "mesh.network=n1")
	if code != ExitOK || !strings.Contains(errs, "objects applied") || !strings.Contains(errs, "revision 1 is ready") {
		t.Fatalf("code %d\n%s", code, errs)
	}
	if strings.Contains(errs, "\r") {
		t.Error("lines are written over, though this is no terminal")
	}
	if !s.has(t, "daemonsets", "istio-system", "warren-node") || !s.has(t, "deployments", "istio-system", "warren-control") {
		t.Error("not everything is there")
	}

	// What was set stays set.
	if code, _, errs = s.run(t, "upgrade", "--set", "control.logLevel=debug"); code != ExitOK {
		t.Fatalf("code %d\n%s", code, errs)
	}
	list, err := release.Records{Client: s.kube, Namespace: "istio-system"}.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(list[1].Config); got != "map[control:map[logLevel:debug] mesh:map[network:n1]]" {
		t.Errorf("values %s", got)
	}

	// Without agents, they are gone; nothing else is.
	if code, _, errs = s.run(t, "upgrade", "--profile", "minimal", "--set", "admission.enabled=false"); code != ExitOK {
		t.Fatalf("code %d\n%s", code, errs)
	}
	if s.has(t, "daemonsets", "istio-system", "warren-node") || s.has(t, "validatingwebhookconfigurations", "", "warren-validator") ||
		!s.has(t, "deployments", "istio-system", "warren-control") {
		t.Errorf("another profile does not exchange the parts\n%s", errs)
	}

	if code, _, errs = s.run(t, "uninstall"); code != ExitOK {
		t.Fatalf("code %d\n%s", code, errs)
	}
	if s.has(t, "deployments", "istio-system", "warren-control") || s.has(t, "clusterroles", "", "warren-control-istio-system") {
		t.Error("something is left")
	}
	if !s.has(t, "customresourcedefinitions", "", "authorizationpolicies.security.istio.io") {
		t.Error("the definitions are gone, and with them what users stored")
	}
	if got := s.revisions(t); len(got) > 0 {
		t.Errorf("records are left: %v", got)
	}
	if code, _, errs = s.run(t, "uninstall"); code != ExitOK || !strings.Contains(errs, "nothing of Warren is installed") {
		t.Errorf("a second time: code %d\n%s", code, errs)
	}
	if code, _, errs = s.run(t, "uninstall", "--purge"); code != ExitOK || s.has(t, "customresourcedefinitions", "", "authorizationpolicies.security.istio.io") {
		t.Errorf("--purge leaves the definitions: code %d\n%s", code, errs)
	}
}

// An install that ended in the middle is completed by the next.
func TestInterruptedInstallIsCompleted(t *testing.T) {
	s := newSite(t)
	s.refuse = "DaemonSet"
	code, _, errs := s.run(t, "install", "--set", "crds.install=false")
	if code != ExitError || !strings.Contains(errs, "applying DaemonSet istio-system/warren-") || !strings.Contains(errs, "run it again to go on") {
		t.Errorf("code %d\n%s", code, errs)
	}
	list, err := release.Records{Client: s.kube, Namespace: "istio-system"}.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// As if it had been killed.
	list[0].Info.Status = "pending-install"
	if err := (release.Records{Client: s.kube, Namespace: "istio-system"}).Put(t.Context(), list[0]); err != nil {
		t.Fatal(err)
	}
	s.refuse = ""
	code, _, errs = s.run(t, "install", "--set", "crds.install=false")
	if code != ExitOK || !strings.Contains(errs, "revision 1 was interrupted; going on from it") {
		t.Errorf("code %d\n%s", code, errs)
	}
	if got := s.revisions(t); !slices.Equal(got, []string{"1 failed", "2 deployed"}) {
		t.Errorf("revisions %v", got)
	}
}

// An upgrade whose pods do not start says why and is rolled back.
func TestUpgradeRollsBack(t *testing.T) {
	s := newSite(t)
	if code, _, errs := s.run(t, "upgrade"); code != ExitError || !strings.Contains(errs, "warren install") {
		t.Errorf("with nothing there: code %d\n%s", code, errs)
	}
	if code, _, errs := s.run(t, "install", "--set", "crds.install=false"); code != ExitOK {
		t.Fatalf("code %d\n%s", code, errs)
	}
	p := pod("istio-system", "warren-node-x", "node1", map[string]string{"app": "ztunnel", "app.kubernetes.io/part-of": "warren"}, nil)
	p.Status.Conditions = nil
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}}}
	if err := s.kube.Tracker().Add(p); err != nil {
		t.Fatal(err)
	}
	s.broken = ":nowhere"
	synctest.Test(t, func(t *testing.T) {
		code, _, errs := s.run(t, "upgrade", "--set", "image.tag=nowhere", "--timeout", "3s")
		for _, want := range []string{"node agents 0/2 (node1)", "warren-node-x: ImagePullBackOff: no such image", "going back to revision 1", "rolled back to revision 1"} {
			if !strings.Contains(errs, want) {
				t.Errorf("not said: %s", want)
			}
		}
		if code != ExitError || t.Failed() {
			t.Errorf("code %d\n%s", code, errs)
		}
	})
	if got := s.revisions(t); !slices.Equal(got, []string{"1 superseded", "2 failed", "3 deployed"}) {
		t.Errorf("revisions %v", got)
	}
}

func TestInstallRefusesWhatCannotWork(t *testing.T) {
	ztunnel := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "ztunnel", Labels: map[string]string{"app": "ztunnel"}}}
	old := node("5.10.0")
	old.Name = "old"
	for name, c := range map[string]struct {
		object runtime.Object
		args   []string
		code   int
		want   string
	}{
		"another mesh":  {ztunnel, nil, ExitError, "Istio ambient captures pods here"},
		"an old kernel": {old, nil, ExitError, "too old on old (5.10.0)"},
		"a typo":        {nil, []string{"--set", "node.logLevl=debug"}, ExitUsage, "did you mean node.logLevel?"},
		"a file":        {nil, []string{"-f", "nowhere.yaml"}, ExitError, "reading values: open nowhere.yaml"},
		"a profile":     {nil, []string{"--profile", "sidecar"}, ExitUsage, "there is no profile"},
	} {
		var objects []runtime.Object
		if c.object != nil {
			objects = append(objects, c.object)
		}
		s := newSite(t, objects...)
		code, _, errs := s.run(t, append([]string{"install"}, c.args...)...)
		if code != c.code || !strings.Contains(errs, c.want) {
			t.Errorf("%s: code %d\n%s", name, code, errs)
		}
		if got := s.revisions(t); len(got) > 0 {
			t.Errorf("%s: something was installed: %v", name, got)
		}
	}
}

func TestManifestAndProfiles(t *testing.T) {
	s := newSite(t)
	code, out, errs := s.run(t, "manifest", "generate", "--set", "crds.install=false", "-n", "mesh")
	if code != ExitOK || !strings.HasPrefix(out, "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: mesh\n---\n") || strings.Contains(out, "helm.sh/hook") {
		t.Errorf("code %d\n%.300s%s", code, out, errs)
	}
	if code, out, _ := s.run(t, "manifest", "generate", "--profile", "empty"); code != ExitOK || out != "" {
		t.Errorf("code %d\n%.300s", code, out)
	}
	file := filepath.Join(t.TempDir(), "v.yaml")
	if err := os.WriteFile(file, []byte("mesh: {trustDomain: example.org}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, out, _ := s.run(t, "manifest", "generate", "-f", file); !strings.Contains(out, `trustDomain: "example.org"`) {
		t.Error("-f has no effect")
	}
	if _, out, _ := s.run(t, "profile", "list"); !strings.HasPrefix(out, "PROFILE     WHAT IT IS\nambient     The same as default,") {
		t.Error(out)
	}
	if _, out, _ := s.run(t, "profile", "dump", "minimal"); !strings.Contains(out, "  enabled: false\n  env: {}\n  logLevel: info\n") {
		t.Error(out)
	}
	const want = "VALUE          default   minimal\nnode.enabled   true      false\n"
	if _, out, _ := s.run(t, "profile", "diff", "default", "minimal"); out != want {
		t.Error(out)
	}
	if _, out, _ := s.run(t, "profile", "diff", "default", "ambient"); out != "default and ambient are the same\n" {
		t.Error(out)
	}
}

// What the manifest of any profile has is found when it is uninstalled, though no record says what was applied.
func TestManifestsOfAllProfilesAreFoundAgain(t *testing.T) {
	a := &app{namespace: "istio-system"}
	found, err := a.installedObjects(nil, revision.Default)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, o := range found {
		known[release.Describe(o)] = true
	}
	for _, name := range release.Profiles() {
		v, err := release.Sources{Profile: name, Set: []string{"networkPolicies.enabled=true"}}.Values(nil)
		if err != nil {
			t.Fatal(name, err)
		}
		r, err := release.Render(v, release.Target{Namespace: "istio-system"})
		if err != nil {
			t.Fatal(name, err)
		}
		for _, o := range r.Objects {
			if !known[release.Describe(o)] {
				t.Errorf("%s of profile %s would stay", release.Describe(o), name)
			}
		}
	}
}

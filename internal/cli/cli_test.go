package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	metav1alpha1 "istio.io/api/meta/v1alpha1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/version"
	fakediscovery "k8s.io/client-go/discovery/fake"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/warrenmesh/warren/internal/cli/release"
)

const dump = `{
 "workloads":[{"workloadIps":["10.1.0.5"],"protocol":"HBONE","name":"ui-1","namespace":"shop","node":"node1","status":"Healthy"}],
 "services":[{"name":"ui","namespace":"shop","vips":["/10.96.0.7"],"ports":{"8080":8080},"endpoints":{"a":{"status":"Healthy"},"b":{"status":"Unhealthy"}}}],
 "policies":[{"name":"deny","namespace":"shop","action":"Deny","scope":"Namespace","rules":[[]],"dryRun":false}],
 "certificates":[{"identity":"spiffe://cluster.local/ns/shop/sa/ui","state":"Available","certChain":[{"serialNumber":"7","validFrom":"a","expirationTime":"b"}]}],
 "workloadState":{"u1":{"state":"up","connections":{"inbound":[],"outbound":[{"src":"10.1.0.5:4000","originalDst":"10.96.0.7:8080","actualDst":"10.1.1.6:15008","protocol":"HBONE","peer":"spiffe://cluster.local/ns/shop/sa/catalog"}]},"info":{"name":"ui-1","namespace":"shop"}}}
}`

// run runs the command line against objects, with an agent that answers with the dump above.
func run(t *testing.T, objects []runtime.Object, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{env: Env{Program: "warren", Args: args, Version: "test", Out: &out, Err: &errs}}
	a.connect = func(*app) (*conn, error) {
		k := fake.NewClientset(slices.DeleteFunc(slices.Clone(objects), func(o runtime.Object) bool { _, ok := o.(*securityv1.AuthorizationPolicy); return ok })...)
		k.Discovery().(*fakediscovery.FakeDiscovery).FakedServerVersion = &version.Info{Major: "1", Minor: "36", GitVersion: "v1.36.3"}
		var security []runtime.Object
		for _, o := range objects {
			if _, ok := o.(*securityv1.AuthorizationPolicy); ok {
				security = append(security, o)
			}
		}
		gateways := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{gatewayResource: "GatewayList"})
		return &conn{Interface: k, istio: istiofake.NewSimpleClientset(security...), objects: release.Cluster{Client: gateways}, ask: func(_ context.Context, p *corev1.Pod, port int, path string) ([]byte, error) {
			switch {
			case port == adminPort && path == "/config_dump":
				return []byte(dump), nil
			case path == "/version" && (port == adminPort) == (p.Labels["app"] == "ztunnel"):
				return fmt.Appendf(nil, `{"version":"1","fips140":%q}`, p.Annotations["says-fips"]), nil
			}
			return nil, fmt.Errorf("unexpected question %s to port %d of %s", path, port, p.Name)
		}}, nil
	}
	code = a.main(t.Context())
	return code, out.String(), errs.String()
}

// pod is one that is ready. The mesh's own are Warren's, but for those that say otherwise.
func pod(namespace, name, node string, labels, annotations map[string]string) *corev1.Pod {
	if labels["app"] != "" && namespace == "istio-system" && labels["app.kubernetes.io/part-of"] == "" {
		labels = maps.Clone(labels)
		labels["app.kubernetes.io/part-of"] = "warren"
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(name), Labels: labels, Annotations: annotations},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Image: "r.example:5000/x:v9"}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
}

func installed() []runtime.Object {
	ours := func(app string) map[string]string {
		return map[string]string{"app": app, "app.kubernetes.io/part-of": "warren"}
	}
	set := func(name, app string) *appsv1.DaemonSet {
		return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name, Labels: ours(app)},
			Status: appsv1.DaemonSetStatus{NumberReady: 2, DesiredNumberScheduled: 2}}
	}
	return []runtime.Object{
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}, Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KernelVersion: "6.1.0-40-amd64", OperatingSystem: "linux"}}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "warren-control", Labels: ours("istiod")},
			Status: appsv1.DeploymentStatus{Replicas: 1, ReadyReplicas: 1}},
		set("warren-node", "ztunnel"), set("warren-holder", "warren-holder"),
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio-ca-root-cert"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{modeLabel: "ambient"}}},
		&admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "warren-validator"},
			Webhooks: []admissionv1.ValidatingWebhook{{ClientConfig: admissionv1.WebhookClientConfig{CABundle: []byte("root")}}}},
		pod("istio-system", "warren-node-a", "node1", map[string]string{"app": "ztunnel"}, nil),
		pod("istio-system", "warren-node-b", "node2", map[string]string{"app": "ztunnel"}, nil),
		pod("shop", "ui-1", "node1", nil, map[string]string{redirection: "enabled"}),
	}
}

func TestStatus(t *testing.T) {
	code, out, errs := run(t, installed(), "status")
	if code != ExitOK || !strings.Contains(out, "node agents     2/2 ready") || !strings.Contains(out, "shop        ambient   1") {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
	if strings.Contains(out, "\x1b") {
		t.Error("colours, though this is no terminal")
	}

	waiting := append(installed(), pod("shop", "late", "node2", nil, map[string]string{redirection: "pending"}))
	code, out, _ = run(t, waiting, "status", "-o", "json")
	var s meshStatus
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatal(err)
	}
	if code != ExitFound || len(s.Pending) != 1 || s.Pending[0].Name != "late" || s.Pending[0].Why == "" {
		t.Errorf("code %d, %+v", code, s)
	}
}

func TestStatusSaysWhichPoliciesAreEnforced(t *testing.T) {
	p := func(name string, generation int64, c *metav1alpha1.IstioCondition) *securityv1.AuthorizationPolicy {
		return &securityv1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Generation: generation},
			Status: metav1alpha1.IstioStatus{Conditions: []*metav1alpha1.IstioCondition{c}}}
	}
	enforced := &metav1alpha1.IstioCondition{Type: "Enforced", Status: "True", Reason: "Enforced", Message: "2/2 nodes at revision 7", ObservedGeneration: 1}
	lagging := &metav1alpha1.IstioCondition{Type: "Enforced", Status: "False", Reason: "NodesPending", Message: "1/2 nodes at revision 8; waiting for node2", ObservedGeneration: 1}
	_, out, errs := run(t, append(installed(), p("good", 1, enforced), p("changed", 2, enforced), p("slow", 1, lagging)), "status")
	for _, want := range []string{
		"shop        authorizationpolicy/changed   Unknown    -              nothing has been said about its last change yet",
		"shop        authorizationpolicy/good      True       Enforced       2/2 nodes at revision 7",
		"shop        authorizationpolicy/slow      False      NodesPending   1/2 nodes at revision 8; waiting for node2",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s%s", want, out, errs)
		}
	}
}

func TestCheckSaysWhoseCryptographyIsUsed(t *testing.T) {
	replica := func(fips string) *corev1.Pod {
		return pod("istio-system", "warren-control-a", "node1", map[string]string{"app": "istiod"}, map[string]string{"says-fips": fips})
	}
	agent := func(name, image, fips string) *corev1.Pod {
		p := pod("istio-system", name, name, map[string]string{"app": "ztunnel"}, map[string]string{"says-fips": fips})
		p.Spec.Containers[0].Image = image
		return p
	}
	for _, c := range []struct {
		name    string
		objects []runtime.Object
		want    string
	}{
		{"standard", []runtime.Object{replica("false"), agent("one", "x:v1", "false")}, "ok       cryptography: of the Go toolchain, without"},
		{"certified", []runtime.Object{replica("true"), agent("one", "x:v1-fips", "true")}, "ok       cryptography: the FIPS 140-3 mode is on in the control plane and all node agents"},
		{"mixed", []runtime.Object{replica("true"), agent("one", "x:v1", "false")}, "warning  cryptography: the FIPS 140-3 mode is on in 1 pod and off in one"},
		{"switched off", []runtime.Object{replica("true"), agent("one", "x:v1-fips", "false")}, "failed   cryptography: the FIPS 140-3 mode is off in one"},
	} {
		objects := slices.DeleteFunc(installed(), func(o runtime.Object) bool {
			p, ok := o.(*corev1.Pod)
			return ok && p.Namespace == "istio-system"
		})
		_, out, errs := run(t, append(objects, c.objects...), "check")
		if !strings.Contains(out, c.want) {
			t.Errorf("%s: no %q in\n%s%s", c.name, c.want, out, errs)
		}
	}
}

func TestPodsOutsideTheMeshAreNotPending(t *testing.T) {
	host := pod("shop", "host", "node1", nil, nil)
	host.Spec.HostNetwork = true
	objects := append(installed(), host,
		pod("shop", "opted-out", "node1", map[string]string{modeLabel: "none"}, nil),
		pod("shop", "sidecar", "node1", nil, map[string]string{"sidecar.istio.io/status": "{}"}))
	code, out, errs := run(t, objects, "status")
	if code != ExitOK || !strings.Contains(out, "shop        ambient   1          0         3") {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
}

func TestCheck(t *testing.T) {
	code, out, errs := run(t, installed(), "check")
	if code != ExitOK || strings.Contains(out, "failed") || strings.Contains(out, "warning") {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
	for _, c := range []struct {
		config map[string]string
		want   string
	}{
		{map[string]string{"cni-exclusive": "true"}, "failed   network plugin: Cilium takes Warren's plugin out"},
		{map[string]string{}, "failed   network plugin: Cilium takes Warren's plugin out"},
		{map[string]string{"cni-exclusive": "false"}, "ok       network plugin: Cilium leaves room"},
		{map[string]string{"cni-exclusive": "false", "kube-proxy-replacement": "true", "enable-bpf-masquerade": "true"}, "UDP of udp is not filtered"},
	} {
		_, out, errs := run(t, append(installed(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "cilium-config"}, Data: c.config},
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "udp", Labels: map[string]string{modeLabel: "ambient", udpLabel: udpEnforce}}}), "check")
		if !strings.Contains(out, c.want) {
			t.Errorf("Cilium with %v: no %q in\n%s%s", c.config, c.want, out, errs)
		}
	}
	broken := append(installed(),
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "old"}, Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KernelVersion: "5.15.0-1", OperatingSystem: "linux"}}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "typo", Labels: map[string]string{modeLabel: "ambiant"}}},
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "other", Name: "ztunnel", Labels: map[string]string{"app": "ztunnel"}}})
	broken = append(broken,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "udp", Labels: map[string]string{modeLabel: "ambient", udpLabel: udpEnforce}}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "udp-typo", Labels: map[string]string{modeLabel: "ambient", udpLabel: "yes"}}})
	code, out, _ = run(t, broken, "check")
	for _, want := range []string{"old (5.15.0-1)", "ambiant, which means nothing", "other/ztunnel", "udp-typo has warren.io/udp-policy=yes, which means nothing",
		"UDP: of shop, udp-typo neither encrypted nor filtered, as in Istio; of udp filtered by identity, not encrypted"} {
		if !strings.Contains(out, want) {
			t.Errorf("check does not mention %q:\n%s", want, out)
		}
	}
	if code != ExitFound {
		t.Errorf("code %d", code)
	}
}

func TestCheckTellsThatPoliciesAreNotChecked(t *testing.T) {
	var without []runtime.Object
	for _, o := range installed() {
		if _, ok := o.(*admissionv1.ValidatingWebhookConfiguration); !ok {
			without = append(without, o)
		}
	}
	untrusted := append(without[:len(without):len(without)], &admissionv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "warren-validator"}, Webhooks: make([]admissionv1.ValidatingWebhook, 1)})
	for want, objects := range map[string][]runtime.Object{"there is no ValidatingWebhookConfiguration": without, "no root certificate": untrusted} {
		if code, out, _ := run(t, objects, "check"); code != ExitOK || !strings.Contains(out, "warning  admission: ") || !strings.Contains(out, want) {
			t.Errorf("code %d, want %q:\n%s", code, want, out)
		}
	}
}

func TestEveryFindingThatIsNotOKSaysWhatToDo(t *testing.T) {
	_, out, _ := run(t, nil, "check", "-o", "json")
	var list []finding
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, f := range list {
		if f.Result != "ok" && f.Hint == "" {
			t.Errorf("%s: %s: no hint", f.Check, f.What)
		}
	}
}

func TestNodeConfig(t *testing.T) {
	for view, want := range map[string]string{
		"workloads": "10.1.0.5", "services": "1/2", "policies": "deny", "certificates": "spiffe://cluster.local/ns/shop/sa/ui",
		"connections": "10.1.1.6:15008",
	} {
		code, out, errs := run(t, installed(), "node-config", view)
		if code != ExitOK || !strings.Contains(out, want) {
			t.Errorf("%s: code %d\n%s%s", view, code, out, errs)
		}
	}
	// What two nodes know alike is one row.
	if _, out, _ := run(t, installed(), "node-config", "workloads"); strings.Count(out, "ui-1") != 1 {
		t.Errorf("rows are repeated:\n%s", out)
	}
	code, out, errs := run(t, installed(), "node-config", "workloads", "shop/ui-1", "-o", "json")
	if code != ExitOK || !strings.Contains(out, `"node": "node1"`) || strings.Contains(out, "node2") {
		t.Errorf("code %d\n%s%s", code, out, errs)
	}
}

func TestErrors(t *testing.T) {
	for _, c := range []struct {
		objects []runtime.Object
		args    []string
		code    int
		says    string
	}{
		{nil, []string{"status"}, ExitError, "warren install"},
		{installed(), []string{"node-config", "workloads", "nowhere"}, ExitError, "NAMESPACE/POD"},
		{nil, []string{"node-config", "policies"}, ExitError, "warren check"},
		{nil, []string{"status", "-o", "xml"}, ExitUsage, "none of table, json, yaml"},
		{nil, []string{"stats"}, ExitUsage, "warren --help"},
		{nil, []string{"check", "extra"}, ExitUsage, "warren --help"},
	} {
		code, _, errs := run(t, c.objects, c.args...)
		if code != c.code || !strings.Contains(errs, c.says) {
			t.Errorf("warren %s: code %d, want %d, says %q, want %q in it", strings.Join(c.args, " "), code, c.code, errs, c.says)
		}
	}
}

func TestKernelVersions(t *testing.T) {
	for v, want := range map[string]bool{"6.1.0-40-amd64": true, "6.18.4": true, "7.0": true, "5.15.0": false, "6.0.12": false, "": false, "nonsense": false} {
		if kernelOK(v) != want {
			t.Errorf("kernelOK(%q) = %v", v, !want)
		}
	}
}

// The cleaner is the agent with another argument, or it would not find what the agent left.
func TestCleanerIsTheAgentToldToUninstall(t *testing.T) {
	agent := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "warren-node"}}
	agent.Spec.Template.Spec = corev1.PodSpec{HostPID: true, Containers: []corev1.Container{{
		Name: "node-agent", Image: "x", Env: []corev1.EnvVar{{Name: "A", Value: "b"}}, ReadinessProbe: &corev1.Probe{}}}}
	c := cleaner(agent).Spec.Template.Spec
	if len(c.InitContainers) != 1 || len(c.InitContainers[0].Args) != 1 || c.InitContainers[0].Args[0] != "uninstall" ||
		len(c.InitContainers[0].Env) != 1 || c.InitContainers[0].ReadinessProbe != nil || !c.HostPID {
		t.Errorf("%+v", c)
	}
	if c.InitContainers[0].TerminationMessagePolicy != corev1.TerminationMessageFallbackToLogsOnError {
		t.Error("nobody learns why it fails")
	}
	if len(c.Containers) != 1 || !slices.Equal(c.Containers[0].Args, []string{"idle"}) || c.Containers[0].Env != nil || *c.Containers[0].SecurityContext.RunAsUser == 0 {
		t.Errorf("what stays until the pod is deleted does not only wait: %+v", c.Containers)
	}
	if agent.Spec.Template.Spec.InitContainers != nil || agent.Spec.Template.Spec.Containers[0].Name != "node-agent" {
		t.Error("the agent's own template was changed")
	}
}

// Nodes of canaries are cleaned with the others.
func TestCleanerGoesToNodesOfCanariesToo(t *testing.T) {
	in := func(key string, op corev1.NodeSelectorOperator) corev1.NodeSelectorRequirement {
		return corev1.NodeSelectorRequirement{Key: key, Operator: op, Values: []string{"canary"}}
	}
	without := in("pool", corev1.NodeSelectorOpNotIn)
	for name, c := range map[string]struct{ had, has []corev1.NodeSelectorTerm }{
		"nothing else": {had: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{without}}}},
		"one that is all": {had: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{in("arch", corev1.NodeSelectorOpIn), without}},
			{MatchExpressions: []corev1.NodeSelectorRequirement{without}}}},
		"more": {had: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{in("arch", corev1.NodeSelectorOpIn), without, in("pool", corev1.NodeSelectorOpIn)}}},
			has: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{in("arch", corev1.NodeSelectorOpIn), in("pool", corev1.NodeSelectorOpIn)}}}},
	} {
		agent := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Name: "warren-node", Annotations: map[string]string{canaryNodes: "pool=canary"}}}
		agent.Spec.Template.Spec = corev1.PodSpec{Containers: []corev1.Container{{}}, Affinity: &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: c.had}}}}
		var has []corev1.NodeSelectorTerm
		if r := cleaner(agent).Spec.Template.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution; r != nil {
			has = r.NodeSelectorTerms
		}
		if !reflect.DeepEqual(has, c.has) {
			t.Errorf("%s: %v, want %v", name, has, c.has)
		}
	}
}

func TestANodeThatIsNotCleanSaysWhy(t *testing.T) {
	failed := corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, Message: "time=x level=info\nnode-agent: the pin is busy\n"}}
	backOff := corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 20s"}}
	for want, s := range map[string]corev1.PodStatus{
		" (it failed 1 time: node-agent: the pin is busy)":  {InitContainerStatuses: []corev1.ContainerStatus{{State: failed}}},
		" (it failed 3 times: node-agent: the pin is busy)": {InitContainerStatuses: []corev1.ContainerStatus{{State: backOff, LastTerminationState: failed, RestartCount: 3}}},
		" (CrashLoopBackOff: back-off 20s)":                 {InitContainerStatuses: []corev1.ContainerStatus{{State: backOff}}},
		" (Unschedulable: no node)": {Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse,
			Reason: "Unschedulable", Message: "no node"}}},
		"": {InitContainerStatuses: []corev1.ContainerStatus{{}}},
	} {
		if got := whyUnclean(&corev1.Pod{Status: s}); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

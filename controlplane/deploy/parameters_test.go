package deploy

import (
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"
)

// said is a ParameterSource.
type said struct {
	named    map[ParametersKey]*Parameters
	defaults map[string]*Parameters
	unknown  bool
}

func (s *said) Want([]ParametersKey) {}

func (s *said) Get(k ParametersKey) (*Parameters, bool) { return s.named[k], !s.unknown }

func (s *said) Defaults(string) (map[string]*Parameters, bool) { return s.defaults, true }

// made is one of the manifests as the API server would read it.
func made[T any](t *testing.T, all []manifest, k kind) (out T) {
	t.Helper()
	for _, m := range all {
		if m.kind == k {
			b, err := json.Marshal(m.body)
			if err == nil {
				err = json.Unmarshal(b, &out)
			}
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
	}
	t.Fatalf("no object of kind %d", k)
	return out
}

// What Istio's documentation has as an example, and what it does to the objects.
func TestParametersAreLaidOnWhatIsMade(t *testing.T) {
	class := ReadParameters(map[string]string{
		"deployment":          "spec: {template: {spec: {priorityClassName: high, terminationGracePeriodSeconds: 75}}}",
		"podDisruptionBudget": "spec: {minAvailable: 1}",
	}, "1")
	own := ReadParameters(map[string]string{
		"horizontalPodAutoscaler": "spec:\n  minReplicas: 2\n  maxReplicas: 2\n",
		"deployment": "metadata:\n  annotations:\n    additional-annotation: some-value\nspec:\n  replicas: 4\n  template:\n    spec:\n" +
			"      containers:\n      - name: istio-proxy\n        resources:\n          requests:\n            cpu: 1234m\n",
		"service": "metadata: {annotations: {team: blue}}\nspec:\n  type: NodePort\n  ports:\n  - \"$patch\": delete\n    port: 15021\n  - port: 80\n    nodePort: 30080\n",
	}, "2")
	if class.problem != "" || own.problem != "" {
		t.Fatal(class.problem, own.problem)
	}
	g := gateway(func(g *gatewayv1.Gateway) {
		g.Spec.GatewayClassName = "istio"
		g.Spec.Listeners = []gatewayv1.Listener{{Name: "http", Port: 80, Protocol: "HTTP"}}
	})
	all, err := Settings{}.manifests(g, nil, wishes{class, own})
	if err != nil {
		t.Fatal(err)
	}
	dep := made[appsv1.Deployment](t, all, deployment)
	pod := dep.Spec.Template.Spec
	c := pod.Containers[0]
	if dep.Annotations["additional-annotation"] != "some-value" || pod.PriorityClassName != "high" || c.Resources.Requests.Cpu().String() != "1234m" || c.Resources.Requests.Memory().String() != "96Mi" {
		t.Errorf("Deployment: %+v", dep)
	}
	if len(pod.Containers) != 1 || c.Image != "" || len(c.Env) == 0 || len(c.VolumeMounts) == 0 {
		t.Errorf("the container is no longer what it was: %+v", c)
	}
	if dep.Spec.Replicas != nil {
		t.Errorf("%d replicas where a HorizontalPodAutoscaler says how many", *dep.Spec.Replicas)
	}
	for _, e := range c.Env {
		if e.Name == drainVariable && e.Value != "60" {
			t.Errorf("connections are drained for %s s of 75", e.Value)
		}
	}
	svc := made[corev1.Service](t, all, service)
	if len(svc.Spec.Ports) != 1 || svc.Spec.Ports[0].Port != 80 || svc.Spec.Ports[0].NodePort != 30080 || svc.Spec.Ports[0].Name != "port-80" || svc.Annotations["team"] != "blue" || svc.Spec.Type != "NodePort" {
		t.Errorf("Service: %+v", svc)
	}
	pdb := made[policyv1.PodDisruptionBudget](t, all, budget)
	if pdb.Spec.MaxUnavailable != nil || pdb.Spec.MinAvailable.IntValue() != 1 {
		t.Errorf("PodDisruptionBudget: %+v", pdb.Spec)
	}
	hpa := made[struct {
		Spec struct {
			MinReplicas    int
			ScaleTargetRef struct{ Kind, Name string }
		}
	}](t, all, autoscaler)
	if hpa.Spec.MinReplicas != 2 || hpa.Spec.ScaleTargetRef.Kind != "Deployment" || hpa.Spec.ScaleTargetRef.Name != dep.Name {
		t.Errorf("HorizontalPodAutoscaler: %+v", hpa)
	}
}

// Who writes parameters can say how much and where, and nothing by which a gateway would be something else.
func TestParametersThatCannotBe(t *testing.T) {
	for text, want := range map[string]string{
		"deployments=spec: {}": "the key deployments; use deployment, horizontalPodAutoscaler, podDisruptionBudget, service, serviceAccount",
		"deployment=spec: [":   "deployment: yaml:",
		"deployment=spec: {template: {spec: {serviceAccountName: admin}}}":                                                          "spec.template.spec.serviceAccountName cannot be set",
		"deployment=spec: {template: {spec: {hostNetwork: true}}}":                                                                  "spec.template.spec.hostNetwork cannot be set",
		"deployment=spec: {template: {spec: {volumes: [{name: x, secret: {secretName: y}}]}}}":                                      "spec.template.spec.volumes cannot be set",
		"deployment=spec: {template: {spec: {initContainers: [{name: x, image: y}]}}}":                                              "spec.template.spec.initContainers cannot be set",
		"deployment=spec: {template: {spec: {containers: [{name: istio-proxy, image: y}]}}}":                                        "spec.template.spec.containers[0].image cannot be set",
		"deployment=spec: {template: {spec: {containers: [{name: istio-proxy, env: []}]}}}":                                         "spec.template.spec.containers[0].env cannot be set",
		"deployment=spec: {template: {spec: {containers: [{name: other, resources: {}}]}}}":                                         "other is no container of it",
		"deployment=spec: {template: {spec: {containers: [{resources: {}}]}}}":                                                      "is no container of it",
		"deployment=spec: {template: {spec: {$patch: replace}}}":                                                                    "$patch cannot be set",
		"deployment=metadata: {name: other}":                                                                                        "metadata.name cannot be set",
		"deployment=metadata: {ownerReferences: []}":                                                                                "metadata.ownerReferences cannot be set",
		"deployment=spec: {selector: {}}":                                                                                           "spec.selector cannot be set",
		"deployment=spec: {replicas: many}":                                                                                         "replicas",
		"deployment=spec: {template: {metadata: {labels: {istio.io/dataplane-mode: ambient}}}}":                                     "spec.template.metadata.labels: the label istio.io/dataplane-mode",
		"deployment=metadata: {labels: {gateway.networking.k8s.io/gateway-name: other}}":                                            "metadata.labels: the label gateway.networking.k8s.io/gateway-name",
		"deployment=spec: {template: {spec: {topologySpreadConstraints: [{maxSkw: 1}]}}}":                                           "maxSkw",
		"service=spec: {selector: {app: other}}":                                                                                    "spec.selector cannot be set",
		"service=spec: {externalIPs: [10.0.0.1]}":                                                                                   "spec.externalIPs cannot be set",
		"service=spec: {ports: [{port: 80, targetPort: 22}]}":                                                                       "spec.ports[0].targetPort cannot be set",
		"service=spec: {ports: [{port: 80, $patch: delete}]}":                                                                       "only port 15021 can be taken away",
		"horizontalPodAutoscaler=spec: {scaleTargetRef: {kind: Deployment, name: other}}":                                           "spec.scaleTargetRef cannot be set",
		"podDisruptionBudget=spec: {selector: {}}":                                                                                  "spec.selector cannot be set",
		"serviceAccount=secrets: [{name: x}]":                                                                                       "secrets cannot be set",
		"serviceAccount=metadata: {annotations: {eks.amazonaws.com/role-arn: x}}":                                                   "",
		"deployment=apiVersion: apps/v1\nkind: Deployment\nspec: {template: {spec: {affinity: {podAntiAffinity: {}}}}}":             "",
		"horizontalPodAutoscaler=spec: {minReplicas: 2, maxReplicas: 5, behavior: {scaleDown: {stabilizationWindowSeconds: 30}}}":   "",
		"service=spec: {loadBalancerSourceRanges: [10.0.0.0/8], externalTrafficPolicy: Local, ports: [{port: 81, name: http-two}]}": "",
	} {
		key, patch, _ := strings.Cut(text, "=")
		p := ReadParameters(map[string]string{key: patch, "serviceAccount2": ""}, "1")
		if p.problem == "" || !strings.Contains(p.problem, "serviceAccount2") && want == "" {
			t.Errorf("%s: %q", text, p.problem)
		}
		p = ReadParameters(map[string]string{key: patch}, "1")
		if !strings.Contains(p.problem, want) || (want == "") != (p.problem == "") {
			t.Errorf("%s: %q, want %q", text, p.problem, want)
		}
		if p.problem != "" && len(p.patches) > 0 {
			t.Errorf("%s: %v is kept", text, p.patches)
		}
	}
}

// One that is wrong, or not there, changes nothing of what was made, and is said; what was made for scaling goes with its wish.
func TestParametersOfAGateway(t *testing.T) {
	g := gateway(func(g *gatewayv1.Gateway) {
		g.Spec.Infrastructure = &gatewayv1.GatewayInfrastructure{ParametersRef: &gatewayv1.LocalParametersReference{Kind: "ConfigMap", Name: "options"}}
	})
	kube, gateways := fake.NewClientset(), gatewayfake.NewSimpleClientset()
	if _, err := gateways.GatewayV1().Gateways("shop").Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	source := &said{unknown: true, named: map[ParametersKey]*Parameters{}}
	d := &Deployer{Kube: kube, Gateways: gateways, Parameters: source, Log: slog.New(slog.DiscardHandler),
		State: func(string, string) ([]string, int) { return []string{"10.96.0.7"}, 1 }}
	applied := map[types.UID]done{}
	step := func(status, message string) {
		t.Helper()
		now, err := gateways.GatewayV1().Gateways("shop").Get(t.Context(), "way", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		d.reconcile(t.Context(), now, applied)
		if now, err = gateways.GatewayV1().Gateways("shop").Get(t.Context(), "way", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		c := meta.FindStatusCondition(now.Status.Conditions, "Accepted")
		switch {
		case c == nil && status != "":
			t.Fatalf("nothing is said, want %s %s", status, message)
		case c != nil && (string(c.Status) != status || !strings.Contains(c.Message, message)):
			t.Fatalf("%s %s, want %s %s", c.Status, c.Message, status, message)
		}
	}
	replicas := func() (n int32, ok bool) {
		dep, err := kube.AppsV1().Deployments("shop").Get(t.Context(), "way", metav1.GetOptions{})
		if err != nil || dep.Spec.Replicas == nil {
			return 0, err == nil
		}
		return *dep.Spec.Replicas, true
	}
	scaled := func() bool {
		t.Helper()
		_, err := kube.AutoscalingV2().HorizontalPodAutoscalers("shop").Get(t.Context(), "way", metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			t.Fatal(err)
		}
		return err == nil
	}
	key := ParametersKey{"shop", "options"}
	say := func(version string, data map[string]string) { source.named[key] = ReadParameters(data, version) }

	step("", "")
	if _, ok := replicas(); ok {
		t.Error("a Deployment is made before it is known what it is to be")
	}
	source.unknown = false
	step("False", "there is no ConfigMap shop/options")
	say("1", map[string]string{"deployment": "spec: {replicas: 3}"})
	step("True", "")
	if n, _ := replicas(); n != 3 {
		t.Errorf("%d replicas, want 3", n)
	}
	say("2", map[string]string{"deployment": "spec: {replicas: 5, paused: true}"})
	step("False", "ConfigMap shop/options: deployment: spec.paused cannot be set")
	if n, _ := replicas(); n != 3 {
		t.Errorf("%d replicas, want the 3 of before", n)
	}
	say("3", map[string]string{"horizontalPodAutoscaler": "spec: {minReplicas: 2, maxReplicas: 4}"})
	step("True", "")
	if !scaled() {
		t.Error("there is no HorizontalPodAutoscaler")
	}
	say("4", nil)
	step("True", "")
	if scaled() {
		t.Error("the HorizontalPodAutoscaler is still there")
	}
	source.defaults = map[string]*Parameters{"a": ReadParameters(nil, "5"), "b": ReadParameters(nil, "6")}
	step("False", "the ConfigMaps a and b both hold the defaults of the class istio-waypoint")
}

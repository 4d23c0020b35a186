package release

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// istios are the objects that Istio's charts base, istiod, cni and ztunnel of 1.24 to 1.29 make in an installation without a
// revision, and what istiod makes itself (manifests/charts/*/templates and pilot/pkg/bootstrap of istio/istio). Definitions are not
// among them: the chart leaves alone those that somebody else installed.
var istios = []string{
	"ConfigMap istio-system/istio", "ConfigMap istio-system/istio-sidecar-injector", "ConfigMap istio-system/values", "ConfigMap istio-system/istio-ca-root-cert",
	"ConfigMap istio-system/istio-cni-config", "ConfigMap istio-system/istio-leader", "Secret istio-system/istio-ca-secret", "Secret istio-system/cacerts",
	"ServiceAccount istio-system/istiod", "ServiceAccount istio-system/istio-reader-service-account", "ServiceAccount istio-system/ztunnel", "ServiceAccount istio-system/istio-cni",
	"Deployment istio-system/istiod", "Service istio-system/istiod", "Service istio-system/istiod-revision-tag-default", "PodDisruptionBudget istio-system/istiod",
	"HorizontalPodAutoscaler istio-system/istiod", "DaemonSet istio-system/ztunnel", "DaemonSet istio-system/istio-cni-node", "Role istio-system/istiod", "RoleBinding istio-system/istiod",
	"ClusterRole istiod-clusterrole-istio-system", "ClusterRole istiod-gateway-controller-istio-system", "ClusterRole istio-reader-clusterrole-istio-system", "ClusterRole istio-cni",
	"ClusterRole istio-cni-repair-role", "ClusterRole istio-cni-ambient", "ClusterRole ztunnel", "ClusterRoleBinding istiod-clusterrole-istio-system",
	"ValidatingWebhookConfiguration istio-validator-istio-system", "ValidatingWebhookConfiguration istiod-default-validator", "MutatingWebhookConfiguration istio-sidecar-injector",
	"ValidatingAdmissionPolicy stable-channel-default-policy.istio.io", "ResourceQuota istio-system/istio-cni-resource-quota", "ResourceQuota istio-system/ztunnel-resource-quota",
	"GatewayClass istio", "GatewayClass istio-waypoint", "GatewayClass istio-remote", "NetworkPolicy istio-system/istiod", "NetworkPolicy istio-system/ztunnel", "NetworkPolicy istio-system/istio-cni-node",
}

// Beside an Istio nothing has a name of Istio's, nothing is selected by Istio's Services, and the nodes are left alone until they
// are moved.
func TestBesideIstio(t *testing.T) {
	on := map[string]any{"enabled": true}
	values := map[string]any{"besideIstio": on, "networkPolicies": on, "resourceQuotas": on, "securityContextConstraints": on,
		"node": map[string]any{"affinity": map[string]any{"nodeAffinity": map[string]any{"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{"nodeSelectorTerms": []any{
			map[string]any{"matchExpressions": []any{map[string]any{"key": "pool", "operator": "Exists"}}}, map[string]any{"matchExpressions": []any{map[string]any{"key": "zone", "operator": "Exists"}}}}}}}}}
	r, err := Render(values, Target{Namespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range r.Objects {
		if o.GetKind() == "CustomResourceDefinition" {
			continue
		}
		got = append(got, Describe(o))
		if slices.Contains(istios, Describe(o)) {
			t.Errorf("%s is Istio's", Describe(o))
		}
		pod, _, _ := unstructured.NestedStringMap(o.Object, "spec", "template", "metadata", "labels")
		if pod["istio"] == "pilot" || pod["app"] == "istiod" && pod["istio.io/rev"] != "warren" {
			t.Errorf("Istio's Service istiod selects the pods of %s: %v", Describe(o), pod)
		}
		if o.GetKind() == "DaemonSet" {
			terms, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
			want := []any{map[string]any{"key": "warren.io/migration", "operator": "In", "values": []any{"warren"}}}
			for i, key := range []string{"pool", "zone"} {
				all := append([]any{map[string]any{"key": key, "operator": "Exists"}}, want...)
				if len(terms) != 2 || cmp.Diff(map[string]any{"matchExpressions": all}, terms[i]) != "" {
					t.Errorf("%s: nodes %v", Describe(o), terms)
				}
			}
		}
		if text := string(mustJSON(t, o)); strings.Contains(text, "istiod.istio-system.svc") {
			t.Errorf("%s asks Istio's control plane", Describe(o))
		}
		if o.GetKind() == "Role" && o.GetName() == "warren-control-warren" {
			rules, _, _ := unstructured.NestedSlice(o.Object, "rules")
			for _, rule := range rules {
				if m := rule.(map[string]any); cmp.Equal(m["resources"], []any{"secrets"}) && !cmp.Equal(m["verbs"], []any{"get"}) {
					t.Errorf("it may do more with Istio's root key than read it: %v", m)
				}
			}
		}
	}
	slices.Sort(got)
	want := []string{
		"ServiceAccount istio-system/warren-holder", "ServiceAccount istio-system/warren-node", "DaemonSet istio-system/warren-holder", "DaemonSet istio-system/warren-node",
		"ServiceAccount istio-system/warren-control-warren", "ConfigMap istio-system/istio-warren", "ClusterRole warren-control-warren-istio-system",
		"ClusterRoleBinding warren-control-warren-istio-system", "Role istio-system/warren-control-warren", "RoleBinding istio-system/warren-control-warren",
		"Service istio-system/istiod-warren", "Service istio-system/warren-control-warren", "PodDisruptionBudget istio-system/warren-control-warren",
		"Deployment istio-system/warren-control-warren", "ValidatingAdmissionPolicy warren-namespaces", "ValidatingAdmissionPolicyBinding warren-namespaces",
		"NetworkPolicy istio-system/warren-control-warren", "NetworkPolicy istio-system/warren-uninstall", "ResourceQuota istio-system/warren-critical-pods",
		"ClusterRole warren-privileged-istio-system", "RoleBinding istio-system/warren-privileged",
	}
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for what, v := range map[string]map[string]any{
		"compat.istioNames": {"besideIstio": on, "compat": map[string]any{"istioNames": true}},
		"revision next":     {"besideIstio": on, "revision": "next"},
	} {
		if _, err := Render(v, Target{Namespace: "istio-system"}); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s beside an Istio: %v", what, err)
		}
	}
}

func mustJSON(t *testing.T, o *unstructured.Unstructured) []byte {
	t.Helper()
	b, err := o.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

package chart

import (
	"strings"
	"testing"
)

const gatewayDir = "../../../charts/gateway"

func renderGateway(t *testing.T, set ...string) string {
	t.Helper()
	return renderChart(t, "istio-ingressgateway", gatewayDir, "istio-ingress", set)
}

func TestGatewayLint(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", gatewayDir); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// The names and labels are those that Istio's chart of the same name gives, by which Gateways select the pods.
func TestGateway(t *testing.T) {
	all := renderGateway(t)
	for _, kind := range []string{"ServiceAccount", "Deployment", "PodDisruptionBudget", "Service"} {
		o := object(t, all, kind, "istio-ingressgateway")
		for _, want := range []string{"app: istio-ingressgateway", "istio: ingressgateway"} {
			if !strings.Contains(o, want) {
				t.Errorf("%s lacks %s", kind, want)
			}
		}
	}
	pod := object(t, all, "Deployment", "istio-ingressgateway")
	for _, want := range []string{"drop: [ALL]", "runAsNonRoot: true", "readOnlyRootFilesystem: true", "automountServiceAccountToken: false", "istio.io/dataplane-mode: none", "networking.istio.io/tunnel: http"} {
		if !strings.Contains(pod, want) {
			t.Errorf("the pod lacks %q", want)
		}
	}
	own := renderGateway(t, "labels.istio=egressgateway", "labels.team=a", "service.type=None", "autoscaling.enabled=true")
	if pod := object(t, own, "Deployment", "istio-ingressgateway"); !strings.Contains(pod, "istio: egressgateway") || !strings.Contains(pod, "team: a") || strings.Contains(pod, "replicas:") {
		t.Errorf("labels, or replicas beside an autoscaler:\n%s", pod)
	}
	object(t, own, "HorizontalPodAutoscaler", "istio-ingressgateway")
	if strings.Contains(own, "\nkind: Service\n") {
		t.Error("service.type None makes a Service")
	}
	for _, v := range []string{"service.type=ExternalName", "replicas=2", "control.address=nowhere", "service.ports[0].port=0"} {
		if out, err := helm(t, "template", "x", gatewayDir, "--set", v); err == nil {
			t.Errorf("%s is accepted: %.200s", v, out)
		}
	}
}

package release

import (
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

const iop = `
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
metadata: {name: mesh, namespace: istio-system}
spec:
  profile: ambient
  hub: docker.io/istio
  meshConfig:
    trustDomain: example.org
    rootNamespace: istio-system
    accessLogFile: ""
    outboundTrafficPolicy: {mode: REGISTRY_ONLY}
    extensionProviders: [{name: authz}]
  components:
    pilot: {k8s: {replicaCount: 2, resources: {requests: {cpu: 100m}}}}
    cni: {enabled: true}
    ingressGateways: [{name: istio-ingressgateway, enabled: true}]
  values:
    global: {platform: k3s, network: n1, proxy: {image: distroless, clusterDomain: cluster.test}}
    meshConfig: {trustDomainAliases: [old.example]}
    pilot: {env: {PILOT_ENABLE_STATUS: true}, traceSampling: 1}
    cni: {ambient: {enabled: true, dnsCapture: false}}
`

// What an IstioOperator says goes where it belongs, and what has no place is named.
func TestIstioOperator(t *testing.T) {
	var said []string
	s := Sources{Profile: "default", Files: []File{{"mesh.yaml", []byte(iop)}}, Set: []string{"mesh.network=n2"}, Warn: func(w string) { said = append(said, w) }}
	v, err := s.Values(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	const want = `control:
  replicas: 2
  resources:
    requests:
      cpu: 100m
mesh:
  clusterDomain: cluster.test
  network: n2
  trustDomain: example.org
  trustDomainAliases:
  - old.example
meshConfig:
  extensionProviders:
  - name: authz
  outboundTrafficPolicy:
    mode: REGISTRY_ONLY
node:
  accessLog: false
  cni:
    binDir: /var/lib/rancher/k3s/data/cni
    confDir: /var/lib/rancher/k3s/agent/etc/cni/net.d
  dnsCapture: false
  enabled: true
`
	if string(got) != want {
		t.Errorf("values\n%s", got)
	}
	for _, path := range []string{"spec.hub", "spec.meshConfig.rootNamespace", "spec.components.ingressGateways",
		"spec.values.global.proxy.image", "spec.values.pilot.env.PILOT_ENABLE_STATUS", "spec.values.pilot.traceSampling"} {
		if !slices.ContainsFunc(said, func(w string) bool { return strings.HasPrefix(w, "mesh.yaml: "+path+" has no effect: ") }) {
			t.Errorf("%s is dropped without a word: %q", path, said)
		}
	}
	if len(said) != 6 {
		t.Errorf("warnings %q", said)
	}
	r, err := Render(v, Target{Namespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range r.Objects {
		if o.GetKind() == "ConfigMap" {
			text, _ := o.Object["data"].(map[string]any)["mesh"].(string)
			var m struct {
				TrustDomain        string
				ExtensionProviders []struct{ Name string }
				DefaultConfig      struct{ DiscoveryAddress string }

				OutboundTrafficPolicy struct{ Mode string }
			}
			if err := yaml.Unmarshal([]byte(text), &m); err != nil || m.TrustDomain != "example.org" || len(m.ExtensionProviders) != 1 || m.DefaultConfig.DiscoveryAddress == "" || m.OutboundTrafficPolicy.Mode != "REGISTRY_ONLY" {
				t.Errorf("%v\n%s", err, text)
			}
		}
	}
}

func TestIstioOperatorThatIsWrong(t *testing.T) {
	for text, want := range map[string]string{
		"kind: IstioOperator\napiVersion: install.istio.io/v1\n":                                               "write install.istio.io/v1alpha1",
		"kind: IstioOperator\napiVersion: install.istio.io/v1alpha1\nspec: {profile: ambiant}\n":               "did you mean ambient?",
		"kind: IstioOperator\napiVersion: install.istio.io/v1alpha1\nspec: {profile: 1}\n":                     "is not text",
		"kind: IstioOperator\napiVersion: install.istio.io/v1alpha1\nspec: []\n":                               "not an object",
		"kind: IstioOperator\napiVersion: install.istio.io/v1alpha1\nspec: {meshConfig: {trustDomain: A/B}}\n": "mesh.trustDomain",
	} {
		if _, err := (Sources{Files: []File{{"f", []byte(text)}}}).Values(nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
	v, err := Sources{Set: []string{"meshConfig.trustDomain=x"}}.Values(nil)
	if err == nil {
		_, err = Render(v, Target{Namespace: "istio-system"})
	}
	if err == nil || !strings.Contains(err.Error(), "mesh.trustDomain") {
		t.Errorf("the same thing can be said in two places: %v", err)
	}
}

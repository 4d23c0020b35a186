package release

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// operator is what an IstioOperator comes to.
type operator struct {
	profiles []string
	values   map[string]any
	ignored  []string // what means nothing here
}

// meanings are where the values of an IstioOperator's spec go, by their paths in it; to "" goes what Warren does anyway.
func meanings() map[string]string {
	m := map[string]string{
		"revision":                              "revision",
		"meshConfig.trustDomain":                "mesh.trustDomain",
		"meshConfig.trustDomainAliases":         "mesh.trustDomainAliases",
		"meshConfig.caAddress":                  "ca.address",
		"meshConfig.enableAutoMtls":             "",
		"meshConfig.outboundTrafficPolicy.mode": "meshConfig.outboundTrafficPolicy.mode",
		"meshConfig.localityLbSetting":          "meshConfig.localityLbSetting",
		"meshConfig.extensionProviders":         "meshConfig.extensionProviders",
		"meshConfig.defaultProviders":           "meshConfig.defaultProviders",

		"components.base.enabled":                      "crds.install",
		"components.pilot.enabled":                     "control.enabled",
		"components.ztunnel.enabled":                   "node.enabled",
		"components.cni.enabled":                       "node.enabled",
		"components.pilot.k8s.replicaCount":            "control.replicas",
		"components.pilot.namespace":                   "",
		"values.revision":                              "revision",
		"values.pilot.replicaCount":                    "control.replicas",
		"values.pilot.env.PILOT_ENABLE_AMBIENT":        "",
		"values.global.istioNamespace":                 "",
		"values.global.network":                        "mesh.network",
		"values.global.multiCluster.clusterName":       "mesh.clusterID",
		"values.global.proxy.clusterDomain":            "mesh.clusterDomain",
		"values.global.imagePullPolicy":                "image.pullPolicy",
		"values.global.imagePullSecrets":               "image.pullSecrets",
		"values.global.priorityClassName":              "control.priorityClassName",
		"values.global.variant":                        "",
		"values.cni.cniBinDir":                         "node.cni.binDir",
		"values.cni.cniConfDir":                        "node.cni.confDir",
		"values.cni.ambient.enabled":                   "",
		"values.cni.ambient.dnsCapture":                "node.dnsCapture",
		"values.cni.chained":                           "",
		"values.cni.resourceQuotas.enabled":            "resourceQuotas.enabled",
		"values.cni.resourceQuotas.pods":               "resourceQuotas.pods",
		"values.ztunnel.resourceQuotas.enabled":        "resourceQuotas.enabled",
		"values.ztunnel.resourceQuotas.pods":           "resourceQuotas.pods",
		"values.ztunnel.logLevel":                      "node.logLevel",
		"values.ztunnel.multiCluster.clusterName":      "mesh.clusterID",
		"values.ztunnel.network":                       "mesh.network",
		"values.ztunnel.terminationGracePeriodSeconds": "node.terminationGracePeriodSeconds",
	}
	for _, name := range []string{"resources", "nodeSelector", "tolerations", "affinity", "podAnnotations"} {
		m["values.pilot."+name], m["components.pilot.k8s."+name] = "control."+name, "control."+name
		m["values.ztunnel."+name], m["components.ztunnel.k8s."+name] = "node."+name, "node."+name
	}
	return m
}

// reasons say of what has no place here why not, by the beginning of its path.
var reasons = []struct{ path, why string }{
	{"components.ingressGateways", "no gateway is installed with the mesh: install the chart of one (charts/gateway), or make a Gateway of the Gateway API"},
	{"components.egressGateways", "no gateway is installed with the mesh: install the chart of one (charts/gateway), or make a Gateway of the Gateway API"},
	{"values.gateways", "no gateway is installed with the mesh: install the chart of one (charts/gateway), or make a Gateway of the Gateway API"},
	{"values.sidecarInjectorWebhook", "there are no sidecars"},
	{"values.global.proxy", "there are no sidecars"},
	{"components.istiodRemote", "see the profile external"},
	{"addonComponents", "add-ons are not installed with the mesh: kubectl apply -f samples/addons"},
	{"meshConfig.enableTracing", "name a provider of meshConfig.extensionProviders in meshConfig.defaultProviders.tracing or in a Telemetry"},
	{"meshConfig.defaultConfig.tracing", "name a provider of meshConfig.extensionProviders in meshConfig.defaultProviders.tracing or in a Telemetry"},
	{"hub", "Warren's images are elsewhere: image.registry"},
	{"tag", "Warren's images have tags of their own: image.tag"},
	{"values.global.hub", "Warren's images are elsewhere: image.registry"},
	{"values.global.tag", "Warren's images have tags of their own: image.tag"},
	{"values.pilot.env", "these are settings of Istio's program"},
	{"values.ztunnel.env", "these are settings of Istio's program"},
	{"components.pilot.k8s.env", "these are settings of Istio's program"},
}

// profilesOf are ours for Istio's, where the names differ.
var profilesOf = map[string][]string{"stable": {"default"}, "remote": {"external"}, "openshift-ambient": {"openshift"}}

// readOperator translates. Nothing is dropped without a word.
func readOperator(doc map[string]any) (*operator, error) {
	if v, _ := doc["apiVersion"].(string); v != "install.istio.io/v1alpha1" {
		return nil, fmt.Errorf("an IstioOperator of %q is not known; write install.istio.io/v1alpha1", v)
	}
	spec, ok := doc["spec"].(map[string]any)
	if !ok && doc["spec"] != nil {
		return nil, errors.New("spec of the IstioOperator is not an object")
	}
	o := &operator{values: map[string]any{}}
	spec = clone(spec)
	platform := ""
	for _, p := range []struct {
		take func() (any, bool)
		path string
	}{
		{func() (any, bool) { return pluck(spec, "profile") }, "profile"},
		{func() (any, bool) { return pluck(spec, "values", "profile") }, "values.profile"},
		{func() (any, bool) { return pluck(spec, "values", "global", "platform") }, "values.global.platform"},
	} {
		v, ok := p.take()
		if !ok || v == "" {
			continue
		}
		name, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("%s of the IstioOperator is not text", p.path)
		}
		if p.path == "values.global.platform" {
			platform = name
			continue
		}
		if ours := profilesOf[name]; ours != nil {
			o.profiles = append(o.profiles, ours...)
		} else {
			o.profiles = append(o.profiles, name)
		}
	}
	if platform != "" && !slices.Contains(o.profiles, platform) {
		o.profiles = append(o.profiles, platform)
	}
	pluck(spec, "namespace")
	to := meanings()
	// The mesh configuration can also stand among the values.
	o.walk(spec, "", to)
	slices.Sort(o.ignored)
	return o, nil
}

// pluck takes a value out of a tree.
func pluck(m map[string]any, path ...string) (any, bool) {
	for _, k := range path[:len(path)-1] {
		m, _ = m[k].(map[string]any)
	}
	v, ok := m[path[len(path)-1]]
	delete(m, path[len(path)-1])
	return v, ok
}

func (o *operator) walk(v any, at string, to map[string]string) {
	look := strings.Replace(at, "values.meshConfig.", "meshConfig.", 1)
	if path, ok := to[look]; ok {
		if path != "" {
			put(o.values, path, v)
		}
		return
	}
	switch look {
	case "meshConfig.rootNamespace", "values.global.rootNamespace":
		o.ignored = append(o.ignored, fmt.Sprintf("spec.%s has no effect: the root namespace is the control plane's, which -n names", at))
		return
	case "meshConfig.accessLogFile":
		put(o.values, "node.accessLog", v != "")
		if v != "" {
			put(o.values, "meshConfig.accessLogFile", v)
		}
		return
	}
	m, ok := v.(map[string]any)
	if !ok {
		why := "it has no meaning here"
		for _, r := range reasons {
			if look == r.path || strings.HasPrefix(look, r.path+".") {
				why = r.why
			}
		}
		o.ignored = append(o.ignored, fmt.Sprintf("spec.%s has no effect: %s", at, why))
		return
	}
	for _, k := range slices.Sorted(maps.Keys(m)) {
		o.walk(m[k], join(at, k), to)
	}
}

// put sets a value by its path.
func put(values map[string]any, path string, v any) {
	keys := strings.Split(path, ".")
	for _, k := range keys[:len(keys)-1] {
		next, ok := values[k].(map[string]any)
		if !ok {
			next = map[string]any{}
			values[k] = next
		}
		values = next
	}
	values[keys[len(keys)-1]] = v
}

// IgnoredMeshConfig lists what of Istio's mesh configuration has no effect here, each with why.
func IgnoredMeshConfig(mesh map[string]any) []string {
	_, ignored := FromMeshConfig(mesh)
	return ignored
}

// FromMeshConfig is what of Istio's mesh configuration is followed, as values of the chart, and what has no effect here, each with why.
func FromMeshConfig(mesh map[string]any) (values map[string]any, ignored []string) {
	o := &operator{values: map[string]any{}}
	o.walk(map[string]any{"meshConfig": mesh}, "", meanings())
	slices.Sort(o.ignored)
	for i, s := range o.ignored {
		o.ignored[i] = strings.TrimPrefix(s, "spec.")
	}
	return o.values, o.ignored
}

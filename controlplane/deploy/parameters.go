package deploy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"
)

// LabelDefaults is on a ConfigMap of the root namespace that says what holds for all Gateways of the class that it names
// (Istio, "GatewayClass defaults").
const LabelDefaults = "gateway.istio.io/defaults-for-class"

// ParametersKey names a ConfigMap.
type ParametersKey struct{ Namespace, Name string }

// Parameters is what a ConfigMap says of the objects that are made for a Gateway, a strategic merge patch for each, under the keys
// that Istio has for them. Only what [settable] lists can be said: whoever may write Gateways and ConfigMaps is not thereby one who
// may run any container, under any account, or read any Secret.
type Parameters struct {
	patches map[kind]object
	problem string // why nothing of it holds
	version string
}

// Problem says why nothing of it holds; "" for no reason.
func (p *Parameters) Problem() string { return p.problem }

// keys are those of the ConfigMap; shapes are what the patches are of.
var (
	keys = map[string]kind{
		"serviceAccount": serviceAccount, "service": service, "deployment": deployment, "podDisruptionBudget": budget, "horizontalPodAutoscaler": autoscaler,
	}
	shapes = map[kind]any{
		serviceAccount: corev1.ServiceAccount{}, service: corev1.Service{}, deployment: appsv1.Deployment{}, budget: policyv1.PodDisruptionBudget{},
		autoscaler: autoscalingv2.HorizontalPodAutoscaler{},
	}
)

// settable is what can be said of each kind: these fields, with all that is below them, of lists those of each item.
var settable = map[kind]fields{
	serviceAccount: paths("metadata: labels annotations"),
	service: paths("metadata: labels annotations",
		"spec: type loadBalancerIP loadBalancerClass loadBalancerSourceRanges externalTrafficPolicy internalTrafficPolicy allocateLoadBalancerNodePorts healthCheckNodePort",
		"spec: sessionAffinity sessionAffinityConfig ipFamilies ipFamilyPolicy trafficDistribution",
		"spec.ports: port name protocol nodePort $patch"),
	deployment: paths("metadata: labels annotations",
		"spec: replicas strategy minReadySeconds revisionHistoryLimit progressDeadlineSeconds",
		"spec.template.metadata: labels annotations",
		"spec.template.spec: nodeSelector affinity tolerations topologySpreadConstraints priorityClassName terminationGracePeriodSeconds",
		"spec.template.spec: runtimeClassName schedulerName imagePullSecrets dnsPolicy dnsConfig",
		"spec.template.spec.containers: name resources imagePullPolicy"),
	budget:     paths("metadata: labels annotations", "spec: minAvailable maxUnavailable unhealthyPodEvictionPolicy"),
	autoscaler: paths("metadata: labels annotations", "spec: minReplicas maxReplicas metrics behavior"),
}

// fields are names, and what is below each; nil is everything.
type fields map[string]fields

// paths reads lines of "where: field field".
func paths(lines ...string) fields {
	out := fields{}
	for _, l := range lines {
		where, names, _ := strings.Cut(l, ": ")
		at := out
		for _, step := range strings.Split(where, ".") {
			if at[step] == nil {
				at[step] = fields{}
			}
			at = at[step]
		}
		for _, n := range strings.Fields(names) {
			at[n] = nil
		}
	}
	return out
}

// other is the first of what is said that cannot be, as a path; "" for none.
func (f fields) other(said any, path string) string {
	switch v := said.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			below, ok := f[name]
			at := strings.TrimPrefix(path+"."+name, ".")
			if !ok {
				return at
			}
			if below == nil {
				continue
			}
			if bad := below.other(v[name], at); bad != "" {
				return bad
			}
		}
	case []any:
		for i, item := range v {
			if bad := f.other(item, fmt.Sprintf("%s[%d]", path, i)); bad != "" {
				return bad
			}
		}
	}
	return ""
}

// ReadParameters reads the data of a ConfigMap. What cannot be followed is kept as a problem: then nothing of it holds.
func ReadParameters(data map[string]string, version string) *Parameters {
	p := &Parameters{patches: map[kind]object{}, version: version}
	for _, key := range slices.Sorted(maps.Keys(data)) {
		k, ok := keys[key]
		if !ok {
			p.problem = fmt.Sprintf("the key %s; use %s", key, strings.Join(slices.Sorted(maps.Keys(keys)), ", "))
			return p
		}
		patch, problem := readPatch(k, data[key])
		if problem != "" {
			p.problem = key + ": " + problem
			return p
		}
		if len(patch) > 0 {
			p.patches[k] = patch
		}
	}
	return p
}

func readPatch(k kind, text string) (object, string) {
	var patch object
	if err := yaml.Unmarshal([]byte(text), &patch); err != nil {
		return nil, strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")
	}
	delete(patch, "apiVersion") // which they are is known
	delete(patch, "kind")
	if bad := settable[k].other(patch, ""); bad != "" {
		return nil, bad + " cannot be set"
	}
	for _, at := range [][]string{{"metadata", "labels"}, {"spec", "template", "metadata", "labels"}} {
		labels, _ := below(patch, at...).(map[string]any)
		for _, l := range slices.Sorted(maps.Keys(labels)) {
			if ours(l) {
				return nil, fmt.Sprintf("%s: the label %s says what the mesh makes of it and cannot be set", strings.Join(at, "."), l)
			}
		}
	}
	containers, _ := below(patch, "spec", "template", "spec", "containers").([]any)
	for _, c := range containers {
		if name := below(c, "name"); name != "istio-proxy" {
			return nil, fmt.Sprintf("spec.template.spec.containers: %v is no container of it; istio-proxy is", name)
		}
	}
	ports, _ := below(patch, "spec", "ports").([]any)
	plain := []any{}
	for _, o := range ports {
		switch directive := below(o, "$patch"); {
		case directive == nil:
			plain = append(plain, o)
		case directive != "delete" || fmt.Sprint(below(o, "port")) != fmt.Sprint(statusPort):
			return nil, fmt.Sprintf("spec.ports: only port %d can be taken away, by $patch: delete; the others are listeners of the Gateway", statusPort)
		}
	}
	check := patch
	if len(plain) < len(ports) {
		spec := maps.Clone(patch["spec"].(map[string]any))
		spec["ports"] = plain
		check = maps.Clone(patch)
		check["spec"] = spec
	}
	if problem := typed(k, check); problem != "" {
		return nil, problem
	}
	return patch, ""
}

// typed says what the API server would not understand.
func typed(k kind, patch object) string {
	b, err := json.Marshal(patch)
	if err != nil {
		return err.Error()
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err = d.Decode(reflect.New(reflect.TypeOf(shapes[k])).Interface())
	if err != nil {
		return strings.TrimPrefix(err.Error(), "json: ")
	}
	return ""
}

// ours reports whether a label is one by which the mesh, or a selector, knows what it made.
func ours(label string) bool {
	for _, prefix := range []string{"gateway.networking.k8s.io/", "gateway.istio.io/"} {
		if strings.HasPrefix(label, prefix) {
			return true
		}
	}
	return slices.Contains([]string{"istio.io/dataplane-mode", "networking.istio.io/tunnel", "sidecar.istio.io/inject", "istio.io/use-waypoint", "istio.io/rev"}, label)
}

// below is what stands at a path of objects; nil for nothing.
func below(o any, path ...string) any {
	for _, step := range path {
		m, ok := o.(map[string]any)
		if !ok {
			return nil
		}
		o = m[step]
	}
	return o
}

// wishes are the Parameters that hold for one Gateway, those of its class first.
type wishes []*Parameters

// wishes finds what holds for a Gateway; known is false while it is not known what the ConfigMap says.
func (d *Deployer) wishes(g *gatewayv1.Gateway) (all wishes, problem string, known bool) {
	if d.Parameters == nil {
		return nil, "", true
	}
	class := string(g.Spec.GatewayClassName)
	defaults, known := d.Parameters.Defaults(class)
	if !known {
		return nil, "", false
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(defaults)) {
		names = append(names, name)
		if p := defaults[name]; p.problem != "" {
			problem = fmt.Sprintf("defaults of the class %s, ConfigMap %s: %s", class, name, p.problem)
		}
		all = append(all, defaults[name])
	}
	if len(names) > 1 {
		problem = fmt.Sprintf("the ConfigMaps %s both hold the defaults of the class %s: take the label %s from all but one", strings.Join(names, " and "), class, LabelDefaults)
	}
	if g.Spec.Infrastructure == nil || g.Spec.Infrastructure.ParametersRef == nil {
		return all, problem, true
	}
	ref := g.Spec.Infrastructure.ParametersRef
	if ref.Group != "" || ref.Kind != "ConfigMap" {
		return all, fmt.Sprintf("infrastructure.parametersRef: %s of group %q cannot say what is made; a ConfigMap of group \"\" can", ref.Kind, ref.Group), true
	}
	p, known := d.Parameters.Get(ParametersKey{g.Namespace, ref.Name})
	switch {
	case !known:
		return nil, "", false
	case p == nil:
		return all, fmt.Sprintf("infrastructure.parametersRef: there is no ConfigMap %s/%s", g.Namespace, ref.Name), true
	case p.problem != "":
		return all, fmt.Sprintf("infrastructure.parametersRef: ConfigMap %s/%s: %s", g.Namespace, ref.Name, p.problem), true
	}
	return append(all, p), problem, true
}

// version is another wherever one of them is.
func (w wishes) version() string {
	var all []string
	for _, p := range w {
		all = append(all, p.version)
	}
	return strings.Join(all, " ")
}

// says returns what they say at a path of an object, the last of them first; nil where none does.
func (w wishes) says(k kind, path ...string) any {
	for _, p := range slices.Backward(w) {
		if v := below(p.patches[k], path...); v != nil {
			return v
		}
	}
	return nil
}

// serviceType is what a Gateway's Service is to be; "" where nobody has said.
func (w wishes) serviceType(g *gatewayv1.Gateway) string {
	if t, ok := w.says(service, "spec", "type").(string); ok {
		return t
	}
	return g.Annotations[annotationType]
}

// scaled reports whether how many pods there are is said by a HorizontalPodAutoscaler.
func (w wishes) scaled() bool {
	return slices.ContainsFunc(w, func(p *Parameters) bool { return len(p.patches[autoscaler]) > 0 })
}

// on lays what they say on a manifest.
func (w wishes) on(m manifest) (manifest, error) {
	if !slices.ContainsFunc(w, func(p *Parameters) bool { return len(p.patches[m.kind]) > 0 }) {
		return m, nil
	}
	if m.kind == budget && w.says(budget, "spec", "minAvailable") != nil { // one or the other
		delete(m.body["spec"].(object), "maxUnavailable")
	}
	now, err := json.Marshal(m.body)
	for _, p := range w {
		if len(p.patches[m.kind]) == 0 || err != nil {
			continue
		}
		var patch []byte
		if patch, err = json.Marshal(p.patches[m.kind]); err == nil {
			now, err = strategicpatch.StrategicMergePatch(now, patch, shapes[m.kind])
		}
	}
	var body object
	if err == nil {
		err = json.Unmarshal(now, &body)
	}
	if err != nil {
		return m, fmt.Errorf("parameters of %s: %w", m.body["kind"], err)
	}
	if m.kind == deployment {
		if w.scaled() {
			delete(body["spec"].(object), "replicas")
		}
		drainWithin(body)
	}
	return manifest{m.kind, body}, nil
}

// drainWithin has the pods of a Deployment end their connections within the time that they have to end.
func drainWithin(deployment object) {
	pod := below(deployment, "spec", "template", "spec")
	grace, ok := below(pod, "terminationGracePeriodSeconds").(float64)
	containers, _ := below(pod, "containers").([]any)
	if !ok || len(containers) == 0 {
		return
	}
	env, _ := below(containers[0], "env").([]any)
	for _, e := range env {
		if below(e, "name") == drainVariable {
			e.(object)["value"] = fmt.Sprint(max(1, int(grace)-(terminateWithin-drainSeconds)))
		}
	}
}

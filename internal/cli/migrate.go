package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/cli/release"
)

func (a *app) migrateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "migrate", Short: "Come from Istio's ambient mode", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.migrateBegin(), a.migrateNode(), a.migrateStatus(), a.migrateFinish(), &cobra.Command{
		Use: "check", Short: "Say what would differ if Warren were in the place of the Istio that is installed",
		Long: "Say what would differ if Warren were in the place of the Istio that is installed: what it reads of the mesh's configuration, which\n" +
			"objects and fields it does not follow, which pods it leaves alone. Nothing in the cluster is changed.\n\n" +
			"Exit code 3: something is in the way, or is refused.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			findings, err := a.migration(cmd.Context(), c)
			if err != nil {
				return err
			}
			return a.report(findings)
		},
	})
	return cmd
}

// errNoIstio is returned where there is nothing to come from.
var errNoIstio = errors.New("there is no Istio control plane (a Deployment with the label app=istiod that is not Warren's) in this cluster: nothing to migrate")

func (a *app) migration(ctx context.Context, c *conn) ([]finding, error) {
	if a.env.Analyze == nil {
		return nil, errors.New("this program was built without the analyzer")
	}
	v, err := c.Discovery().ServerVersion()
	if err != nil {
		return nil, fmt.Errorf("reaching the cluster: %w", err)
	}
	control, err := istioControls(ctx, c)
	if err != nil {
		return nil, err
	}
	if len(control) == 0 {
		return nil, errNoIstio
	}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	root := control[0].Namespace
	out := []finding{kubernetesVersion(v.Major, v.Minor, v.GitVersion), checkNodes(nodes.Items), istioVersions(control), istioPlace(root, a.namespace)}
	data, err := istioDataPlane(ctx, c)
	if err != nil {
		return nil, err
	}
	out = append(out, data...)
	settings, config, err := istioConfig(ctx, c, root)
	if err != nil {
		return nil, err
	}
	out = append(out, config...)
	p := a.progress()
	p.now("reading the cluster")
	objects, err := a.clusterObjects(ctx, c)
	if err != nil {
		return nil, err
	}
	p.clear()
	out = append(out, istioPods(objects)...)
	out = append(out, istioObjects(objects)...)
	wrong, err := a.env.Analyze(root, settings, objects, true)
	if err != nil {
		return nil, err
	}
	for _, f := range wrong {
		result, name := "warning", f.Name
		if f.Severity == "error" {
			result = "failed"
		}
		if f.Namespace != "" {
			name = f.Namespace + "/" + f.Name
		}
		field := f.Field
		if field != "" {
			field += ": "
		}
		out = append(out, finding{f.Kind + " " + name, result, field + f.Message, "docs/analyze.md: " + f.Code})
	}
	return out, nil
}

func istioVersions(control []appsv1.Deployment) finding {
	var all []string
	for _, d := range control {
		tag := "of no version"
		if len(d.Spec.Template.Spec.Containers) > 0 {
			image := d.Spec.Template.Spec.Containers[0].Image
			if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
				tag = image[i+1:]
			}
		}
		all = append(all, fmt.Sprintf("%s/%s, %s", d.Namespace, d.Name, tag))
	}
	slices.Sort(all)
	if len(all) > 1 {
		return finding{"istio", "warning", plural(len(all), "control plane") + ": " + strings.Join(all, "; "), "Warren replaces all revisions at once"}
	}
	return finding{"istio", "ok", all[0], ""}
}

// istioPlace tells whether the root key, and what is of the root namespace, stay where they are.
func istioPlace(root, ours string) finding {
	if root != ours {
		return finding{"certificates", "warning", "Istio is in " + root + ": its root key and the policies of the whole mesh are there, and not in " + ours,
			"install with -n " + root}
	}
	return finding{"certificates", "ok", "a root key in the Secret cacerts or istio-ca-secret of " + root + " is taken over, so that certificates of both are trusted", ""}
}

// istioDataPlane says who captures pods now.
func istioDataPlane(ctx context.Context, c *conn) ([]finding, error) {
	sets, err := istioSets(ctx, c)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, d := range sets {
		found = append(found, setName(&d))
	}
	if len(found) == 0 {
		return []finding{{"data plane", "warning", "no ztunnel runs here: this Istio captures pods with sidecars alone", "see pods with sidecars below"}}, nil
	}
	return []finding{{"data plane", "ok", "Istio captures pods: " + strings.Join(found, ", "), "node by node they leave it to Warren: warren migrate begin, then warren migrate node"}}, nil
}

// istioConfig reads the mesh's configuration, and says what of it has no effect here.
func istioConfig(ctx context.Context, c *conn, root string) (map[string]string, []finding, error) {
	cm, err := c.CoreV1().ConfigMaps(root).Get(ctx, "istio", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, []finding{{"mesh configuration", "warning", "there is no ConfigMap istio in " + root, "only the control plane of the revision default is looked at"}}, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading the mesh's configuration: %w", err)
	}
	ignored, err := ignoredMeshConfig(root, cm.Data["mesh"])
	if err != nil {
		return nil, nil, err
	}
	var out []finding
	for _, s := range ignored {
		out = append(out, finding{"mesh configuration", "warning", s, ""})
	}
	if severalNetworks(cm) {
		out = append(out, finding{"networks", "failed", "the mesh has more than one network (key meshNetworks)", "Warren has one cluster and one network"})
	}
	if len(out) == 0 {
		out = append(out, finding{"mesh configuration", "ok", "all of it is followed", "hand it over: warren install --set-string mesh.trustDomain=…, or -f with an IstioOperator"})
	}
	return cm.Data, out, nil
}

// severalNetworks reports whether the mesh's configuration has networks, or cannot be read there.
func severalNetworks(cm *corev1.ConfigMap) bool {
	var m struct{ Networks map[string]any }
	err := yaml.Unmarshal([]byte(cm.Data["meshNetworks"]), &m)
	return err != nil || len(m.Networks) > 0
}

// ignoredMeshConfig is what of the mesh's configuration has no effect here, each with why.
func ignoredMeshConfig(root, text string) ([]string, error) {
	mesh, err := readMeshConfig(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: root, Name: "istio"}, Data: map[string]string{"mesh": text}})
	if err != nil {
		return nil, err
	}
	return release.IgnoredMeshConfig(mesh), nil
}

// istioPods counts who is captured, and names who has a sidecar.
func istioPods(objects []Analyzed) []finding {
	captured := 0
	sidecars := map[string]int{}
	for _, o := range objects {
		if o.GetKind() != "Pod" {
			continue
		}
		if o.GetAnnotations()[redirection] == "enabled" {
			captured++
		}
		if hasSidecar(o) {
			sidecars[o.GetNamespace()]++
		}
	}
	out := []finding{{"pods", "ok", plural(captured, "pod") + " captured by Istio's ztunnel; the labels that ask for it are Warren's too", ""}}
	if len(sidecars) > 0 {
		var names []string
		for _, ns := range slices.Sorted(maps.Keys(sidecars)) {
			names = append(names, fmt.Sprintf("%s (%d)", ns, sidecars[ns]))
		}
		out = append(out, finding{"pods with sidecars", "warning", "in " + some(names) + ": Warren leaves them alone, and no control plane would configure their Envoys",
			"move them to ambient mode first: take the injection label away, set istio.io/dataplane-mode=ambient, and restart them"})
	}
	return out
}

// hasSidecar tells whether a pod that is not a gateway's has Istio's proxy in it.
func hasSidecar(o Analyzed) bool {
	if o.GetLabels()[gatewayLabel] != "" || o.GetLabels()["istio"] != "" {
		return false
	}
	spec, _ := o.Object["spec"].(map[string]any)
	for _, field := range []string{"containers", "initContainers"} {
		list, _ := spec[field].([]any)
		for _, c := range list {
			if m, ok := c.(map[string]any); ok && m["name"] == "istio-proxy" {
				return true
			}
		}
	}
	return false
}

const servicesAlone = "Warren's waypoints take what is sent to Services"

// notFollowed are kinds of Istio that Warren does not look at, and what to do.
var notFollowed = map[string]string{
	"Sidecar":          "there are no sidecars",
	"ProxyConfig":      "there are no sidecars",
	"WorkloadGroup":    "there are no machines outside of Kubernetes",
	"TrafficExtension": "extensions of Envoy are not loaded",
}

// partlyFollowed are kinds of Istio of which an object may do here what it did there, or not, and how to learn it.
var partlyFollowed = map[string]string{
	"WasmPlugin":  "warren analyze says which are refused: modules are fetched by https or from images that need no imagePullSecret, not from files, and without its module a plugin has requests answered with 503 but for failStrategy FAIL_OPEN; those of sidecars run nowhere, and for a waypoint there have to be targetRefs",
	"EnvoyFilter": "warren analyze says which patches are refused; those of sidecars change nothing, and for a waypoint there have to be targetRefs",
}

// istioObjects says of which objects Warren does nothing with all.
func istioObjects(objects []Analyzed) []finding {
	kinds := map[string][]string{}
	var waypoints int
	var out []finding
	for _, o := range objects {
		name := o.GetNamespace() + "/" + o.GetName()
		if notFollowed[o.GetKind()]+partlyFollowed[o.GetKind()] != "" && strings.HasSuffix(o.GroupVersionKind().Group, ".istio.io") {
			kinds[o.GetKind()] = append(kinds[o.GetKind()], name)
		}
		if o.GetKind() != "Gateway" || o.GroupVersionKind().Group != "gateway.networking.k8s.io" {
			continue
		}
		spec, _ := o.Object["spec"].(map[string]any)
		switch class, _ := spec["gatewayClassName"].(string); class {
		case "istio-waypoint":
			waypoints++
			switch takes := o.GetLabels()[forLabel]; takes {
			case "workload":
				out = append(out, finding{"Gateway " + name, "failed", "it takes what is sent to pods themselves (" + forLabel + "=workload)", servicesAlone})
			case "all":
				out = append(out, finding{"Gateway " + name, "warning", "what is sent to pods themselves goes past it (" + forLabel + "=all)", servicesAlone})
			}
		case "istio-east-west", "istio-remote":
			out = append(out, finding{"Gateway " + name, "failed", "the class " + class + " joins clusters", "Warren has one cluster"})
		}
	}
	if waypoints > 0 {
		out = append(out, finding{"waypoints", "ok", plural(waypoints, "waypoint") + ": Warren's control plane runs them with its own image, and what they serve is refused until they are there", ""})
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		slices.Sort(kinds[kind])
		if how := partlyFollowed[kind]; how != "" {
			out = append(out, finding{kind, "warning", "followed at waypoints and gateways alone, and not in all: " + some(kinds[kind]), how})
			continue
		}
		out = append(out, finding{kind, "warning", "of no effect: " + some(kinds[kind]), notFollowed[kind]})
	}
	return out
}

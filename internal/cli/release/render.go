package release

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/loader/archive"
	chartv2 "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	helmrelease "helm.sh/helm/v4/pkg/release/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/charts"
	"github.com/warrenmesh/warren/internal/build"
	"github.com/warrenmesh/warren/internal/revision"
)

// Name is the release's, as Helm lists it, and begins the names of those of control planes beside the mesh's.
const Name = "warren"

// NameOf is the name of the release of a revision.
func NameOf(rev string) string { return Name + revision.Suffix(rev) }

// RevisionOf is the revision that values are for.
func RevisionOf(values map[string]any) string {
	rev, _ := values["revision"].(string)
	return cmp.Or(rev, revision.Default)
}

// BesideIstio reports whether values are for the time in which Istio captures the pods of some nodes and Warren those of others.
func BesideIstio(values map[string]any) bool {
	m, _ := values["besideIstio"].(map[string]any)
	on, _ := m["enabled"].(bool)
	return on
}

const hookAnnotation = "helm.sh/hook"

// newest is the version of Kubernetes that a manifest is for where none is named.
const newest = "v1.37.0"

// Target is what the chart is rendered for.
type Target struct {
	Namespace string
	Revision  int // 1 installs
	// Config is the cluster that the templates may look things up in; nil for none.
	Config *rest.Config
	// Version and APIs are the cluster's; "" and nil for the newest that this program knows.
	Version string
	APIs    []string
}

// Rendered is what the chart yields.
type Rendered struct {
	Objects []*unstructured.Unstructured // in the order in which they are applied
	Hooks   []*helmrelease.Hook
	Notes   string
}

// chart loads the chart of this program.
func chart() (*chartv2.Chart, error) {
	var files []*archive.BufferedFile
	err := fs.WalkDir(charts.Files, "warren", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := charts.Files.ReadFile(p)
		files = append(files, &archive.BufferedFile{Name: strings.TrimPrefix(p, "warren/"), Data: b})
		return err
	})
	if err != nil {
		return nil, err
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		return nil, err
	}
	Stamp(c, build.Version)
	return c, nil
}

// Stamp makes a chart one of a version of Warren, whose images it installs. Helm wants a chart's own version
// without the v.
func Stamp(c *chartv2.Chart, version string) {
	c.Metadata.AppVersion = version
	if v, released := strings.CutPrefix(version, "v"); released {
		c.Metadata.Version = v
	}
}

// Render renders the chart. The values have been checked by [Sources.Values].
func Render(values map[string]any, t Target) (*Rendered, error) {
	c, err := chart()
	if err != nil {
		return nil, fmt.Errorf("loading the chart: %w", err)
	}
	caps := common.DefaultCapabilities.Copy()
	v, err := common.ParseKubeVersion(cmp.Or(t.Version, newest))
	if err != nil {
		return nil, fmt.Errorf("reading the version of Kubernetes %q: %w", t.Version, err)
	}
	caps.KubeVersion = *v
	if minor, err := strconv.Atoi(caps.KubeVersion.Minor); err == nil && minor >= 30 {
		caps.APIVersions = append(caps.APIVersions, "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy")
	}
	if t.APIs != nil {
		caps.APIVersions = t.APIs
	}
	all, err := util.ToRenderValues(c, clone(values), common.ReleaseOptions{
		Name: NameOf(RevisionOf(values)), Namespace: t.Namespace, Revision: max(1, t.Revision), IsInstall: t.Revision <= 1, IsUpgrade: t.Revision > 1}, caps)
	if err != nil {
		return nil, err
	}
	var e engine.Engine
	if t.Config != nil {
		e = engine.New(t.Config)
	}
	files, err := e.Render(c, all)
	if err != nil {
		return nil, fmt.Errorf("rendering the chart: %w", err)
	}
	out := &Rendered{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, "/NOTES.txt") {
			out.Notes = files[name]
			continue
		}
		if err := out.add(name, files[name]); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	slices.SortStableFunc(out.Objects, func(a, b *unstructured.Unstructured) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.GetKind(), b.GetKind()), cmp.Compare(a.GetName(), b.GetName()))
	})
	slices.SortStableFunc(out.Hooks, func(a, b *helmrelease.Hook) int { return cmp.Compare(a.Weight, b.Weight) })
	return out, nil
}

// add splits a rendered file into objects.
func (r *Rendered) add(name, text string) error {
	for doc := range strings.SplitSeq("\n"+text, "\n---") {
		fields, err := read(doc)
		if err != nil {
			return err
		}
		if len(fields) == 0 {
			continue
		}
		o := &unstructured.Unstructured{Object: fields}
		if o.GetKind() == "" || o.GetName() == "" {
			return errors.New("an object has no kind or no name")
		}
		events := o.GetAnnotations()[hookAnnotation]
		if events == "" {
			r.Objects = append(r.Objects, o)
			continue
		}
		h := &helmrelease.Hook{Name: o.GetName(), Kind: o.GetKind(), Path: name, Manifest: strings.TrimSpace(doc) + "\n"}
		for e := range strings.SplitSeq(events, ",") {
			h.Events = append(h.Events, helmrelease.HookEvent(strings.TrimSpace(e)))
		}
		for p := range strings.SplitSeq(o.GetAnnotations()[helmrelease.HookDeleteAnnotation], ",") {
			h.DeletePolicies = append(h.DeletePolicies, helmrelease.HookDeletePolicy(strings.TrimSpace(p)))
		}
		h.Weight, _ = strconv.Atoi(o.GetAnnotations()[helmrelease.HookWeightAnnotation])
		r.Hooks = append(r.Hooks, h)
	}
	return nil
}

// definitions are CustomResourceDefinitions that have been read, by their text: they make nine tenths of a manifest, and each
// revision in a release's record has them.
var definitions sync.Map // string → map[string]any, which nobody changes

// read reads one document.
func read(doc string) (map[string]any, error) {
	doc = strings.TrimSpace(doc)
	if fields, ok := definitions.Load(doc); ok {
		return runtime.DeepCopyJSON(fields.(map[string]any)), nil
	}
	var fields map[string]any
	if err := yaml.Unmarshal([]byte(doc), &fields); err != nil {
		return nil, err
	}
	if fields["kind"] == "CustomResourceDefinition" {
		definitions.Store(doc, runtime.DeepCopyJSON(fields))
	}
	return fields, nil
}

// order is in which kinds are applied: each after what it needs.
var order = []string{"Namespace", "ResourceQuota", "NetworkPolicy", "CustomResourceDefinition", "ServiceAccount", "Secret", "ConfigMap", "ClusterRole", "ClusterRoleBinding",
	"Role", "RoleBinding", "Service", "PodDisruptionBudget", "Deployment", "DaemonSet"}

func rank(o *unstructured.Unstructured) int {
	if i := slices.Index(order, o.GetKind()); i >= 0 {
		return i
	}
	return len(order)
}

// NamespaceObject is the namespace of the control plane.
func NamespaceObject(name string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name},
	}}
}

// Manifest writes objects as one stream of YAML.
func Manifest(objects []*unstructured.Unstructured) ([]byte, error) {
	var out bytes.Buffer
	for _, o := range objects {
		b, err := yaml.Marshal(o.Object)
		if err != nil {
			return nil, fmt.Errorf("writing %s: %w", Describe(o), err)
		}
		out.WriteString("---\n")
		out.Write(b)
	}
	return out.Bytes(), nil
}

// Parse reads what Manifest or Helm wrote.
func Parse(manifest string) ([]*unstructured.Unstructured, error) {
	var r Rendered
	if err := r.add("the manifest", manifest); err != nil {
		return nil, err
	}
	return r.Objects, nil
}

// Describe names an object in messages.
func Describe(o *unstructured.Unstructured) string {
	if ns := o.GetNamespace(); ns != "" {
		return o.GetKind() + " " + ns + "/" + o.GetName()
	}
	return o.GetKind() + " " + o.GetName()
}

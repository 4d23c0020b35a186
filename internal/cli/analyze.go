package cli

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"sigs.k8s.io/yaml"
)

// Finding is one thing that is wrong with an object.
type Finding struct {
	Severity  string `json:"severity"` // error or warning
	Code      string `json:"code"`     // docs/analyze.md
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	Field     string `json:"field,omitempty"`
	Message   string `json:"message"`
	File      string `json:"file,omitempty"`
}

// Analyzed is an object and where it stands; File is "" for the cluster's.
type Analyzed struct {
	*unstructured.Unstructured
	File string
}

// Analyzer says what is wrong with objects. mesh are the data of the mesh's ConfigMap. With whole, objects are all that there is.
type Analyzer func(rootNamespace string, mesh map[string]string, objects []Analyzed, whole bool) ([]Finding, error)

func (a *app) analyzeCommand() *cobra.Command {
	var kube, recursive bool
	var threshold string
	var namespaces []string
	cmd := &cobra.Command{
		Use: "analyze [FILE|DIRECTORY...]", Short: "Say what is wrong with the mesh's objects, in files and in the cluster",
		Long: "Say what is wrong with the mesh's objects, in files and in the cluster.\n\n" +
			"Without files, with those of the cluster. With files, with what they would be in the cluster, if they were applied;\n" +
			"with --use-kube=false by themselves, where what they name may be elsewhere. docs/analyze.md explains the codes.",
		Args: args(cobra.ArbitraryArgs),
		RunE: func(cmd *cobra.Command, files []string) error {
			if threshold != "error" && threshold != "warning" {
				return usageError{fmt.Errorf("--failure-threshold %s is neither error nor warning", threshold)}
			}
			if !kube && len(files) == 0 {
				return usageError{errors.New("without the cluster there is nothing to look at: name files")}
			}
			if a.env.Analyze == nil {
				return errors.New("this program was built without the analyzer")
			}
			return a.analyze(cmd, files, kube, recursive, threshold, namespaces)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&kube, "use-kube", "k", true, "read the objects of the cluster too")
	f.BoolVarP(&recursive, "recursive", "R", false, "of directories, also those inside of them")
	f.StringVar(&threshold, "failure-threshold", "error", "exit with 3 from this severity on: error or warning")
	f.StringSliceVar(&namespaces, "only", nil, "print only findings about objects of these namespaces")
	_ = cmd.RegisterFlagCompletionFunc("failure-threshold", cobra.FixedCompletions([]string{"error", "warning"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) analyze(cmd *cobra.Command, files []string, kube, recursive bool, threshold string, namespaces []string) error {
	var given []Analyzed
	for _, name := range files {
		objects, err := readObjects(cmd.InOrStdin(), name, recursive)
		if err != nil {
			return err
		}
		given = append(given, objects...)
	}
	var objects []Analyzed
	var settings map[string]string
	if kube {
		c, err := a.connect(a)
		if err != nil {
			return err
		}
		p := a.progress()
		p.now("reading the cluster")
		if objects, err = a.clusterObjects(cmd.Context(), c); err != nil {
			return err
		}
		cm, err := c.CoreV1().ConfigMaps(a.namespace).Get(cmd.Context(), "istio", metav1.GetOptions{})
		switch {
		case err == nil:
			settings = cm.Data
		case !apierrors.IsNotFound(err):
			return fmt.Errorf("reading the mesh's configuration: %w", err)
		}
		p.clear()
	}
	findings, err := a.env.Analyze(a.namespace, settings, over(objects, given, kube), kube)
	if err != nil {
		return err
	}
	ofMesh, err := meshFindings(a.namespace, settings["mesh"])
	if err != nil {
		return err
	}
	findings = append(findings, ofMesh...)
	findings = slices.DeleteFunc(findings, func(f Finding) bool {
		of := f.Namespace
		if f.Kind == "Namespace" {
			of = f.Name
		}
		return len(namespaces) > 0 && !slices.Contains(namespaces, of) || len(files) > 0 && f.File == ""
	})
	if err := a.print(slices.Concat([]Finding{}, findings), func(w io.Writer) error { return a.printAnalysis(w, findings, len(objects)+len(given)) }); err != nil {
		return err
	}
	if slices.ContainsFunc(findings, func(f Finding) bool { return f.Severity == "error" || f.Severity == threshold }) {
		return errFound
	}
	return nil
}

// meshFindings are about the mesh's configuration.
func meshFindings(root, text string) ([]Finding, error) {
	ignored, err := ignoredMeshConfig(root, text)
	var out []Finding
	for _, s := range ignored {
		out = append(out, Finding{Severity: "warning", Code: "partly-ignored", Kind: "ConfigMap", Namespace: root, Name: "istio", Field: "mesh", Message: s})
	}
	return out, err
}

func (a *app) printAnalysis(w io.Writer, findings []Finding, looked int) error {
	if len(findings) == 0 {
		fmt.Fprintf(w, "nothing is wrong with %s\n", plural(looked, "object"))
		return nil
	}
	for _, f := range findings {
		colour := yellow
		if f.Severity == "error" {
			colour = red
		}
		name := f.Name
		if f.Namespace != "" {
			name = f.Namespace + "/" + f.Name
		}
		if f.File != "" {
			name += " in " + f.File
		}
		field := f.Field
		if field != "" {
			field += ": "
		}
		fmt.Fprintf(w, "%s %s %s: %s%s (%s)\n", a.paint(colour, f.Severity), f.Kind, name, field, f.Message, f.Code)
	}
	return nil
}

// over puts what is given in the place of what is there. What is given without a namespace is of default, as kubectl has it.
func over(there, given []Analyzed, whole bool) []Analyzed {
	key := func(o Analyzed) string {
		return strings.Join([]string{o.GetKind(), o.GroupVersionKind().Group, o.GetNamespace(), o.GetName()}, "\x00")
	}
	replaced := map[string]bool{}
	for _, o := range given {
		replaced[key(o)] = true
	}
	if !whole {
		return given
	}
	return append(slices.DeleteFunc(there, func(o Analyzed) bool { return replaced[key(o)] }), given...)
}

// clusterScoped are the kinds that have no namespace, of those that are looked at.
var clusterScoped = []string{"Namespace", "Node", "GatewayClass", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"}

// readObjects reads a file or a directory, or standard input for "-".
func readObjects(in io.Reader, name string, recursive bool) ([]Analyzed, error) {
	if name == "-" {
		b, err := io.ReadAll(in)
		if err != nil {
			return nil, err
		}
		return parseObjects(name, b)
	}
	var out []Analyzed
	err := filepath.WalkDir(name, func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && p != name && !recursive:
			return filepath.SkipDir
		case d.IsDir():
			return nil
		case p != name && !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(p)):
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		objects, err := parseObjects(p, b)
		out = append(out, objects...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading objects: %w", err)
	}
	return out, nil
}

func parseObjects(name string, b []byte) ([]Analyzed, error) {
	var out []Analyzed
	for doc := range documents(b) {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(doc, &o.Object); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if len(o.Object) == 0 {
			continue
		}
		if o.GetKind() == "" || o.GetAPIVersion() == "" {
			return nil, fmt.Errorf("%s: an object has no kind or no apiVersion", name)
		}
		items := []*unstructured.Unstructured{o}
		if o.IsList() {
			items = nil
			if err := o.EachListItem(func(i runtime.Object) error {
				items = append(items, i.(*unstructured.Unstructured))
				return nil
			}); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		for _, o := range items {
			if o.GetNamespace() == "" && !slices.Contains(clusterScoped, o.GetKind()) {
				o.SetNamespace("default")
			}
			out = append(out, Analyzed{o, name})
		}
	}
	return out, nil
}

// listed is a resource and its kind.
type listed struct {
	schema.GroupVersionResource
	kind string
}

// clusterObjects reads what the mesh is made from: pods, Services, and all of Istio's kinds and the Gateway API's.
func (a *app) clusterObjects(ctx context.Context, c *conn) ([]Analyzed, error) {
	kinds := []listed{
		{schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}, "Namespace"},
		{schema.GroupVersionResource{Version: "v1", Resource: "pods"}, "Pod"},
		{schema.GroupVersionResource{Version: "v1", Resource: "services"}, "Service"},
		{schema.GroupVersionResource{Version: "v1", Resource: "nodes"}, "Node"},
		{schema.GroupVersionResource{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"}, "EndpointSlice"},
	}
	_, lists, err := c.Discovery().ServerGroupsAndResources()
	if err != nil && !discovery.IsGroupDiscoveryFailedError(err) { // of others' API servers
		return nil, fmt.Errorf("asking what the cluster has: %w", err)
	}
	chosen := map[string]string{} // group/resource → version
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil || !strings.HasSuffix(gv.Group, ".istio.io") && gv.Group != "gateway.networking.k8s.io" {
			continue
		}
		for _, r := range l.APIResources {
			k := gv.Group + "/" + r.Name
			if strings.Contains(r.Name, "/") || !slices.Contains(r.Verbs, "list") || chosen[k] == "v1" || chosen[k] != "" && gv.Version != "v1" {
				continue
			}
			kinds = slices.DeleteFunc(kinds, func(have listed) bool { return have.Group == gv.Group && have.Resource == r.Name })
			chosen[k] = gv.Version
			kinds = append(kinds, listed{gv.WithResource(r.Name), r.Kind})
		}
	}
	var out []Analyzed
	for _, k := range kinds {
		list, err := c.objects.Client.Resource(k.GroupVersionResource).List(ctx, metav1.ListOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing %s: %w", cmp.Or(k.Resource, k.kind), err)
		}
		for i := range list.Items {
			o := &list.Items[i]
			if o.GetKind() == "" { // of a list, the items may be without
				o.SetGroupVersionKind(k.GroupVersion().WithKind(k.kind))
			}
			out = append(out, Analyzed{o, ""})
		}
	}
	return out, nil
}

// documents yields the parts of a stream of YAML.
func documents(b []byte) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for doc := range bytes.SplitSeq(append([]byte("\n"), b...), []byte("\n---")) {
			if len(bytes.TrimSpace(doc)) > 0 && !yield(doc) {
				return
			}
		}
	}
}

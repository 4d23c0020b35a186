package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// revisionFlag is what a command line needs for a revision, "" for the mesh's.
func revisionFlag(rev string) string {
	if rev == revision.Default {
		return ""
	}
	return " --revision " + rev
}

// ofRelease begins what is said of a release that is not the mesh's.
func ofRelease(rev string) string {
	if rev == revision.Default {
		return ""
	}
	return release.NameOf(rev) + ": "
}

// joinedMesh is the mesh that a control plane joins: nil for the mesh's own.
type joinedMesh struct {
	values map[string]any // of its release; nil where it is not known
	known  bool
}

// joined finds the mesh that the control plane of a revision is for. It has to be there: it has the root of trust, the
// definitions and the agents.
func (a *app) joined(ctx context.Context, c *conn, rev string) (*joinedMesh, error) {
	if rev == revision.Default {
		return nil, nil
	}
	known, err := a.revisions(ctx, c)
	if err != nil {
		return nil, err
	}
	if to, ok := known.Tags[rev]; ok {
		return nil, fmt.Errorf("%s is the name of a tag in %s, of revision %s: choose another, or take the tag away", rev, a.namespace, to)
	}
	history, err := release.Records{Client: c, Namespace: a.namespace}.List(ctx)
	if err != nil {
		return nil, err
	}
	if mesh := release.InForce(history); mesh != nil {
		return &joinedMesh{values: mesh.Config, known: true}, nil
	}
	controls, err := a.controls(ctx, c)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(controls, func(d appsv1.Deployment) bool { return d.Labels[revision.Label] == revision.Default }) {
		return nil, fmt.Errorf("there is no mesh in %s for a control plane of revision %s to join: %s install comes first, without a revision", a.namespace, rev, a.name())
	}
	return &joinedMesh{}, nil // applied by kubectl, say
}

// config is what a control plane's release begins with: what the mesh's was set to, but for what has only that.
func (m *joinedMesh) config() map[string]any {
	if m == nil {
		return nil
	}
	out := map[string]any{}
	for k, v := range m.values {
		if !slices.Contains([]string{"node", "holder", "crds", "admission", "resourceQuotas", "securityContextConstraints"}, k) {
			out[k] = v
		}
	}
	return out
}

// fits refuses values with which two control planes would tell the mesh two things.
func (m *joinedMesh) fits(values map[string]any) error {
	if m == nil || !m.known {
		return nil
	}
	theirs, err := release.Complete(m.values)
	if err != nil {
		return err
	}
	ours, err := release.Complete(values)
	if err != nil {
		return err
	}
	var differ []string
	for _, row := range release.Diff(theirs, ours) {
		part, _, _ := strings.Cut(row.Path, ".")
		if slices.Contains([]string{"mesh", "ca", "compat"}, part) {
			differ = append(differ, fmt.Sprintf("%s (%s, of the mesh %s)", row.Path, dash(row.Right), dash(row.Left)))
		}
	}
	if len(differ) > 0 {
		return fmt.Errorf("%s: the control planes of a mesh have these in common; leave them out here", strings.Join(differ, ", "))
	}
	return nil
}

// controls lists the Deployments of Warren's control planes in their namespace.
func (a *app) controls(ctx context.Context, c *conn) ([]appsv1.Deployment, error) {
	list, err := c.AppsV1().Deployments(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: controlSelector})
	if err != nil {
		return nil, fmt.Errorf("reading the control planes in %s: %w", a.namespace, err)
	}
	return slices.DeleteFunc(list.Items, func(d appsv1.Deployment) bool { return !isOurs(d.Labels) }), nil
}

// revisions reads which control planes and tags there are.
func (a *app) revisions(ctx context.Context, c *conn) (revision.Known, error) {
	list, err := c.CoreV1().Services(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: revision.Label})
	if err != nil {
		return revision.Known{}, fmt.Errorf("reading the control planes and tags in %s: %w", a.namespace, err)
	}
	var services []revision.Service
	for _, s := range list.Items {
		services = append(services, s.Labels)
	}
	return revision.Read(services), nil
}

// owned is a Gateway and what it asks for.
type owned struct {
	namespace, name string
	asked           string
	owner, problem  string
}

func (o owned) String() string { return o.namespace + "/" + o.name }

// owners tells of all Gateways that Warren makes whose they are, and by which revisions and tags.
func (a *app) owners(ctx context.Context, c *conn) ([]owned, revision.Known, error) {
	known, err := a.revisions(ctx, c)
	if err != nil {
		return nil, known, err
	}
	list, err := c.objects.Client.Resource(gatewayResource).List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil, known, nil
	}
	if err != nil {
		return nil, known, fmt.Errorf("listing Gateways: %w", err)
	}
	namespaces, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, known, fmt.Errorf("listing namespaces: %w", err)
	}
	labels := map[string]map[string]string{}
	for _, ns := range namespaces.Items {
		labels[ns.Name] = ns.Labels
	}
	var out []owned
	for i := range list.Items {
		g := &list.Items[i]
		if class, _, _ := unstructured.NestedString(g.Object, "spec", "gatewayClassName"); class != waypointClass && class != "istio" && g.GetLabels()[revision.Label] == "" {
			continue // of another controller's class; one of a class of the user's own that is ours has to say what it asks for
		}
		o := owned{namespace: g.GetNamespace(), name: g.GetName(), asked: revision.Asked(g.GetLabels(), labels[g.GetNamespace()])}
		o.owner, o.problem = known.Owner(o.asked)
		out = append(out, o)
	}
	slices.SortFunc(out, func(x, y owned) int { return strings.Compare(x.String(), y.String()) })
	return out, known, nil
}

// having are the Gateways that are a revision's.
func having(all []owned, rev string) (out []string) {
	for _, o := range all {
		if o.owner == rev {
			out = append(out, o.String())
		}
	}
	return out
}

// beside are the revisions of control planes beside the mesh's.
func (a *app) beside(ctx context.Context, c *conn) (revisions []string, err error) {
	controls, err := a.controls(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, d := range controls {
		if r := d.Labels[revision.Label]; r != revision.Default && r != revision.BesideIstio && r != "" {
			revisions = append(revisions, r)
		}
	}
	slices.Sort(revisions)
	return revisions, nil
}

// keepsCommon refuses to change of the mesh what other control planes have in common with it.
func (a *app) keepsCommon(ctx context.Context, c *conn, before, values map[string]any) error {
	others, err := a.beside(ctx, c)
	if err != nil || len(others) == 0 {
		return err
	}
	if err := (&joinedMesh{values: before, known: true}).fits(values); err != nil {
		return fmt.Errorf("%w, or uninstall those of revision %s first", err, strings.Join(others, ", "))
	}
	return nil
}

// besideIstio reports whether the control plane here is one beside Istio's.
func (a *app) besideIstio(ctx context.Context, c *conn) bool {
	controls, err := a.controls(ctx, c)
	return err == nil && slices.ContainsFunc(controls, func(d appsv1.Deployment) bool { return d.Labels[revision.Label] == revision.BesideIstio })
}

// mayUninstall refuses what would leave something without a control plane, or without anybody who captures.
func (a *app) mayUninstall(ctx context.Context, c *conn, rev string) error {
	if rev == revision.Default {
		if err := a.noneMoved(ctx, c); err != nil {
			return err
		}
		others, err := a.beside(ctx, c)
		if err != nil {
			return err
		}
		if len(others) > 0 {
			return fmt.Errorf("there are control planes beside the mesh's, of revision %s: %s uninstall --revision %s goes first; --force uninstalls the mesh nevertheless",
				strings.Join(others, ", "), a.name(), others[0])
		}
		return nil
	}
	all, known, err := a.owners(ctx, c)
	if err != nil {
		return err
	}
	left := having(all, rev)
	var tags []string
	for tag, to := range known.Tags {
		if to == rev {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	agents, err := a.agents(ctx, c)
	if err != nil {
		return err
	}
	var nodes []string
	for _, p := range agents {
		if p.Labels[revision.Label] == rev && p.DeletionTimestamp == nil {
			nodes = append(nodes, p.Spec.NodeName)
		}
	}
	var errs []error
	if len(nodes) > 0 {
		errs = append(errs, fmt.Errorf("the agents of %s ask the control plane of revision %s: %s upgrade --set node.canary.revision= first", some(nodes), rev, a.name()))
	}
	if len(left) > 0 {
		errs = append(errs, fmt.Errorf("the control plane of revision %s has the Gateways %s: take the label %s from them or their namespaces first, which gives them to the mesh's", rev, some(left), revision.Label))
	}
	if len(tags) > 0 {
		errs = append(errs, fmt.Errorf("the tags %s are for revision %s: %s tag remove, or tag set --overwrite", some(tags), rev, a.name()))
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w\n--force uninstalls it nevertheless, and what it has made goes on as it is", errors.Join(errs...))
	}
	return nil
}

// checkRevisions tells whether everything that asks for a control plane has one; nothing where there is only the mesh's.
func (a *app) checkRevisions(ctx context.Context, c *conn, s *meshStatus) []finding {
	all, known, err := a.owners(ctx, c)
	if err != nil {
		return []finding{{"revisions", "warning", "cannot tell: " + err.Error(), "this needs the right to list services, namespaces and Gateways"}}
	}
	var out []finding
	for _, o := range all {
		if o.problem != "" {
			out = append(out, finding{"revisions", "warning", "nobody makes or configures the Gateway " + o.String() + ": " + o.problem,
				a.name() + " install --revision, " + a.name() + " tag set, or take the label from it or its namespace"})
		}
	}
	for _, tag := range slices.Sorted(maps.Keys(known.Tags)) {
		if rev := known.Tags[tag]; !known.Revisions[rev] {
			out = append(out, finding{"revisions", "warning", "the tag " + tag + " is for revision " + rev + ", which is not there",
				a.name() + " tag set " + tag + " --overwrite --revision REVISION, or " + a.name() + " tag remove " + tag})
		}
	}
	if len(out) > 0 || len(s.Revisions) == 0 {
		return out
	}
	var say []string
	for _, rev := range slices.Sorted(maps.Keys(s.Revisions)) {
		say = append(say, fmt.Sprintf("%s (%s ready, %s)", rev, s.Revisions[rev], plural(len(having(all, rev)), "Gateway")))
	}
	return []finding{{"revisions", "ok", "beside the mesh's control plane " + strings.Join(say, ", "), ""}}
}

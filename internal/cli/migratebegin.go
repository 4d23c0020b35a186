package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

func (a *app) migrateBegin() *cobra.Command {
	ch := change{poll: 250 * time.Millisecond}
	cmd := &cobra.Command{
		Use: "begin", Short: "Install Warren beside the Istio that is there; it captures nothing until nodes are moved",
		Long: "Install Warren beside the Istio that is there: with its root, its trust domain and what of its configuration is followed, and under names of its own.\n" +
			"It captures nothing until nodes are moved, and serves the Gateways with the label " + revision.Label + "=" + revision.BesideIstio + ".",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			if ch.over, err = a.fromIstio(cmd.Context(), c); err != nil {
				return err
			}
			if err := a.change(cmd, &ch); err != nil {
				return err
			}
			a.progress().done("next: %s migrate node NODE, and %s migrate status", a.name(), a.name())
			return nil
		},
	}
	ch.values.add(cmd, "default")
	_ = cmd.Flags().MarkHidden("revision")
	cmd.Flags().DurationVar(&ch.limit, "timeout", 3*time.Minute, "give up waiting after this long")
	cmd.Flags().BoolVar(&ch.force, "force", false, "install though a check fails")
	return cmd
}

// istioControl finds the one control plane of Istio that Warren is to be beside, with its revision.
func (a *app) istioControl(ctx context.Context, c *conn) (*appsv1.Deployment, string, error) {
	all, err := istioControls(ctx, c)
	if err != nil {
		return nil, "", err
	}
	if len(all) == 0 {
		return nil, "", errNoIstio
	}
	var here []appsv1.Deployment
	var names []string
	for _, d := range all {
		names = append(names, d.Namespace+"/"+d.Name)
		if d.Namespace == a.namespace {
			here = append(here, d)
		}
	}
	slices.Sort(names)
	switch {
	case len(here) == 0:
		return nil, "", fmt.Errorf("this cluster has Istio in %s, and Warren has to be where its root key is: give -n with that namespace", strings.Join(names, ", "))
	case len(all) > 1:
		return nil, "", fmt.Errorf("there are several control planes of Istio, %s: nodes go over from one; finish its own upgrade first", strings.Join(names, ", "))
	}
	rev := cmp.Or(here[0].Labels[revision.Label], revision.Default)
	if rev == revision.BesideIstio {
		return nil, "", fmt.Errorf("the revision of Istio's Deployment %s is %q, which is Warren's name beside it", names[0], rev)
	}
	return &here[0], rev, nil
}

// fromIstio is what Warren is installed with beside an Istio, as that is set.
func (a *app) fromIstio(ctx context.Context, c *conn) (map[string]any, error) {
	control, rev, err := a.istioControl(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := a.istioKey(ctx, c); err != nil {
		return nil, err
	}
	name := "istio" + revision.Suffix(rev)
	cm, err := c.CoreV1().ConfigMaps(a.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("there is no ConfigMap %s/%s with the configuration of Istio's revision %s", a.namespace, name, rev)
	}
	if err != nil {
		return nil, fmt.Errorf("reading Istio's configuration: %w", err)
	}
	if severalNetworks(cm) {
		return nil, fmt.Errorf("ConfigMap %s/%s: the mesh has more than one network (key meshNetworks), and Warren has one cluster and one network", cm.Namespace, cm.Name)
	}
	values, err := a.meshValues(cm)
	if err != nil {
		return nil, err
	}
	mesh := map[string]any{}
	for _, ctr := range control.Spec.Template.Spec.Containers {
		for _, e := range ctr.Env {
			if e.Name == "CLUSTER_ID" && e.Value != "" {
				mesh["clusterID"] = e.Value
			}
		}
	}
	ns, err := c.CoreV1().Namespaces().Get(ctx, a.namespace, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("reading namespace %s: %w", a.namespace, err)
	}
	if network := ns.Labels["topology.istio.io/network"]; network != "" {
		mesh["network"] = network
	}
	return release.Over(values, map[string]any{"mesh": mesh, "besideIstio": map[string]any{"enabled": true, "configMap": name}}), nil
}

// meshValues is what of Istio's configuration is followed, as values of the chart.
func (a *app) meshValues(cm *corev1.ConfigMap) (map[string]any, error) {
	mesh, err := readMeshConfig(cm)
	if err != nil {
		return nil, err
	}
	if mesh["caAddress"] != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s: a CA elsewhere signs for Istio (caAddress): install it with helm, besideIstio.enabled=true and ca.address, ca.serverName and ca.rootConfigMap for the same CA", cm.Namespace, cm.Name)
	}
	values, ignored := release.FromMeshConfig(mesh)
	for _, s := range ignored {
		fmt.Fprintln(a.env.Err, "warning: ConfigMap "+cm.Namespace+"/"+cm.Name+": "+s)
	}
	return values, nil
}

// istioKey refuses an Istio whose signing key is not in the cluster.
func (a *app) istioKey(ctx context.Context, c *conn) error {
	for _, name := range []string{"cacerts", "istio-ca-secret"} {
		switch _, err := c.CoreV1().Secrets(a.namespace).Get(ctx, name, metav1.GetOptions{}); {
		case err == nil:
			return nil
		case !apierrors.IsNotFound(err):
			return fmt.Errorf("reading Secret %s/%s: %w", a.namespace, name, err)
		}
	}
	return fmt.Errorf("there is neither a Secret cacerts nor istio-ca-secret in %s: with Istio's root key elsewhere, install with helm, besideIstio.enabled=true and the values under ca", a.namespace)
}

func (a *app) migrateFinish() *cobra.Command {
	ch := change{upgrade: true, rollback: true, poll: 250 * time.Millisecond}
	cmd := &cobra.Command{
		Use: "finish", Short: "Be the mesh alone, once every node is moved and Istio is removed",
		Long: "Be the mesh alone: take over the names, the Gateways and what there is once in a mesh. While something of Istio's is there it takes over\n" +
			"its configuration and says what to remove; it removes nothing of Istio's itself. Holders stay; agents are exchanged as in an upgrade.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.finish(cmd, &ch) },
	}
	ch.values.add(cmd, "")
	_ = cmd.Flags().MarkHidden("revision")
	cmd.Flags().DurationVar(&ch.limit, "timeout", 5*time.Minute, "give up waiting after this long")
	return cmd
}

func (a *app) finish(cmd *cobra.Command, ch *change) error {
	ctx := cmd.Context()
	c, err := a.connect(a)
	if err != nil {
		return err
	}
	history, err := release.Records{Client: c, Namespace: a.namespace}.List(ctx)
	if err != nil {
		return err
	}
	rec := release.InForce(history)
	if rec == nil {
		return fmt.Errorf("there is no release %s in %s: %s migrate begin", release.Name, a.namespace, a.name())
	}
	if !release.BesideIstio(rec.Config) {
		if err := a.afterFinish(ctx, c); err != nil { // it was interrupted then, or there is nothing to do
			return err
		}
		a.progress().done("Warren is the mesh alone")
		return nil
	}
	if err := a.allMoved(ctx, c); err != nil {
		return err
	}
	left, err := a.istioLeft(ctx, c)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return a.handOver(cmd, c, rec, left)
	}
	ch.over = map[string]any{"besideIstio": map[string]any{"enabled": false}}
	if err := a.change(cmd, ch); err != nil {
		return err
	}
	return a.afterFinish(ctx, c)
}

// allMoved refuses to end a migration that leaves nodes without anybody who captures.
func (a *app) allMoved(ctx context.Context, c *conn) error {
	rows, err := a.migrationNodes(ctx, c)
	if err != nil {
		return err
	}
	var not []string
	for _, r := range rows {
		if r.Captures != "warren" && (r.Captures != "nobody" || r.Captured+r.Pending > 0) {
			not = append(not, r.Node+" ("+r.Captures+")")
		}
	}
	if len(not) > 0 {
		return fmt.Errorf("not moved yet: %s: %s migrate node --all", some(not), a.name())
	}
	return nil
}

// istioLeft names what is there of Istio whose names, or pods, Warren would take.
func (a *app) istioLeft(ctx context.Context, c *conn) (left []string, err error) {
	sets, err := istioSets(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, d := range sets {
		left = append(left, "DaemonSet "+setName(&d))
	}
	controls, err := istioControls(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, d := range controls {
		left = append(left, "Deployment "+d.Namespace+"/"+d.Name)
	}
	switch s, err := c.CoreV1().Services(a.namespace).Get(ctx, "istiod", metav1.GetOptions{}); {
	case err == nil && !isOurs(s.Labels):
		left = append(left, "Service "+a.namespace+"/istiod")
	case err != nil && !apierrors.IsNotFound(err):
		return nil, fmt.Errorf("reading Service %s/istiod: %w", a.namespace, err)
	}
	switch m, err := c.CoreV1().ConfigMaps(a.namespace).Get(ctx, "istio", metav1.GetOptions{}); {
	case err == nil && !isOurs(m.Labels):
		left = append(left, "ConfigMap "+a.namespace+"/istio")
	case err != nil && !apierrors.IsNotFound(err):
		return nil, fmt.Errorf("reading ConfigMap %s/istio: %w", a.namespace, err)
	}
	return left, nil
}

// handOver keeps what Istio's configuration says now, and tells how Istio is removed.
func (a *app) handOver(cmd *cobra.Command, c *conn, rec *release.Record, left []string) error {
	ctx := cmd.Context()
	beside, _ := rec.Config["besideIstio"].(map[string]any)
	name, _ := beside["configMap"].(string)
	switch cm, err := c.CoreV1().ConfigMaps(a.namespace).Get(ctx, cmp.Or(name, "istio"), metav1.GetOptions{}); {
	case apierrors.IsNotFound(err): // it was taken over before
	case err != nil:
		return fmt.Errorf("reading Istio's configuration: %w", err)
	default:
		values, err := a.meshValues(cm)
		if err != nil {
			return err
		}
		before, err := release.Complete(rec.Config)
		if err != nil {
			return err
		}
		after, err := release.Complete(release.Over(rec.Config, values))
		if err != nil {
			return err
		}
		if len(release.Diff(before, after)) > 0 {
			ch := change{upgrade: true, rollback: true, poll: 250 * time.Millisecond, limit: 5 * time.Minute, over: values}
			if err := a.change(cmd, &ch); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf(`every node is moved, and Istio's configuration is taken over. Of Istio there is left: %s
Remove it as it was installed, and run this again:
  helm uninstall ztunnel istio-cni istiod -n %s     # its definitions and istio-base stay: the objects under them are the mesh's
  istioctl uninstall --revision default             # where istioctl installed it; not --purge, which takes the root key along
Connections go on meanwhile; changes of Gateways that are Istio's wait`, strings.Join(left, ", "), a.namespace)
}

// afterFinish clears away what was only for the time of two meshes, and gives Gateways that name Warren's revision of that time to it.
func (a *app) afterFinish(ctx context.Context, c *conn) error {
	all, known, err := a.owners(ctx, c)
	if err != nil {
		return err
	}
	if names := asking(all, revision.BesideIstio); len(names) > 0 && known.Tags[revision.BesideIstio] == "" {
		if err := a.setTag(ctx, c, revision.BesideIstio, revision.Default, false); err != nil {
			return err
		}
		a.progress().done("%s: the label %s=%s may be taken away, and then the tag", some(names), revision.Label, revision.BesideIstio)
	}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: migrationLabel})
	if err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	m := mover{app: a, c: c, p: a.progress()}
	var errs []error
	for _, n := range nodes.Items {
		if err := m.note(ctx, n.Name, func(n *corev1.Node, s *moveState) { setLabel(n, ""); *s = moveState{} }); err != nil {
			errs = append(errs, fmt.Errorf("node %s: %w", n.Name, err))
		}
	}
	return errors.Join(errs...)
}

// readMeshConfig reads the key mesh of Istio's ConfigMap, without what is Warren's own already.
func readMeshConfig(cm *corev1.ConfigMap) (map[string]any, error) {
	var mesh map[string]any
	if err := yaml.Unmarshal([]byte(cm.Data["mesh"]), &mesh); err != nil {
		return nil, fmt.Errorf("reading the mesh's configuration: ConfigMap %s/%s, key mesh: %w", cm.Namespace, cm.Name, err)
	}
	if mesh["rootNamespace"] == cm.Namespace {
		delete(mesh, "rootNamespace")
	}
	if d, ok := mesh["defaultConfig"].(map[string]any); ok {
		delete(d, "discoveryAddress") // where it is, Warren's own is too
	}
	return mesh, nil
}

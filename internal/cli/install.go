package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/discovery"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// change is an installation or an upgrade.
type change struct {
	values   valueFlags
	upgrade  bool // there has to be something to upgrade
	reset    bool // forget what was set before
	rollback bool
	force    bool           // though a check failed
	over     map[string]any // values that go over what was set before, and under what the flags say
	limit    time.Duration
	poll     time.Duration
}

func (a *app) installCommand() *cobra.Command {
	ch := change{poll: 250 * time.Millisecond}
	cmd := &cobra.Command{
		Use: "install", Short: "Install the mesh, or make an installation what the flags say, and wait until it works",
		Long: "Install the mesh, or make an installation what the flags say, and wait until it works.\n\n" +
			"An install that was interrupted is completed by running it again. helm lists the release, and can go on from it.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.change(cmd, &ch) },
	}
	ch.values.add(cmd, "default")
	cmd.Flags().DurationVar(&ch.limit, "timeout", 3*time.Minute, "give up waiting after this long")
	cmd.Flags().BoolVar(&ch.force, "force", false, "install though a check fails")
	return cmd
}

func (a *app) upgradeCommand() *cobra.Command {
	ch := change{upgrade: true, poll: 250 * time.Millisecond}
	cmd := &cobra.Command{
		Use: "upgrade", Short: "Bring an installation to this program's version, node by node",
		Long: "Bring an installation to this program's version, node by node. What was set before stays set, unless --profile or\n" +
			"--reset-values say otherwise. What does not become ready is rolled back.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.change(cmd, &ch) },
	}
	ch.values.add(cmd, "")
	cmd.Flags().DurationVar(&ch.limit, "timeout", 5*time.Minute, "give up waiting after this long")
	cmd.Flags().BoolVar(&ch.force, "force", false, "upgrade though a check fails")
	cmd.Flags().BoolVar(&ch.reset, "reset-values", false, "forget what was set before")
	cmd.Flags().BoolVar(&ch.rollback, "rollback", true, "go back to what was there when the upgrade does not become ready")
	return cmd
}

func (a *app) change(cmd *cobra.Command, ch *change) error {
	// A typo is told before a cluster is asked.
	asked, err := ch.values.values(cmd, nil)
	if err != nil {
		return err
	}
	rev := release.RevisionOf(asked)
	c, err := a.connect(a)
	if err != nil {
		return err
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(cmd.Context(), ch.limit)
	defer cancel()
	p := a.progress()
	records := release.Records{Client: c, Namespace: a.namespace, Revision: rev}
	history, err := records.List(ctx)
	if err != nil {
		return err
	}
	before := release.InForce(history)
	if ch.upgrade && before == nil {
		return fmt.Errorf("there is no release %s in %s to upgrade: %s install%s", release.NameOf(rev), a.namespace, a.name(), revisionFlag(rev))
	}
	if release.Interrupted(history) {
		last := history[len(history)-1]
		p.done("revision %d was interrupted; going on from it", last.Version)
		if err := records.Failed(ctx, last, "interrupted"); err != nil {
			return err
		}
	}
	mesh, err := a.joined(ctx, c, rev)
	if err != nil {
		return err
	}
	base := mesh.config()
	if ch.upgrade && !ch.reset && ch.values.profile == "" {
		base = before.Config
	}
	values, err := ch.values.values(cmd, release.Over(base, ch.over))
	if err != nil {
		return err
	}
	if err := a.mayInstall(ctx, c, ch.force, release.BesideIstio(values)); err != nil {
		return err
	}
	if before != nil && release.BesideIstio(values) && !release.BesideIstio(before.Config) {
		return fmt.Errorf("the release %s is a mesh by itself, and cannot be beside Istio's any more: uninstall it first", release.Name)
	}
	if before != nil && release.BesideIstio(before.Config) && !release.BesideIstio(values) {
		left, err := a.istioLeft(ctx, c)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return fmt.Errorf("without besideIstio.enabled Warren would take the names of what is still Istio's: %s; %s migrate finish says how it ends", strings.Join(left, ", "), a.name())
		}
	}
	if was := release.RevisionOf(values); was != rev { // set when that was a label alone
		return fmt.Errorf("the release %s was installed with revision %s, which is that of a second control plane: uninstall it, and install it without a revision", release.NameOf(rev), was)
	}
	if err := mesh.fits(values); err != nil {
		return err
	}
	if rev == revision.Default && before != nil {
		if err := a.keepsCommon(ctx, c, before.Config, values); err != nil {
			return err
		}
	}
	number := 1
	if len(history) > 0 {
		number = history[len(history)-1].Version + 1
	}
	p.now("rendering")
	target, err := a.target(c, number)
	if err != nil {
		return err
	}
	rendered, err := release.Render(values, target)
	if err != nil {
		return err
	}
	rec, err := records.Next(history, values, rendered)
	if err != nil {
		return err
	}
	err = a.roll(ctx, c, p, ch, records, history, rec, rendered.Objects)
	if err == nil {
		p.done("%srevision %d is ready after %s", ofRelease(rev), rec.Version, time.Since(start).Round(100*time.Millisecond))
		return nil
	}
	// Whatever ended it, what is there is written down. The way back has its time even where there was little for the way there.
	after, cancelAfter := context.WithTimeout(context.WithoutCancel(ctx), max(ch.limit, 3*time.Minute))
	defer cancelAfter()
	err = errors.Join(err, records.Failed(after, rec, err.Error()))
	if !ch.upgrade || !ch.rollback {
		return fmt.Errorf("%w\nrun it again to go on, or %s uninstall%s", err, a.name(), revisionFlag(rev))
	}
	p.done("revision %d does not become ready; going back to revision %d", rec.Version, before.Version)
	if e := a.back(after, c, p, ch, records, append(history, rec), before); e != nil {
		return errors.Join(err, fmt.Errorf("going back: %w\nrun it again to go on, or with what was set before to go back", e))
	}
	return fmt.Errorf("%w\nrolled back to revision %d", err, before.Version)
}

// back applies an earlier revision again.
func (a *app) back(ctx context.Context, c *conn, p *progress, ch *change, records release.Records, history []*release.Record, to *release.Record) error {
	objects, err := release.Parse(to.Manifest)
	if err != nil {
		return err
	}
	rec, err := records.Next(history, to.Config, &release.Rendered{Objects: objects, Hooks: to.Hooks, Notes: to.Info.Notes})
	if err != nil {
		return err
	}
	rec.Chart = to.Chart
	err = a.roll(ctx, c, p, ch, records, history, rec, objects)
	if err != nil {
		return errors.Join(err, records.Failed(context.WithoutCancel(ctx), rec, err.Error()))
	}
	return nil
}

// roll makes the cluster what a revision says and waits until it works.
func (a *app) roll(ctx context.Context, c *conn, p *progress, ch *change, records release.Records, history []*release.Record, rec *release.Record, objects []*unstructured.Unstructured) error {
	var was []*unstructured.Unstructured
	for _, old := range history {
		o, err := release.Parse(old.Manifest)
		if err != nil {
			return fmt.Errorf("reading revision %d of the release: %w", old.Version, err)
		}
		was = append(release.Gone(was, o), o...)
	}
	gone := release.Gone(was, objects)
	if err := c.objects.Apply(ctx, []*unstructured.Unstructured{release.NamespaceObject(a.namespace)}, func(*unstructured.Unstructured) {}); err != nil {
		return err
	}
	if err := records.Put(ctx, rec); err != nil {
		return err
	}
	if slices.ContainsFunc(gone, isAgents) && !slices.ContainsFunc(objects, isAgents) {
		p.now("cleaning the nodes: what is to be has no agents")
		if err := a.clean(ctx, c, nil); err != nil {
			return err
		}
	}
	release.Own(objects, records.Revision, a.namespace)
	n := 0
	apply := func(some []*unstructured.Unstructured) error {
		return c.objects.Apply(ctx, some, func(*unstructured.Unstructured) {
			if n++; p.terminal {
				p.now("applying %d/%d", n, len(objects))
			}
		})
	}
	removed := 0
	remove := func(some []*unstructured.Unstructured) error {
		n, err := c.objects.Delete(ctx, some)
		removed += n
		return err
	}
	// Agents of a node end once there are others: those of canaries come before the others leave their nodes, and go after.
	first, others := objects, []*unstructured.Unstructured(nil)
	if slices.ContainsFunc(objects, isCanary) {
		first, others = split(objects, func(o *unstructured.Unstructured) bool { return !isAgents(o) || isCanary(o) })
	}
	went, late := split(gone, func(o *unstructured.Unstructured) bool { return !isAgents(o) })
	if err := apply(first); err != nil {
		return err
	}
	if err := remove(went); err != nil {
		return err
	}
	if len(others) > 0 {
		if err := a.await(ctx, c, p, ch.poll, first); err != nil {
			return err
		}
		if err := apply(others); err != nil {
			return err
		}
	}
	p.done("%s applied", plural(len(objects), "object"))
	if err := a.await(ctx, c, p, ch.poll, objects); err != nil {
		return err
	}
	if err := remove(late); err != nil {
		return err
	}
	if removed > 0 {
		p.done("%s removed that it no longer has", plural(removed, "object"))
	}
	what := "Install complete"
	if len(history) > 0 {
		what = "Upgrade complete"
	}
	return records.Deployed(ctx, history, rec, what)
}

// isAgents reports whether an object is a DaemonSet of agents.
func isAgents(o *unstructured.Unstructured) bool {
	return o.GetKind() == "DaemonSet" && o.GetLabels()["app"] == "ztunnel"
}

// isCanary reports whether an object is the DaemonSet of agents that are tried first.
func isCanary(o *unstructured.Unstructured) bool {
	return isAgents(o) && o.GetLabels()[canaryLabel] != ""
}

// split keeps the order.
func split(all []*unstructured.Unstructured, is func(*unstructured.Unstructured) bool) (those, others []*unstructured.Unstructured) {
	for _, o := range all {
		if is(o) {
			those = append(those, o)
		} else {
			others = append(others, o)
		}
	}
	return those, others
}

// target is the cluster as the templates see it.
func (a *app) target(c *conn, number int) (release.Target, error) {
	t := release.Target{Namespace: a.namespace, Revision: number, Config: c.rest}
	v, err := c.Discovery().ServerVersion()
	if err != nil {
		return t, fmt.Errorf("reaching the cluster: %w", err)
	}
	t.Version = v.GitVersion
	groups, lists, err := c.Discovery().ServerGroupsAndResources()
	if err != nil && !discovery.IsGroupDiscoveryFailedError(err) { // of others' API servers
		return t, fmt.Errorf("asking what the cluster has: %w", err)
	}
	for _, g := range groups {
		for _, v := range g.Versions {
			t.APIs = append(t.APIs, v.GroupVersion)
		}
	}
	for _, l := range lists {
		for _, r := range l.APIResources {
			t.APIs = append(t.APIs, l.GroupVersion+"/"+r.Kind)
		}
	}
	return t, nil
}

// mayInstall refuses what cannot work, with what check would say of it.
func (a *app) mayInstall(ctx context.Context, c *conn, force, besideIstio bool) error {
	v, err := c.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("reaching the cluster: %w; name another with --context or --kubeconfig", err)
	}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	findings := append([]finding{kubernetesVersion(v.Major, v.Minor, v.GitVersion), checkNodes(nodes.Items)}, append(a.checkOthers(ctx, c, besideIstio), checkPlugin(ctx, c)...)...)
	findings = append(findings, a.checkRights(ctx, c))
	findings = slices.DeleteFunc(findings, func(f finding) bool { return f.Result != "failed" })
	if len(findings) == 0 {
		return nil
	}
	if err := a.printFindings(a.env.Err, findings); err != nil {
		return err
	}
	if force {
		return nil
	}
	return errors.New("it would not work here; --force installs nevertheless")
}

// await waits until every Deployment and DaemonSet among the objects is as it should be.
func (a *app) await(ctx context.Context, c *conn, p *progress, every time.Duration, objects []*unstructured.Unstructured) error {
	names := map[string]string{"istiod": "control plane", "ztunnel": "node agents", "warren-holder": "holders"}
	for {
		var left []string
		var err error
		for _, o := range objects {
			if o.GetKind() != "Deployment" && o.GetKind() != "DaemonSet" {
				continue
			}
			what := names[o.GetLabels()["app"]]
			switch {
			case what == "":
				what = o.GetName()
			case isCanary(o):
				what = "canaries' " + what
			}
			var state string
			if state, err = a.rollout(ctx, c, o); err != nil {
				break
			}
			if state != "" {
				left = append(left, what+" "+state)
			}
		}
		if err == nil && len(left) == 0 {
			return nil
		}
		if err == nil {
			p.now("waiting: %s", strings.Join(left, ", "))
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = errors.New(strings.Join(left, ", "))
			}
			return fmt.Errorf("not ready: %w%s", err, a.stuck(context.WithoutCancel(ctx), c))
		case <-time.After(every):
		}
	}
}

// rollout says what is missing, "" where nothing is.
func (a *app) rollout(ctx context.Context, c *conn, o *unstructured.Unstructured) (string, error) {
	if o.GetKind() == "Deployment" {
		d, err := c.AppsV1().Deployments(o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
		if err != nil {
			return "", fmt.Errorf("reading %s: %w", release.Describe(o), err)
		}
		want, s := int32(1), d.Status
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		if s.ObservedGeneration < d.Generation || s.UpdatedReplicas < want || s.AvailableReplicas < want || s.Replicas > want {
			return fmt.Sprintf("%d/%d", min(s.UpdatedReplicas, s.AvailableReplicas), want), nil
		}
		return "", nil
	}
	d, err := c.AppsV1().DaemonSets(o.GetNamespace()).Get(ctx, o.GetName(), metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", release.Describe(o), err)
	}
	s := d.Status
	have := s.NumberReady
	if d.Spec.UpdateStrategy.Type != appsv1.OnDeleteDaemonSetStrategyType {
		have = min(have, s.UpdatedNumberScheduled)
	}
	if s.ObservedGeneration >= d.Generation && have >= s.DesiredNumberScheduled {
		return "", nil
	}
	return fmt.Sprintf("%d/%d%s", have, s.DesiredNumberScheduled, a.behind(ctx, c, d)), nil
}

// behind names nodes whose pod of a DaemonSet is not there, not ready or not of its newest template.
func (a *app) behind(ctx context.Context, c *conn, d *appsv1.DaemonSet) string {
	pods, err := c.CoreV1().Pods(d.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(d.Spec.Selector)})
	if err != nil {
		return ""
	}
	template := d.Annotations["deprecated.daemonset.template.generation"]
	if d.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType {
		template = ""
	}
	done := map[string]bool{}
	for _, p := range pods.Items {
		if p.Labels[canaryLabel] != d.Spec.Template.Labels[canaryLabel] { // the selector of the others matches canaries too
			continue
		}
		current := template == "" || p.Labels["pod-template-generation"] == template
		done[p.Spec.NodeName] = done[p.Spec.NodeName] || current && ready(&p) && p.DeletionTimestamp == nil
	}
	var nodes []string
	for n, ok := range done {
		if !ok && n != "" {
			nodes = append(nodes, n)
		}
	}
	if len(nodes) == 0 {
		return ""
	}
	slices.Sort(nodes)
	return " (" + some(nodes) + ")"
}

// stuck says why pods of the control plane's namespace do not start, as the kubelet and the scheduler have it.
func (a *app) stuck(ctx context.Context, c *conn) string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	pods, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=warren"})
	if err != nil {
		return ""
	}
	var out strings.Builder
	for _, p := range pods.Items {
		why := ""
		for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			if w := s.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
				why = strings.TrimSuffix(w.Reason+": "+w.Message, ": ")
			}
		}
		for _, cond := range p.Status.Conditions {
			if cond.Type == corev1.PodScheduled && cond.Status == corev1.ConditionFalse {
				why = cond.Message
			}
		}
		if why != "" {
			fmt.Fprintf(&out, "\n  %s: %s", p.Name, why)
		}
	}
	return out.String()
}

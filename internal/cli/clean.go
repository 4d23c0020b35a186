package cli

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// cleanName is the DaemonSet that cleans the nodes, and its pods' label.
const cleanName = "warren-uninstall"

// goneForGood says what to do about a node that no longer answers.
const goneForGood = "on a node that is gone for good nothing is lost: run this again without it"

// cleanCommand is what the chart runs before it is uninstalled. Capture outlives the agent on purpose, so
// somebody has to say that it is to end.
func (a *app) cleanCommand() *cobra.Command {
	limit := 90 * time.Second
	cmd := &cobra.Command{
		Use: "clean-nodes", Hidden: true, Short: "Stop the node agents and take everything of theirs off the nodes",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), limit)
			defer cancel()
			return a.clean(ctx, c, nil)
		},
	}
	cmd.Flags().DurationVar(&limit, "timeout", limit, "give up after this long")
	return cmd
}

// clean stops the agents and cleans the nodes. Where the agents' DaemonSet is gone already, the nodes are cleaned with
// the fallback; nil is none.
func (a *app) clean(ctx context.Context, c *conn, fallback *appsv1.DaemonSet) error {
	sets := c.AppsV1().DaemonSets(a.namespace)
	list, err := sets.List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	if err != nil {
		return fmt.Errorf("finding the node agents: %w", err)
	}
	if len(list.Items) == 0 && fallback == nil {
		fmt.Fprintln(a.env.Out, "no node agents in "+a.namespace+", nothing to clean")
		return nil
	}
	// Those that are for all nodes go last: what is interrupted finds them again.
	slices.SortStableFunc(list.Items, func(a, b appsv1.DaemonSet) int { return cmp.Compare(b.Labels[canaryLabel], a.Labels[canaryLabel]) })
	agent := fallback
	for i := range list.Items {
		agent = &list.Items[i]
		if err := sets.Delete(ctx, agent.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting DaemonSet %s: %w", agent.Name, err)
		}
	}
	// An agent that still runs would capture again what is released.
	if err := a.poll(ctx, "waiting for the agents to end", func() (string, error) {
		pods, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
		if err != nil || len(pods.Items) == 0 {
			return "", err
		}
		return plural(len(pods.Items), "agent") + " still running", nil
	}); err != nil {
		return fmt.Errorf("%w; %s", err, goneForGood)
	}
	return a.cleanWith(ctx, c, cleaner(agent))
}

// cleanWith has a DaemonSet clean the nodes that it runs on, and removes it.
func (a *app) cleanWith(ctx context.Context, c *conn, work *appsv1.DaemonSet) error {
	sets := c.AppsV1().DaemonSets(a.namespace)
	if _, err := sets.Create(ctx, work, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("creating DaemonSet %s: %w", cleanName, err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if err := sets.Delete(ctx, cleanName, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			fmt.Fprintf(a.env.Err, "deleting DaemonSet %s: %v\n", cleanName, err)
		}
	}()
	if err := a.poll(ctx, "waiting for the nodes to be clean", func() (string, error) {
		ds, err := sets.Get(ctx, cleanName, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		pods, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=" + cleanName})
		if err != nil {
			return "", err
		}
		pods.Items = slices.DeleteFunc(pods.Items, func(p corev1.Pod) bool { return ds.UID != "" && !metav1.IsControlledBy(&p, ds) }) // of one before
		var dirty []string
		for i := range pods.Items {
			if !cleaned(&pods.Items[i]) {
				dirty = append(dirty, pods.Items[i].Spec.NodeName+whyUnclean(&pods.Items[i]))
			}
		}
		switch {
		case ds.Status.ObservedGeneration == 0 || len(pods.Items) < int(ds.Status.DesiredNumberScheduled):
			return "not every node has been visited", nil
		case len(dirty) > 0:
			slices.Sort(dirty)
			return "not clean yet: " + strings.Join(dirty, ", "), nil
		}
		fmt.Fprintf(a.env.Out, "%s clean\n", plural(len(pods.Items), "node"))
		return "", nil
	}); err != nil {
		return fmt.Errorf("%w; %s", err, goneForGood)
	}
	return nil
}

// poll calls f until it has nothing left to say.
func (a *app) poll(ctx context.Context, what string, f func() (string, error)) error {
	for {
		left, err := f()
		if err == nil && left == "" {
			return nil
		}
		if err != nil {
			left = err.Error()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %s", what, left)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

func cleaned(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.InitContainerStatuses, func(s corev1.ContainerStatus) bool {
		return s.State.Terminated != nil && s.State.Terminated.ExitCode == 0
	})
}

// whyUnclean is what keeps a node from being clean, as far as its pod says.
func whyUnclean(p *corev1.Pod) string {
	for _, s := range p.Status.InitContainerStatuses {
		for _, ended := range []*corev1.ContainerStateTerminated{s.State.Terminated, s.LastTerminationState.Terminated} {
			if ended != nil && ended.ExitCode != 0 {
				return fmt.Sprintf(" (it failed %s: %s)", plural(int(max(s.RestartCount, 1)), "time"), dash(lastLine(ended.Message)))
			}
		}
		if w := s.State.Waiting; w != nil && w.Message != "" {
			return fmt.Sprintf(" (%s: %s)", w.Reason, w.Message)
		}
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return fmt.Sprintf(" (%s: %s)", c.Reason, c.Message)
		}
	}
	return ""
}

// lastLine is where a process that failed says why.
func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// alsoOn takes out of an affinity that nodes with a label are not meant.
func alsoOn(a *corev1.Affinity, label string) {
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return
	}
	terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for i := range terms {
		terms[i].MatchExpressions = slices.DeleteFunc(terms[i].MatchExpressions, func(r corev1.NodeSelectorRequirement) bool {
			return r.Key == label && r.Operator == corev1.NodeSelectorOpNotIn
		})
		if len(terms[i].MatchExpressions)+len(terms[i].MatchFields) == 0 { // it had nothing else, and an empty one is for no node
			a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution = nil
			return
		}
	}
}

// cleaner is the agent's DaemonSet with the agent told to uninstall, also on the nodes that are the canaries'.
func cleaner(agent *appsv1.DaemonSet) *appsv1.DaemonSet {
	t := *agent.Spec.Template.DeepCopy()
	labels := map[string]string{"app": cleanName, "app.kubernetes.io/part-of": "warren", modeLabel: "none"}
	t.ObjectMeta = metav1.ObjectMeta{Labels: labels}
	work := t.Spec.Containers[0]
	work.Name, work.Args = "uninstall", []string{"uninstall"}
	work.ReadinessProbe, work.LivenessProbe, work.StartupProbe = nil, nil, nil
	work.TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError // for whyUnclean
	t.Spec.InitContainers = []corev1.Container{work}
	// A DaemonSet's pods cannot end: once clean, they wait until they are deleted.
	no, yes, user := false, true, int64(65532)
	idle := corev1.Container{Name: "done", Image: work.Image, ImagePullPolicy: work.ImagePullPolicy, Args: []string{"idle"}, SecurityContext: &corev1.SecurityContext{
		AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, RunAsNonRoot: &yes, RunAsUser: &user, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}}
	t.Spec.Containers = []corev1.Container{idle}
	// What the control plane writes may be gone; the work needs none of it.
	optional := true
	for i := range t.Spec.Volumes {
		if m := t.Spec.Volumes[i].ConfigMap; m != nil {
			m.Optional = &optional
		}
	}
	if key, _, ok := strings.Cut(agent.Annotations[canaryNodes], "="); ok {
		alsoOn(t.Spec.Affinity, key)
	}
	grace := int64(1)
	t.Spec.TerminationGracePeriodSeconds = &grace
	return &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: agent.Namespace, Name: cleanName, Labels: labels},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": cleanName}},
			Template: t,
		},
	}
}

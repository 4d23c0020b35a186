package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

// What a migration writes on objects. The nodes' label decides whose DaemonSets run there: without it Istio's, with the value moved
// Warren's, with between nobody's.
const (
	migrationLabel = "warren.io/migration"
	moved          = "warren"
	between        = "between"

	moveNote   = "warren.io/migration-of-node" // annotation of a node: its moveState
	beforeNote = "warren.io/before-migration"  // annotation of Istio's DaemonSets: their setState
)

// moveState is what is remembered of a node while it is not Istio's.
type moveState struct {
	Cordoned bool      `json:"cordoned,omitempty"` // by the move that goes on
	Since    time.Time `json:"since,omitzero"`     // pods that were made before it are of who captured then
	Left     []string  `json:"left,omitempty"`     // Istio's DaemonSets that ran there
}

// tenants are the pods of a node that are in the mesh, by what has to become of them when another captures there. A pod that one of
// the two has captured keeps that one's rules in its network namespace, so that the other wants a new one.
type tenants struct {
	evict   []corev1.Pod // a controller makes others, elsewhere
	restart []corev1.Pod // a DaemonSet makes others, here
	lone    []corev1.Pod // nobody makes others
	static  []corev1.Pod // the kubelet's own, which no API restarts
}

// tenantsOf sorts those pods of a node that are in the mesh. modes are the namespaces' labels.
func tenantsOf(pods []corev1.Pod, node string, modes map[string]string, sets []appsv1.DaemonSet) (out tenants) {
	for _, p := range pods {
		if p.Spec.NodeName != node || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed || p.Spec.HostNetwork ||
			p.Annotations[redirection] == "" && !enrolled(&p, modes[p.Namespace]) {
			continue
		}
		if ownedByAny(&p, sets) {
			continue
		}
		_, mirror := p.Annotations[corev1.MirrorPodAnnotationKey]
		switch o := metav1.GetControllerOf(&p); {
		case mirror:
			out.static = append(out.static, p)
		case o == nil:
			out.lone = append(out.lone, p)
		case o.Kind == "DaemonSet":
			out.restart = append(out.restart, p)
		default:
			out.evict = append(out.evict, p)
		}
	}
	return out
}

func podNames(pods []corev1.Pod) (out []string) {
	for _, p := range pods {
		out = append(out, p.Namespace+"/"+p.Name)
	}
	return out
}

// mover moves nodes from Istio to Warren or back, one after the other.
type mover struct {
	*app
	c       *conn
	p       *progress
	sets    []appsv1.DaemonSet // Istio's
	limit   time.Duration      // for one node
	back    bool
	force   bool
	evicted int
}

func (a *app) migrateNode() *cobra.Command {
	m := mover{app: a}
	all := false
	cmd := &cobra.Command{
		Use: "node NODE...", Short: "Have Warren capture the pods of nodes, and Istio no more; --back has it the other way round",
		Long: "Have Warren capture the pods of nodes, and Istio no more; --back has it the other way round. One node after the other is cordoned, its pods that\n" +
			"are in the mesh are evicted as budgets allow, Istio's DaemonSets leave it, Warren's agent comes, and it is uncordoned. Pods of DaemonSets are restarted.\n\n" +
			"What was interrupted goes on when it is run again.",
		RunE: func(cmd *cobra.Command, names []string) error {
			if all == (len(names) > 0) {
				return usageError{errors.New("name nodes, or give --all")}
			}
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			m.c, m.p = c, a.progress()
			return m.run(cmd.Context(), names)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&all, "all", false, "every node that is not where it is to be")
	f.BoolVar(&m.back, "back", false, "from Warren to Istio")
	f.BoolVar(&m.force, "force", false, "though pods are deleted that nothing makes again, or wait because no other node takes them")
	f.DurationVar(&m.limit, "timeout", 10*time.Minute, "give up on a node after this long")
	return cmd
}

// run moves the nodes of these names, or all where there are none.
func (m *mover) run(ctx context.Context, names []string) error {
	if !m.besideIstio(ctx, m.c) {
		return fmt.Errorf("there is no Warren beside an Istio in %s: %s migrate begin comes first", m.namespace, m.name())
	}
	var err error
	if m.sets, err = istioSets(ctx, m.c); err != nil {
		return err
	}
	if len(m.sets) == 0 && m.back {
		return errors.New("there is neither a DaemonSet ztunnel nor istio-cni-node to go back to: install them again first")
	}
	list, err := m.c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	nodes, err := m.chosen(ctx, list.Items, names)
	if err != nil {
		return err
	}
	if len(nodes) == 0 {
		m.p.done("every node is where it is to be")
		return nil
	}
	if err := m.inTheWay(ctx, list.Items, nodes); err != nil {
		return err
	}
	for i := range m.sets {
		if err := m.holdOff(ctx, &m.sets[i]); err != nil {
			return err
		}
	}
	for _, n := range nodes {
		start := time.Now()
		m.evicted = 0
		one, cancel := context.WithTimeout(ctx, m.limit)
		err := m.move(one, n.Name)
		cancel()
		if err != nil {
			return fmt.Errorf("node %s: %w\nrun it again to go on, or with%s --back to have it as it was", n.Name, err, map[bool]string{true: "out"}[m.back])
		}
		who := "Warren"
		if m.back {
			who = "Istio"
		}
		m.p.done("node %s: %s captures; %s moved or restarted, %s", n.Name, who, plural(m.evicted, "pod"), time.Since(start).Round(time.Second))
	}
	return m.letGo(ctx)
}

// chosen are the nodes of these names; without any, those that are not where they are to be.
func (m *mover) chosen(ctx context.Context, all []corev1.Node, names []string) (out []corev1.Node, err error) {
	if len(names) == 0 {
		pods, modes, err := m.cluster(ctx)
		if err != nil {
			return nil, err
		}
		istios := map[string]bool{}
		for _, p := range pods {
			if ownedByAny(&p, m.sets) {
				istios[p.Spec.NodeName] = true
			}
		}
		for _, n := range all { // where Istio's pods were taken away, those in the mesh tell
			t := tenantsOf(pods, n.Name, modes, m.sets)
			istios[n.Name] = istios[n.Name] || len(t.evict)+len(t.restart)+len(t.lone)+len(t.static) > 0
		}
		for _, n := range all {
			_, begun := n.Annotations[moveNote]
			if is := n.Labels[migrationLabel]; m.back && (is != "" || begun) || !m.back && (is != moved && (istios[n.Name] || is != "") || begun && unfinished(&n)) {
				out = append(out, n)
			}
		}
		return out, nil
	}
	for _, name := range names {
		i := slices.IndexFunc(all, func(n corev1.Node) bool { return n.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no node %s: see kubectl get nodes", name)
		}
		out = append(out, all[i])
	}
	return out, nil
}

// unfinished reports whether a move of a node was interrupted: who moves it cordons it until it is done.
func unfinished(n *corev1.Node) bool {
	s, err := readMoveState(n)
	return err == nil && s.Cordoned
}

// inTheWay refuses what cannot end well, before anything is touched.
func (m *mover) inTheWay(ctx context.Context, all, nodes []corev1.Node) error {
	pods, modes, err := m.cluster(ctx)
	if err != nil {
		return err
	}
	var errs []error
	no := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, n := range nodes {
		if os := n.Status.NodeInfo.OperatingSystem; os != "" && os != "linux" {
			no("node %s runs %s: agents run on Linux", n.Name, os)
			continue
		}
		if !nodeReady(&n) {
			no("node %s is not ready: kubectl describe node %s", n.Name, n.Name)
		}
		if !m.back && !kernelOK(n.Status.NodeInfo.KernelVersion) {
			no("node %s has the kernel %s: Linux %d.%d or newer is needed", n.Name, dash(n.Status.NodeInfo.KernelVersion), minKernelMajor, minKernelMinor)
		}
		t := tenantsOf(pods, n.Name, modes, m.sets)
		if n.Labels[migrationLabel] == m.to() {
			t = tenants{} // it was moved, and what is there came since
		}
		if len(t.lone) > 0 && !m.force {
			no("node %s: nothing makes the pods %s again: delete them, have a Deployment make them, or --force deletes them", n.Name, some(podNames(t.lone)))
		}
		if len(t.static) > 0 && !m.force {
			no("node %s: %s are static pods in the mesh, which the kubelet alone restarts: take the label from them, or go on with --force and restart them there", n.Name, some(podNames(t.static)))
		}
		if len(t.evict) > 0 && !m.force && !slices.ContainsFunc(all, func(o corev1.Node) bool { return o.Name != n.Name && nodeReady(&o) && !o.Spec.Unschedulable }) {
			no("node %s: no other node is there for its %s meanwhile: add one, or go on with --force and have them wait", n.Name, plural(len(t.evict), "pod"))
		}
	}
	if !m.back && !m.force {
		var needy []string
		for _, p := range pods {
			if slices.ContainsFunc(p.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == "istio-validation" }) {
				needy = append(needy, p.Namespace+"/"+p.Name)
			}
		}
		if len(needy) > 0 {
			no("%s have sidecars that need Istio's CNI plugin, which leaves the nodes that are moved: such pods do not start there. Move them to ambient mode first; --force goes on", some(needy))
		}
	}
	return errors.Join(errs...)
}

func nodeReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// cluster lists the pods, and what each namespace says of the mesh.
func (m *mover) cluster(ctx context.Context) ([]corev1.Pod, map[string]string, error) {
	pods, err := m.c.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("listing pods: %w", err)
	}
	namespaces, err := m.c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("listing namespaces: %w", err)
	}
	modes := map[string]string{}
	for _, ns := range namespaces.Items {
		modes[ns.Name] = ns.Labels[modeLabel]
	}
	return pods.Items, modes, nil
}

// to is the value of the label where a move ends.
func (m *mover) to() string {
	if m.back {
		return ""
	}
	return moved
}

// move takes one node over. Each step looks at what is there, so that it can be run again at any point.
func (m *mover) move(ctx context.Context, node string) error {
	n, err := m.c.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("reading it: %w", err)
	}
	if n.Labels[migrationLabel] != m.to() {
		if err := m.leave(ctx, n); err != nil {
			return err
		}
	}
	return m.arrive(ctx, node)
}

// leave has who captured on a node go: first the pods, then what served them.
func (m *mover) leave(ctx context.Context, n *corev1.Node) error {
	node := n.Name
	pods, modes, err := m.cluster(ctx)
	if err != nil {
		return err
	}
	var left []string
	for i := range m.sets {
		if slices.ContainsFunc(pods, func(p corev1.Pod) bool { return p.Spec.NodeName == node && ownedBy(&p, &m.sets[i]) }) {
			left = append(left, setName(&m.sets[i]))
		}
	}
	if err := m.note(ctx, node, func(n *corev1.Node, s *moveState) {
		if !n.Spec.Unschedulable {
			n.Spec.Unschedulable, s.Cordoned = true, true
		}
		if len(left) > 0 && !m.back {
			s.Left = left
		}
	}); err != nil {
		return err
	}
	t := tenantsOf(pods, node, modes, m.sets)
	if err := m.evict(ctx, append(t.evict, t.lone...)); err != nil {
		return err
	}
	if err := m.note(ctx, node, func(n *corev1.Node, s *moveState) {
		if n.Labels[migrationLabel] != between {
			s.Since = time.Now().UTC().Truncate(time.Second).Add(time.Second) // of pods it is known to the second
		}
		setLabel(n, between)
	}); err != nil {
		return err
	}
	if !m.back {
		return m.poll(ctx, "waiting for Istio's DaemonSets to leave", func() (string, error) {
			var there []string
			pods, err := m.podsOn(ctx, node)
			for _, p := range pods {
				if ownedByAny(&p, m.sets) {
					there = append(there, p.Namespace+"/"+p.Name)
				}
			}
			if len(there) > 0 {
				m.p.now("node %s: waiting for %s to leave", node, some(there))
			}
			return strings.Join(there, ", "), err
		})
	}
	if err := m.poll(ctx, "waiting for Warren's agent to leave", func() (string, error) {
		pods, err := m.podsOn(ctx, node)
		there := podNames(slices.DeleteFunc(pods, func(p corev1.Pod) bool { return !ofAgent(&p) }))
		if len(there) > 0 {
			m.p.now("node %s: waiting for %s to leave", node, some(there))
		}
		return strings.Join(there, ", "), err
	}); err != nil {
		return err
	}
	m.p.now("node %s: cleaning it", node)
	return m.cleanNode(ctx, node)
}

// ofAgent reports whether a pod is Warren's agent or its holder.
func ofAgent(p *corev1.Pod) bool {
	return isOurs(p.Labels) && (p.Labels["app"] == "ztunnel" || p.Labels["app"] == "warren-holder")
}

// cleanNode takes off a node what Warren has put there, with the agent's own image.
func (m *mover) cleanNode(ctx context.Context, node string) error {
	list, err := m.c.AppsV1().DaemonSets(m.namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector + ",!" + canaryLabel})
	if err != nil {
		return fmt.Errorf("finding the node agents: %w", err)
	}
	if len(list.Items) == 0 {
		return fmt.Errorf("there is no DaemonSet of agents in %s to clean it with", m.namespace)
	}
	ds := cleaner(&list.Items[0])
	ds.Spec.Template.Spec.NodeSelector = nil
	ds.Spec.Template.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}}}}}}}
	// One that an interrupted run has left may be another node's.
	if err := m.c.AppsV1().DaemonSets(ds.Namespace).Delete(ctx, ds.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting DaemonSet %s: %w", ds.Name, err)
	}
	if err := m.poll(ctx, "waiting for the DaemonSet "+ds.Name+" of before to go", func() (string, error) {
		switch _, err := m.c.AppsV1().DaemonSets(ds.Namespace).Get(ctx, ds.Name, metav1.GetOptions{}); {
		case apierrors.IsNotFound(err):
			return "", nil
		default:
			return "it is there", err
		}
	}); err != nil {
		return err
	}
	return m.cleanWith(ctx, m.c, ds)
}

// arrive has who is to capture on a node come, and lets pods in.
func (m *mover) arrive(ctx context.Context, node string) error {
	var state moveState
	if err := m.note(ctx, node, func(n *corev1.Node, s *moveState) {
		setLabel(n, m.to())
		state = *s
	}); err != nil {
		return err
	}
	wants := map[string]bool{}
	for i := range m.sets {
		if name := setName(&m.sets[i]); m.back && (len(state.Left) == 0 || slices.Contains(state.Left, name)) {
			wants[name] = true
		}
	}
	if err := m.poll(ctx, "waiting for who captures from now on", func() (string, error) {
		pods, err := m.podsOn(ctx, node)
		there := map[string]bool{}
		for _, p := range pods {
			if !ready(&p) || p.DeletionTimestamp != nil {
				continue
			}
			if ofAgent(&p) {
				there[p.Labels["app"]] = true
			}
			for i := range m.sets {
				if ownedBy(&p, &m.sets[i]) {
					there[setName(&m.sets[i])] = true
				}
			}
		}
		var missing []string
		if m.back {
			for _, name := range slices.Sorted(maps.Keys(wants)) {
				if !there[name] {
					missing = append(missing, name)
				}
			}
		} else {
			for _, app := range []struct{ label, what string }{{"warren-holder", "its holder"}, {"ztunnel", "Warren's agent"}} {
				if !there[app.label] {
					missing = append(missing, app.what)
				}
			}
		}
		if err == nil && len(missing) > 0 {
			m.p.now("node %s: waiting for %s to be ready", node, strings.Join(missing, ", "))
		}
		return strings.Join(missing, ", ") + m.whyNot(pods, len(missing)), err
	}); err != nil {
		return err
	}
	if !m.back { // Istio captures what runs
		pods, modes, err := m.cluster(ctx)
		if err != nil {
			return err
		}
		t := tenantsOf(pods, node, modes, m.sets)
		if err := m.evict(ctx, slices.DeleteFunc(t.restart, func(p corev1.Pod) bool { return !p.CreationTimestamp.Time.Before(state.Since) })); err != nil {
			return err
		}
	}
	return m.note(ctx, node, func(n *corev1.Node, s *moveState) {
		if s.Cordoned {
			n.Spec.Unschedulable, s.Cordoned = false, false
		}
		if m.back {
			*s = moveState{}
		}
	})
}

// whyNot says of pods that are not ready what the kubelet says of them.
func (m *mover) whyNot(pods []corev1.Pod, missing int) string {
	if missing == 0 {
		return ""
	}
	var out strings.Builder
	for _, p := range pods {
		if !ofAgent(&p) || ready(&p) {
			continue
		}
		for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			if w := s.State.Waiting; w != nil {
				fmt.Fprintf(&out, " (%s: %s)", p.Name, strings.TrimSuffix(w.Reason+": "+w.Message, ": "))
			}
		}
	}
	return out.String()
}

func (m *mover) podsOn(ctx context.Context, node string) ([]corev1.Pod, error) {
	list, err := m.c.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		return nil, fmt.Errorf("listing the pods of node %s: %w", node, err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.Spec.NodeName != node }), nil
}

// evict has pods end, as budgets allow, and waits until they are gone.
func (m *mover) evict(ctx context.Context, pods []corev1.Pod) error {
	asked := map[string]bool{}
	return m.poll(ctx, "waiting for pods to end", func() (string, error) {
		var there, held []string
		for _, p := range pods {
			now, err := m.c.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) || err == nil && now.UID != p.UID {
				continue
			}
			if err != nil {
				return "", fmt.Errorf("reading pod %s/%s: %w", p.Namespace, p.Name, err)
			}
			name := p.Namespace + "/" + p.Name
			there = append(there, name)
			if now.DeletionTimestamp != nil {
				continue
			}
			err = m.c.PolicyV1().Evictions(p.Namespace).Evict(ctx, &policyv1.Eviction{
				ObjectMeta:    metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name},
				DeleteOptions: &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &p.UID}},
			})
			switch {
			case err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err):
				if !asked[name] {
					m.evicted++
				}
				asked[name] = true
			case apierrors.IsTooManyRequests(err):
				held = append(held, name)
			default:
				return "", fmt.Errorf("evicting pod %s: %w", name, err)
			}
		}
		if len(there) == 0 {
			return "", nil
		}
		say := some(there)
		if len(held) > 0 {
			say += "; a PodDisruptionBudget holds " + some(held)
		}
		m.p.now("waiting for pods to end: %s", say)
		return say, nil
	})
}

// note changes a node, and what is remembered of its move.
func (m *mover) note(ctx context.Context, node string, change func(*corev1.Node, *moveState)) error {
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		n, err := m.c.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
		if err != nil {
			return err
		}
		s, err := readMoveState(n)
		if err != nil {
			return err
		}
		change(n, &s)
		b, err := json.Marshal(s)
		if err != nil {
			return err
		}
		if n.Annotations == nil {
			n.Annotations = map[string]string{}
		}
		if n.Annotations[moveNote] = string(b); string(b) == "{}" {
			delete(n.Annotations, moveNote)
		}
		_, err = m.c.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{FieldManager: fieldManager})
		return err
	})
	if err != nil {
		return fmt.Errorf("writing its label %s and the annotation %s: %w", migrationLabel, moveNote, err)
	}
	return nil
}

func readMoveState(n *corev1.Node) (s moveState, err error) {
	text := n.Annotations[moveNote]
	if text == "" {
		return s, nil
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return s, fmt.Errorf("annotation %s of node %s is not what was written there: %w; take it away", moveNote, n.Name, err)
	}
	return s, nil
}

func setLabel(n *corev1.Node, value string) {
	if value == "" {
		delete(n.Labels, migrationLabel)
		return
	}
	if n.Labels == nil {
		n.Labels = map[string]string{}
	}
	n.Labels[migrationLabel] = value
}

// noneMoved refuses to go on while Warren captures on nodes that Istio's DaemonSets would not come back to.
func (a *app) noneMoved(ctx context.Context, c *conn) error {
	if !a.besideIstio(ctx, c) {
		return nil
	}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: migrationLabel})
	if err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	var names []string
	for _, n := range nodes.Items {
		names = append(names, n.Name)
	}
	if len(names) > 0 {
		return fmt.Errorf("nodes are moved, and Istio leaves them alone (%s): %s migrate node --all --back first", some(names), a.name())
	}
	return nil
}

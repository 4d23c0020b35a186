package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/revision"
)

var errNotInstalled = errors.New("no control plane of Warren")

// meshStatus is what status prints.
type meshStatus struct {
	Control    ratio             `json:"control"`
	Revisions  map[string]ratio  `json:"revisions,omitempty"` // of control planes beside the mesh's, which Control counts too
	Tags       map[string]string `json:"tags,omitempty"`      // and what revisions are called besides
	Agents     ratio             `json:"agents"`
	Holders    ratio             `json:"holders"`
	Namespaces []namespaceStatus `json:"namespaces"`
	Pending    []pendingPod      `json:"pending,omitempty"`
	Policies   []policyStatus    `json:"policies,omitempty"`
}

// What applies to the UDP that arrives at a namespace's pods.
const (
	udpLabel   = "warren.io/udp-policy"
	udpEnforce = "enforce"

	udpUnfiltered = "unfiltered"
	udpByPolicy   = "by policy"
)

// ratio is how many of those that should be ready are.
type ratio struct {
	Ready int `json:"ready"`
	Want  int `json:"want"`

	mayBeNone bool // that none should be is right too
}

func (r ratio) complete() bool { return (r.Want > 0 || r.mayBeNone) && r.Ready >= r.Want }
func (r ratio) String() string { return fmt.Sprintf("%d/%d", r.Ready, r.Want) }

type namespaceStatus struct {
	Name     string `json:"name"`
	Mode     string `json:"mode"`     // value of the label, "" where single pods are enrolled
	Captured int    `json:"captured"` // pods that their node says are captured
	Pending  int    `json:"pending"`
	Outside  int    `json:"outside"` // opted out, on the host network, with a sidecar
	UDP      string `json:"udp"`     // "unfiltered", or "by policy" where the namespace asks for it; never encrypted
}

type pendingPod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Node      string `json:"node"`
	Why       string `json:"why"`
}

// inOrder reports whether nothing is missing.
func (s *meshStatus) inOrder() bool {
	return s.Control.complete() && s.Agents.complete() && s.Holders.complete() && len(s.Pending) == 0
}

func (a *app) statusCommand() *cobra.Command {
	var wait bool
	var limit time.Duration
	cmd := &cobra.Command{
		Use: "status", Short: "Say what runs, which pods are captured and which policies are enforced", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			s, err := a.status(cmd.Context(), c)
			for start := time.Now(); wait && (err != nil || !s.inOrder()) && time.Since(start) < limit; {
				select {
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				case <-time.After(500 * time.Millisecond):
				}
				s, err = a.status(cmd.Context(), c)
			}
			if err != nil {
				return err
			}
			if err := a.print(s, func(w io.Writer) error { return a.printStatus(w, s) }); err != nil {
				return err
			}
			if !s.inOrder() {
				return errFound
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&wait, "wait", false, "wait until everything is ready and no pod is pending")
	cmd.Flags().DurationVar(&limit, "timeout", 2*time.Minute, "for --wait")
	return cmd
}

func (a *app) status(ctx context.Context, c *conn) (*meshStatus, error) {
	s := &meshStatus{Namespaces: []namespaceStatus{}}
	deployments, err := c.AppsV1().Deployments(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: controlSelector})
	if err != nil {
		return nil, fmt.Errorf("reading the control plane: %w", err)
	}
	for _, d := range deployments.Items {
		s.Control.Ready += int(d.Status.ReadyReplicas)
		s.Control.Want += int(d.Status.Replicas)
		if d.Labels[revision.Label] == revision.BesideIstio { // agents come with the first node that is moved
			s.Agents.mayBeNone, s.Holders.mayBeNone = true, true
		}
		if rev := d.Labels[revision.Label]; rev != revision.Default && rev != revision.BesideIstio && rev != "" {
			if s.Revisions == nil {
				s.Revisions = map[string]ratio{}
			}
			s.Revisions[rev] = ratio{Ready: int(d.Status.ReadyReplicas), Want: int(d.Status.Replicas)}
		}
	}
	known, err := a.revisions(ctx, c)
	if err != nil {
		return nil, err
	}
	s.Tags = known.Tags
	for selector, r := range map[string]*ratio{agentSelector: &s.Agents, holderSelector: &s.Holders} {
		sets, err := c.AppsV1().DaemonSets(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return nil, fmt.Errorf("reading the node agents: %w", err)
		}
		for _, d := range sets.Items {
			r.Ready += int(d.Status.NumberReady)
			r.Want += int(d.Status.DesiredNumberScheduled)
		}
	}
	if s.Control.Want == 0 && s.Agents.Want == 0 {
		return nil, fmt.Errorf("%w in %s: %s install, or name its namespace with -n", errNotInstalled, a.namespace, a.name())
	}
	if s.Policies, err = a.policies(ctx, c.istio); err != nil {
		return nil, err
	}
	return s, a.capture(ctx, c, s)
}

// capture fills in what is captured, as the pods' annotations have it.
func (a *app) capture(ctx context.Context, c *conn, s *meshStatus) error {
	namespaces, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	pods, err := c.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	byNamespace := map[string][]*corev1.Pod{}
	for i := range pods.Items {
		p := &pods.Items[i]
		if p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed && p.DeletionTimestamp == nil {
			byNamespace[p.Namespace] = append(byNamespace[p.Namespace], p)
		}
	}
	for _, n := range namespaces.Items {
		row := namespaceStatus{Name: n.Name, Mode: n.Labels[modeLabel], UDP: udpUnfiltered}
		if n.Labels[udpLabel] == udpEnforce {
			row.UDP = udpByPolicy
		}
		for _, p := range byNamespace[n.Name] {
			switch wanted, value := enrolled(p, row.Mode), p.Annotations[redirection]; {
			case value == "enabled":
				row.Captured++
			case value == "pending" || wanted:
				row.Pending++
				s.Pending = append(s.Pending, pendingPod{n.Name, p.Name, p.Spec.NodeName, a.whyPending(ctx, c, p)})
			default:
				row.Outside++
			}
		}
		if row.Mode == "ambient" || row.Captured+row.Pending > 0 {
			s.Namespaces = append(s.Namespaces, row)
		}
	}
	slices.SortFunc(s.Namespaces, func(x, y namespaceStatus) int { return strings.Compare(x.Name, y.Name) })
	return nil
}

// enrolled repeats the rule of the labels, to find pods that nobody has reported on yet.
func enrolled(p *corev1.Pod, namespaceMode string) bool {
	mode := cmp.Or(p.Labels[modeLabel], namespaceMode)
	_, sidecar := p.Annotations["sidecar.istio.io/status"]
	return mode == "ambient" && !p.Spec.HostNetwork && !sidecar
}

// whyPending reads the reason from the pod's latest event.
func (a *app) whyPending(ctx context.Context, c *conn, p *corev1.Pod) string {
	if p.Spec.NodeName == "" {
		return "not scheduled yet"
	}
	events, err := c.CoreV1().Events(p.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + string(p.UID)})
	if err == nil {
		slices.SortFunc(events.Items, func(x, y corev1.Event) int { return y.LastTimestamp.Compare(x.LastTimestamp.Time) })
		for _, e := range events.Items {
			if strings.Contains(strings.ToLower(e.Source.Component+e.ReportingController), "warren") {
				return e.Message
			}
		}
	}
	return "node " + p.Spec.NodeName + " has not reported it; see kubectl -n " + a.namespace + " logs -l " + agentSelector
}

func (a *app) printStatus(w io.Writer, s *meshStatus) error {
	state := func(r ratio) string {
		if r.complete() {
			return a.paint(green, r.String()+" ready")
		}
		return a.paint(red, r.String()+" ready")
	}
	fmt.Fprintf(w, "control plane   %s\n", state(s.Control))
	for _, rev := range slices.Sorted(maps.Keys(s.Revisions)) {
		fmt.Fprintf(w, "  of revision %s: %s\n", rev, state(s.Revisions[rev]))
	}
	for _, tag := range slices.Sorted(maps.Keys(s.Tags)) {
		fmt.Fprintf(w, "  tag %s: revision %s\n", tag, s.Tags[tag])
	}
	fmt.Fprintf(w, "node agents     %s\nholders         %s\n\n", state(s.Agents), state(s.Holders))
	if len(s.Namespaces) == 0 {
		fmt.Fprintf(w, "no namespace is in the mesh: kubectl label namespace NAMESPACE %s=ambient\n", modeLabel)
		return nil
	}
	t := table{head: []string{"NAMESPACE", "MODE", "CAPTURED", "PENDING", "OUTSIDE", "UDP"}}
	for _, n := range s.Namespaces {
		pending := fmt.Sprint(n.Pending)
		if n.Pending > 0 {
			pending = a.paint(yellow, pending)
		}
		t.add(n.Name, dash(n.Mode), fmt.Sprint(n.Captured), pending, fmt.Sprint(n.Outside), n.UDP)
	}
	if err := t.write(w); err != nil {
		return err
	}
	fmt.Fprintf(w, "UDP is not encrypted. Policies apply to it in namespaces with the label %s=%s.\n", udpLabel, udpEnforce)
	if err := a.printPolicies(w, s.Policies); err != nil {
		return err
	}
	for _, p := range s.Pending {
		fmt.Fprintf(w, "\n%s %s/%s on %s: %s\n", a.paint(yellow, "pending"), p.Namespace, p.Name, dash(p.Node), p.Why)
	}
	return nil
}

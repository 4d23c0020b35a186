package cli

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/revision"
)

// movingNode is what migrate status says of a node.
type movingNode struct {
	Node     string `json:"node"`
	Captures string `json:"captures"` // warren, istio, both, nobody
	Captured int    `json:"captured"` // pods in the mesh
	Pending  int    `json:"pending"`  // pods that are to be
	Left     string `json:"left,omitempty"`
}

// servedGateway is what it says of a Gateway.
type servedGateway struct {
	Gateway string `json:"gateway"`
	By      string `json:"by"` // warren, istio, or a revision of Istio's
	Problem string `json:"problem,omitempty"`
}

type migrationStatus struct {
	Nodes    []movingNode    `json:"nodes"`
	Gateways []servedGateway `json:"gateways"`
}

func (a *app) migrateStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Say who captures on which node, and who serves which Gateway", Args: args(cobra.NoArgs),
		Long: "Say who captures on which node, and who serves which Gateway.\n\nExit code 3: a node is neither the one's nor the other's, or pods are not captured.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			if !a.besideIstio(cmd.Context(), c) {
				return fmt.Errorf("there is no Warren beside an Istio in %s: %s migrate begin", a.namespace, a.name())
			}
			return a.showMigration(cmd.Context(), c)
		},
	}
}

func (a *app) showMigration(ctx context.Context, c *conn) error {
	var s migrationStatus
	var err error
	if s.Nodes, err = a.migrationNodes(ctx, c); err != nil {
		return err
	}
	all, _, err := a.owners(ctx, c)
	if err != nil {
		return err
	}
	s.Gateways = []servedGateway{}
	for _, o := range all {
		by := map[string]string{revision.BesideIstio: "warren", revision.Default: "istio", "": "nobody"}[o.owner]
		s.Gateways = append(s.Gateways, servedGateway{o.String(), cmp.Or(by, "istio, revision "+o.owner), o.problem})
	}
	if err := a.print(s, func(w io.Writer) error { return a.printMigration(w, &s) }); err != nil {
		return err
	}
	if slices.ContainsFunc(s.Nodes, func(n movingNode) bool { return n.Left != "" || n.Pending > 0 }) {
		return errFound
	}
	return nil
}

// migrationNodes says of each node who captures there.
func (a *app) migrationNodes(ctx context.Context, c *conn) ([]movingNode, error) {
	sets, err := istioSets(ctx, c)
	if err != nil {
		return nil, err
	}
	m := mover{app: a, c: c}
	pods, modes, err := m.cluster(ctx)
	if err != nil {
		return nil, err
	}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing nodes: %w", err)
	}
	out := []movingNode{}
	for _, n := range nodes.Items {
		row := movingNode{Node: n.Name}
		var agent, theirs []corev1.Pod
		for _, p := range pods {
			switch {
			case p.Spec.NodeName != n.Name || p.DeletionTimestamp != nil:
			case ofAgent(&p) && p.Labels["app"] == "ztunnel":
				agent = append(agent, p)
			case ownedByAny(&p, sets):
				theirs = append(theirs, p)
			}
		}
		switch {
		case len(agent) > 0 && len(theirs) > 0:
			row.Captures = "both"
		case len(agent) > 0:
			row.Captures = "warren"
		case len(theirs) > 0:
			row.Captures = "istio"
		default:
			row.Captures = "nobody"
		}
		t := tenantsOf(pods, n.Name, modes, sets)
		state, err := readMoveState(&n)
		if err != nil {
			return nil, err
		}
		old := 0 // pods that whoever captures now cannot take
		for _, p := range slices.Concat(t.evict, t.restart, t.lone, t.static) {
			if p.Annotations[redirection] == "enabled" {
				row.Captured++
			} else if p.DeletionTimestamp == nil {
				row.Pending++
			}
			if n.Labels[migrationLabel] == moved && p.CreationTimestamp.Time.Before(state.Since) {
				old++
			}
		}
		var left []string
		say := func(is bool, format string, args ...any) {
			if is {
				left = append(left, fmt.Sprintf(format, args...))
			}
		}
		say(n.Labels[migrationLabel] == between || state.Cordoned, "a move was interrupted: run it again")
		say(n.Labels[migrationLabel] == moved && len(theirs) > 0, "%s of Istio's still there: %s", plural(len(theirs), "pod"), some(podNames(theirs)))
		say(n.Labels[migrationLabel] == moved && !slices.ContainsFunc(agent, func(p corev1.Pod) bool { return ready(&p) }), "the agent is not ready")
		say(old > 0, "%s from before the move", plural(old, "pod"))
		say(n.Labels[migrationLabel] == "" && len(agent) > 0, "an agent of Warren's, though the node was not moved")
		row.Left = strings.Join(left, "; ")
		out = append(out, row)
	}
	for i := range sets {
		if !isApart(&sets[i]) {
			for j := range out {
				if out[j].Captures != "istio" && out[j].Captures != "nobody" {
					out[j].Left = strings.TrimPrefix(out[j].Left+"; DaemonSet "+setName(&sets[i])+" is no longer kept off: run migrate node again", "; ")
				}
			}
		}
	}
	slices.SortFunc(out, func(x, y movingNode) int { return strings.Compare(x.Node, y.Node) })
	return out, nil
}

func (a *app) printMigration(w io.Writer, s *migrationStatus) error {
	t := table{head: []string{"NODE", "CAPTURES", "CAPTURED", "PENDING", "LEFT TO DO"}}
	for _, n := range s.Nodes {
		left := dash(n.Left)
		if n.Left != "" {
			left = a.paint(yellow, n.Left)
		}
		t.add(n.Node, n.Captures, fmt.Sprint(n.Captured), fmt.Sprint(n.Pending), left)
	}
	if err := t.write(w); err != nil {
		return err
	}
	if len(s.Gateways) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	g := table{head: []string{"GATEWAY", "SERVED BY", "PROBLEM"}}
	for _, row := range s.Gateways {
		g.add(row.Gateway, row.By, dash(row.Problem))
	}
	return g.write(w)
}

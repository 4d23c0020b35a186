package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/cli/envoy"
)

func (a *app) proxyConfigCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "proxy-config", Aliases: []string{"pc"},
		Short: "Show what a waypoint's Envoy does",
		Long:  "Show what a waypoint's Envoy does, as it says itself. Of a waypoint with several pods, the first that is ready is asked.",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for _, v := range envoy.Tables {
		match := ""
		sub := &cobra.Command{
			Use: v.Name + " NAMESPACE/WAYPOINT|NAMESPACE/POD", Short: "Show " + v.About,
			Aliases: []string{strings.TrimSuffix(v.Name, "s")},
			Args:    args(cobra.ExactArgs(1)),
			RunE: func(cmd *cobra.Command, target []string) error {
				return a.proxyConfig(cmd.Context(), v, target[0], match)
			},
		}
		sub.Flags().StringVar(&match, "match", "", "only rows with this text in them")
		cmd.AddCommand(sub)
	}
	return cmd
}

func (a *app) proxyConfig(ctx context.Context, v envoy.Table, target, match string) error {
	c, err := a.connect(a)
	if err != nil {
		return err
	}
	pod, err := a.waypointPod(ctx, c, target)
	if err != nil {
		return err
	}
	b, err := c.ask(ctx, pod, adminPort, v.Path)
	if err != nil {
		return err
	}
	said, err := envoy.Parse(b)
	if err != nil {
		return err
	}
	return a.print(said.Without(v.Hidden...), func(w io.Writer) error {
		t := table{head: v.Head}
		for _, r := range v.Rows(said) {
			for i := range r {
				r[i] = dash(r[i])
			}
			if match == "" || strings.Contains(strings.Join(r, " "), match) {
				t.add(r...)
			}
		}
		slices.SortStableFunc(t.rows, func(x, y []string) int { return strings.Compare(x[0], y[0]) }) // the order of routes means something
		return t.write(w)
	})
}

// waypointPod finds a pod of a waypoint, by its own name or the waypoint's, written NAMESPACE/NAME or NAME.NAMESPACE.
func (a *app) waypointPod(ctx context.Context, c *conn, target string) (*corev1.Pod, error) {
	ns, name := podName(target)
	list, err := c.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: gatewayLabel})
	if err != nil {
		return nil, fmt.Errorf("listing the waypoints' pods in %s: %w", ns, err)
	}
	var starting []string
	for i := range list.Items {
		p := &list.Items[i]
		switch {
		case p.Name == name:
			return p, nil
		case p.Labels[gatewayLabel] != name || p.DeletionTimestamp != nil:
		case ready(p):
			return p, nil
		default:
			starting = append(starting, p.Name)
		}
	}
	if len(starting) > 0 {
		return nil, fmt.Errorf("no pod of the waypoint %s/%s is ready; one that is not can be named: %s", ns, name, strings.Join(starting, ", "))
	}
	return nil, fmt.Errorf("%s/%s is neither a waypoint with a pod nor a pod of one: see %s waypoint list -A", ns, name, a.name())
}

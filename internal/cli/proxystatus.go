package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// proxyState is one line of proxy-status.
type proxyState struct {
	Proxy     string            `json:"proxy"`
	Namespace string            `json:"namespace,omitempty"`
	Waypoint  string            `json:"waypoint,omitempty"`
	Type      string            `json:"type"`
	State     string            `json:"state"` // the worst of States, or DISCONNECTED
	States    map[string]string `json:"states,omitempty"`
	Trouble   string            `json:"trouble,omitempty"`
	Control   string            `json:"control,omitempty"` // the pod of the control plane that it is connected to
	Version   string            `json:"version,omitempty"`
}

const (
	stateSynced       = "SYNCED"
	stateDisconnected = "DISCONNECTED"
)

// worst are the states, the worst first. NOT SENT is none of them: there was nothing to send.
var worst = []string{stateDisconnected, "REFUSED", "STALE", stateSynced}

func (a *app) proxyStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use: "proxy-status [NAME]", Aliases: []string{"ps"}, Short: "Say which nodes and waypoints have what the control plane has sent",
		Long: "Say which nodes and waypoints have what the control plane has sent: SYNCED, STALE (sent, and not acknowledged; of a waypoint, not in use),\n" +
			"NOT SENT, REFUSED, or DISCONNECTED. A node acknowledges what it enforces. With a node's, a pod's or a waypoint's name, each type by itself.",
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			rows, err := a.proxyStates(cmd.Context(), c)
			if err != nil {
				return err
			}
			if len(names) == 1 {
				ns, name, ok := strings.Cut(names[0], "/")
				if !ok {
					ns, name = "", names[0]
				}
				rows = slices.DeleteFunc(rows, func(p proxyState) bool {
					return p.Proxy != name && (p.Waypoint != name || name == "") || ns != "" && p.Namespace != ns
				})
				if len(rows) == 0 {
					return fmt.Errorf("%s is neither a node nor a waypoint: see %s proxy-status", names[0], a.name())
				}
			}
			if err := a.print(rows, func(w io.Writer) error { return a.printProxyStates(w, rows, len(names) == 1) }); err != nil {
				return err
			}
			if slices.ContainsFunc(rows, func(p proxyState) bool { return p.State != stateSynced }) {
				return errFound
			}
			return nil
		},
	}
}

// proxyStates asks every pod of the control plane, and adds the agents and waypoints that none of them knows.
func (a *app) proxyStates(ctx context.Context, c *conn) ([]proxyState, error) {
	control, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: controlSelector})
	if err != nil {
		return nil, fmt.Errorf("listing the control plane's pods: %w", err)
	}
	agents, err := a.agents(ctx, c)
	if err != nil {
		return nil, err
	}
	ways, err := c.CoreV1().Pods("").List(ctx, metav1.ListOptions{LabelSelector: gatewayLabel})
	if err != nil {
		return nil, fmt.Errorf("listing the waypoints' pods: %w", err)
	}
	version := map[string]string{}
	var expected []proxyState
	for i := range agents {
		version[agents[i].Spec.NodeName] = tagOf(&agents[i])
		expected = append(expected, proxyState{Proxy: agents[i].Spec.NodeName, Type: "node"})
	}
	for i := range ways.Items {
		p := &ways.Items[i]
		if p.DeletionTimestamp != nil || p.Status.Phase != corev1.PodRunning {
			continue
		}
		version[p.Namespace+"/"+p.Name] = tagOf(p)
		expected = append(expected, proxyState{Proxy: p.Name, Namespace: p.Namespace, Waypoint: p.Labels[gatewayLabel], Type: "waypoint"})
	}
	var out []proxyState
	asked := 0
	for i := range control.Items {
		p := &control.Items[i]
		if !ready(p) || p.DeletionTimestamp != nil {
			continue
		}
		b, err := c.ask(ctx, p, monitoringPort, "/debug/syncz")
		if err != nil {
			return nil, err
		}
		var rows []proxyState
		if err := json.Unmarshal(b, &rows); err != nil {
			return nil, fmt.Errorf("reading what %s says: %w", p.Name, err)
		}
		asked++
		for _, r := range rows {
			r.Control, r.State = p.Name, stateSynced
			for _, s := range r.States {
				if i := slices.Index(worst, s); i >= 0 && i < slices.Index(worst, r.State) {
					r.State = s
				}
			}
			out = append(out, r)
		}
	}
	if asked == 0 {
		return nil, fmt.Errorf("%w is ready in %s: see %s check", errNotInstalled, a.namespace, a.name())
	}
	for _, e := range expected {
		if !slices.ContainsFunc(out, func(p proxyState) bool { return p.Type == e.Type && p.Proxy == e.Proxy && p.Namespace == e.Namespace }) {
			e.State = stateDisconnected
			out = append(out, e)
		}
	}
	for i := range out {
		out[i].Version = version[strings.TrimPrefix(out[i].Namespace+"/"+out[i].Proxy, "/")]
	}
	slices.SortStableFunc(out, func(x, y proxyState) int {
		return strings.Compare(x.Type+"\x00"+x.Namespace+"\x00"+x.Proxy, y.Type+"\x00"+y.Namespace+"\x00"+y.Proxy)
	})
	return out, nil
}

// tagOf is the tag of a pod's image.
func tagOf(p *corev1.Pod) string {
	if len(p.Spec.Containers) == 0 {
		return ""
	}
	image := p.Spec.Containers[0].Image
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		return image[i+1:]
	}
	return ""
}

func (a *app) printProxyStates(w io.Writer, rows []proxyState, each bool) error {
	state := func(s string) string {
		switch s {
		case stateSynced:
			return a.paint(green, s)
		case "NOT SENT":
			return s
		}
		return a.paint(red, s)
	}
	t := table{head: []string{"NAME", "TYPE", "STATE", "TYPES", "CONTROL PLANE", "VERSION"}}
	if each {
		t.head = []string{"NAME", "TYPE", "CONFIGURATION", "STATE"}
	}
	for _, p := range rows {
		name := strings.TrimPrefix(p.Namespace+"/"+p.Proxy, "/")
		kinds := slices.Sorted(maps.Keys(p.States))
		if !each {
			t.add(name, p.Type, state(p.State), fmt.Sprint(len(kinds)), dash(p.Control), dash(p.Version))
			continue
		}
		if len(kinds) == 0 {
			t.add(name, p.Type, "-", state(p.State))
		}
		for _, k := range kinds {
			t.add(name, p.Type, k, state(p.States[k]))
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	for _, p := range rows {
		if p.Trouble != "" {
			fmt.Fprintf(w, "\n%s: %s\n", strings.TrimPrefix(p.Namespace+"/"+p.Proxy, "/"), p.Trouble)
		}
	}
	return nil
}

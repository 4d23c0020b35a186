package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// addon is a program beside the mesh that has pages to look at.
type addon struct {
	name, title string
	port        int
	path        string
	// Labels of its pods, of which one is enough: those of samples/addons and of the charts of its makers.
	selectors []string
}

var addons = []addon{
	{"prometheus", "Prometheus", 9090, "/", []string{"app=prometheus", "app.kubernetes.io/name=prometheus"}},
	{"grafana", "Grafana", 3000, "/dashboards", []string{"app=grafana", "app.kubernetes.io/name=grafana"}},
	{"kiali", "Kiali", 20001, "/kiali", []string{"app=kiali", "app.kubernetes.io/name=kiali"}},
	{"zipkin", "Zipkin", 9411, "/zipkin/", []string{"app=zipkin", "app.kubernetes.io/name=zipkin"}},
	{"jaeger", "Jaeger", 16686, "/", []string{"app=jaeger", "app.kubernetes.io/name=jaeger"}},
}

// page is what a dashboard command opens.
type page struct {
	pod  *corev1.Pod
	port int
	path string
}

// opened is what it prints.
type opened struct {
	URL string `json:"url"`
	Pod string `json:"pod"`
}

func (a *app) dashboardCommand() *cobra.Command {
	local, browser := 0, false
	cmd := &cobra.Command{
		Use: "dashboard", Aliases: []string{"dash", "d"}, Short: "Open the pages of add-ons, agents, waypoints and the control plane",
		Long: "Forward a local port to the pages of an add-on, an agent, a waypoint or the control plane, and print their address, until it is interrupted.\n" +
			"Add-ons are looked for in the namespace of the control plane, or that of -n.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().IntVarP(&local, "port", "p", 0, "local port; 0: that of the pages, or any where that is taken")
	cmd.PersistentFlags().BoolVar(&browser, "browser", false, "open a browser; only on a terminal")
	add := func(use, short string, arguments cobra.PositionalArgs, find func(context.Context, *conn, string) (page, error)) {
		cmd.AddCommand(&cobra.Command{
			Use: use, Short: short, Args: args(arguments),
			RunE: func(cmd *cobra.Command, target []string) error {
				if local < 0 || local > 65535 {
					return usageError{fmt.Errorf("--port %d is no port: take 0 to 65535", local)}
				}
				if browser && !isTerminal(a.env.Out) {
					return usageError{fmt.Errorf("--browser needs a terminal; without it the address is printed")}
				}
				c, err := a.connect(a)
				if err != nil {
					return err
				}
				p, err := find(cmd.Context(), c, strings.Join(target, ""))
				if err != nil {
					return err
				}
				return a.show(cmd.Context(), c, p, local, browser)
			},
		})
	}
	for _, x := range addons {
		add(x.name, "Open "+x.title, cobra.NoArgs, func(ctx context.Context, c *conn, _ string) (page, error) {
			pod, err := a.addonPod(ctx, c, x)
			return page{pod, x.port, x.path}, err
		})
	}
	add("envoy NAMESPACE/WAYPOINT|NAMESPACE/POD", "Open the admin pages of a waypoint's or gateway's Envoy", cobra.ExactArgs(1),
		func(ctx context.Context, c *conn, target string) (page, error) {
			pod, err := a.waypointPod(ctx, c, target)
			return page{pod, adminPort, "/"}, err
		})
	add("agent NODE|NAMESPACE/POD", "Open the admin pages of a node's agent", cobra.ExactArgs(1),
		func(ctx context.Context, c *conn, target string) (page, error) {
			pod, err := a.agentFor(ctx, c, target)
			return page{pod, adminPort, "/"}, err
		})
	add("control", "Open the monitoring pages of the control plane", cobra.NoArgs,
		func(ctx context.Context, c *conn, _ string) (page, error) {
			pod, found, err := somePod(ctx, c, a.namespace, controlSelector)
			switch {
			case err != nil:
				return page{}, fmt.Errorf("looking for the control plane: %w", err)
			case pod == nil:
				return page{}, fmt.Errorf("%w is ready in %s (%d pods): see %s check", errNotInstalled, a.namespace, found, a.name())
			}
			return page{pod, monitoringPort, "/debug/syncz"}, nil
		})
	return cmd
}

// addonPod finds a pod of an add-on that is ready.
func (a *app) addonPod(ctx context.Context, c *conn, x addon) (*corev1.Pod, error) {
	found := 0
	for _, selector := range x.selectors {
		pod, n, err := somePod(ctx, c, a.namespace, selector)
		if err != nil {
			return nil, fmt.Errorf("looking for %s: %w", x.title, err)
		}
		if pod != nil {
			return pod, nil
		}
		found += n
	}
	if found > 0 {
		return nil, fmt.Errorf("%s is installed in %s, and none of its pods is ready: see kubectl -n %s get pods -l %s", x.title, a.namespace, a.namespace, x.selectors[0])
	}
	return nil, fmt.Errorf("no pod of %s (%s) is in %s: kubectl apply -f samples/addons/%s.yaml installs one, and -n says where else to look",
		x.title, strings.Join(x.selectors, " or "), a.namespace, x.name)
}

// somePod is a pod that is ready, nil where none is, and how many there are.
func somePod(ctx context.Context, c *conn, namespace, selector string) (*corev1.Pod, int, error) {
	list, err := c.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, 0, fmt.Errorf("listing pods of %s: %w", namespace, err)
	}
	for i := range list.Items {
		if p := &list.Items[i]; ready(p) && p.DeletionTimestamp == nil {
			return p, len(list.Items), nil
		}
	}
	return nil, len(list.Items), nil
}

// show forwards the port until the context ends or the pod is gone.
func (a *app) show(ctx context.Context, c *conn, p page, local int, browser bool) error {
	want := local
	if local == 0 {
		want = p.port
	}
	f, err := c.tunnel(ctx, p.pod, want, p.port)
	if err != nil && local == 0 && ctx.Err() == nil { // its own port is taken here
		f, err = c.tunnel(ctx, p.pod, 0, p.port)
	}
	if err != nil {
		return err
	}
	o := opened{URL: fmt.Sprintf("http://127.0.0.1:%d%s", f.port, p.path), Pod: p.pod.Namespace + "/" + p.pod.Name}
	switch a.output {
	case "table":
		fmt.Fprintln(a.env.Out, o.URL)
		fmt.Fprintf(a.env.Err, "forwarded to %s until it is interrupted\n", o.Pod)
	default: // a line, since there is no end to wait for
		if err := json.NewEncoder(a.env.Out).Encode(o); err != nil {
			f.close()
			return err
		}
	}
	if browser {
		if err := openBrowser(ctx, o.URL); err != nil {
			fmt.Fprintf(a.env.Err, "no browser could be opened: %v\n", err)
		}
	}
	select {
	case <-ctx.Done():
		f.close()
		return nil
	case <-f.ended:
		return fmt.Errorf("the connection to %s has ended: %w", o.Pod, f.err)
	}
}

// openBrowser has the desktop open an address.
func openBrowser(ctx context.Context, url string) error {
	program := "xdg-open"
	if runtime.GOOS == "darwin" {
		program = "open"
	}
	return exec.CommandContext(ctx, program, url).Start()
}

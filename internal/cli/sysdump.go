package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"

	"github.com/warrenmesh/warren/internal/cli/sysdump"
)

// metricsPort is an agent's and a waypoint's.
const metricsPort = 15020

// questions are asked of pods, by their label: where the answer goes, the port and the path.
var questions = map[string][]struct {
	file string
	port int
	path string
}{
	agentSelector: {{"config_dump.json", adminPort, "/config_dump"}, {"mesh.json", adminPort, "/debug/mesh"}, {"connections.json", adminPort, "/connections"},
		{"version.json", adminPort, "/version"}, {"goroutines.txt", adminPort, "/debug/pprof/goroutine?debug=1"}, {"metrics.txt", metricsPort, "/metrics"}},
	controlSelector: {{"version.json", monitoringPort, "/version"}, {"metrics.txt", monitoringPort, "/metrics"}},
	gatewayLabel: {{"config_dump.json", adminPort, "/config_dump"}, {"clusters.json", adminPort, "/clusters?format=json"},
		{"server_info.json", adminPort, "/server_info"}, {"metrics.txt", metricsPort, "/stats/prometheus"}},
}

func (a *app) sysdumpCommand() *cobra.Command {
	file, lines, limit := "", int64(5000), 3*time.Minute
	cmd := &cobra.Command{
		Use: "sysdump", Short: "Pack what helps to understand a mesh into one file, without what is secret",
		Long: "Pack what helps to understand a mesh into one file: objects of the mesh and of its namespace, nodes, logs, what agents and waypoints\n" +
			"hold, and metrics. Secrets are not asked for; keys, tokens and passwords are taken out of everything else. Names, addresses and\n" +
			"what logs say of connections and requests stay in it.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			now := time.Now().UTC()
			name := "warren-sysdump-" + now.Format("20060102-150405")
			if file == "" {
				file = name + ".tar.gz"
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), limit)
			defer cancel()
			return a.sysdump(ctx, c, file, name, now, lines)
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "where to write it (default warren-sysdump-TIME.tar.gz), - is standard output")
	cmd.Flags().Int64Var(&lines, "log-lines", lines, "of each container, at most")
	cmd.Flags().DurationVar(&limit, "timeout", limit, "leave out what takes longer")
	return cmd
}

func (a *app) sysdump(ctx context.Context, c *conn, file, name string, now time.Time, lines int64) error {
	p, out := a.progress(), io.Writer(a.env.Out)
	if file == "-" && isTerminal(a.env.Out) {
		return usageError{errors.New("the archive would be written to the terminal: name a file with -f")}
	}
	var f *os.File
	if file != "-" {
		var err error
		// It names everything of a cluster: nobody else's to read.
		if f, err = os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
			return fmt.Errorf("writing the archive: %w", err)
		}
		defer f.Close()
		out = f
	}
	d := &collector{app: a, c: c, archive: sysdump.New(out, name, now), lines: lines}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"what is in order", d.findings}, {"the nodes and what runs on them", d.machines}, {"objects of " + a.namespace, d.own},
		{"policies, routes and gateways", d.config}, {"logs, and what agents and waypoints hold", d.pods},
	} {
		p.now("collecting %s", step.what)
		if err := step.do(ctx); err != nil {
			d.archive.Missing(step.what, err)
		}
	}
	err := d.archive.Close()
	if f != nil {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing the archive: %w", err), os.Remove(file))
	}
	files, missing := d.archive.Count()
	what := plural(files, "file")
	if missing > 0 {
		what += fmt.Sprintf(", and %d could not be had: see missing.txt in it", missing)
	}
	if f != nil {
		abs, err := filepath.Abs(file)
		if err != nil {
			abs = file
		}
		what = abs + ": " + what
	}
	p.done("%s", what)
	return nil
}

// collector fills an archive.
type collector struct {
	app     *app
	c       *conn
	archive *sysdump.Archive
	lines   int64
}

func (d *collector) findings(ctx context.Context) error {
	put := func(name string, v any, err error) {
		if err != nil {
			d.archive.Missing(name, err)
			return
		}
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			d.archive.Missing(name, err)
			return
		}
		d.archive.Add(name, b)
	}
	found, err := d.app.check(ctx, d.c)
	put("check.json", found, err)
	s, err := d.app.status(ctx, d.c)
	put("status.json", s, err)
	v, err := d.c.Discovery().ServerVersion()
	put("version.json", map[string]any{"warren": d.app.env.Version, "kubernetes": v}, err)
	return nil
}

// list reads objects of a resource; "" are all namespaces.
func (d *collector) list(ctx context.Context, file, namespace string, r schema.GroupVersionResource) {
	var all []*unstructured.Unstructured
	for from := ""; ; {
		l, err := d.c.objects.Client.Resource(r).Namespace(namespace).List(ctx, metav1.ListOptions{Limit: 500, Continue: from})
		if err != nil {
			d.archive.Missing(file, err)
			break
		}
		for i := range l.Items {
			all = append(all, &l.Items[i])
		}
		if from = l.GetContinue(); from == "" {
			break
		}
	}
	d.archive.AddObjects(file, all)
}

func (d *collector) machines(ctx context.Context) error {
	core := schema.GroupVersion{Version: "v1"}
	d.list(ctx, "cluster/nodes.yaml", "", core.WithResource("nodes"))
	d.list(ctx, "cluster/namespaces.yaml", "", core.WithResource("namespaces"))
	d.list(ctx, "cluster/services.yaml", "", core.WithResource("services"))
	// Of pods that are not the mesh's, only where they are and what is said of their capture.
	list, err := d.c.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var out strings.Builder
	for i := range list.Items {
		p := &list.Items[i]
		fmt.Fprintf(&out, "%s/%s node=%s phase=%s ready=%t ip=%s account=%s capture=%s\n", p.Namespace, p.Name, p.Spec.NodeName, p.Status.Phase, ready(p), p.Status.PodIP,
			p.Spec.ServiceAccountName, p.Annotations[redirection])
	}
	d.archive.Add("cluster/pods.txt", []byte(out.String()))
	return nil
}

func (d *collector) own(ctx context.Context) error {
	for r, gv := range map[string]schema.GroupVersion{
		"pods": {Version: "v1"}, "services": {Version: "v1"}, "configmaps": {Version: "v1"}, "serviceaccounts": {Version: "v1"}, "events": {Version: "v1"},
		"deployments": {Group: "apps", Version: "v1"}, "daemonsets": {Group: "apps", Version: "v1"}, "poddisruptionbudgets": {Group: "policy", Version: "v1"},
		"leases": {Group: "coordination.k8s.io", Version: "v1"},
	} {
		d.list(ctx, "control/"+r+".yaml", d.app.namespace, gv.WithResource(r))
	}
	d.list(ctx, "cluster/validatingwebhookconfigurations.yaml", "", schema.GroupVersionResource{Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingwebhookconfigurations"})
	return nil
}

// config are all objects by which users say what they want of the mesh.
func (d *collector) config(ctx context.Context) error {
	lists, err := d.c.Discovery().ServerPreferredResources()
	if err != nil && !discovery.IsGroupDiscoveryFailedError(err) {
		return err
	}
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil || !strings.HasSuffix(gv.Group, "istio.io") && gv.Group != "gateway.networking.k8s.io" && gv.Group != "warren.io" && gv.Group != "networking.k8s.io" {
			continue
		}
		for _, r := range l.APIResources {
			if !slices.Contains(r.Verbs, "list") || gv.Group == "networking.k8s.io" && r.Name != "networkpolicies" {
				continue
			}
			d.list(ctx, "config/"+r.Name+"."+gv.Group+".yaml", "", gv.WithResource(r.Name))
		}
	}
	return nil
}

func (d *collector) pods(ctx context.Context) error {
	g := &errgroup.Group{}
	g.SetLimit(8)
	for _, x := range []struct{ namespace, selector string }{{d.app.namespace, agentSelector}, {d.app.namespace, holderSelector}, {d.app.namespace, controlSelector}, {"", gatewayLabel}} {
		list, err := d.c.CoreV1().Pods(x.namespace).List(ctx, metav1.ListOptions{LabelSelector: x.selector})
		if err != nil {
			d.archive.Missing("pods with "+x.selector, err)
			continue
		}
		for i := range list.Items {
			p := &list.Items[i]
			dir := path.Join("pods", p.Namespace+"."+p.Name)
			g.Go(func() error { d.logs(ctx, p, dir); return nil })
			for _, q := range questions[x.selector] {
				g.Go(func() error {
					one, cancel := context.WithTimeout(ctx, 20*time.Second)
					defer cancel()
					b, err := d.c.ask(one, p, q.port, q.path)
					if err != nil {
						d.archive.Missing(path.Join(dir, q.file), err)
						return nil
					}
					d.archive.Add(path.Join(dir, q.file), b)
					return nil
				})
			}
		}
	}
	return g.Wait()
}

func (d *collector) logs(ctx context.Context, p *corev1.Pod, dir string) {
	get := func(container string, previous bool, file string) {
		b, err := d.c.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{Container: container, Previous: previous, TailLines: &d.lines, Timestamps: true}).DoRaw(ctx)
		if err != nil {
			d.archive.Missing(path.Join(dir, file), err)
			return
		}
		d.archive.Add(path.Join(dir, file), b)
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		get(c.Name, false, c.Name+".log")
		if c.RestartCount > 0 {
			get(c.Name, true, c.Name+".previous.log")
		}
	}
}

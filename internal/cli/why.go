package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/cli/envoy"
	"github.com/warrenmesh/warren/internal/cli/why"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// request are the flags that say what is asked of a waypoint.
type request struct {
	method, path, host string
	headers            []string
}

func (r *request) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.method, "method", "GET", "of the request, where a waypoint looks at requests")
	f.StringVar(&r.path, "path", "/", "of the request, with its query")
	f.StringVar(&r.host, "host", "", "that the request names (default the service's)")
	f.StringArrayVar(&r.headers, "header", nil, "NAME=VALUE of the request; may be repeated")
}

func (r *request) read() (envoy.Request, error) {
	out := envoy.Request{Method: strings.ToUpper(r.method), Path: r.path, Host: r.host, Headers: map[string]string{}}
	if out.Method == "" || !strings.HasPrefix(r.path, "/") {
		return out, usageError{errors.New("a request has a --method, and a --path that begins with /")}
	}
	for _, h := range r.headers {
		k, v, ok := strings.Cut(h, "=")
		if !ok || k == "" {
			return out, usageError{fmt.Errorf("--header %s is not NAME=VALUE", h)}
		}
		out.Headers[strings.ToLower(k)] = v
	}
	return out, nil
}

func (a *app) whyCommand() *cobra.Command {
	req := &request{}
	cmd := &cobra.Command{
		Use: "why SOURCE DESTINATION[:PORT]", Short: "Explain what becomes of a connection, and what decides",
		Long: "Explain what becomes of a connection: whether the client is captured, where its node sends the connection, whether the two ends\n" +
			"trust each other, and which policy decides at the other end. Both nodes are asked for what they hold, and the same functions\n" +
			"decide here as there. Where a waypoint is on the way, its Envoy is asked for its configuration, and a request is followed through it.\n\n" +
			"SOURCE is a pod, as NAMESPACE/POD or POD.NAMESPACE. DESTINATION is a pod likewise, a service as SERVICE.NAMESPACE or by its full\n" +
			"name, or an address. The port may be left out where there is only one. Exit code 3: the connection is refused, or some are.",
		Example: "  warren why shop/ui-7d9 catalog.shop:8080\n  warren why shop/ui-7d9 catalog.shop --method POST --path /items --header x-user=anna\n" +
			"  warren why shop/ui-7d9 10.96.0.7:8080 -o json",
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, ends []string) error {
			ask, err := req.read()
			if err != nil {
				return err
			}
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			answer, err := a.why(cmd.Context(), c, ends[0], ends[1], ask)
			if err != nil {
				return err
			}
			if err := a.print(answer, func(w io.Writer) error { return a.printWhy(w, answer) }); err != nil {
				return err
			}
			if answer.Outcome != why.Allowed {
				return errFound
			}
			return nil
		},
	}
	req.add(cmd)
	return cmd
}

// explanation is what why prints.
type explanation struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	why.Answer
}

func (a *app) why(ctx context.Context, c *conn, source, destination string, ask envoy.Request) (*explanation, error) {
	agents, err := a.agents(ctx, c)
	if err != nil {
		return nil, err
	}
	if len(agents) == 0 {
		return nil, fmt.Errorf("no node agent runs in %s: see %s check", a.namespace, a.name())
	}
	client, err := a.agentFor(ctx, c, source)
	if err != nil {
		return nil, err
	}
	if client.Spec.NodeName == source || client.Name == source {
		return nil, usageError{fmt.Errorf("%s is a node: name the pod that connects, as NAMESPACE/POD", source)}
	}
	near, err := fetchNode(ctx, c, client)
	if err != nil {
		return nil, err
	}
	ns, name := podName(source)
	src := podAt(near.Mesh, ns, name)
	if src == nil {
		return nil, fmt.Errorf("node %s does not know the pod %s/%s yet: on the host network, just started, or the node is behind; see %s node-config workloads %[1]s",
			near.Name, ns, name, a.name())
	}
	dst, err := destinationOf(near.Mesh, src, destination)
	if err != nil {
		return nil, usageError{err}
	}
	k := &known{app: a, c: c, agents: agents, nodes: map[string]*why.Node{near.Name: near}, waypoints: map[string]*envoy.Config{}}
	for {
		answer := why.Explain(why.Question{Source: src.UID, Dst: dst, Client: near, Node: k.node, Waypoint: k.waypoint, Request: ask})
		if !k.learn(ctx) {
			return &explanation{Source: ns + "/" + name, Destination: dst.String(), Answer: answer}, nil
		}
	}
}

// known is what has been asked so far. An explanation says by what it looks for whom there is to ask yet.
type known struct {
	app       *app
	c         *conn
	agents    []corev1.Pod
	nodes     map[string]*why.Node     // nil: it has been asked in vain
	waypoints map[string]*envoy.Config // by UID
	missing   []func(context.Context)  // that ask for what was looked for
	mu        sync.Mutex               // guards the maps while they do
}

func (k *known) node(name string) *why.Node {
	n, asked := k.nodes[name]
	if asked {
		return n
	}
	k.nodes[name] = nil
	i := slices.IndexFunc(k.agents, func(p corev1.Pod) bool { return p.Spec.NodeName == name })
	if i < 0 {
		return nil
	}
	k.missing = append(k.missing, func(ctx context.Context) {
		n, err := fetchNode(ctx, k.c, &k.agents[i])
		if err != nil {
			fmt.Fprintf(k.app.env.Err, "node %s: %v\n", name, err) // said as unknown
			return
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.nodes[name] = n
	})
	return nil
}

func (k *known) waypoint(pod *mesh.Workload) *envoy.Config {
	held, asked := k.waypoints[pod.UID]
	if asked {
		return held
	}
	k.waypoints[pod.UID] = nil
	k.missing = append(k.missing, func(ctx context.Context) {
		at := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}, Spec: corev1.PodSpec{NodeName: pod.Node}}
		held, err := fetchEnvoy(ctx, k.c, at)
		if err != nil {
			fmt.Fprintf(k.app.env.Err, "waypoint %s/%s: %v\n", pod.Namespace, pod.Name, err)
			return
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.waypoints[pod.UID] = held
	})
	return nil
}

// learn asks for what was looked for; false says that there was nothing.
func (k *known) learn(ctx context.Context) bool {
	if len(k.missing) == 0 {
		return false
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, ask := range k.missing {
		g.Go(func() error { ask(ctx); return nil })
	}
	k.missing = nil
	_ = g.Wait()
	return true
}

// fetchEnvoy asks a waypoint's pod for what its Envoy holds.
func fetchEnvoy(ctx context.Context, c *conn, pod *corev1.Pod) (*envoy.Config, error) {
	held := &envoy.Config{}
	g, ctx := errgroup.WithContext(ctx)
	for path, into := range map[string]*envoy.Value{
		"/config_dump?resource=dynamic_listeners":     &held.Listeners,
		"/config_dump?resource=dynamic_route_configs": &held.Routes,
		"/config_dump?resource=ecds_filters":          &held.Extensions,
		"/clusters?format=json":                       &held.Clusters,
	} {
		g.Go(func() error {
			b, err := c.ask(ctx, pod, adminPort, path)
			if err == nil {
				*into, err = envoy.Parse(b)
			}
			return err
		})
	}
	return held, g.Wait()
}

// fetchNode asks an agent for what it holds.
func fetchNode(ctx context.Context, c *conn, agent *corev1.Pod) (*why.Node, error) {
	n := &why.Node{Name: agent.Spec.NodeName, Captured: map[string]bool{}, Certificates: map[string]string{}}
	var d struct {
		WorkloadState map[string]struct { // by the pod's UID, which is not the workload's
			Info struct{ Namespace, Name string }
		}
		Certificates []struct{ Identity, State string }
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		b, err := c.ask(ctx, agent, adminPort, "/debug/mesh")
		if err != nil {
			return fmt.Errorf("%w; an agent of before this version cannot say what it knows", err)
		}
		n.Mesh, err = wds.DecodeSnapshot(b)
		return err
	})
	g.Go(func() error {
		b, err := c.ask(ctx, agent, adminPort, "/config_dump")
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &d); err != nil {
			return fmt.Errorf("reading the dump of %s: %w", agent.Spec.NodeName, err)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	carried := map[string]bool{}
	for _, p := range d.WorkloadState {
		carried[p.Info.Namespace+"/"+p.Info.Name] = true
	}
	for w := range n.Mesh.WorkloadsOn(n.Name) {
		if carried[w.Namespace+"/"+w.Name] && isPod(w) {
			n.Captured[w.UID] = true
		}
	}
	for _, x := range d.Certificates {
		n.Certificates[x.Identity] = x.State
	}
	return n, nil
}

func isPod(w *mesh.Workload) bool { return strings.Contains(w.UID, "/Pod/") }

// podName reads NAMESPACE/POD, POD.NAMESPACE or POD.
func podName(s string) (namespace, name string) {
	if before, after, ok := strings.Cut(s, "/"); ok {
		return before, after
	}
	if i := strings.LastIndexByte(s, '.'); i > 0 {
		return s[i+1:], s[:i]
	}
	return "default", s
}

func podAt(s *mesh.Snapshot, namespace, name string) *mesh.Workload {
	for w := range s.Workloads() {
		if w.Namespace == namespace && w.Name == name && isPod(w) {
			return w
		}
	}
	return nil
}

// destinationOf finds the address that a name stands for.
func destinationOf(s *mesh.Snapshot, src *mesh.Workload, text string) (netip.AddrPort, error) {
	if at, err := netip.ParseAddrPort(text); err == nil {
		return at, nil
	}
	if _, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPort{}, fmt.Errorf("%s has no port: write it as ADDRESS:PORT, an IPv6 address in brackets", text)
	}
	host, port := text, uint16(0)
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		n, err := strconv.ParseUint(text[i+1:], 10, 16)
		if err != nil || n == 0 {
			return netip.AddrPort{}, fmt.Errorf("%q is no port", text[i+1:])
		}
		host, port = text[:i], uint16(n)
	}
	if !strings.Contains(host, "/") {
		meant := mesh.Meant(s.Hosts()[strings.ToLower(strings.TrimSuffix(host, "."))], src.Namespace) // as DNS capture has it
		for svc := range s.Services() {
			short := svc.Short + "." + svc.Name.Namespace
			if meant != nil && svc != meant {
				continue
			}
			if meant == nil && host != svc.Name.Hostname && host != short && host != short+".svc" && (host != svc.Short || svc.Name.Namespace != src.Namespace) {
				continue
			}
			if len(svc.VIPs) == 0 {
				return netip.AddrPort{}, fmt.Errorf("%s has no address of its own: name one of its pods", svc.Name.Hostname)
			}
			addr := svc.VIPs[0].Addr
			for _, v := range svc.VIPs {
				if len(src.Addrs) > 0 && v.Addr.Is4() == src.Addrs[0].Is4() {
					addr = v.Addr
				}
			}
			if port == 0 {
				var all []string
				for _, p := range svc.Ports {
					all = append(all, strconv.Itoa(int(p.Port)))
				}
				if len(svc.Ports) != 1 {
					return netip.AddrPort{}, fmt.Errorf("%s has the ports %s: write %s:PORT", svc.Name.Hostname, strings.Join(all, ", "), host)
				}
				port = svc.Ports[0].Port
			}
			return netip.AddrPortFrom(addr, port), nil
		}
	}
	ns, name := podName(host)
	w := podAt(s, ns, name)
	if w == nil || len(w.Addrs) == 0 {
		return netip.AddrPort{}, fmt.Errorf("the client's node knows neither a service nor a pod %q: write SERVICE.NAMESPACE, NAMESPACE/POD or ADDRESS, with :PORT", host)
	}
	if port == 0 {
		return netip.AddrPort{}, fmt.Errorf("%s is a pod: write %s:PORT", host, host)
	}
	for _, addr := range w.Addrs {
		if len(src.Addrs) > 0 && addr.Is4() == src.Addrs[0].Is4() {
			return netip.AddrPortFrom(addr, port), nil
		}
	}
	return netip.AddrPortFrom(w.Addrs[0], port), nil
}

func (a *app) printWhy(w io.Writer, x *explanation) error {
	mark := func(s why.Step) string {
		switch s.Result {
		case "ok":
			return a.paint(green, "ok     ")
		case "warning":
			return a.paint(yellow, "warning")
		}
		return a.paint(red, "refused")
	}
	step := func(indent string, s why.Step) {
		object := ""
		if s.Object != "" {
			object = "  [" + s.Object
			if s.Rule > 0 {
				object += ", rule " + strconv.Itoa(s.Rule)
			}
			object += "]"
		}
		fmt.Fprintf(w, "%s%s  %-10s  on %s: %s%s\n", indent, mark(s), s.Stage, s.Node, s.What, object)
		if s.Hint != "" {
			fmt.Fprintf(w, "%s                     %s\n", indent, a.paint(faint, strings.Replace(s.Hint, "warren ", a.name()+" ", 1)))
		}
	}
	colours := map[why.Outcome]colour{why.Allowed: green, why.Refused: red, why.Depends: yellow, why.Unknown: yellow}
	fmt.Fprintf(w, "%s to %s: %s\n", x.Source, x.Destination, a.paint(colours[x.Outcome], string(x.Outcome)))
	for _, s := range x.Steps {
		step("  ", s)
	}
	for _, e := range x.Ends {
		indent := "  "
		if len(x.Ends) > 1 {
			fmt.Fprintf(w, "  to %s on %s: %s\n", dash(e.Workload), dash(e.Node), a.paint(colours[e.Outcome], string(e.Outcome)))
			indent = "    "
		}
		for _, s := range e.Steps {
			step(indent, s)
		}
	}
	return nil
}

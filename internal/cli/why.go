package cli

import (
	"context"
	"encoding/json"
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

	"github.com/warrenmesh/warren/internal/cli/why"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

func (a *app) whyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "why SOURCE DESTINATION[:PORT]", Short: "Explain what becomes of a connection, and what decides",
		Long: "Explain what becomes of a connection: whether the client is captured, where its node sends the connection, whether the two ends\n" +
			"trust each other, and which policy decides at the other end. Both nodes are asked for what they hold, and the same functions\n" +
			"decide here as there.\n\n" +
			"SOURCE is a pod, as NAMESPACE/POD or POD.NAMESPACE. DESTINATION is a pod likewise, a service as SERVICE.NAMESPACE or by its full\n" +
			"name, or an address. The port may be left out where there is only one. Exit code 3: the connection is refused, or some are.",
		Example: "  warren why shop/ui-7d9 catalog.shop:8080\n  warren why shop/ui-7d9 10.96.0.7:8080 -o json",
		Args:    args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, ends []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			answer, err := a.why(cmd.Context(), c, ends[0], ends[1])
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
}

// explanation is what why prints.
type explanation struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	why.Answer
}

func (a *app) why(ctx context.Context, c *conn, source, destination string) (*explanation, error) {
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
	nodes := map[string]*why.Node{near.Name: near}
	ask := func(n string) *why.Node { return nodes[n] }
	// The first pass tells which nodes there are to ask.
	first := why.Explain(why.Question{Source: src.UID, Dst: dst, Client: near, Node: ask})
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range agents {
		node := agents[i].Spec.NodeName
		if node == near.Name || !slices.ContainsFunc(first.Ends, func(e why.End) bool { return e.Node == node }) {
			continue
		}
		g.Go(func() error {
			far, err := fetchNode(gctx, c, &agents[i])
			if err != nil {
				fmt.Fprintf(a.env.Err, "node %s: %v\n", node, err) // said as unknown
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			nodes[node] = far
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return &explanation{Source: ns + "/" + name, Destination: dst.String(),
		Answer: why.Explain(why.Question{Source: src.UID, Dst: dst, Client: near, Node: ask})}, nil
}

// fetchNode asks an agent for what it holds.
func fetchNode(ctx context.Context, c *conn, agent *corev1.Pod) (*why.Node, error) {
	n := &why.Node{Name: agent.Spec.NodeName, Captured: map[string]bool{}, Certificates: map[string]string{}}
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
		var d struct {
			WorkloadState map[string]json.RawMessage
			Certificates  []struct{ Identity, State string }
		}
		if err := json.Unmarshal(b, &d); err != nil {
			return fmt.Errorf("reading the dump of %s: %w", agent.Spec.NodeName, err)
		}
		for uid := range d.WorkloadState {
			n.Captured[uid] = true
		}
		for _, x := range d.Certificates {
			n.Certificates[x.Identity] = x.State
		}
		return nil
	})
	return n, g.Wait()
}

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
		if w.Namespace == namespace && w.Name == name && strings.Contains(w.UID, "/Pod/") {
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
		for svc := range s.Services() {
			short := svc.Short + "." + svc.Name.Namespace
			if host != svc.Name.Hostname && host != short && host != short+".svc" && (host != svc.Short || svc.Name.Namespace != src.Namespace) {
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

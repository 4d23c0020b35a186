package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/warrenmesh/warren/internal/cli/why"
	"github.com/warrenmesh/warren/internal/mesh"
)

// podDescription is what a pod is to the mesh, as its own node holds it.
type podDescription struct {
	Pod         string              `json:"pod"`
	Node        string              `json:"node"`
	Addresses   []string            `json:"addresses"`
	Captured    bool                `json:"captured"`
	Identity    string              `json:"identity,omitempty"`
	Certificate string              `json:"certificate,omitempty"` // state of the node's
	Plaintext   string              `json:"plaintext"`             // accepted, or refused and by what
	Services    []string            `json:"services"`
	Waypoint    string              `json:"waypoint,omitempty"`
	Policies    []policyDescription `json:"policies"`
	Problems    []string            `json:"problems,omitempty"`
}

// serviceDescription is what a service is to the mesh, as one node holds it.
type serviceDescription struct {
	Service   string                `json:"service"`
	Node      string                `json:"node"` // that was asked
	Addresses []string              `json:"addresses"`
	Ports     []string              `json:"ports"`
	Waypoint  string                `json:"waypoint,omitempty"`
	Endpoints []endpointDescription `json:"endpoints"`
	Problems  []string              `json:"problems,omitempty"`
}

type endpointDescription struct {
	Workload string   `json:"workload"`
	Node     string   `json:"node,omitempty"`
	Address  string   `json:"address,omitempty"`
	Ready    bool     `json:"ready"`
	Tunnel   bool     `json:"tunnel"`
	Policies []string `json:"policies"`
}

type policyDescription struct {
	Name   string `json:"name"`
	Action string `json:"action"`
	Scope  string `json:"scope"`
	Rules  int    `json:"rules"`
	DryRun bool   `json:"dryRun,omitempty"`
}

func (a *app) describeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "describe", Short: "Say what a pod or a service is to the mesh",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use: "pod NAMESPACE/POD", Short: "Say who a pod is, what applies to it and what it lacks", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, target []string) error {
			d, err := a.describePod(cmd.Context(), target[0])
			if err != nil {
				return err
			}
			return a.described(d, d.Problems, func(w io.Writer) error { return a.printPod(w, d) })
		},
	}, &cobra.Command{
		Use: "service SERVICE.NAMESPACE", Aliases: []string{"svc"}, Short: "Say where a service leads, and what is on the way", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, target []string) error {
			d, err := a.describeService(cmd.Context(), target[0])
			if err != nil {
				return err
			}
			return a.described(d, d.Problems, func(w io.Writer) error { return a.printService(w, d) })
		},
	})
	return cmd
}

func (a *app) described(d any, problems []string, table func(io.Writer) error) error {
	if err := a.print(d, table); err != nil {
		return err
	}
	if len(problems) > 0 {
		return errFound
	}
	return nil
}

// holding finds a pod and what its node holds.
func (a *app) holding(ctx context.Context, c *conn, target string) (*why.Node, *mesh.Workload, error) {
	agent, err := a.agentFor(ctx, c, target)
	if err != nil {
		return nil, nil, err
	}
	if agent.Spec.NodeName == target || agent.Name == target {
		return nil, nil, usageError{fmt.Errorf("%s is a node: name a pod, as NAMESPACE/POD", target)}
	}
	n, err := fetchNode(ctx, c, agent)
	if err != nil {
		return nil, nil, err
	}
	ns, name := podName(target)
	w := podAt(n.Mesh, ns, name)
	if w == nil {
		return nil, nil, fmt.Errorf("node %s does not know the pod %s/%s: it is on the host network, has just started, or the node is behind; see %s status", n.Name, ns, name, a.name())
	}
	return n, w, nil
}

func (a *app) describePod(ctx context.Context, target string) (*podDescription, error) {
	c, err := a.connect(a)
	if err != nil {
		return nil, err
	}
	n, w, err := a.holding(ctx, c, target)
	if err != nil {
		return nil, err
	}
	return a.podAsHeld(n, w), nil
}

func (a *app) podAsHeld(n *why.Node, w *mesh.Workload) *podDescription {
	d := &podDescription{Pod: w.Namespace + "/" + w.Name, Node: n.Name, Addresses: []string{}, Captured: n.Captured[w.UID], Plaintext: "accepted",
		Services: []string{}, Policies: []policyDescription{}, Waypoint: gatewayText(w.Waypoint)}
	problem := func(format string, args ...any) { d.Problems = append(d.Problems, fmt.Sprintf(format, args...)) }
	for _, addr := range w.Addrs {
		d.Addresses = append(d.Addresses, addr.String())
	}
	if d.Captured {
		d.Identity = w.Identity.String()
		if d.Certificate = n.Certificates[d.Identity]; d.Certificate == "" {
			d.Certificate = "missing"
		}
		if d.Certificate != "Available" {
			problem("the certificate is %s: %s node-config certificates %s", strings.ToLower(d.Certificate), a.name(), n.Name)
		}
	} else if w.Tunnel == mesh.TunnelHBONE && !w.NativeTunnel {
		problem("the mesh counts it as captured and its node does not carry it: %s status says why", a.name())
	}
	if !w.Healthy {
		problem("it is not ready: services do not lead to it")
	}
	for svc := range w.Services {
		d.Services = append(d.Services, svc.Hostname)
	}
	slices.Sort(d.Services)
	list, missing := n.Mesh.PoliciesOf(w)
	for p := range list {
		d.Policies = append(d.Policies, describePolicy(p))
	}
	if missing != nil {
		problem("the policy %s applies to it and is not on the node: everything is refused", missing)
	}
	slices.SortFunc(d.Policies, func(x, y policyDescription) int { return strings.Compare(x.Name, y.Name) })
	if d.Captured && len(w.Addrs) > 0 {
		// Of ports that nothing is said about, as far as policies of PeerAuthentications go.
		for p := range list {
			c := mesh.Conn{SourceIP: w.Addrs[0], Dst: netip.AddrPortFrom(w.Addrs[0], 1), DstWorkload: w, Plaintext: true}
			if p.Name.OfPeerAuthentication() && p.Action == mesh.Deny && !p.DryRun && p.Matches(c) {
				d.Plaintext = "refused (STRICT, " + p.Name.String() + ")"
			}
		}
	}
	return d
}

func describePolicy(p *mesh.Policy) policyDescription {
	return policyDescription{Name: p.Name.String(), Rules: len(p.Rules), DryRun: p.DryRun,
		Action: map[mesh.Action]string{mesh.Allow: "ALLOW", mesh.Deny: "DENY", mesh.Audit: "AUDIT"}[p.Action],
		Scope:  map[mesh.Scope]string{mesh.ScopeMesh: "mesh", mesh.ScopeNamespace: "namespace", mesh.ScopeWorkload: "selector"}[p.Scope]}
}

func gatewayText(g *mesh.Gateway) string {
	switch {
	case g == nil:
		return ""
	case g.Service.Hostname != "":
		return g.Service.String()
	}
	return netip.AddrPortFrom(g.Addr.Addr, g.HBONEPort).String()
}

func (a *app) printPod(w io.Writer, d *podDescription) error {
	captured := a.paint(green, "yes, as "+d.Identity)
	if !d.Captured {
		captured = a.paint(yellow, "no: it sends and receives plaintext")
	}
	lines := [][2]string{{"pod", d.Pod}, {"node", d.Node}, {"addresses", strings.Join(d.Addresses, ", ")}, {"captured", captured}}
	if d.Captured {
		lines = append(lines, [2]string{"certificate", d.Certificate}, [2]string{"plaintext", d.Plaintext})
	}
	lines = append(lines, [2]string{"services", dash(strings.Join(d.Services, ", "))}, [2]string{"waypoint", dash(d.Waypoint)})
	for _, l := range lines {
		fmt.Fprintf(w, "%-12s %s\n", l[0], l[1])
	}
	if len(d.Policies) == 0 {
		fmt.Fprintf(w, "%-12s none applies\n", "policies")
	} else {
		fmt.Fprintln(w)
		t := table{head: []string{"POLICY", "ACTION", "SCOPE", "RULES", "DRY RUN"}}
		for _, p := range d.Policies {
			t.add(p.Name, p.Action, p.Scope, strconv.Itoa(p.Rules), strconv.FormatBool(p.DryRun))
		}
		if err := t.write(w); err != nil {
			return err
		}
	}
	a.printProblems(w, d.Problems)
	return nil
}

func (a *app) printProblems(w io.Writer, problems []string) {
	for _, p := range problems {
		fmt.Fprintf(w, "%s %s\n", a.paint(red, "problem"), p)
	}
}

func (a *app) describeService(ctx context.Context, target string) (*serviceDescription, error) {
	c, err := a.connect(a)
	if err != nil {
		return nil, err
	}
	agents, err := a.agents(ctx, c)
	if err != nil {
		return nil, err
	}
	if len(agents) == 0 {
		return nil, fmt.Errorf("no node agent runs in %s: see %s check", a.namespace, a.name())
	}
	n, err := fetchNode(ctx, c, &agents[0])
	if err != nil {
		return nil, err
	}
	svc, err := serviceNamed(n.Mesh, target)
	if err != nil {
		return nil, err
	}
	return a.serviceAsHeld(n, svc), nil
}

// serviceNamed finds a service by SERVICE.NAMESPACE, NAMESPACE/SERVICE or its full name.
func serviceNamed(s *mesh.Snapshot, text string) (*mesh.Service, error) {
	if ns, name, ok := strings.Cut(text, "/"); ok {
		text = name + "." + ns
	}
	var found []*mesh.Service
	for svc := range s.Services() {
		short := svc.Short + "." + svc.Name.Namespace
		if text == svc.Name.Hostname || text == short || text == short+".svc" || text == svc.Short {
			found = append(found, svc)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("the mesh knows no service %q: write SERVICE.NAMESPACE", text)
	case 1:
		return found[0], nil
	}
	var names []string
	for _, svc := range found {
		names = append(names, svc.Name.String())
	}
	slices.Sort(names)
	return nil, usageError{errors.New(text + " may be " + strings.Join(names, " or ") + ": write SERVICE.NAMESPACE")}
}

func (a *app) serviceAsHeld(n *why.Node, svc *mesh.Service) *serviceDescription {
	d := &serviceDescription{Service: svc.Name.String(), Node: n.Name, Addresses: []string{}, Ports: []string{}, Endpoints: []endpointDescription{}, Waypoint: gatewayText(svc.Waypoint)}
	problem := func(format string, args ...any) { d.Problems = append(d.Problems, fmt.Sprintf(format, args...)) }
	for _, v := range svc.VIPs {
		d.Addresses = append(d.Addresses, v.Addr.String())
	}
	for _, p := range svc.Ports {
		d.Ports = append(d.Ports, strconv.Itoa(int(p.Port)))
	}
	serving := 0
	for w := range n.Mesh.Endpoints(svc.Name) {
		e := endpointDescription{Workload: w.Namespace + "/" + w.Name, Node: w.Node, Ready: w.Healthy, Tunnel: w.Tunnel == mesh.TunnelHBONE, Policies: []string{}}
		if len(w.Addrs) > 0 {
			e.Address = w.Addrs[0].String()
		}
		if w.Healthy {
			serving++
		}
		list, missing := n.Mesh.PoliciesOf(w)
		for p := range list {
			e.Policies = append(e.Policies, p.Name.String())
		}
		slices.Sort(e.Policies)
		if missing != nil {
			problem("the policy %s applies to %s and is not on the node: everything is refused", missing, e.Workload)
		}
		d.Endpoints = append(d.Endpoints, e)
	}
	slices.SortFunc(d.Endpoints, func(x, y endpointDescription) int { return strings.Compare(x.Workload, y.Workload) })
	switch {
	case len(d.Endpoints) == 0:
		problem("it has no endpoint: connections are refused; compare its selector with the labels of pods")
	case serving == 0:
		problem("none of its endpoints is ready: connections are refused")
	}
	if g := svc.Waypoint; g != nil && g.Service.Hostname != "" {
		alive := false
		for w := range n.Mesh.Endpoints(g.Service) {
			alive = alive || w.Healthy
		}
		if !alive {
			problem("its waypoint %s has no pod that is ready: connections are refused; see %s waypoint status -n %s", g.Service, a.name(), g.Service.Namespace)
		}
	}
	return d
}

func (a *app) printService(w io.Writer, d *serviceDescription) error {
	for _, l := range [][2]string{{"service", d.Service}, {"addresses", dash(strings.Join(d.Addresses, ", "))}, {"ports", dash(strings.Join(d.Ports, ", "))}, {"waypoint", dash(d.Waypoint)}} {
		fmt.Fprintf(w, "%-12s %s\n", l[0], l[1])
	}
	if len(d.Endpoints) > 0 {
		fmt.Fprintln(w)
		t := table{head: []string{"ENDPOINT", "NODE", "ADDRESS", "READY", "TUNNEL", "POLICIES"}}
		yes := map[bool]string{true: "yes", false: "no"}
		for _, e := range d.Endpoints {
			t.add(e.Workload, dash(e.Node), dash(e.Address), yes[e.Ready], yes[e.Tunnel], dash(strings.Join(e.Policies, ", ")))
		}
		if err := t.write(w); err != nil {
			return err
		}
	}
	a.printProblems(w, d.Problems)
	return nil
}

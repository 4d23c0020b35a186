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

	"github.com/warrenmesh/warren/internal/mesh"
)

// authzAnswer is what the policies of a pod say about a client.
type authzAnswer struct {
	Source      string       `json:"source"`
	Destination string       `json:"destination"`
	Node        string       `json:"node"` // whose state says so
	Allowed     bool         `json:"allowed"`
	Why         mesh.Reason  `json:"why"`
	By          string       `json:"by,omitempty"`
	Policies    []authzMatch `json:"policies"`
}

type authzMatch struct {
	policyDescription
	Matches bool `json:"matches"`
	Rule    int  `json:"rule,omitempty"` // the first that matches, from 1
}

func (a *app) authzCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "authz", Short: "Try authorization policies",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(&cobra.Command{
		Use: "test SOURCE NAMESPACE/POD:PORT", Short: "Say which policies of a pod would match a client, and what they decide",
		Long: "Say which policies of a pod would match a client, and what they decide, by the state that the pod's node holds.\n\n" +
			"SOURCE is a pod, as NAMESPACE/POD; an identity, as DOMAIN/ns/NAMESPACE/sa/ACCOUNT with or without spiffe://, which nobody needs to have and\n" +
			"which comes from no address; or an address, for a client without an identity. Nothing is connected. What a waypoint decides about requests, why says.\n" +
			"Exit code 3: it would be refused.",
		Example: "  warren authz test shop/ui-7d9 shop/catalog-5c8:8080\n  warren authz test cluster.local/ns/bank/sa/teller shop/catalog-5c8:8080\n  warren authz test 192.0.2.1 shop/catalog-5c8:8080",
		Args:    args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, ends []string) error {
			answer, err := a.authzTest(cmd.Context(), ends[0], ends[1])
			if err != nil {
				return err
			}
			if err := a.print(answer, func(w io.Writer) error { return a.printAuthz(w, answer) }); err != nil {
				return err
			}
			if !answer.Allowed {
				return errFound
			}
			return nil
		},
	})
	return cmd
}

func (a *app) authzTest(ctx context.Context, source, destination string) (*authzAnswer, error) {
	target, portText, ok := strings.Cut(destination, ":")
	port, err := strconv.ParseUint(portText, 10, 16)
	if !ok || err != nil || port == 0 || !strings.Contains(target, "/") {
		return nil, usageError{errors.New("write the destination as NAMESPACE/POD:PORT, with the port that the pod listens on; for a service ask why")}
	}
	c, err := a.connect(a)
	if err != nil {
		return nil, err
	}
	n, w, err := a.holding(ctx, c, target)
	if err != nil {
		return nil, err
	}
	if len(w.Addrs) == 0 {
		return nil, fmt.Errorf("%s has no address", target)
	}
	ask := mesh.Conn{Dst: netip.AddrPortFrom(w.Addrs[0], uint16(port)), DstWorkload: w}
	if err := sourceOf(n.Mesh, source, &ask); err != nil {
		return nil, err
	}
	v := n.Mesh.Authorize(ask)
	out := &authzAnswer{Source: source, Destination: destination, Node: n.Name, Allowed: v.Allow, Why: v.Why, Policies: []authzMatch{}}
	if v.By != (mesh.PolicyName{}) {
		out.By = v.By.String()
	}
	list, _ := n.Mesh.PoliciesOf(w)
	for p := range list {
		m := authzMatch{policyDescription: describePolicy(p), Matches: p.Matches(ask)}
		for i := range p.Rules {
			one := mesh.Policy{Rules: p.Rules[i : i+1]}
			if m.Rule == 0 && one.Matches(ask) {
				m.Rule = i + 1
			}
		}
		out.Policies = append(out.Policies, m)
	}
	slices.SortFunc(out.Policies, func(x, y authzMatch) int { return strings.Compare(x.Name, y.Name) })
	return out, nil
}

// sourceOf fills in who asks.
func sourceOf(s *mesh.Snapshot, source string, ask *mesh.Conn) error {
	if addr, err := netip.ParseAddr(source); err == nil {
		ask.SourceIP, ask.Plaintext = addr.Unmap(), true
		return nil
	}
	if strings.Contains(source, "/ns/") {
		id, err := mesh.ParseIdentity("spiffe://" + strings.TrimPrefix(source, "spiffe://"))
		if err != nil {
			return usageError{fmt.Errorf("the source: %w", err)}
		}
		ask.Source = id
		return nil
	}
	ns, name := podName(source)
	w := podAt(s, ns, name)
	if w == nil {
		return fmt.Errorf("the mesh knows no pod %s/%s: write NAMESPACE/POD, an identity with /ns/ in it, or an address", ns, name)
	}
	if len(w.Addrs) > 0 {
		ask.SourceIP = w.Addrs[0]
	}
	if ask.Plaintext = w.Tunnel != mesh.TunnelHBONE; !ask.Plaintext {
		ask.Source = w.Identity
	}
	return nil
}

func (a *app) printAuthz(w io.Writer, x *authzAnswer) error {
	verdict := a.paint(green, "allowed")
	if !x.Allowed {
		verdict = a.paint(red, "refused")
	}
	fmt.Fprintf(w, "%s to %s: %s (%s", x.Source, x.Destination, verdict, x.Why)
	if x.By != "" {
		fmt.Fprintf(w, ", %s", x.By)
	}
	fmt.Fprintf(w, "), by the state of %s\n", x.Node)
	if len(x.Policies) == 0 {
		return nil
	}
	t := table{head: []string{"POLICY", "ACTION", "SCOPE", "MATCHES", "RULE", "DRY RUN"}}
	for _, p := range x.Policies {
		rule := ""
		if p.Rule > 0 {
			rule = strconv.Itoa(p.Rule)
		}
		t.add(p.Name, p.Action, p.Scope, map[bool]string{true: "yes", false: "no"}[p.Matches], dash(rule), strconv.FormatBool(p.DryRun))
	}
	return t.write(w)
}

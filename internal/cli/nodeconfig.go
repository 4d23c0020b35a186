package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
)

// view is one part of an agent's /config_dump and how it looks as a table.
type view struct {
	name, about string
	key         string
	head        []string
	rows        func(raw json.RawMessage) ([][]string, error)
}

var views = []view{
	{"workloads", "endpoints of the mesh as a node knows them", "workloads",
		[]string{"NAMESPACE", "POD NAME", "ADDRESSES", "NODE", "PROTOCOL", "STATUS", "WAYPOINT"}, workloadRows},
	{"services", "services and their endpoints", "services",
		[]string{"NAMESPACE", "SERVICE", "ADDRESSES", "PORTS", "ENDPOINTS", "WAYPOINT"}, serviceRows},
	{"policies", "authorization policies", "policies",
		[]string{"NAMESPACE", "POLICY", "ACTION", "SCOPE", "RULES", "DRY RUN"}, policyRows},
	{"certificates", "certificates that a node holds", "certificates",
		[]string{"IDENTITY", "STATE", "VALID FROM", "EXPIRES", "SERIAL"}, certificateRows},
	{"connections", "open connections that the agent carries", "workloadState",
		[]string{"POD", "DIRECTION", "SOURCE", "DESTINATION", "SENT TO", "PROTOCOL", "PEER"}, connectionRows},
}

// nodeDump is one agent's part, as -o json prints it.
type nodeDump struct {
	Node string          `json:"node"`
	Data json.RawMessage `json:"data"`
}

func (a *app) nodeConfigCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "node-config", Aliases: []string{"nc", "ztunnel-config"},
		Short: "Show what a node agent knows and does",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for _, v := range views {
		file := ""
		sub := &cobra.Command{
			Use: v.name + " [NODE|NAMESPACE/POD]", Short: "Show " + v.about,
			Aliases: []string{strings.TrimSuffix(v.name, "s")},
			Args:    args(cobra.MaximumNArgs(1)),
			RunE: func(cmd *cobra.Command, target []string) error {
				return a.nodeConfig(cmd.Context(), v, file, target)
			},
		}
		sub.Flags().StringVarP(&file, "file", "f", "", "read a saved /config_dump instead of asking")
		cmd.AddCommand(sub)
	}
	return cmd
}

func (a *app) nodeConfig(ctx context.Context, v view, file string, target []string) error {
	var dumps []nodeDump
	switch {
	case file != "":
		b, err := readDump(file)
		if err != nil {
			return err
		}
		dumps = []nodeDump{{Node: file, Data: b}}
	default:
		c, err := a.connect(a)
		if err != nil {
			return err
		}
		pods, err := a.someAgents(ctx, c, strings.Join(target, ""))
		if err != nil {
			return err
		}
		if dumps, err = fetchDumps(ctx, c, pods); err != nil {
			return err
		}
	}
	for i := range dumps {
		var all map[string]json.RawMessage
		if err := json.Unmarshal(dumps[i].Data, &all); err != nil {
			return fmt.Errorf("reading the dump of %s: %w", dumps[i].Node, err)
		}
		if all[v.key] == nil {
			return fmt.Errorf("the dump of %s has no %q; is it of another version?", dumps[i].Node, v.key)
		}
		dumps[i].Data = all[v.key]
	}
	return a.print(dumps, func(w io.Writer) error {
		// What all nodes know alike is printed once.
		t := table{head: v.head}
		seen := map[string]int{} // how many nodes have the row
		perNode := v.key == "workloadState" || v.key == "certificates"
		if perNode {
			t.head = append([]string{"NODE"}, v.head...)
		}
		for _, d := range dumps {
			rows, err := v.rows(d.Data)
			if err != nil {
				return fmt.Errorf("reading the dump of %s: %w", d.Node, err)
			}
			for _, r := range rows {
				if perNode {
					r = append([]string{d.Node}, r...)
				}
				k := strings.Join(r, "\x00")
				if seen[k]++; seen[k] == 1 {
					t.add(r...)
				}
			}
		}
		if v.key == "policies" {
			t.head = append(slices.Clone(t.head), "NODES")
			for i, r := range t.rows {
				t.rows[i] = append(slices.Clone(r), fmt.Sprintf("%d/%d", seen[strings.Join(r, "\x00")], len(dumps)))
			}
		}
		slices.SortStableFunc(t.rows, func(x, y []string) int { return slices.Compare(x[:2], y[:2]) })
		return t.write(w)
	})
}

// fetchDumps asks all agents at once. What some answered is no substitute for what one did not.
func fetchDumps(ctx context.Context, c *conn, pods []corev1.Pod) ([]nodeDump, error) {
	dumps := make([]nodeDump, len(pods))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range pods {
		g.Go(func() error {
			b, err := c.ask(ctx, &pods[i], adminPort, "/config_dump")
			if err != nil {
				return err
			}
			dumps[i] = nodeDump{Node: pods[i].Spec.NodeName, Data: b}
			return nil
		})
	}
	return dumps, g.Wait()
}

func workloadRows(raw json.RawMessage) ([][]string, error) {
	var list []struct {
		Namespace, Name, Node, Protocol, Status, Hostname string
		WorkloadIPs                                       []string `json:"workloadIps"`
		Waypoint                                          *struct{ Destination string }
	}
	err := json.Unmarshal(raw, &list)
	rows := make([][]string, 0, len(list))
	for _, w := range list {
		addrs := w.WorkloadIPs
		if len(addrs) == 0 && w.Hostname != "" {
			addrs = []string{w.Hostname}
		}
		way := ""
		if w.Waypoint != nil {
			way = w.Waypoint.Destination
		}
		rows = append(rows, []string{w.Namespace, w.Name, dash(strings.Join(addrs, ",")), dash(w.Node), w.Protocol, w.Status, dash(way)})
	}
	return rows, err
}

func serviceRows(raw json.RawMessage) ([][]string, error) {
	var list []struct {
		Namespace, Name string
		Vips            []string
		Ports           map[string]uint16
		Endpoints       map[string]struct{ Status string }
		Waypoint        *struct{ Destination string }
	}
	err := json.Unmarshal(raw, &list)
	rows := make([][]string, 0, len(list))
	for _, s := range list {
		healthy := 0
		for _, e := range s.Endpoints {
			if e.Status == "Healthy" {
				healthy++
			}
		}
		var ports []string
		for p := range s.Ports {
			ports = append(ports, p)
		}
		slices.Sort(ports)
		way := ""
		if s.Waypoint != nil {
			way = s.Waypoint.Destination
		}
		for i, v := range s.Vips {
			s.Vips[i] = strings.TrimPrefix(v, "/") // network "" of network/address
		}
		rows = append(rows, []string{s.Namespace, s.Name, dash(strings.Join(s.Vips, ",")), dash(strings.Join(ports, ",")),
			fmt.Sprintf("%d/%d", healthy, len(s.Endpoints)), dash(way)})
	}
	return rows, err
}

func policyRows(raw json.RawMessage) ([][]string, error) {
	var list []struct {
		Namespace, Name, Action, Scope string
		Rules                          []json.RawMessage
		DryRun                         bool
	}
	err := json.Unmarshal(raw, &list)
	rows := make([][]string, 0, len(list))
	for _, p := range list {
		rows = append(rows, []string{p.Namespace, p.Name, p.Action, p.Scope, fmt.Sprint(len(p.Rules)), fmt.Sprint(p.DryRun)})
	}
	return rows, err
}

func certificateRows(raw json.RawMessage) ([][]string, error) {
	var list []struct {
		Identity, State string
		CertChain       []struct{ SerialNumber, ValidFrom, ExpirationTime string }
	}
	err := json.Unmarshal(raw, &list)
	rows := make([][]string, 0, len(list))
	for _, c := range list {
		r := []string{c.Identity, c.State, "-", "-", "-"}
		if len(c.CertChain) > 0 {
			leaf := c.CertChain[0]
			r = []string{c.Identity, c.State, leaf.ValidFrom, leaf.ExpirationTime, leaf.SerialNumber}
		}
		rows = append(rows, r)
	}
	return rows, err
}

func connectionRows(raw json.RawMessage) ([][]string, error) {
	type connection struct{ Src, OriginalDst, ActualDst, Protocol, Peer string }
	var pods map[string]struct {
		Connections struct{ Inbound, Outbound []connection }
		Info        struct{ Name, Namespace string }
	}
	if err := json.Unmarshal(raw, &pods); err != nil {
		return nil, errors.New("workloadState has a form this version does not know")
	}
	var rows [][]string
	for _, p := range pods {
		name := p.Info.Namespace + "/" + p.Info.Name
		for direction, list := range map[string][]connection{"inbound": p.Connections.Inbound, "outbound": p.Connections.Outbound} {
			for _, c := range list {
				rows = append(rows, []string{name, direction, c.Src, c.OriginalDst, dash(c.ActualDst), c.Protocol, dash(c.Peer)})
			}
		}
	}
	slices.SortFunc(rows, slices.Compare[[]string])
	return rows, nil
}

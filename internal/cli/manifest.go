package cli

import (
	"bytes"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/cli/release"
)

func (a *app) manifestCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "manifest", Short: "Write what would be installed", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	var v valueFlags
	version := ""
	generate := &cobra.Command{
		Use: "generate", Short: "Write the manifest: the namespace, the definitions, then what uses them",
		Long: "Write the manifest: the namespace, the definitions, then what uses them. It asks no cluster.\n\n" +
			"kubectl apply -f of it installs the mesh, and warren uninstall takes it away again.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			values, err := v.values(cmd, nil)
			if err != nil {
				return err
			}
			r, err := release.Render(values, release.Target{Namespace: a.namespace, Version: version})
			if err != nil {
				return err
			}
			objects := r.Objects
			if len(objects) > 0 {
				objects = append([]*unstructured.Unstructured{release.NamespaceObject(a.namespace)}, objects...)
			}
			b, err := release.Manifest(objects)
			if err != nil {
				return err
			}
			_, err = a.env.Out.Write(b)
			return err
		},
	}
	v.add(generate, "default")
	generate.Flags().StringVar(&version, "kube-version", "", "version of Kubernetes that it is for, as 1.33 (default the newest known)")
	cmd.AddCommand(generate)
	return cmd
}

// profileRow is one line of profile list.
type profileRow struct {
	Name  string `json:"name"`
	About string `json:"about"`
}

func (a *app) profileCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "profile", Short: "Show the profiles that an installation can start from", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	list := &cobra.Command{Use: "list", Short: "List the profiles", Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			var rows []profileRow
			for _, n := range release.Profiles() {
				rows = append(rows, profileRow{n, release.ProfileAbout(n)})
			}
			return a.print(rows, func(w io.Writer) error {
				t := table{head: []string{"PROFILE", "WHAT IT IS"}}
				for _, r := range rows {
					t.add(r.Name, r.About)
				}
				return t.write(w)
			})
		}}
	dump := &cobra.Command{Use: "dump [PROFILE]", Short: "Print all values as a profile has them", Args: args(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, names []string) error {
			name := "default"
			if len(names) == 1 {
				name = names[0]
			}
			b, v, err := profileValues(name)
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.print(v, nil)
			}
			_, err = a.env.Out.Write(b)
			return err
		}}
	diff := &cobra.Command{Use: "diff PROFILE PROFILE", Short: "Print which values differ between two profiles", Args: args(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, names []string) error {
			var all [2]map[string]any
			for i, n := range names {
				_, v, err := profileValues(n)
				if err != nil {
					return err
				}
				all[i] = v
			}
			rows := release.Diff(all[0], all[1])
			return a.print(rows, func(w io.Writer) error {
				if len(rows) == 0 {
					fmt.Fprintf(w, "%s and %s are the same\n", names[0], names[1])
					return nil
				}
				t := table{head: []string{"VALUE", names[0], names[1]}}
				for _, r := range rows {
					t.add(r.Path, dash(r.Left), dash(r.Right))
				}
				return t.write(w)
			})
		}}
	cmd.AddCommand(list, dump, diff)
	return cmd
}

// profileValues are all values of the chart as a profile has them.
func profileValues(name string) ([]byte, map[string]any, error) {
	v, err := release.Sources{Profile: name}.Values(nil)
	if err != nil {
		return nil, nil, usageError{err}
	}
	all, err := release.Complete(v)
	if err != nil {
		return nil, nil, err
	}
	b, err := yaml.Marshal(all)
	if err != nil {
		return nil, nil, err
	}
	return bytes.TrimPrefix(b, []byte("---\n")), all, nil
}

package cli

import (
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// valueFlags are the flags that say what is installed.
type valueFlags struct {
	profile        string
	revision       string
	files          []string
	set, setString []string
	read           []release.File // the files
}

func (v *valueFlags) add(cmd *cobra.Command, profile string) {
	f := cmd.Flags()
	f.StringVar(&v.profile, "profile", profile, "what to start from, several with commas between them: see profile list")
	f.StringVar(&v.revision, "revision", "", "of a control plane beside the mesh's, to which waypoints and gateways can go over; the agents stay with the mesh's (default the mesh's own)")
	f.StringArrayVarP(&v.files, "values", "f", nil, "file with values of the chart or an IstioOperator, - is standard input; of several the last wins")
	f.StringArrayVar(&v.set, "set", nil, "PATH=VALUE[,...] of the chart")
	f.StringArrayVar(&v.setString, "set-string", nil, "PATH=VALUE whose value is text whatever it looks like")
	_ = cmd.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions(release.Profiles(), cobra.ShellCompDirectiveNoFileComp))
}

// values reads and checks what the flags say, over base.
func (v *valueFlags) values(cmd *cobra.Command, base map[string]any) (map[string]any, error) {
	s := release.Sources{Profile: v.profile, Set: v.set, SetString: v.setString}
	if v.revision != "" {
		if err := revision.Check(v.revision); err != nil {
			return nil, usageError{fmt.Errorf("--revision: %w", err)}
		}
		s.SetString = append(slices.Clone(s.SetString), "revision="+v.revision)
	}
	if v.read == nil { // once: standard input does not come again
		s.Warn = func(w string) { fmt.Fprintln(cmd.ErrOrStderr(), "warning:", w) }
		for _, name := range v.files {
			b, err := readValues(cmd.InOrStdin(), name)
			if err != nil {
				return nil, err
			}
			v.read = append(v.read, release.File{Name: name, Data: b})
		}
	}
	s.Files = v.read
	out, err := s.Values(base)
	if err != nil {
		return nil, usageError{err}
	}
	return out, nil
}

func readValues(in io.Reader, name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(in)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading values: %w", err)
	}
	return b, nil
}

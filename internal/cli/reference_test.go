package cli

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/warrenmesh/warren/results"
)

// docs/cli.md is what the commands say of themselves.
func TestReferenceIsCurrent(t *testing.T) {
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	want := []byte(reference())
	file := filepath.Join(root, "docs", "cli.md")
	if *update {
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(file); err != nil || !bytes.Equal(have, want) {
		t.Errorf("docs/cli.md is not what the commands say now (%v): go test ./internal/cli -update takes it over", err)
	}
}

// reference writes all commands and their flags, as their help says them, in Markdown.
func reference() string {
	root := (&app{env: Env{Program: "warren"}}).root()
	var b strings.Builder
	b.WriteString("# The command line\n\n" + root.Long + "\n\nThis page is made of what `--help` says (`go test ./internal/cli -update`). What the commands are for: [install.md](install.md), " +
		"[looking.md](looking.md),\n[why.md](why.md), [analyze.md](analyze.md), [waypoints.md](waypoints.md), [addons.md](addons.md), [benchmark.md](benchmark.md).\n\n## Flags of all commands\n\n")
	writeFlags(&b, root.PersistentFlags())
	writeCommands(&b, root)
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func writeCommands(b *strings.Builder, parent *cobra.Command) {
	for _, c := range parent.Commands() {
		// Completion and help are cobra's own.
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		fmt.Fprintf(b, "\n## %s\n\n", c.CommandPath())
		about := c.Long
		if about == "" {
			about = c.Short + "."
		}
		b.WriteString(about + "\n")
		if c.HasSubCommands() {
			var names []string
			for _, s := range c.Commands() {
				if !s.Hidden {
					names = append(names, "`"+s.Name()+"`")
				}
			}
			fmt.Fprintf(b, "\nCommands: %s.\n", strings.Join(names, ", "))
		} else {
			fmt.Fprintf(b, "\n    %s\n", c.UseLine())
		}
		if len(c.Aliases) > 0 {
			aliases := slices.Clone(c.Aliases)
			for i := range aliases {
				aliases[i] = "`" + aliases[i] + "`"
			}
			fmt.Fprintf(b, "\nAlso: %s.\n", strings.Join(aliases, ", "))
		}
		if c.LocalNonPersistentFlags().HasAvailableFlags() {
			b.WriteByte('\n')
			writeFlags(b, c.LocalNonPersistentFlags())
		}
		writeCommands(b, c)
	}
}

func writeFlags(b *strings.Builder, flags *pflag.FlagSet) {
	b.WriteString("| Flag | Default | |\n|---|---|---|\n")
	cell := strings.NewReplacer("|", "\\|", "\n", " ")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		kind, usage := pflag.UnquoteUsage(f)
		name := "`--" + f.Name + "`"
		if f.Shorthand != "" {
			name = "`-" + f.Shorthand + "`, " + name
		}
		if kind != "" {
			name += " " + kind
		}
		value := f.DefValue
		if value == "[]" || value == "false" {
			value = ""
		}
		if value != "" {
			value = "`" + value + "`"
		}
		fmt.Fprintf(b, "| %s | %s | %s |\n", cell.Replace(name), cell.Replace(value), cell.Replace(usage))
	})
}

package cli

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/warrenmesh/warren/results"
)

var (
	commandLine   = regexp.MustCompile(`(?m)^(?:    )?(?:\$ )?(?:! )?(?:go run \./cmd/)?warren ([a-z].*)$`)
	substitution  = regexp.MustCompile(`\$\([^)]*\)`)
	commandInText = regexp.MustCompile("`warren ([a-z][^`]*)`")
)

// Every command line of ours that stands in a document is one: the commands are there, and so are their flags. The quick start
// and the tasks are run besides (test/e2e).
func TestDocumentedCommandsExist(t *testing.T) {
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	look := func(file, line string) {
		n++
		line, _, _ = strings.Cut(substitution.ReplaceAllString(line, "x"), " #")
		line, _, _ = strings.Cut(line, " ||")
		words := strings.Fields(line)
		command := (&app{env: Env{Program: "warren"}}).root()
		for len(words) > 0 && !strings.HasPrefix(words[0], "-") {
			// proxy-config clusters|routes is both.
			var next *cobra.Command
			for name := range strings.SplitSeq(words[0], "|") {
				next = nil
				for _, c := range command.Commands() {
					if c.Name() == name || c.HasAlias(name) {
						next = c
					}
				}
				if next == nil {
					break
				}
			}
			if next == nil {
				break
			}
			command, words = next, words[1:]
		}
		if command.HasSubCommands() && len(words) > 0 && !strings.HasPrefix(words[0], "-") {
			t.Errorf("%s: warren %s: there is no %q", file, line, words[0])
			return
		}
		for _, w := range words {
			name, _, _ := strings.Cut(strings.Trim(w, "[]"), "=")
			long, isLong := strings.CutPrefix(name, "--")
			var f *pflag.Flag
			switch {
			case isLong:
				f = command.Flag(long)
				if f == nil && long == "help" {
					continue
				}
			case len(name) == 2 && name[0] == '-' && name != "--":
				if f = command.Flags().ShorthandLookup(name[1:]); f == nil {
					f = command.InheritedFlags().ShorthandLookup(name[1:])
				}
			default:
				continue
			}
			if f == nil {
				t.Errorf("%s: warren %s: there is no flag %s", file, line, name)
			}
		}
	}
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && p != root || d.Name() == "out") {
			return fs.SkipDir
		}
		if filepath.Ext(p) != ".md" {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for _, m := range append(commandLine.FindAllStringSubmatch(string(b), -1), commandInText.FindAllStringSubmatch(string(b), -1)...) {
			look(strings.TrimPrefix(p, root+"/"), m[1])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 50 {
		t.Errorf("only %d command lines are found", n)
	}
}

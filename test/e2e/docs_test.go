package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// docPage is a document of which every block runs.
type docPage struct {
	file string
	slow bool
}

// pages are the documents whose blocks run, in an order in which each finds what it builds on. The others are too slow for
// a check: they install, upgrade and remove the mesh.
var pages = []docPage{
	{"docs/quick-start.md", true},
	{"docs/tasks/enrol.md", false},
	{"docs/tasks/deny-and-allow.md", false},
	{"docs/tasks/canary.md", false},
	{"docs/tasks/rate-limits.md", false},
	{"docs/tasks/envoyfilter.md", false},
	{"docs/tasks/wasm.md", false},
	{"docs/tasks/egress.md", false},
	{"docs/tasks/find-out-why.md", false},
	{"docs/tasks/upgrade.md", true},
	{"docs/tasks/uninstall.md", true},
}

// block is a fenced block of a page: a script, and what it is said to print.
type block struct {
	line   int
	script string
	prints string // "" where nothing is said
	notRun string // why, where it cannot run here
}

var fence = regexp.MustCompile("(?ms)^```(\\w*)[ \t]*([^\n]*)\n(.*?)^```$")

// blocks reads a page. A block of text right after a script is what the script prints.
func blocks(t *testing.T, page string) []block {
	t.Helper()
	var out []block
	end := -1
	for _, m := range fence.FindAllStringSubmatchIndex(page, -1) {
		language, info, body := page[m[2]:m[3]], page[m[4]:m[5]], page[m[6]:m[7]]
		line := 1 + strings.Count(page[:m[0]], "\n")
		switch reason, marked := strings.CutPrefix(info, "not-run: "); {
		case language == "sh" && (info == "" || marked && reason != ""):
			out = append(out, block{line: line, script: body})
			if marked {
				out[len(out)-1].notRun = reason
			}
		case language == "text" && len(out) > 0 && strings.TrimSpace(page[end:m[0]]) == "":
			out[len(out)-1].prints = body
		default:
			t.Errorf("line %d: a block is neither a script nor what the script before it prints: %s %s", line, language, info)
		}
		end = m[1]
	}
	return out
}

// commands counts the lines of a script that begin a command.
func commands(script string) int {
	n, until, continued := 0, "", false
	for line := range strings.Lines(script) {
		line = strings.TrimSpace(line)
		switch {
		case until != "":
			if line == until {
				until = ""
			}
		case line == "" || strings.HasPrefix(line, "#") || line == "done" || line == "}":
		default:
			if !continued {
				n++
			}
			if _, word, ok := strings.Cut(line, "<<"); ok {
				until = word
			}
			continued = strings.HasSuffix(line, "\\")
		}
	}
	return n
}

// said reports whether out is what a page says: "..." stands for any text, a line that is only that for any lines, and white
// space for white space.
func said(out, page string) bool {
	var re strings.Builder
	re.WriteString(`(?s)\A\s*`)
	for line := range strings.Lines(strings.TrimSpace(page)) {
		if strings.TrimSpace(line) == "..." {
			re.WriteString(`(?:[^\n]*\n)*?`)
			continue
		}
		for _, word := range strings.Fields(line) {
			re.WriteString(`[ \t]*`)
			parts := strings.Split(word, "...")
			for j := range parts {
				parts[j] = regexp.QuoteMeta(parts[j])
			}
			re.WriteString(strings.Join(parts, `[^\n]*?`))
		}
		re.WriteString(`[ \t]*\n`)
	}
	re.WriteString(`\s*\z`)
	return regexp.MustCompile(re.String()).MatchString(strings.TrimSpace(out) + "\n")
}

func TestWhatPagesSay(t *testing.T) {
	for _, c := range []struct {
		out, page string
		want      bool
	}{
		{"a 1\nb 2\n", "a 1\nb 2\n", true},
		{"a    1\nb 2\n", "a 1\n...\n", true},
		{"x\na 1\nb 2\n", "...\na ...\n...\n", true},
		{"x\na 1\n", "...\na ...\n...\n", true},
		{"ui-7d9-x1 enabled\n", "ui-... enabled\n", true},
		{"ui-7d9-x1 pending\n", "ui-... enabled\n", false},
		{"  a\n  b 2\n", "a\n...\n  b 2\n", true},
		{"a 1\nb 2\n", "a 1\n", false},
		{"", "a\n", false},
	} {
		if got := said(c.out, c.page); got != c.want {
			t.Errorf("%q against %q: %t", c.out, c.page, got)
		}
	}
	if n := commands("a\n# b\nc <<END\nx\nEND\nd \\\n  e\n\nf\n"); n != 4 {
		t.Errorf("%d commands", n)
	}
}

// shell is a reader's terminal: what one block exports, the next has.
type shell struct {
	in  io.WriteCloser
	out *bufio.Reader
	end func() error
}

// newShell opens a terminal in the repository, with the cluster's kubectl and kubeconfig.
func newShell(t *testing.T) *shell {
	t.Helper()
	bin, err := warrenProgram()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), "bash", "--noprofile", "--norc", "-euo", "pipefail", "-s")
	cmd.Dir = mesh.Root()
	cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig(), "NO_COLOR=1",
		"PATH="+filepath.Dir(bin)+":"+filepath.Dir(mesh.KubectlPath())+":"+os.Getenv("PATH"))
	in, err := cmd.StdinPipe()
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	cmd.Stdout, cmd.Stderr = w, w
	must(t, cmd.Start())
	w.Close()
	return &shell{in: in, out: bufio.NewReader(r), end: func() error {
		in.Close()
		defer r.Close()
		return cmd.Wait()
	}}
}

const prompt = "-- the block has ended --"

// run runs a script and returns what it printed; ok is false when a command failed, which ends the shell.
func (s *shell) run(script string) (out string, ok bool) {
	if _, err := fmt.Fprintf(s.in, "{\n%s} < /dev/null\nprintf '\\n%%s\\n' '%s'\n", script, prompt); err != nil {
		return err.Error(), false
	}
	var b strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		if strings.TrimSuffix(line, "\n") == prompt {
			return b.String(), true
		}
		b.WriteString(line)
		if err != nil {
			return b.String(), false
		}
	}
}

// Every block of the quick start and the tasks does what its page says.
func TestDocsCommands(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	found, err := filepath.Glob(filepath.Join(mesh.Root(), "docs", "tasks", "*.md"))
	must(t, err)
	for _, f := range found {
		if name := "docs/tasks/" + filepath.Base(f); !slices.ContainsFunc(pages, func(p docPage) bool { return p.file == name }) {
			t.Errorf("%s is not run", name)
		}
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		for _, ns := range []string{"shop", "visitors", "istio-egress"} {
			if err := deleteNamespace(ctx, ns); err != nil {
				t.Error(err)
			}
		}
		if *long {
			if err := mesh.Install(ctx); err != nil {
				t.Error(err)
			}
		}
	})
	if !*long {
		must(t, mesh.Shop(ctx))
	}
	ran, failed, left := 0, 0, 0
	for _, p := range pages {
		if p.slow && !*long {
			continue
		}
		text, err := os.ReadFile(filepath.Join(mesh.Root(), p.file))
		must(t, err)
		start := time.Now()
		t.Run(strings.TrimSuffix(filepath.Base(p.file), ".md"), func(t *testing.T) {
			sh := newShell(t)
			alive := true
			for _, b := range blocks(t, string(text)) {
				n := commands(b.script)
				if b.notRun != "" {
					left += n
					continue
				}
				ran += n
				if !alive {
					failed += n
					continue
				}
				out, ok := sh.run(b.script)
				switch {
				case !ok:
					alive = false
					failed += n
					t.Errorf("%s:%d: a command of this block fails, and those after it are not run:\n%s\nIt printed\n%s", p.file, b.line, b.script, out)
				case b.prints != "" && !said(out, b.prints):
					failed++
					t.Errorf("%s:%d: this block does not print what is said:\n%s\nIt printed\n%s\nand it is said\n%s", p.file, b.line, b.script, out, b.prints)
				}
			}
			if err := sh.end(); err != nil && alive {
				t.Errorf("%s: %v", p.file, err)
			}
		})
		t.Logf("%s: %.0f s", p.file, time.Since(start).Seconds())
	}
	if *long {
		record("docs-commands", "docs-commands", ran, failed, float64(ran), "commands of the quick start and the tasks run as they stand")
		record("docs-commands", "commands marked as not run here", left, 0, float64(left), "commands, each with its reason")
	}
}

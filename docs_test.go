package warren_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	testName    = regexp.MustCompile("`((?:Test|Fuzz)[A-Z]\\w*)`")
	testFuncs   = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)[A-Z]\w*)\(`)
	makeTarget  = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
	makeNamed   = regexp.MustCompile("(?m)(?:^\\s+|`|run: )make ([a-z][a-z0-9-]*)")
	securityRow = regexp.MustCompile(`(?m)^\| can(?:not)? \|.*$`)
)

// TestMakeHasWhatIsNamed: what documents and workflows have somebody make is a target of the Makefile.
func TestMakeHasWhatIsNamed(t *testing.T) {
	text, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, m := range makeTarget.FindAllStringSubmatch(string(text), -1) {
		have[m[1]] = true
	}
	named := 0
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/tasks/*.md", ".github/workflows/*.yml"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range makeNamed.FindAllStringSubmatch(string(text), -1) {
				named++
				if !have[m[1]] {
					t.Errorf("%s names make %s, which the Makefile does not have", f, m[1])
				}
			}
		}
	}
	if named < 20 {
		t.Errorf("only %d names are found", named)
	}
}

// TestSecurityNamesTestsThatExist: each claim of docs/SECURITY.md names a test, and every test that it names is
// there. Every fuzz target is listed.
func TestSecurityNamesTestsThatExist(t *testing.T) {
	have := map[string]bool{}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(p, "_test.go") {
			return err
		}
		src, err := os.ReadFile(p)
		for _, m := range testFuncs.FindAllSubmatch(src, -1) {
			have[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("docs/SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range testName.FindAllSubmatch(text, -1) {
		named[string(m[1])] = true
	}
	for name := range named {
		if !have[name] {
			t.Errorf("docs/SECURITY.md names %s, which is not there", name)
		}
	}
	rows := securityRow.FindAllString(string(text), -1)
	for _, row := range rows {
		if !testName.MatchString(row) {
			t.Errorf("a claim without a test: %s", row)
		}
	}
	if len(rows) < 20 {
		t.Errorf("only %d claims are found", len(rows))
	}
	for name := range have {
		if strings.HasPrefix(name, "Fuzz") && !named[name] {
			t.Errorf("docs/SECURITY.md does not list %s", name)
		}
	}
}

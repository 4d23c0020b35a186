package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A test that fails has a second try; what fails twice, what races and what panics fails.
func TestSecondTry(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod": "module again\n\ngo 1.26\n",
		"a_test.go": `package again

import (
	"os"
	"testing"
)

func once(t *testing.T) bool {
	_, err := os.Stat(t.Name())
	os.WriteFile(t.Name(), nil, 0o600)
	return err != nil
}

func TestGood(t *testing.T) {}

func TestUnsteady(t *testing.T) {
	t.Run("part", func(t *testing.T) { t.Parallel() })
	if once(t) {
		t.Error("the first time")
	}
}

func TestBad(t *testing.T) { t.Error("always") }

func TestPanic(t *testing.T) {
	if once(t) {
		panic("the first time")
	}
}
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		run                      string
		passed, failed, unsteady int
	}{
		{"Good", 1, 0, 0},
		{"Good|Unsteady", 2, 0, 1},
		{"Good|Bad", 1, 1, 0},
		{"Panic", 0, 1, 0},
	} {
		r := goTest("-run="+c.run, ".")(t.Context(), step{dir: dir})
		if r.passed != c.passed || r.failed != c.failed || len(r.unsteady) != c.unsteady {
			t.Errorf("%s: %d passed, %d failed, %d unsteady, not %d, %d, %d\n%s", c.run, r.passed, r.failed, len(r.unsteady), c.passed, c.failed, c.unsteady, r.detail)
		}
		if c.unsteady > 0 && !strings.Contains(r.unsteady[0], "the first time") {
			t.Errorf("%s: what it printed when it failed is lost: %q", c.run, r.unsteady)
		}
	}
}

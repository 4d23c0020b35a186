package cli

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "write the golden files")

// session runs the commands that are the names of a file's sections, one after the other, and compares what they print with
// the sections: standard output, then standard error, then the exit code where it is not 0.
func session(t *testing.T, file string, run func(t *testing.T, args ...string) (code int, stdout, stderr string)) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	a := txtar.Parse(b)
	for i, f := range a.Files {
		args, ok := strings.CutPrefix(f.Name, "warren ")
		if !ok {
			continue
		}
		code, out, errs := run(t, strings.Fields(args)...)
		got := out + errs
		if code != ExitOK {
			got += fmt.Sprintf("exit code %d\n", code)
		}
		if *update {
			a.Files[i].Data = []byte(got)
		} else if got != string(f.Data) {
			t.Errorf("%s: %s prints\n%s\nwhere it used to print\n%s\ngo test ./internal/cli -update takes it over", file, f.Name, got, f.Data)
		}
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

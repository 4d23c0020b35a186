// Package images proves that Warren's images can be built again: two checkouts, in different directories, give the
// same bytes. It owns no code of the build, which is test/cluster's.
package images

import (
	"flag"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/results"
)

var long = flag.Bool("long", false, "build every image twice, for amd64 and arm64, which takes minutes")

func TestTwoCheckoutsGiveTheSameImages(t *testing.T) {
	if !*long {
		t.Skip("builds everything twice: -long")
	}
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	first, second := digests(t, root, "a"), digests(t, root, "another/place")
	failed := 0
	for name, d := range first {
		t.Logf("%s %s", name, d)
		if second[name] != d {
			failed++
			t.Errorf("%s: %s, and built again %s", name, d, second[name])
		}
	}
	if len(first) == 0 || len(first) != len(second) {
		t.Fatalf("built %d images, and then %d", len(first), len(second))
	}
	if err := results.Record("images", results.Row{Name: "images for amd64 and arm64, built in two checkouts", Inputs: len(first),
		Failures: failed, Figure: float64(len(first) - failed), Unit: "equal digests"}); err != nil {
		t.Error(err)
	}
}

// digests clones the repository and builds its images there, by name.
func digests(t *testing.T, root, dir string) map[string]string {
	t.Helper()
	at := filepath.Join(t.TempDir(), dir)
	if out, err := exec.Command("git", "clone", "-q", root, at).CombinedOutput(); err != nil {
		t.Fatalf("clone: %v: %s", err, out)
	}
	cmd := exec.Command("go", "run", "./cmd/cluster", "images", "--out", t.TempDir(), "--platform", "linux/amd64,linux/arm64")
	cmd.Dir = filepath.Join(at, "test", "cluster")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("build the images: %v: %s", err, out)
	}
	all := map[string]string{}
	for line := range strings.Lines(string(out)) { // NAME  DIGEST  FILE
		if f := strings.Fields(line); len(f) == 3 && strings.HasPrefix(f[1], "sha256:") {
			all[f[0]] = f[1]
		}
	}
	return all
}

package cluster

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/warrenmesh/warren/test/cluster/image"
)

// TestProgramsBuildReproducibly compiles the cluster's own programs twice, in
// different directories, for both platforms, and compares image digests.
func TestProgramsBuildReproducibly(t *testing.T) {
	root, err := source()
	if err != nil {
		t.Fatal(err)
	}
	for _, arch := range []string{"amd64", "arm64"} {
		var digests []string
		for range 2 {
			p := product{name: "probe", programs: []program{{"images/probe", "probe"}, {"images/pause", "pause"}}}
			v, err := p.build(t.Context(), root, t.TempDir(), "v0.1.0", image.Platform{Arch: arch}, func(string) {})
			if err != nil {
				t.Fatal(err)
			}
			im := image.Image{Name: "a:b", Variants: []image.Variant{v}}
			d, err := im.WriteFile(filepath.Join(t.TempDir(), "x.tar"))
			if err != nil {
				t.Fatal(err)
			}
			digests = append(digests, d)
		}
		if digests[0] != digests[1] {
			t.Errorf("%s: digests %v differ", arch, digests)
		}
	}
}

func TestMissingProgramsAreLeftOutAndNamed(t *testing.T) {
	var said []string
	p := product{name: "x", programs: []program{{"cmd/nowhere", "nowhere"}}}
	v, err := p.build(t.Context(), t.TempDir(), t.TempDir(), "dev", image.Platform{Arch: "amd64"}, func(s string) { said = append(said, s) })
	if err != nil || len(v.Files) != 0 {
		t.Fatalf("%+v, %v", v, err)
	}
	if want := []string{"left out /nowhere: there is no program in cmd/nowhere"}; !slices.Equal(said, want) {
		t.Errorf("said %q", said)
	}
}

func TestInputKeyFollowsTheSources(t *testing.T) {
	root := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(root, "src"), 0o755); err != nil {
		t.Fatal(err)
	}
	key := func(b ...build) string {
		t.Helper()
		k, err := inputKey(root, []string{"src"}, b)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	write("src/go.mod", "module a")
	a := key()
	if key() != a {
		t.Error("same input, another key")
	}
	write("other", "x")
	if key() != a {
		t.Error("a file outside the sources changes the key")
	}
	if key(build{out: "x"}) == a {
		t.Error("build flags do not change the key")
	}
	write("src/go.mod", "module b")
	if key() == a {
		t.Error("go.mod does not change the key")
	}
}

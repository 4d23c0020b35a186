package bpf

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// README.md says what each outcome means, each once and in the order of the enum.
func TestEveryOutcomeIsDocumented(t *testing.T) {
	spec, err := LoadMesh()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("outcome", &enum); err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, v := range enum.Values {
		if v.Name != "OUTCOMES" {
			want = append(want, strings.ToLower(v.Name))
		}
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| [^|]+ \\| [^|]+ \\|$").FindAllSubmatch(readme, -1) {
		got = append(got, string(m[1]))
	}
	if !slices.Equal(got, want) {
		t.Errorf("README.md documents %d outcomes, the enum has %d", len(got), len(want))
		for i := range max(len(got), len(want)) {
			if i >= len(got) || i >= len(want) || got[i] != want[i] {
				t.Fatalf("they part at %d: %v, %v", i, tail(got, i), tail(want, i))
			}
		}
	}
}

func tail(s []string, i int) []string { return s[min(i, len(s)):min(i+3, len(s))] }

// Each outcome is counted somewhere: one that is not has no meaning.
func TestEveryOutcomeIsUsed(t *testing.T) {
	var code strings.Builder
	for _, f := range []string{"connect.h", "sockops.h", "lookup.h", "guard.h", "decide.h", "udp.h", "near.h", "service.h", "dns.h"} {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		code.Write(b)
	}
	spec, err := LoadMesh()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("outcome", &enum); err != nil {
		t.Fatal(err)
	}
	for _, v := range enum.Values {
		if v.Name != "OUTCOMES" && !strings.Contains(code.String(), v.Name) {
			t.Errorf("%s is never counted", v.Name)
		}
	}
}

// What is committed is what the compiler makes of the sources.
func TestGeneratedFilesAreCurrent(t *testing.T) {
	clang, err := exec.LookPath("clang")
	if err != nil {
		t.Skip("no clang")
	}
	if v, err := exec.Command(clang, "--version").Output(); err != nil || !strings.Contains(string(v), "version 14.") {
		t.Skip("the committed object is that of clang 14")
	}
	dir := t.TempDir()
	cmd := exec.Command("go", "tool", "bpf2go", "-output-dir", dir)
	cmd.Args = append(cmd.Args, generateArgs(t)...)
	cmd.Env = append(os.Environ(), "GOPACKAGE=bpf", "GOFILE=bpf.go")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"mesh_bpfel.go", "mesh_bpfel.o"} {
		have, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		made, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if string(have) != string(made) {
			t.Errorf("%s is out of date: run go generate ./bpf", name)
		}
	}
}

// generateArgs reads the arguments from the go:generate line, so that they are written once.
func generateArgs(t *testing.T) []string {
	b, err := os.ReadFile("bpf.go")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if args, ok := strings.CutPrefix(strings.TrimSpace(line), "//go:generate go tool bpf2go "); ok {
			return strings.Fields(args)
		}
	}
	t.Fatal("no go:generate line")
	return nil
}

// The sizes that the programs and the documentation rely on.
func TestMapsAreBounded(t *testing.T) {
	spec, err := LoadMesh()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct {
		typ  ebpf.MapType
		size uint32
	}{
		MeshMapPods:       {ebpf.Hash, 1024},
		MeshMapOwners:     {ebpf.Hash, 2048},
		MeshMapListeners:  {ebpf.SockMap, 1024 * uint32(MeshListenerLISTENERS)},
		MeshMapTickets:    {ebpf.Hash, 2 * 1024 * 256}, // accounts times tickets of each; never LRU
		MeshMapHandshakes: {ebpf.Array, 2 * 1024},
		MeshMapOutcomes:   {ebpf.PerCPUArray, 64},
	} {
		if m := spec.Maps[name]; m.Type != want.typ || m.MaxEntries != want.size {
			t.Errorf("%s is %s of %d, want %s of %d", name, m.Type, m.MaxEntries, want.typ, want.size)
		}
	}
	for name, m := range spec.Maps {
		if m.Pinning != ebpf.PinByName && !strings.HasPrefix(name, ".") {
			t.Errorf("%s is not pinned", fmt.Sprint(name))
		}
	}
}

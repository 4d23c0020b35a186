package analysis

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane/policy"
)

var update = flag.Bool("update", false, "write the golden files")

func parse(t *testing.T, text []byte, from string) []Object {
	t.Helper()
	var out []Object
	for doc := range strings.SplitSeq("\n"+string(text), "\n---") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
			t.Fatal(err)
		}
		if len(o.Object) > 0 {
			out = append(out, Object{o, from})
		}
	}
	return out
}

// Each section of testdata is a file of objects, read beside the shop and by itself, and after it what is found.
func TestAnalysis(t *testing.T) {
	cfg, err := ConfigOf("istio-system", "trustDomain: cluster.local\nextensionProviders: [{name: known}]", "")
	if err != nil {
		t.Fatal(err)
	}
	shop, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if found, err := Run(Input{Objects: parse(t, shop, ""), Config: cfg, Cluster: true}); err != nil || len(found) > 0 {
		t.Fatalf("the shop itself: %v, %v", found, err)
	}
	file := filepath.Join("testdata", "findings.txtar")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	a := txtar.Parse(b)
	codes := map[string]bool{}
	for i := 0; i < len(a.Files); i++ {
		f := a.Files[i]
		if f.Name == "found" {
			continue
		}
		var got strings.Builder
		for _, cluster := range []bool{true, false} {
			objects := parse(t, f.Data, "file")
			if cluster {
				objects = append(parse(t, shop, ""), objects...)
			} else {
				got.WriteString("by itself:\n")
			}
			found, err := Run(Input{Objects: objects, Config: cfg, Cluster: cluster})
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range found {
				codes[x.Code] = true
				fmt.Fprintf(&got, "%s %s %s/%s %s: %s (%s)\n", x.Severity, x.Kind, x.Namespace, x.Name, x.Field, x.Message, x.Code)
			}
		}
		golden := txtar.File{Name: "found", Data: []byte(got.String())}
		have := i+1 < len(a.Files) && a.Files[i+1].Name == "found"
		switch {
		case *update && have:
			a.Files[i+1] = golden
		case *update:
			a.Files = slices.Insert(a.Files, i+1, golden)
		case !have || string(a.Files[i+1].Data) != got.String():
			t.Errorf("%s: found\n%s\ngo test ./controlplane/analysis -update takes it over", f.Name, got.String())
		}
	}
	if *update {
		if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	known := map[string]bool{}
	for _, e := range policy.Explanations {
		known[string(e.Code)] = true
	}
	for _, e := range Explanations {
		for code := range strings.SplitSeq(e.Code, ", ") {
			known[code] = true
		}
	}
	for code := range codes {
		if !known[code] {
			t.Errorf("%s is found and not explained", code)
		}
	}
	for _, c := range []Code{NotAWaypoint, NotFollowed, SubsetSelectsNothing, UnknownField, UnknownHost, UnknownPort, UnknownRevision, UnknownSubset, UnknownWaypoint} {
		if !codes[string(c)] {
			t.Errorf("no example earns %s", c)
		}
	}
}

func TestConfigThatCannotBeRead(t *testing.T) {
	if _, err := ConfigOf("istio-system", "a: [", ""); err == nil {
		t.Error("a configuration that is no YAML is taken")
	}
}

func TestKebab(t *testing.T) {
	for in, want := range map[string]string{"NoWaypoint": "no-waypoint", "UnknownUDPPolicy": "unknown-udp-policy", "Ignored": "ignored"} {
		if got := kebab(in); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
}

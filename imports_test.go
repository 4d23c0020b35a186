// Package warren_test holds the rules of the house that a machine can check: which package may import
// which, how packages are named, that each says what it owns, and that no file grows without end.
package warren_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/warrenmesh/warren"

// maxLines bounds a hand-written file.
const maxLines = 800

// forbiddenNames are package names that say nothing about what is inside.
var forbiddenNames = []string{"util", "utils", "common", "types", "helper", "helpers", "manager", "misc", "shared"}

// sourceFile is one Go file of the root module.
type sourceFile struct {
	path      string   // slash-separated, relative to the root of the repository
	dir       string   // "." for the root
	pkg       string   // package name
	imports   []string // as written
	doc       bool     // has a package comment
	test      bool
	generated bool
	lines     int
}

// readTree parses every Go file of the root module; nested modules are their own houses.
func readTree(t *testing.T) []sourceFile {
	t.Helper()
	var files []sourceFile
	fset := token.NewFileSet()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if path == "." {
				return nil
			}
			if name := d.Name(); strings.HasPrefix(name, ".") || name == "testdata" || name == "bin" || name == "out" {
				return filepath.SkipDir
			}
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(fset, path, src, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		s := sourceFile{
			path:      filepath.ToSlash(path),
			dir:       filepath.ToSlash(filepath.Dir(path)),
			pkg:       f.Name.Name,
			doc:       f.Doc != nil && strings.HasPrefix(strings.ToLower(f.Doc.Text()), docOpening(f)),
			test:      strings.HasSuffix(path, "_test.go"),
			generated: ast.IsGenerated(f),
			lines:     bytes.Count(src, []byte{'\n'}),
		}
		for _, spec := range f.Imports {
			p, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			s.imports = append(s.imports, p)
		}
		files = append(files, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// docOpening is how a package comment begins; that of a command names the command.
func docOpening(f *ast.File) string {
	if f.Name.Name == "main" {
		return ""
	}
	return "package " + f.Name.Name
}

// within reports whether dir is one of the trees or below one.
func within(dir string, trees ...string) bool {
	return slices.ContainsFunc(trees, func(t string) bool { return dir == t || strings.HasPrefix(dir, t+"/") })
}

// ours returns the repository directory of an import path of this module.
func ours(imp string) (string, bool) {
	if imp == module {
		return ".", true
	}
	return strings.CutPrefix(imp, module+"/")
}

func imports(imp string, prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return imp == p || strings.HasPrefix(imp, p+"/") })
}

// A rule names what a file must not import.
type rule struct {
	name   string
	why    string
	broken func(f sourceFile, imp, dir string, own bool) bool
}

var rules = []rule{
	{
		name: "mesh is stdlib only",
		why:  "internal/mesh is the domain: functions of values, without Kubernetes, wire formats or libraries",
		broken: func(f sourceFile, imp, dir string, own bool) bool {
			return within(f.dir, "internal/mesh") && !f.test && (own && !within(dir, "internal/mesh") || !own && strings.Contains(imp, "."))
		},
	},
	{
		name: "components do not know each other",
		why:  "the node agent and the control plane meet on the wire (api/) and nowhere else",
		broken: func(f sourceFile, _, dir string, own bool) bool {
			return own && (within(f.dir, "node-agent") && within(dir, "controlplane", "waypoint", "console") ||
				within(f.dir, "controlplane") && within(dir, "node-agent", "console") ||
				within(f.dir, "waypoint") && within(dir, "node-agent", "controlplane", "console"))
		},
	},
	{
		name: "internal is below the components",
		why:  "imports point one way: cmd, components, internal, internal/mesh",
		broken: func(f sourceFile, _, dir string, own bool) bool {
			return own && within(f.dir, "internal") && within(dir, "cmd", "node-agent", "controlplane", "waypoint", "console", "bpf", "test")
		},
	},
	{
		name: "nothing imports a command or the tests",
		why:  "cmd/ is flags, Config and Run; test/ is on top of everything",
		broken: func(f sourceFile, _, dir string, own bool) bool {
			return own && (within(dir, "cmd") && !within(f.dir, dir) || within(dir, "test") && !within(f.dir, "test"))
		},
	},
	{
		name: "bpf has one importer",
		why:  "the kernel interface is spoken by node-agent/datapath alone",
		broken: func(f sourceFile, _, dir string, own bool) bool {
			return own && within(dir, "bpf") && !within(f.dir, "bpf", "node-agent/datapath")
		},
	},
	{
		name: "Kubernetes clients stay where Kubernetes is",
		why:  "the node agent has no API rights and must not grow a client",
		broken: func(f sourceFile, imp, _ string, _ bool) bool {
			return imports(imp, "k8s.io", "istio.io/client-go", "sigs.k8s.io/gateway-api") &&
				!within(f.dir, "controlplane", "cmd/controlplane", "internal/cli", "test", "charts")
		},
	},
	{
		name: "Envoy configuration is written in one place",
		why:  "Envoy protos belong to waypoint and controlplane/xds; others need the discovery protocol at most",
		broken: func(f sourceFile, imp, _ string, _ bool) bool {
			if !imports(imp, "github.com/envoyproxy/go-control-plane") || within(f.dir, "waypoint", "controlplane/xds", "test", "examples/tcpcheck") {
				return false
			}
			discovery := imports(imp, "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3",
				"github.com/envoyproxy/go-control-plane/envoy/config/core/v3")
			return !discovery || !within(f.dir, "node-agent/xds", "controlplane")
		},
	},
	{
		name: "api has no logic",
		why:  "wire contracts depend on nothing of ours",
		broken: func(f sourceFile, _, dir string, own bool) bool {
			return own && within(f.dir, "api") && !within(dir, "api")
		},
	},
	{
		name: "no Istio implementation",
		why:  "two copies of a proto package panic at start",
		broken: func(_ sourceFile, imp, _ string, _ bool) bool {
			return imports(imp, "istio.io/istio")
		},
	},
}

func TestImportDirections(t *testing.T) {
	for _, f := range readTree(t) {
		for _, imp := range f.imports {
			dir, own := ours(imp)
			for _, r := range rules {
				if r.broken(f, imp, dir, own) {
					t.Errorf("%s imports %s: %s (%s)", f.path, imp, r.name, r.why)
				}
			}
		}
	}
}

func TestPackageNames(t *testing.T) {
	for _, f := range readTree(t) {
		if slices.Contains(forbiddenNames, f.pkg) {
			t.Errorf("%s: a package called %q says nothing about what it owns", f.path, f.pkg)
		}
	}
}

func TestPackageComments(t *testing.T) {
	documented := map[string]bool{}
	for _, f := range readTree(t) {
		if f.test {
			continue
		}
		documented[f.dir] = documented[f.dir] || f.doc
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s: no package comment; say what the package owns and what it must not know", dir)
		}
	}
}

func TestFileLength(t *testing.T) {
	for _, f := range readTree(t) {
		if !f.generated && f.lines > maxLines {
			t.Errorf("%s has %d lines; split it by the role of its parts (at most %d)", f.path, f.lines, maxLines)
		}
	}
}

// TestRulesBite breaks each rule once on purpose, so that a rule which never fires is noticed.
func TestRulesBite(t *testing.T) {
	bad := map[string]sourceFile{
		"mesh is stdlib only":                         {dir: "internal/mesh", imports: []string{"github.com/gaissmai/bart"}},
		"components do not know each other":           {dir: "node-agent/xds", imports: []string{module + "/controlplane/xds"}},
		"internal is below the components":            {dir: "internal/wds", imports: []string{module + "/node-agent/hbone"}},
		"nothing imports a command or the tests":      {dir: "controlplane", imports: []string{module + "/cmd/controlplane"}},
		"bpf has one importer":                        {dir: "node-agent/proxy", imports: []string{module + "/bpf"}},
		"Kubernetes clients stay where Kubernetes is": {dir: "node-agent/enroll", imports: []string{"k8s.io/client-go/rest"}},
		"Envoy configuration is written in one place": {dir: "controlplane/ca", imports: []string{"github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"}},
		"api has no logic":                            {dir: "api/node", imports: []string{module + "/internal/mesh"}},
		"no Istio implementation":                     {dir: "test/interop", imports: []string{"istio.io/istio/pkg/log"}},
	}
	for _, r := range rules {
		f, ok := bad[r.name]
		if !ok {
			t.Errorf("rule %q has no counter-example", r.name)
			continue
		}
		dir, own := ours(f.imports[0])
		if !r.broken(f, f.imports[0], dir, own) {
			t.Errorf("rule %q lets %s import %s", r.name, f.dir, f.imports[0])
		}
	}
}

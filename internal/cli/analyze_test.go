package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// echo finds an error in each object that is called wrong, and a warning in each that is called odd.
func echo(root string, mesh map[string]string, objects []Analyzed, whole bool) ([]Finding, error) {
	var out []Finding
	for _, o := range objects {
		if severity := map[string]string{"wrong": "error", "odd": "warning"}[o.GetName()]; severity != "" {
			out = append(out, Finding{Severity: severity, Code: "a-code", Kind: o.GetKind(), Namespace: o.GetNamespace(), Name: o.GetName(), Field: "spec", Message: "is " + severity + " in " + root, File: o.File})
		}
	}
	return out, nil
}

func TestAnalyzeFiles(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{
		"odd.yaml":        "kind: Odd\napiVersion: v1\nmetadata: {name: odd}\n---\n# nothing\n---\nkind: Namespace\napiVersion: v1\nmetadata: {name: odd}\n",
		"sub/wrong.json":  `{"kind":"List","apiVersion":"v1","items":[{"kind":"Wrong","apiVersion":"v1","metadata":{"name":"wrong","namespace":"shop"}}]}`,
		"sub/notes.txt":   "kind: [",
		"broken/bad.yaml": "kind: [",
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	analyze := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		a := &app{env: Env{Program: "warren", Args: append([]string{"analyze", "--use-kube=false"}, args...), Out: &out, Err: &errs, Analyze: echo}}
		code := a.main(t.Context())
		return code, out.String(), errs.String()
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"odd.yaml"}, ExitOK, "warning Odd default/odd in odd.yaml: spec: is warning in istio-system (a-code)\nwarning Namespace odd in odd.yaml: spec: is warning in istio-system (a-code)\n"},
		{[]string{"odd.yaml", "--failure-threshold", "warning"}, ExitFound, "warning Odd"},
		{[]string{"odd.yaml", "--only", "shop"}, ExitOK, "nothing is wrong with 2 objects\n"},
		{[]string{"sub"}, ExitFound, "error Wrong shop/wrong in sub/wrong.json"},
		{[]string{"."}, ExitOK, "warning Odd"},
		{[]string{"sub", "-o", "json"}, ExitFound, `"file": "sub/wrong.json"`},
		{[]string{"broken"}, ExitError, "error: reading objects: broken/bad.yaml:"},
		{[]string{"absent"}, ExitError, "error: reading objects: lstat absent"},
		{nil, ExitUsage, "name files"},
		{[]string{"sub", "--failure-threshold", "info"}, ExitUsage, "neither error nor warning"},
	} {
		code, out, errs := analyze(c.args...)
		if code != c.code || !strings.Contains(out+errs, c.want) {
			t.Errorf("%v: code %d\n%s%s", c.args, code, out, errs)
		}
	}
	if code, _, errs := analyze("-R", "."); code != ExitError || !strings.Contains(errs, "bad.yaml") {
		t.Errorf("what is inside of directories is not read: %d, %s", code, errs)
	}
}

// What is given stands in the place of what is there, and nothing else does.
func TestAnalyzeOver(t *testing.T) {
	there, err := parseObjects("", []byte("kind: A\napiVersion: g/v1\nmetadata: {name: x}\n---\nkind: A\napiVersion: h/v1\nmetadata: {name: x}\n---\nkind: A\napiVersion: g/v1\nmetadata: {name: y}\n"))
	if err != nil {
		t.Fatal(err)
	}
	given, err := parseObjects("f", []byte("kind: A\napiVersion: g/v1beta1\nmetadata: {name: x}\n"))
	if err != nil {
		t.Fatal(err)
	}
	all := over(there, given, true)
	if len(all) != 3 || all[2].File != "f" || all[0].GroupVersionKind().Group != "h" {
		t.Errorf("%v", all)
	}
	if alone := over(there, given, false); len(alone) != 1 {
		t.Errorf("%v", alone)
	}
}

// What the mesh's configuration asks for in vain is said.
func TestAnalyzeMeshConfiguration(t *testing.T) {
	for text, want := range map[string]string{
		"": "",
		"rootNamespace: mesh\ntrustDomain: a.b\ndefaultConfig: {discoveryAddress: istiod.mesh.svc:15012}": "",
		"rootNamespace: mesh\nenableTracing: true":                                                        "meshConfig.enableTracing has no effect",
		"defaultConfig: {tracing: {zipkin: {address: zipkin.mesh:9411}}}":                                 "meshConfig.defaultConfig.tracing.zipkin.address has no effect",
	} {
		found, err := meshFindings("mesh", text)
		if err != nil || len(found) > 1 || want == "" != (len(found) == 0) {
			t.Errorf("%q: %v, %v", text, found, err)
			continue
		}
		if want != "" && (!strings.Contains(found[0].Message, want) || found[0].Name != "istio" || found[0].Code != "partly-ignored") {
			t.Errorf("%q: %v", text, found[0])
		}
	}
	if _, err := meshFindings("mesh", "a: ["); err == nil || !strings.Contains(err.Error(), "ConfigMap mesh/istio") {
		t.Errorf("a configuration that cannot be read: %v", err)
	}
}

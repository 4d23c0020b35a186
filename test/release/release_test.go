package main

import (
	"archive/tar"
	"compress/gzip"
	"debug/buildinfo"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
)

// What is published says its version, installs the images of that version, and names what it is made of.
func TestAReleaseIsOfOneVersion(t *testing.T) {
	here := "linux/" + runtime.GOARCH
	m := maker{version: "v9.8.7", out: filepath.Join(t.TempDir(), "release"), platforms: here, log: t.Logf}
	if err := m.make(t.Context(), []string{here}, false); err != nil {
		t.Fatal(err)
	}
	sums := exec.CommandContext(t.Context(), "sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS")
	sums.Dir = m.out
	if out, err := sums.CombinedOutput(); err != nil {
		t.Errorf("sha256sum: %v: %s", err, out)
	}

	warren := unpack(t, filepath.Join(m.out, "warren-v9.8.7-linux-"+runtime.GOARCH+".tar.gz"))
	if got := run(t, warren, "version", "--client"); got != "warren v9.8.7\n" {
		t.Errorf("version: %q", got)
	}
	images := regexp.MustCompile(`ghcr\.io/warrenmesh/warren/[a-z-]+[:@]\S+`).FindAllString(run(t, warren, "manifest", "generate"), -1)
	for _, image := range images {
		if !strings.HasSuffix(strings.TrimRight(image, `"',}`), ":v9.8.7") {
			t.Errorf("the manifest has %s", image)
		}
	}
	if len(images) < 3 {
		t.Errorf("the manifest has %d images", len(images))
	}
	for _, name := range []string{"warren", "gateway"} {
		c, err := loader.Load(filepath.Join(m.out, name+"-9.8.7.tgz"))
		if err != nil {
			t.Fatal(err)
		}
		if c.Metadata.Version != "9.8.7" || c.Metadata.AppVersion != "v9.8.7" {
			t.Errorf("chart %s is of %s, for %s", name, c.Metadata.Version, c.Metadata.AppVersion)
		}
	}

	listed := components(t, filepath.Join(m.out, "images", "cli.cdx.json"))
	info, err := buildinfo.ReadFile(warren)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range info.Deps {
		if d.Replace == nil && listed["pkg:golang/"+d.Path+"@"+d.Version].Name == "" {
			t.Errorf("the image's bill of materials does not have %s %s", d.Path, d.Version)
		}
	}
	if len(info.Deps) < 50 {
		t.Errorf("the program says that it is made of %d modules", len(info.Deps))
	}
	envoy := components(t, filepath.Join(m.out, "images", "waypoint.cdx.json"))[here+"/envoy"]
	if envoy.Version == "" || envoy.Hashes == nil {
		t.Errorf("the waypoint's bill of materials has Envoy as %+v", envoy)
	}
}

func TestWhatCannotBeReleasedIsRefused(t *testing.T) {
	there := t.TempDir()
	for version, reason := range map[string]string{
		"": "say one as v0.2.0", "0.2.0": "say one as v0.2.0", "v0.2": "say one as v0.2.0", "v0.2.0": "remove it, or say another",
	} {
		m := maker{version: version, out: there, log: t.Logf}
		if err := m.make(t.Context(), nil, false); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: %v, want %q", version, err, reason)
		}
	}
}

// components are those of a bill of materials, by reference.
func components(t *testing.T, file string) map[string]cdx.Component {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(f, cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	out := map[string]cdx.Component{}
	for _, c := range *bom.Components {
		out[c.BOMRef] = c
	}
	return out
}

// unpack returns the program that an archive of the command line has.
func unpack(t *testing.T, archive string) string {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(z)
	h, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), h.Name)
	if err := os.WriteFile(name, b, h.FileInfo().Mode()); err != nil {
		t.Fatal(err)
	}
	return name
}

func run(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, args...).Output()
	if err != nil {
		t.Fatalf("%s: %v", args, err)
	}
	return string(out)
}

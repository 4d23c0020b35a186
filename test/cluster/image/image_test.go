package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func sample(t *testing.T, mtime time.Time) *Image {
	t.Helper()
	im := &Image{Name: "example.org/a/b:v1", Config: Config{Entrypoint: []string{"/app"}, User: "65532:65532"}}
	for _, arch := range []string{"amd64", "arm64"} {
		d := t.TempDir()
		files := map[string]string{}
		for _, f := range []string{"app", "opt/bin/tool"} {
			p := filepath.Join(d, filepath.Base(f))
			if err := os.WriteFile(p, []byte(arch+f), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Chtimes(p, mtime, mtime); err != nil {
				t.Fatal(err)
			}
			files[f] = p
		}
		im.Variants = append(im.Variants, Variant{Platform{arch}, files})
	}
	return im
}

func TestSameInputSameBytes(t *testing.T) {
	var first, second bytes.Buffer
	d1, err := sample(t, time.Now()).Write(&first)
	if err != nil {
		t.Fatal(err)
	}
	d2, err := sample(t, time.Now().Add(-time.Hour)).Write(&second)
	if err != nil {
		t.Fatal(err)
	}
	if d1 != d2 || !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Errorf("digests %s and %s", d1, d2)
	}
}

func TestLayout(t *testing.T) {
	var b bytes.Buffer
	digest, err := sample(t, time.Now()).Write(&b)
	if err != nil {
		t.Fatal(err)
	}
	files := untar(t, &b)
	for name, content := range files {
		if want, ok := strings.CutPrefix(name, "blobs/sha256/"); ok {
			if sum := sha256.Sum256(content); hex.EncodeToString(sum[:]) != want {
				t.Errorf("blob %s has digest %x", want, sum)
			}
		}
	}
	type index struct{ Manifests []descriptor }
	blob := func(d string, into any) {
		t.Helper()
		if err := json.Unmarshal(files["blobs/sha256/"+strings.TrimPrefix(d, "sha256:")], into); err != nil {
			t.Fatal(err)
		}
	}
	var top, im index
	if err := json.Unmarshal(files["index.json"], &top); err != nil {
		t.Fatal(err)
	}
	if len(top.Manifests) != 1 || top.Manifests[0].Digest != digest || top.Manifests[0].Annotations["io.containerd.image.name"] != "example.org/a/b:v1" {
		t.Fatalf("index.json: %+v", top)
	}
	blob(digest, &im)
	if len(im.Manifests) != 2 || im.Manifests[0].Platform.Architecture != "amd64" || im.Manifests[1].Platform.Architecture != "arm64" {
		t.Fatalf("index: %+v", im)
	}
	var m struct {
		Config descriptor
		Layers []descriptor
	}
	blob(im.Manifests[1].Digest, &m)
	var cfg struct {
		Architecture string
		Config       struct {
			Entrypoint []string
			User       string
		}
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	blob(m.Config.Digest, &cfg)
	if cfg.Architecture != "arm64" || cfg.Config.User != "65532:65532" || !slices.Equal(cfg.Config.Entrypoint, []string{"/app"}) ||
		len(m.Layers) != 1 || !slices.Equal(cfg.RootFS.DiffIDs, []string{m.Layers[0].Digest}) {
		t.Errorf("configuration: %+v, layers %+v", cfg, m.Layers)
	}
	content := untar(t, bytes.NewReader(files["blobs/sha256/"+strings.TrimPrefix(m.Layers[0].Digest, "sha256:")]))
	if string(content["app"]) != "arm64app" || string(content["opt/bin/tool"]) != "arm64opt/bin/tool" {
		t.Errorf("layer: %q", content)
	}
	for _, d := range []string{"opt/", "opt/bin/", "tmp/", "proc/"} {
		if _, ok := content[d]; !ok {
			t.Errorf("layer has no %s", d)
		}
	}
}

func untar(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(time.Unix(0, 0)) || h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s: time %s, owner %d:%d", h.Name, h.ModTime, h.Uid, h.Gid)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

func TestParsePlatforms(t *testing.T) {
	l, err := ParsePlatforms("linux/amd64,linux/arm64")
	if err != nil || len(l) != 2 || l[1].String() != "linux/arm64" {
		t.Errorf("got %v, %v", l, err)
	}
	for _, s := range []string{"", "amd64", "windows/amd64", "linux/amd64,"} {
		if _, err := ParsePlatforms(s); err == nil {
			t.Errorf("%q is accepted", s)
		}
	}
}

func TestMissingFileLeavesNoArchive(t *testing.T) {
	im := Image{Name: "a:b", Variants: []Variant{{Platform{"amd64"}, map[string]string{"app": "/does/not/exist"}}}}
	out := filepath.Join(t.TempDir(), "x.tar")
	if _, err := im.WriteFile(out); err == nil {
		t.Fatal("no error")
	}
	if l, _ := filepath.Glob(out + "*"); len(l) > 0 {
		t.Errorf("left %v", l)
	}
}

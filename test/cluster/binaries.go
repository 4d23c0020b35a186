package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/warrenmesh/warren/test/cluster/image"
	"github.com/warrenmesh/warren/test/cluster/internal/plan"
)

// Versions of what kubebox reports about itself; the sources are pinned by its
// go.mod.
const (
	kubernetesVersion = "v1.36.3"
	containerdVersion = "v2.3.7"
)

// components are the names kubebox answers to.
var components = []string{
	"containerd", "coredns", "ctr", "etcd", "helm", "kube-apiserver", "kube-controller-manager",
	"kube-proxy", "kube-scheduler", "kubelet",
}

// build is one go build: a package directory below the source, the output's
// name, and arguments.
type build struct {
	dir, pkg, out string
	args          []string
}

func kubeboxBuilds() []build {
	const base = "k8s.io/component-base/version."
	x := []string{
		base + "gitVersion=" + kubernetesVersion, base + "gitMajor=1", base + "gitMinor=36",
		base + "gitTreeState=clean", base + "gitCommit=warren", base + "buildDate=2026-01-01T00:00:00Z",
		"k8s.io/client-go/pkg/version.gitVersion=" + kubernetesVersion,
		"github.com/containerd/containerd/v2/version.Version=" + containerdVersion,
	}
	args := []string{
		"-trimpath", "-tags=no_btrfs,no_zfs,no_devmapper,no_tracing,no_aufs",
		"-ldflags=-s -w -X " + strings.Join(x, " -X "),
	}
	return []build{
		{"kubebox", ".", "kubebox", args},
		{"kubebox", "./kubectl", "kubectl", args},
		{"kubebox", "./shim", "containerd-shim-runc-v2", []string{"-trimpath", "-ldflags=-s -w"}},
	}
}

// cacheDir is outside every source tree.
func cacheDir() (string, error) {
	d, err := os.UserCacheDir() // $XDG_CACHE_HOME or $HOME/.cache
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	return filepath.Join(d, "warren", "cluster"), nil
}

// cacheLife is how long a directory of the cache stays when nobody asks for it.
const cacheLife = 7 * 24 * time.Hour

// cached returns the directory for the given key, calling fill to make it first
// if it is not there. A directory appears complete or not at all.
func cached(kind, key string, fill func(dir string) error) (string, error) {
	top, err := cacheDir()
	if err != nil {
		return "", err
	}
	return cachedIn(top, kind, key, fill)
}

func cachedIn(top, kind, key string, fill func(dir string) error) (string, error) {
	dir := filepath.Join(top, kind+"-"+key)
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err == nil { // there, and used just now
		return dir, nil
	}
	if err := prune(top, kind, now.Add(-cacheLife)); err != nil {
		return "", err
	}
	if err := os.MkdirAll(top, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(top, ".new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := fill(tmp); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, e := os.Stat(dir); e == nil {
			return dir, nil // somebody else was faster
		}
		return "", err
	}
	return dir, nil
}

// prune deletes what was last asked for before a time. Fresh builds are the
// moment for it: each change of the sources leaves a directory behind.
func prune(top, kind string, before time.Time) error {
	l, err := filepath.Glob(filepath.Join(top, kind+"-*"))
	if err != nil {
		return err
	}
	for _, d := range l {
		if fi, err := os.Stat(d); err == nil && fi.ModTime().Before(before) {
			if err := os.RemoveAll(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// inputKey hashes the files below dirs (relative to root) and everything else
// that decides what a build gives.
func inputKey(root string, dirs []string, builds []build) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH, builds)
	for _, d := range dirs {
		err := filepath.WalkDir(filepath.Join(root, d), func(p string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			rel, _ := filepath.Rel(root, p)
			fmt.Fprintln(h, rel)
			_, err = io.Copy(h, f)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// source finds this module's directory: where it was compiled from, or above
// the working directory.
func source() (string, error) {
	var candidates []string
	if _, f, _, ok := runtime.Caller(0); ok {
		candidates = append(candidates, filepath.Dir(f))
	}
	if wd, err := os.Getwd(); err == nil {
		for d := wd; ; d = filepath.Dir(d) {
			candidates = append(candidates, d, filepath.Join(d, "test", "cluster"))
			if d == filepath.Dir(d) {
				break
			}
		}
	}
	for _, d := range candidates {
		if _, err := os.Stat(filepath.Join(d, "kubebox", "go.mod")); err == nil {
			return d, nil
		}
	}
	return "", errors.New("find the sources of test/cluster: run inside Warren's repository")
}

func (b build) run(ctx context.Context, root, out string, env ...string) error {
	args := append([]string{"build", "-p=2", "-buildvcs=false", "-o", filepath.Join(out, b.out)}, b.args...)
	cmd := exec.CommandContext(ctx, "go", append(args, b.pkg)...)
	cmd.Dir = filepath.Join(root, b.dir)
	cmd.Env = append(os.Environ(), append([]string{"CGO_ENABLED=0", "GOWORK=off", "GOGC=800"}, env...)...) // a compiler that collects less needs a fifth less time
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("build %s in %s: %w", b.pkg, cmd.Dir, err)
	}
	return nil
}

// Binaries returns the directory with Kubernetes' programs, building them if the
// cache has none for these sources.
func Binaries(ctx context.Context, log func(string)) (string, error) {
	root, err := source()
	if err != nil {
		return "", err
	}
	builds := kubeboxBuilds()
	key, err := inputKey(root, []string{"kubebox"}, builds)
	if err != nil {
		return "", err
	}
	return cached("bin", key, func(dir string) error {
		log("building Kubernetes " + kubernetesVersion + " from source; the first time takes several minutes")
		for _, b := range builds {
			if err := b.run(ctx, root, dir); err != nil {
				return err
			}
		}
		for _, c := range components {
			if err := os.Symlink("kubebox", filepath.Join(dir, c)); err != nil {
				return err
			}
		}
		return nil
	})
}

// ownImages returns the directory with the archives of the cluster's own images.
func ownImages(ctx context.Context) (string, error) {
	root, err := source()
	if err != nil {
		return "", err
	}
	args := []string{"-trimpath", "-ldflags=-s -w"}
	builds := []build{{"images", "./pause", "pause", args}, {"images", "./probe", "probe", args}}
	key, err := inputKey(root, []string{"images", "image"}, builds)
	if err != nil {
		return "", err
	}
	return cached("images", key, func(dir string) error {
		tmp, err := os.MkdirTemp("", "warren-images-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(tmp)
		for i, b := range builds {
			if err := b.run(ctx, root, tmp); err != nil {
				return err
			}
			im := image.Image{
				Name:   []string{plan.SandboxImage, ProbeImage}[i],
				Config: image.Config{Entrypoint: []string{"/" + b.out}},
				Variants: []image.Variant{{
					Platform: image.Platform{Arch: runtime.GOARCH},
					Files:    map[string]string{b.out: filepath.Join(tmp, b.out)},
				}},
			}
			if _, err := im.WriteFile(filepath.Join(dir, b.out+".tar")); err != nil {
				return err
			}
		}
		return nil
	})
}

// launcher returns a copy-safe path of the cluster command: this program if it
// is that command, else one built for the purpose.
func launcher(ctx context.Context, self bool) (string, error) {
	if self {
		return os.Executable()
	}
	root, err := source()
	if err != nil {
		return "", err
	}
	top, err := cacheDir()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(top, 0o755); err != nil {
		return "", err
	}
	b := build{".", "./cmd/cluster", "launcher", nil}
	return filepath.Join(top, b.out), b.run(ctx, root, top)
}

func copyFiles(from, to string, match string) error {
	l, err := filepath.Glob(filepath.Join(from, match))
	if err != nil {
		return err
	}
	slices.Sort(l)
	for _, f := range l {
		if err := copyFile(f, filepath.Join(to, filepath.Base(f)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// copyFile replaces dst only when the copy is complete, so that a running
// program or an importer never sees half of it.
func copyFile(src, dst string, mode fs.FileMode) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst+".part", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if e := out.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("copy %s: %w", src, err)
	}
	return os.Rename(dst+".part", dst)
}

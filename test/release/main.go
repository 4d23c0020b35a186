// Command release makes what is published of a version: archives of all images for amd64 and arm64, with and without
// the certified cryptography, and a bill of materials for each; the command line for six platforms; the charts; and
// the checksums of all of it. It publishes nothing and signs nothing.
//
//	go run ./test/release --version v0.2.0 [--out out/release] [--cli linux/amd64,darwin/arm64] [--fips=false]
package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/Masterminds/semver/v3"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	chartutil "helm.sh/helm/v4/pkg/chart/v2/util"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/results"
)

const everywhere = "linux/amd64,linux/arm64,darwin/amd64,darwin/arm64,windows/amd64,windows/arm64"

func main() {
	r := maker{log: func(format string, args ...any) { fmt.Printf(format+"\n", args...) }}
	cli, fips := "", false
	flag.StringVar(&r.version, "version", "", "what is released, as v0.2.0")
	flag.StringVar(&r.out, "out", "out/release", "directory that is made; it must not be there")
	flag.StringVar(&r.platforms, "platform", "linux/amd64,linux/arm64", "of the images")
	flag.StringVar(&cli, "cli", everywhere, "what the command line is built for")
	flag.BoolVar(&fips, "fips", true, "images with the certified cryptography too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := r.make(ctx, strings.Split(cli, ","), fips); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

// maker makes one version.
type maker struct {
	root      string // of the repository
	version   string // as v0.2.0
	out       string
	platforms string
	log       func(format string, args ...any)
}

func (m *maker) make(ctx context.Context, cli []string, fips bool) error {
	if v, released := strings.CutPrefix(m.version, "v"); !released {
		return fmt.Errorf("version %q: say one as v0.2.0", m.version)
	} else if _, err := semver.StrictNewVersion(v); err != nil {
		return fmt.Errorf("version %q: %w; say one as v0.2.0", m.version, err)
	}
	var err error
	if m.root, err = results.Root(); err != nil {
		return err
	}
	if m.out, err = filepath.Abs(m.out); err != nil {
		return err
	}
	// What is half made is not told from what is whole, so nothing is added to what is there.
	if err := errors.Join(os.MkdirAll(filepath.Dir(m.out), 0o755), os.Mkdir(m.out, 0o755)); err != nil {
		return fmt.Errorf("%w; remove it, or say another with --out", err)
	}
	if err := m.charts(); err != nil {
		return err
	}
	for _, platform := range cli {
		if err := m.cli(ctx, platform); err != nil {
			return fmt.Errorf("the command line for %s: %w", platform, err)
		}
	}
	if err := m.images(ctx, "images"); err != nil {
		return err
	}
	if fips {
		if err := m.images(ctx, "images-fips", "--fips"); err != nil {
			return err
		}
	}
	return m.checksums()
}

// charts packs both charts as of the version, whose images they install.
func (m *maker) charts() error {
	for _, name := range []string{"warren", "gateway"} {
		c, err := loader.Load(filepath.Join(m.root, "charts", name))
		if err != nil {
			return fmt.Errorf("chart %s: %w", name, err)
		}
		release.Stamp(c, m.version)
		file, err := chartutil.Save(c, m.out)
		if err != nil {
			return fmt.Errorf("chart %s: %w", name, err)
		}
		m.log("%s", filepath.Base(file))
	}
	return nil
}

// cli builds the command line for an operating system and an architecture, and packs it with the license.
func (m *maker) cli(ctx context.Context, platform string) error {
	goos, arch, ok := strings.Cut(platform, "/")
	if !ok {
		return errors.New("say a platform as linux/amd64")
	}
	dir, err := os.MkdirTemp("", "warren-release-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := "warren"
	if goos == "windows" {
		program += ".exe"
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", filepath.Join(dir, program),
		"-ldflags=-s -w -X github.com/warrenmesh/warren/internal/build.Version="+m.version, "./cmd/warren")
	build.Dir = m.root
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOOS="+goos, "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	name := fmt.Sprintf("warren-%s-%s-%s.tar.gz", m.version, goos, arch)
	if err := pack(filepath.Join(m.out, name), filepath.Join(dir, program), filepath.Join(m.root, "LICENSE")); err != nil {
		return err
	}
	m.log("%s", name)
	return nil
}

// pack writes files into an archive, without their directories. The same files give the same bytes.
func pack(archive string, files ...string) (err error) {
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z := gzip.NewWriter(f)
	t := tar.NewWriter(z)
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: filepath.Base(name), Mode: 0o644, Size: int64(len(b)), ModTime: time.Unix(0, 0)}
		if strings.HasPrefix(h.Name, "warren") {
			h.Mode = 0o755
		}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(b); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

// images builds the images into a directory, and writes what is in each beside it.
func (m *maker) images(ctx context.Context, dir string, args ...string) error {
	out := filepath.Join(m.out, dir)
	build := exec.CommandContext(ctx, "go", append([]string{"run", "./cmd/cluster", "images", "--out", out, "--tag", m.version, "--platform", m.platforms}, args...)...)
	build.Dir = filepath.Join(m.root, "test", "cluster")
	if b, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the images: %w: %s", err, b)
	}
	archives, err := filepath.Glob(filepath.Join(out, "*.tar"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		bill, err := billOf(archive)
		if err != nil {
			return fmt.Errorf("bill of materials of %s: %w", filepath.Base(archive), err)
		}
		if err := write(strings.TrimSuffix(archive, ".tar")+".cdx.json", bill); err != nil {
			return err
		}
		m.log("%s@%s: %d components", bill.Metadata.Component.Name+":"+bill.Metadata.Component.Version, (*bill.Metadata.Component.Hashes)[0].Value, len(*bill.Components))
	}
	return nil
}

// checksums writes SHA256SUMS, as sha256sum --check reads it.
func (m *maker) checksums() error {
	var lines []string
	err := filepath.WalkDir(m.out, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		sum := sha256.New()
		if _, err := io.Copy(sum, f); err != nil {
			return err
		}
		short, err := filepath.Rel(m.out, name)
		lines = append(lines, fmt.Sprintf("%x  %s\n", sum.Sum(nil), filepath.ToSlash(short)))
		return err
	})
	if err != nil {
		return err
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[sha256.Size*2:], b[sha256.Size*2:]) })
	return os.WriteFile(filepath.Join(m.out, "SHA256SUMS"), []byte(strings.Join(lines, "")), 0o644)
}

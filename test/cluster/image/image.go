// Package image writes container images from static binaries: no daemon, no
// registry, no base image. The same input gives the same bytes: every time is
// the epoch, every owner is root, entries are sorted, layers are not compressed.
//
// An archive is a tar file of an OCI image layout, as containerd, Docker 25 and
// later, podman, skopeo and crane read it. It must not know what is in an image.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Platform is an operating system and architecture; the former is always linux.
type Platform struct{ Arch string }

// ParsePlatforms reads "linux/amd64,linux/arm64".
func ParsePlatforms(s string) ([]Platform, error) {
	var l []Platform
	for f := range strings.SplitSeq(s, ",") {
		arch, ok := strings.CutPrefix(f, "linux/")
		if !ok || (arch != "amd64" && arch != "arm64") {
			return nil, fmt.Errorf("platform %q: use linux/amd64 or linux/arm64", f)
		}
		l = append(l, Platform{arch})
	}
	return l, nil
}

func (p Platform) String() string { return "linux/" + p.Arch }

// Config is what a container started from the image gets by default.
type Config struct {
	Entrypoint []string
	User       string // "uid:gid"; empty is root
	Labels     map[string]string
}

// Variant is the image for one platform: paths in the image and the files they
// come from.
type Variant struct {
	Platform Platform
	Files    map[string]string
}

// Image is one name with a variant per platform.
type Image struct {
	Name     string // with registry, repository and tag
	Config   Config
	Variants []Variant
}

const (
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar"
	searchPath    = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *platform         `json:"platform,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// layout collects blobs by digest.
type layout map[string][]byte

func (l layout) add(mediaType string, b []byte) descriptor {
	sum := sha256.Sum256(b)
	hexsum := hex.EncodeToString(sum[:])
	l[hexsum] = b
	return descriptor{MediaType: mediaType, Digest: "sha256:" + hexsum, Size: len(b)}
}

func (l layout) addJSON(mediaType string, v any) (descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return l.add(mediaType, b), nil
}

// Write writes the archive and returns the digest of the image index.
func (im *Image) Write(w io.Writer) (digest string, err error) {
	blobs := layout{}
	var manifests []descriptor
	for _, v := range im.Variants {
		m, err := blobs.variant(im.Config, v)
		if err != nil {
			return "", fmt.Errorf("image %s for %s: %w", im.Name, v.Platform, err)
		}
		manifests = append(manifests, m)
	}
	index, err := blobs.addJSON(mediaIndex, map[string]any{"schemaVersion": 2, "mediaType": mediaIndex, "manifests": manifests})
	if err != nil {
		return "", err
	}
	digest = index.Digest
	_, tag, _ := strings.Cut(path.Base(im.Name), ":")
	index.Annotations = map[string]string{
		"io.containerd.image.name":          im.Name,
		"org.opencontainers.image.ref.name": tag,
	}
	top, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": mediaIndex, "manifests": []descriptor{index}})
	if err != nil {
		return "", err
	}

	t := tar.NewWriter(w)
	put := func(name string, b []byte) error {
		return putFile(t, name, 0o644, b)
	}
	if err := put("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return "", err
	}
	if err := put("index.json", top); err != nil {
		return "", err
	}
	var names []string
	for n := range blobs {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		if err := put("blobs/sha256/"+n, blobs[n]); err != nil {
			return "", err
		}
	}
	return digest, t.Close()
}

// variant adds the layer, configuration and manifest of one platform.
func (l layout) variant(c Config, v Variant) (descriptor, error) {
	files, err := layer(v.Files)
	if err != nil {
		return descriptor{}, err
	}
	ld := l.add(mediaLayer, files)
	p := &platform{Architecture: v.Platform.Arch, OS: "linux"}
	cd, err := l.addJSON(mediaConfig, map[string]any{
		"architecture": p.Architecture,
		"os":           p.OS,
		"created":      time.Unix(0, 0).UTC().Format(time.RFC3339),
		"config": map[string]any{
			"Entrypoint": c.Entrypoint, "User": c.User, "Labels": c.Labels,
			"Env": []string{searchPath}, "WorkingDir": "/",
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{ld.Digest}},
	})
	if err != nil {
		return descriptor{}, err
	}
	md, err := l.addJSON(mediaManifest, map[string]any{
		"schemaVersion": 2, "mediaType": mediaManifest, "config": cd, "layers": []descriptor{ld},
	})
	md.Platform = p
	return md, err
}

// layer packs the files, the directories they need, and the empty ones that a
// runtime mounts over or a program expects.
func layer(files map[string]string) ([]byte, error) {
	dirs := map[string]int64{"tmp": 0o1777, "etc": 0o755, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755}
	var names []string
	for name := range files {
		name = strings.Trim(name, "/")
		names = append(names, name)
		for d := path.Dir(name); d != "."; d = path.Dir(d) {
			dirs[d] = 0o755
		}
	}
	for d := range dirs {
		names = append(names, d+"/")
	}
	slices.Sort(names)

	var b bytes.Buffer
	t := tar.NewWriter(&b)
	for _, n := range names {
		if d, ok := strings.CutSuffix(n, "/"); ok {
			if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: n, Mode: dirs[d], ModTime: time.Unix(0, 0)}); err != nil {
				return nil, err
			}
			continue
		}
		src, ok := files[n]
		if !ok {
			src = files["/"+n]
		}
		content, err := os.ReadFile(src)
		if err != nil {
			return nil, err
		}
		if err := putFile(t, n, 0o755, content); err != nil {
			return nil, err
		}
	}
	if err := t.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func putFile(t *tar.Writer, name string, mode int64, b []byte) error {
	err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(b)), ModTime: time.Unix(0, 0)})
	if err != nil {
		return err
	}
	_, err = t.Write(b)
	return err
}

// WriteFile writes the archive to a file, which appears only when complete.
func (im *Image) WriteFile(name string) (digest string, err error) {
	f, err := os.Create(name + ".part")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	digest, err = im.Write(f)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return "", fmt.Errorf("write %s: %w", name, err)
	}
	return digest, os.Rename(f.Name(), name)
}

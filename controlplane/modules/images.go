package modules

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Layers of images that have a module, by what is in them: the module itself, or a compressed archive with a file of a name.
var (
	plainLayers   = []string{"application/vnd.module.wasm.content.layer.v1+wasm", "application/wasm"}
	archiveLayers = []string{ocispec.MediaTypeImageLayerGzip, "application/vnd.docker.image.rootfs.diff.tar.gzip"}
)

const (
	archived     = "plugin.wasm"
	dockerImage  = "application/vnd.docker.distribution.manifest.v2+json"
	dockerImages = "application/vnd.docker.distribution.manifest.list.v2+json"
	maxManifest  = 1 << 20
)

// image fetches the module in an image: of reference registry/repository:tag or @digest. pinned is the digest of the manifest,
// in hexadecimal, that it has to have; "": any. with is the Secret that has the registry's password, nil for none.
func image(ctx context.Context, client *http.Client, reference, pinned string, with map[string][]byte) ([]byte, error) {
	ref, err := registry.ParseReference(reference)
	if err != nil {
		return nil, errors.New("it does not name an image; write oci://registry.example/name:tag")
	}
	if ref.Reference == "" {
		ref.Reference = "latest"
	}
	as := &auth.Client{Client: client, Cache: auth.NewCache()}
	if with != nil {
		account, err := accountFor(with, ref)
		if err != nil {
			return nil, fmt.Errorf("imagePullSecret: %w", err)
		}
		as.Credential = auth.StaticCredential(ref.Host(), account) // for this registry alone
	}
	repo := &remote.Repository{Client: as, Reference: ref, MaxMetadataBytes: maxManifest}
	desc, b, err := manifestOf(ctx, repo, ref.Reference)
	if err != nil {
		return nil, err
	}
	if pinned != "" && desc.Digest != digest.NewDigestFromEncoded(digest.SHA256, pinned) {
		return nil, fmt.Errorf("the image's digest is %s, not the one that it has to be", desc.Digest)
	}
	if desc.MediaType == ocispec.MediaTypeImageIndex || desc.MediaType == dockerImages {
		var index ocispec.Index
		if err := json.Unmarshal(b, &index); err != nil {
			return nil, errors.New("the index of the images cannot be read")
		}
		one, err := chosen(index.Manifests)
		if err != nil {
			return nil, err
		}
		if _, b, err = manifestOf(ctx, repo, one.Digest.String()); err != nil {
			return nil, err
		}
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(b, &m); err != nil || len(m.Layers) == 0 {
		return nil, errors.New("the image's manifest cannot be read, or has no layers")
	}
	return layer(ctx, repo, m.Layers)
}

// manifestOf fetches a manifest, or an index of several.
func manifestOf(ctx context.Context, repo *remote.Repository, reference string) (ocispec.Descriptor, []byte, error) {
	desc, r, err := repo.Manifests().FetchReference(ctx, reference)
	if err != nil {
		return desc, nil, fmt.Errorf("ask the registry for the image: %w", err)
	}
	defer r.Close()
	if desc.Size > maxManifest {
		return desc, nil, fmt.Errorf("the image's manifest has more than %d bytes", maxManifest)
	}
	b, err := content.ReadAll(r, desc) // which compares the digest
	return desc, b, err
}

// chosen is the one image of several that has the module: they are the same where they were made for several kinds of machines.
func chosen(list []ocispec.Descriptor) (out ocispec.Descriptor, err error) {
	list = slices.DeleteFunc(list, func(d ocispec.Descriptor) bool { return d.Platform != nil && d.Platform.OS == "unknown" }) // what is said of the others
	for _, d := range list {
		if p := d.Platform; p != nil && (p.Architecture == "wasm" || p.OS == "linux" && p.Architecture == "amd64") {
			return d, nil
		}
	}
	if len(list) == 0 {
		return out, errors.New("the index has no image")
	}
	return list[0], nil
}

// layer fetches the module in one of the layers: the first that is one, or else the file in the last.
func layer(ctx context.Context, repo *remote.Repository, layers []ocispec.Descriptor) ([]byte, error) {
	at := slices.IndexFunc(layers, func(d ocispec.Descriptor) bool { return slices.Contains(plainLayers, d.MediaType) })
	if at < 0 {
		at = len(layers) - 1
	}
	d := layers[at]
	if d.Size > maxBytes {
		return nil, fmt.Errorf("the module has more than %d bytes", maxBytes)
	}
	r, err := repo.Blobs().Fetch(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("ask the registry for the module: %w", err)
	}
	defer r.Close()
	b, err := content.ReadAll(r, d)
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the module: %w", err)
	case slices.Contains(plainLayers, d.MediaType):
		return b, nil
	case slices.Contains(archiveLayers, d.MediaType):
		return file(b)
	}
	return nil, fmt.Errorf("there is no module in the image: its last layer is of type %.100q", d.MediaType)
}

// file takes the module out of a compressed archive.
func file(b []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, errors.New("the image's last layer cannot be decompressed")
	}
	all := tar.NewReader(io.LimitReader(z, 2*maxBytes)) // there may be something beside it
	for {
		h, err := all.Next()
		if err != nil {
			return nil, errors.New("there is no " + archived + " in the image's last layer")
		}
		if h.Typeflag != tar.TypeReg || path.Clean(strings.TrimPrefix(h.Name, "/")) != archived {
			continue
		}
		out, err := io.ReadAll(io.LimitReader(all, maxBytes+1))
		switch {
		case err != nil:
			return nil, errors.New("the " + archived + " in the image's last layer ends before its end")
		case len(out) > maxBytes:
			return nil, fmt.Errorf("the module has more than %d bytes", maxBytes)
		}
		return out, nil
	}
}

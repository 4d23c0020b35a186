package modules

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// archive is a compressed one with a file.
func archive(name string, b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	_ = w.WriteHeader(&tar.Header{Name: name, Size: int64(len(b)), Mode: 0o644, Typeflag: tar.TypeReg})
	_, _ = w.Write(b)
	_ = w.Close()
	_ = z.Close()
	return out.Bytes()
}

// registryOf is a registry that asks for a token of anybody, and sends to another host for what is large.
type registryOf struct {
	realm     string
	password  string            // of "robot", that a token takes; "": anybody has one
	blobs     map[string][]byte // by digest
	manifests map[string][]byte // by tag and digest
	kinds     map[string]string // their types
}

func newRegistry() *registryOf {
	return &registryOf{realm: "https://auth.example/token", blobs: map[string][]byte{}, manifests: map[string][]byte{}, kinds: map[string]string{}}
}

func (g *registryOf) descriptor(kind string, b []byte) map[string]any {
	d := "sha256:" + digestOf(b)
	g.blobs[d] = b
	return map[string]any{"mediaType": kind, "digest": d, "size": len(b)}
}

// put adds what a tag means, and returns its digest.
func (g *registryOf) put(tag, kind string, m map[string]any) string {
	m["schemaVersion"], m["mediaType"] = 2, kind
	b, _ := json.Marshal(m)
	for _, name := range []string{tag, "sha256:" + digestOf(b)} {
		g.manifests[name], g.kinds[name] = b, kind
	}
	return digestOf(b)
}

func (g *registryOf) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	last := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	switch {
	case r.URL.Host == "auth.example" && g.password != "" && r.Header.Get("Authorization") != "Basic "+base64.StdEncoding.EncodeToString([]byte("robot:"+g.password)):
		rec.WriteHeader(http.StatusUnauthorized)
	case r.URL.Host == "auth.example":
		fmt.Fprint(rec, `{"token": "anybody"}`)
	case r.URL.Host == "cdn.example" && r.Header.Get("Authorization") != "":
		rec.WriteHeader(http.StatusTeapot) // which is nobody's to know there
	case r.URL.Host == "cdn.example":
		_, _ = rec.Write(g.blobs[last])
	case r.Header.Get("Authorization") != "Bearer anybody":
		rec.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="registry",scope="repository:filters/one:pull"`, g.realm))
		rec.WriteHeader(http.StatusUnauthorized)
	case strings.Contains(r.URL.Path, "/manifests/") && g.manifests[last] != nil:
		rec.Header().Set("Content-Type", g.kinds[last])
		rec.Header().Set("Docker-Content-Digest", "sha256:"+digestOf(g.manifests[last]))
		_, _ = rec.Write(g.manifests[last])
	case strings.Contains(r.URL.Path, "/blobs/") && g.blobs[last] != nil:
		http.Redirect(rec, r, "https://cdn.example/"+last, http.StatusTemporaryRedirect)
	default:
		http.NotFound(rec, r)
	}
	res := rec.Result()
	res.Request, res.ContentLength = r, int64(rec.Body.Len())
	return res, nil
}

func TestImages(t *testing.T) {
	good := bare("proxy_abi_version_0_2_1")
	g := newRegistry()
	config := g.descriptor("application/vnd.oci.image.config.v1+json", []byte("{}"))
	put := func(tag, kind, layer string, b []byte) string {
		return g.put(tag, kind, map[string]any{"config": config, "layers": []any{g.descriptor(layer, b)}})
	}
	pinned := put("v1", ocispec.MediaTypeImageManifest, "application/vnd.module.wasm.content.layer.v1+wasm", good)
	put("latest", ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, archive("./plugin.wasm", good))
	docker := put("docker", dockerImage, "application/vnd.docker.image.rootfs.diff.tar.gzip", archive("plugin.wasm", good))
	put("other", ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, archive("other.wasm", good))
	put("text", ocispec.MediaTypeImageManifest, "text/plain", good)
	put("bare", ocispec.MediaTypeImageManifest, "application/wasm", []byte("secret"))
	put("large", ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageLayerGzip, archive("plugin.wasm", make([]byte, maxBytes+1)))
	lies := g.descriptor("application/wasm", append([]byte("not "), good...))
	g.blobs[lies["digest"].(string)] = append([]byte("nor "), good...)
	g.put("lies", ocispec.MediaTypeImageManifest, map[string]any{"config": config, "layers": []any{lies}})
	one := func(digest, os, arch string) map[string]any {
		return map[string]any{"mediaType": dockerImage, "digest": "sha256:" + digest, "size": len(g.manifests["sha256:"+digest]), "platform": map[string]any{"os": os, "architecture": arch}}
	}
	g.put("several", ocispec.MediaTypeImageIndex, map[string]any{"manifests": []any{one(pinned, "unknown", "unknown"), one(docker, "linux", "arm64"), one(docker, "linux", "amd64")}})
	for _, c := range []struct{ url, sha256, want string }{
		{"oci://r.example/filters/one:v1", "", ""},
		{"oci://r.example/filters/one:v1", pinned, ""},
		{"oci://r.example/filters/one@sha256:" + pinned, pinned, ""},
		{"oci://r.example/filters/one:v1", docker, "the image's digest is sha256:" + pinned},
		{"oci://r.example/filters/one", "", ""},
		{"oci://r.example/filters/one:docker", "", ""},
		{"oci://r.example/filters/one:several", "", ""},
		{"oci://r.example/filters/one:other", "", "no plugin.wasm"},
		{"oci://r.example/filters/one:text", "", `of type "text/plain"`},
		{"oci://r.example/filters/one:bare", "", "no Wasm module"},
		{"oci://r.example/filters/one:large", "", "has more than"},
		{"oci://r.example/filters/one:lies", "", "read the module"},
		{"oci://r.example/filters/one:absent", "", "not found"},
		{"oci://filter", "", "does not name an image"},
	} {
		m, err := source(g, nil)(t.Context(), policy.ModuleSource{URL: c.url, SHA256: c.sha256})
		switch {
		case c.want == "" && (err != nil || !bytes.Equal(m.Code, good) || m.Digest != digestOf(good)):
			t.Errorf("%s: %v %v", c.url, m, err)
		case c.want != "" && (m != nil || err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret")):
			t.Errorf("%s: %v %v, want %q", c.url, m, err, c.want)
		}
	}
	// Who hands out tokens is asked over TLS, too.
	g.realm = "http://auth.example/token"
	if _, err := source(g, nil)(t.Context(), policy.ModuleSource{URL: "oci://r.example/filters/one:v1"}); err == nil || !strings.Contains(err.Error(), "uses http") {
		t.Errorf("a token is asked for without TLS: %v", err)
	}

	// A registry that wants a password gets the one that is for it, and nothing of a Secret is in what is told.
	g.realm, g.password = "https://auth.example/token", "hush"
	for _, c := range []struct{ key, data, want string }{
		{dockerConfig, `{"auths": {"r.example": {"username": "robot", "password": "hush"}}}`, ""},
		{dockerConfig, `{"auths": {"https://r.example/v2/": {"auth": "` + base64.StdEncoding.EncodeToString([]byte("robot:hush")) + `"}}}`, ""},
		{dockerConfigOld, `{"r.example": {"username": "robot", "password": "hush"}}`, ""},
		{dockerConfig, `{"auths": {"r.example": {"username": "x", "password": "y"}, "r.example/filters": {"username": "robot", "password": "hush"}, "r.example/filters/other": {"username": "x", "password": "y"}}}`, ""},
		{dockerConfig, `{"auths": {"r.example": {"username": "robot", "password": "hush2"}}}`, "401"},
		{dockerConfig, `{"auths": {"other.example": {"username": "robot", "password": "hush"}, "r.example/fil": {"username": "robot", "password": "hush"}}}`, "it has nothing for r.example/filters/one"},
		{dockerConfig, `{"auths": {"r.example": {"auth": "hush"}}}`, "cannot be read"},
		{dockerConfig, `hush`, "cannot be read"},
		{"password", `hush`, "it has no .dockerconfigjson"},
		{"", "", "Secret is not there"},
	} {
		read := func(_ context.Context, name string) (map[string][]byte, error) {
			if c.key == "" || name != "shop/pull" {
				return nil, errors.New("that Secret is not there")
			}
			return map[string][]byte{c.key: []byte(c.data)}, nil
		}
		m, err := source(g, read)(t.Context(), policy.ModuleSource{URL: "oci://r.example/filters/one:v1", Secret: "shop/pull"})
		if (err == nil) != (c.want == "") || err != nil && (!strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "hush")) || err == nil && !bytes.Equal(m.Code, good) {
			t.Errorf("with %s: %v, want %q", c.data, err, c.want)
		}
	}
	if _, err := source(g, nil)(t.Context(), policy.ModuleSource{URL: "oci://r.example/filters/one:v1"}); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("without a password: %v", err)
	}
}

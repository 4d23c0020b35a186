// Package modules fetches Wasm modules, as package fetch does. It must not know what they are for.
package modules

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/warrenmesh/warren/controlplane/fetch"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Limits of one attempt.
const (
	patience = time.Minute
	maxBytes = 8 << 20 // each proxy that runs a module is sent it
)

// New returns what keeps the modules that are wanted, and tells of them. One that has been fetched is not fetched again, so that
// nobody runs another who has not said so. secret reads a Secret with passwords of registries; by is nil but in tests.
func New(by http.RoundTripper, secret Secret, told func(from policy.ModuleSource, m *mesh.Module, problem string), log *slog.Logger) *fetch.Keeper[policy.ModuleSource, *mesh.Module] {
	return fetch.NewKeeper("Wasm module", 0, source(by, secret), told, log)
}

// Secret reads what is in a Secret, namespace/name.
type Secret func(ctx context.Context, name string) (map[string][]byte, error)

// source fetches a module.
func source(by http.RoundTripper, secret Secret) func(context.Context, policy.ModuleSource) (*mesh.Module, error) {
	c := fetch.Config{
		What: "modules", Accept: "application/wasm, application/octet-stream, */*", MaxBytes: maxBytes, Within: patience, Transport: by,
		NoPlain: "write https, or the sha256 of the module",
	}
	encrypted := fetch.NewClient(c)
	c.NoPlain = ""
	known := fetch.NewClient(c) // whatever comes has to be what is known
	return func(ctx context.Context, s policy.ModuleSource) (*mesh.Module, error) {
		if reference, ok := strings.CutPrefix(s.URL, policy.Images); ok {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			var with map[string][]byte
			if s.Secret != "" {
				var err error
				if with, err = secret(ctx, s.Secret); err != nil {
					return nil, fmt.Errorf("imagePullSecret %s: %w", s.Secret, err)
				}
				if with == nil {
					with = map[string][]byte{}
				}
			}
			b, err := image(ctx, encrypted.HTTP(), reference, s.SHA256, with)
			if err != nil {
				return nil, err
			}
			return module(b, "")
		}
		client := encrypted
		if s.SHA256 != "" {
			client = known
		}
		b, err := client.Get(ctx, s.URL)
		if err != nil {
			return nil, err
		}
		return module(b, s.SHA256)
	}
}

// header is how a module begins: the magic and version 1 of the format.
var header = []byte{0, 'a', 's', 'm', 1, 0, 0, 0}

// module is one of these bytes, where they are what they have to be. Of what is no module nothing is told.
func module(b []byte, digest string) (*mesh.Module, error) {
	switch {
	case bytes.HasPrefix(b, header):
	case bytes.HasPrefix(b, header[:4]):
		return nil, errors.New("it is no Wasm module but a component, or of another version of the format")
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		return nil, errors.New("it is compressed; serve the module as it is")
	default:
		return nil, errors.New("it is no Wasm module")
	}
	sum := sha256.Sum256(b)
	got := hex.EncodeToString(sum[:])
	if digest != "" && got != digest {
		return nil, fmt.Errorf("its sha256 is %s, not the one that it has to be", got)
	}
	if err := check(b[len(header):]); err != nil {
		return nil, err
	}
	return &mesh.Module{Digest: got, Code: b}, nil
}

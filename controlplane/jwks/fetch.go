package jwks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/warrenmesh/warren/controlplane/fetch"
	"github.com/warrenmesh/warren/controlplane/policy"
)

// Limits of one attempt.
const (
	patience = 10 * time.Second
	maxBytes = 1 << 20
)

// refresh is how often a key set is fetched anew.
const refresh = 20 * time.Minute

// New returns what keeps the key sets that are wanted, and tells of them. allowHTTP lets them be fetched without TLS, for issuers
// inside the cluster; by is nil but in tests.
func New(allowHTTP bool, by http.RoundTripper, told func(from policy.KeySource, keys, problem string), log *slog.Logger) *fetch.Keeper[policy.KeySource, string] {
	return fetch.NewKeeper("key set", refresh, source(allowHTTP, by), told, log)
}

// source fetches a key set.
func source(allowHTTP bool, by http.RoundTripper) func(context.Context, policy.KeySource) (string, error) {
	c := fetch.Config{What: "keys", Accept: "application/json", MaxBytes: maxBytes, Within: patience, Transport: by}
	if !allowHTTP {
		c.NoPlain = "write https, or allow it with keySets.allowHTTP in the mesh's configuration"
	}
	client := fetch.NewClient(c)
	return func(ctx context.Context, s policy.KeySource) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		at := s.URL
		if s.Discover {
			b, err := client.Get(ctx, strings.TrimSuffix(s.URL, "/")+"/.well-known/openid-configuration")
			if err != nil {
				return "", fmt.Errorf("ask the issuer where its keys are, for there is no jwksUri: %w", err)
			}
			var found struct {
				URI string `json:"jwks_uri"`
			}
			if err := json.Unmarshal(b, &found); err != nil || found.URI == "" {
				return "", errors.New("the issuer does not tell where its keys are; write jwksUri")
			}
			at = found.URI
		}
		b, err := client.Get(ctx, at)
		if err != nil {
			return "", err
		}
		return policy.PublicKeys(b, false)
	}
}

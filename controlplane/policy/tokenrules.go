package policy

import (
	"crypto/ecdh"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"golang.org/x/net/http/httpguts"
	securityv1beta1 "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// MaxTokenRules is how many rules one RequestAuthentication may have; waypoints look at every one for each request.
const MaxTokenRules = 64

// KeySource is where keys are fetched from: a key set, or the issuer who says where it is. The zero value is nowhere.
type KeySource struct {
	URL      string
	Discover bool
}

func (k KeySource) String() string { return k.URL }

// TokenRule is a rule whose keys may have to be fetched.
type TokenRule struct {
	mesh.TokenRule
	From KeySource
}

// Tokens is what waypoints and gateways do about one RequestAuthentication.
type Tokens struct {
	Rules   []TokenRule
	Targets []Target
	// Selector are the labels of the gateways' pods that it is for where it has no targets.
	Selector map[string]string
	// Problems are what of it means nothing; no token is valid for that.
	Problems []string
}

// CompileTokens compiles a RequestAuthentication for waypoints.
func (m Mesh) CompileTokens(p *securityv1.RequestAuthentication) Tokens {
	var out Tokens
	refs := p.Spec.TargetRefs
	if len(refs) == 0 && p.Spec.TargetRef != nil {
		refs = []*typev1beta1.PolicyTargetReference{p.Spec.TargetRef}
	}
	for _, r := range refs[:min(len(refs), 16)] { // as many as the API allows
		out.Targets = append(out.Targets, targetOf(r))
	}
	out.Selector = p.Spec.GetSelector().GetMatchLabels()
	rules := p.Spec.JwtRules
	if len(rules) > MaxTokenRules {
		out.Problems = append(out.Problems, fmt.Sprintf("%d rules, of which there may be %d; the others are left out, so that their tokens are not valid", len(rules), MaxTokenRules))
		rules = rules[:MaxTokenRules]
	}
	for i, r := range rules {
		if r != nil {
			out.Rules = append(out.Rules, out.rule(fmt.Sprintf("jwtRules[%d]", i), r))
		}
	}
	return out
}

func (t *Tokens) rule(at string, r *securityv1beta1.JWTRule) TokenRule {
	bad := func(format string, args ...any) {
		t.Problems = append(t.Problems, at+": "+fmt.Sprintf(format, args...))
	}
	name := func(field, v string) bool {
		ok := httpguts.ValidHeaderFieldName(v)
		if !ok {
			bad("%s: %s is not the name of a header", field, quote(v))
		}
		return ok
	}
	out := TokenRule{TokenRule: mesh.TokenRule{
		Issuer: r.GetIssuer(), Audiences: r.GetAudiences(), Forward: r.GetForwardOriginalToken(),
		FromParams: nonEmpty(r.GetFromParams()), FromCookies: nonEmpty(r.GetFromCookies()), SpaceLists: nonEmpty(r.GetSpaceDelimitedClaims()),
	}}
	for _, h := range r.GetFromHeaders() {
		if name("fromHeaders", h.GetName()) {
			if strings.ContainsAny(h.GetPrefix(), "\x00\r\n") {
				bad("fromHeaders: the prefix %s cannot be in a header", quote(h.GetPrefix()))
				continue
			}
			out.FromHeaders = append(out.FromHeaders, mesh.TokenHeader{Name: h.GetName(), Prefix: h.GetPrefix()})
		}
	}
	if v := r.GetOutputPayloadToHeader(); v != "" && name("outputPayloadToHeader", v) {
		out.PayloadHeader = v
	}
	for _, c := range r.GetOutputClaimToHeaders() {
		if c.GetClaim() != "" && name("outputClaimToHeaders", c.GetHeader()) {
			out.Claims = append(out.Claims, mesh.TokenClaim{Header: c.GetHeader(), Claim: c.GetClaim()})
		}
	}
	switch {
	case r.GetJwks() != "":
		keys, err := PublicKeys([]byte(r.GetJwks()), true)
		if err != nil {
			bad("jwks: %v: no token is valid", err)
		}
		out.Keys = keys
	case r.GetJwksUri() != "":
		out.From = KeySource{URL: r.GetJwksUri()}
	case r.GetIssuer() != "":
		out.From = KeySource{URL: r.GetIssuer(), Discover: true}
	}
	return out
}

func nonEmpty(list []string) []string {
	var out []string
	for _, v := range list {
		if v != "" {
			out = append(out, v)
		}
	}
	return out
}

// members of a key that verify; what else one has stays where it is.
var members = []string{"kty", "kid", "use", "key_ops", "alg", "n", "e", "crv", "x", "y", "k"}

// PublicKeys reads a JSON Web Key Set, or a single key, and keeps the keys that something can be verified with, and of them
// what that takes. Secrets that both sides know are kept only where the author wrote them.
func PublicKeys(text []byte, shared bool) (string, error) {
	var set struct {
		Kty  string                       `json:"kty"`
		Keys []map[string]json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(text, &set); err != nil {
		return "", errors.New("the key set is not JSON of the form {\"keys\": [...]}") // the error might show of it what is not ours to show
	}
	if set.Keys == nil && set.Kty != "" {
		var one map[string]json.RawMessage
		if err := json.Unmarshal(text, &one); err != nil {
			return "", errors.New("the key is not JSON")
		}
		set.Keys = append(set.Keys, one)
	}
	keep := []map[string]json.RawMessage{}
	for _, k := range set.Keys {
		if !verifies(k, shared) {
			continue
		}
		out := map[string]json.RawMessage{}
		for _, m := range members {
			if v, ok := k[m]; ok {
				out[m] = v
			}
		}
		keep = append(keep, out)
	}
	if len(keep) == 0 {
		return "", errors.New("the key set has no key to verify with")
	}
	b, err := json.Marshal(map[string]any{"keys": keep})
	return string(b), err
}

// verifies reports whether a key is complete and of a kind that is known. One that is not would have Envoy reject the others.
func verifies(k map[string]json.RawMessage, shared bool) bool {
	text := func(name string) string {
		var v string
		_ = json.Unmarshal(k[name], &v) // what is no text is as good as none
		return v
	}
	number := func(name string) []byte {
		b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(text(name), "="))
		if err != nil {
			return nil
		}
		return b
	}
	for _, m := range []string{"kid", "alg", "use"} {
		if k[m] != nil && text(m) == "" {
			return false
		}
	}
	switch text("kty") {
	case "RSA":
		n, e := new(big.Int).SetBytes(number("n")), new(big.Int).SetBytes(number("e"))
		return n.BitLen() >= 1024 && n.BitLen() <= 8192 && e.Bit(0) == 1 && e.BitLen() >= 2 && e.BitLen() <= 33
	case "EC":
		curve := map[string]ecdh.Curve{"P-256": ecdh.P256(), "P-384": ecdh.P384(), "P-521": ecdh.P521()}[text("crv")]
		x, y := number("x"), number("y")
		if curve == nil || len(x) == 0 || len(x) != len(y) {
			return false
		}
		_, err := curve.NewPublicKey(append(append([]byte{4}, x...), y...)) // which has to be on the curve
		return err == nil
	case "OKP":
		return text("crv") == "Ed25519" && len(number("x")) == 32
	case "oct":
		return shared && len(number("k")) > 0
	}
	return false
}

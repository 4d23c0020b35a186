package interop

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// issuer signs tokens.
type issuer struct {
	kid string
	key *ecdsa.PrivateKey
}

func newIssuer(t *testing.T, kid string) issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return issuer{kid, key}
}

func segment(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// keys is its key set.
func (i issuer) keys(t *testing.T) string {
	t.Helper()
	p, err := i.key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf(`{"keys":[{"kty":"EC","crv":"P-256","alg":"ES256","use":"sig","kid":%q,"x":%q,"y":%q}]}`, i.kid, segment(p[1:33]), segment(p[33:]))
}

// token signs claims; it is valid for an hour if they say nothing else.
func (i issuer) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	all := map[string]any{"exp": time.Now().Add(time.Hour).Unix()}
	for k, v := range claims {
		all[k] = v
	}
	body, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	text := segment([]byte(fmt.Sprintf(`{"alg":"ES256","typ":"JWT","kid":%q}`, i.kid))) + "." + segment(body)
	sum := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, i.key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return text + "." + segment(sig)
}

// waypointTokens has a waypoint verify tokens, decide by what is in them, and say so once it does.
func waypointTokens(t *testing.T, istio *istiofake.Clientset, guarded func(name, spec string), get func(authority, path string, headers ...string) (int, string, error)) {
	ctx := t.Context()
	ours, theirs := newIssuer(t, "ours"), newIssuer(t, "ours")
	request := func(spec string) {
		t.Helper()
		r := &securityv1.RequestAuthentication{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "tokens", UID: types.UID("uid-tokens-" + fmt.Sprint(len(spec))), Generation: 1}}
		if err := yaml.Unmarshal([]byte("targetRefs: [{kind: Service, name: inventory}]\n"+spec), &r.Spec); err != nil {
			t.Fatal(err)
		}
		api := istio.SecurityV1().RequestAuthentications("shop")
		_ = api.Delete(ctx, r.Name, metav1.DeleteOptions{}) // there may be none
		if _, err := api.Create(ctx, r, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	is := func(name, status string) {
		t.Helper()
		eventually(t, name+" to be "+status, time.Minute, func() error {
			r, err := istio.SecurityV1().RequestAuthentications("shop").Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, c := range r.Status.Conditions {
				if c.Type == "Enforced" && c.Status+" "+c.Reason == status {
					return nil
				}
			}
			return fmt.Errorf("%v", r.Status.Conditions)
		})
	}
	bearer := func(token string) string { return "authorization: Bearer " + token + "\r\n" }
	claims := map[string]any{"iss": "https://issuer.example/", "sub": "me", "aud": []string{"other", "shop"}, "groups": []string{"a", "b"}, "realm": map[string]any{"role": "admin"}, "scope": "read write"}
	with := func(k string, v any) map[string]any {
		out := map[string]any{k: v}
		for name, old := range claims {
			if name != k {
				out[name] = old
			}
		}
		return out
	}
	request(fmt.Sprintf("jwtRules: [{issuer: https://issuer.example/, audiences: [shop], jwks: '%s', outputClaimToHeaders: [{header: x-sub, claim: sub}]}]", ours.keys(t)))
	is("tokens", "True Enforced")
	good := ours.token(t, claims)
	for _, c := range []struct {
		name, header string
		want         int
	}{
		{"none", "", 200}, {"a good one", bearer(good), 200},
		{"another's signature", bearer(theirs.token(t, claims)), 401},
		{"one that has ended", bearer(ours.token(t, with("exp", time.Now().Add(-time.Hour).Unix()))), 401},
		{"one for somebody else", bearer(ours.token(t, with("aud", "bank"))), 403},
		{"another issuer's", bearer(ours.token(t, with("iss", "https://other.example/"))), 401},
		{"one that was changed", bearer(good[:len(good)-2]), 401},
		{"no signature", bearer(segment([]byte(`{"alg":"none"}`)) + "." + strings.Split(good, ".")[1] + "."), 401},
		{"no token at all", bearer("x"), 401},
	} {
		if code, body, err := get("10.96.0.9:80", "/", c.header); err != nil || code != c.want {
			t.Errorf("%s: %d %v, want %d\n%s", c.name, code, err, c.want, body)
		}
	}
	_, body, err := get("10.96.0.9:80", "/", bearer(good), "x-sub: somebody else\r\n")
	if err != nil || !strings.Contains(body, "X-Sub: me\r\n") || strings.Contains(body, "somebody else") || strings.Contains(body, "Authorization") {
		t.Errorf("with a token the application got %v\n%s", err, body)
	}
	if _, body, err = get("10.96.0.9:80", "/", "x-sub: somebody else\r\n"); err != nil || strings.Contains(body, "somebody else") {
		t.Errorf("a claim that a client made up reaches the application: %v\n%s", err, body)
	}

	guarded("known", `rules: [{from: [{source: {requestPrincipals: ["https://issuer.example/*"]}}], when: [{key: "request.auth.claims[groups]", values: [b]}, {key: "request.auth.claims[realm][role]", values: ["adm*"]}, {key: "request.auth.claims[scope]", values: [write]}]}]`)
	guarded("not-you", "action: DENY\n"+`rules: [{from: [{source: {requestPrincipals: ["*/you"]}}]}]`)
	for _, c := range []struct {
		name, header string
		want         int
	}{
		{"none", "", 403}, {"a good one", bearer(good), 200}, {"of nobody", bearer(ours.token(t, with("sub", ""))), 403},
		{"of another group", bearer(ours.token(t, with("groups", "a b"))), 403}, {"of the group alone", bearer(ours.token(t, with("groups", "b"))), 200},
		{"without a role", bearer(ours.token(t, with("realm", "admin"))), 403}, {"without a scope", bearer(ours.token(t, with("scope", "read"))), 403},
		{"of you", bearer(ours.token(t, with("sub", "you"))), 403}, {"of a name that ends so", bearer(ours.token(t, with("sub", "the/you"))), 403},
	} {
		if code, body, err := get("10.96.0.9:80", "/", c.header); err != nil || code != c.want {
			t.Errorf("a policy about tokens, %s: %d %v, want %d\n%s", c.name, code, err, c.want, body)
		}
	}

	// Keys that cannot be fetched verify nothing, and it is said why.
	request("jwtRules: [{issuer: https://issuer.example/, jwksUri: 'https://127.0.0.1:15012/keys'}]")
	is("tokens", "False KeysNotFetched")
	eventually(t, "no token to be valid", time.Minute, func() error {
		code, _, err := get("10.96.0.9:80", "/", bearer(good))
		if err == nil && code != 401 {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
	for _, name := range []string{"known", "not-you"} {
		if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := istio.SecurityV1().RequestAuthentications("shop").Delete(context.WithoutCancel(ctx), "tokens", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "tokens to mean nothing", time.Minute, func() error {
		code, _, err := get("10.96.0.9:80", "/", bearer("x"))
		if err == nil && code != 200 {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
}

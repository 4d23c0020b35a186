package e2e

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

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// signer makes tokens (ES256).
type signer struct {
	id  string
	key *ecdsa.PrivateKey
}

func newSigner(t *testing.T, id string) signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return signer{id, k}
}

const issuer = "https://issuer.example"

func base64url(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

// token is one for somebody of a group, good for a time.
func (s signer) token(t *testing.T, group string, lasts time.Duration) string {
	t.Helper()
	part := func(v any) string {
		b, err := json.Marshal(v)
		must(t, err)
		return base64url(b)
	}
	text := part(object{"alg": "ES256", "kid": s.id}) + "." +
		part(object{"iss": issuer, "sub": "somebody", "group": group, "exp": time.Now().Add(lasts).Unix()})
	sum := sha256.Sum256([]byte(text))
	r, v, err := ecdsa.Sign(rand.Reader, s.key, sum[:])
	must(t, err)
	both := make([]byte, 64)
	r.FillBytes(both[:32])
	v.FillBytes(both[32:])
	return text + "." + base64url(both)
}

// keySet is what verifies the tokens of signers.
func keySet(t *testing.T, all ...signer) string {
	t.Helper()
	var keys []any
	for _, s := range all {
		point, err := s.key.PublicKey.Bytes() // 4, x, y
		must(t, err)
		keys = append(keys, object{"kty": "EC", "crv": "P-256", "alg": "ES256", "kid": s.id, "x": base64url(point[1:33]), "y": base64url(point[33:])})
	}
	b, err := json.Marshal(object{"keys": keys})
	must(t, err)
	return string(b)
}

// reply is what came of a request.
type reply struct {
	Status int
	Body   string
}

// Tokens are verified by a waypoint, with the keys that the control plane has fetched or that are in the object; without keys no
// token is valid. What a provider is to be asked about it is asked about, and what it does not answer is denied.
func TestTokensAndProviders(t *testing.T) {
	ctx := t.Context()
	ns := behindWaypoint(t, "e2e-tokens", 1, "client")
	first, second, stranger := newSigner(t, "first"), newSigner(t, "second"), newSigner(t, "first")
	program := func(name string, node string, args ...string) lab.PodSpec {
		return lab.PodSpec{Namespace: ns, Name: name, Account: name, Node: node, Program: tcpcheck, Args: args}
	}
	must(t, mesh.Run(ctx, program("app", nodes[1], "serve"), program("authority", nodes[0], "authority", "-keys", keySet(t, first))))
	applyIn(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: app, namespace: NS, labels: {istio.io/use-waypoint: way}}
spec: {selector: {app: app}, ports: [{name: http, port: 80, targetPort: 9005}]}
---
apiVersion: v1
kind: Service
metadata: {name: authority, namespace: NS}
spec: {selector: {app: authority}, ports: [{name: http-keys, port: 9011}, {name: grpc, port: 9012}]}
`)
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	must(t, mesh.Install(ctx, "mesh.keySets.allowHTTP=true"))
	t.Cleanup(func() {
		if err := mesh.Install(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	})
	setMesh(t, strings.ReplaceAll(`extensionProviders:
- {name: authority, envoyExtAuthzGrpc: {service: authority.NS.svc.cluster.local, port: 9012}}
`, "NS", ns))

	ask := func(path string, headers ...string) (a reply, err error) {
		args := []string{tcpcheck, "get"}
		for _, h := range headers {
			args = append(args, "-header", h)
		}
		out, err := mesh.Exec(ctx, ns, "client", append(args, "http://app"+path)...)
		if err != nil {
			return a, err
		}
		return a, json.Unmarshal([]byte(out), &a)
	}
	becomes := func(what string, want int, body, path string, headers ...string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			a, err := ask(path, headers...)
			if err == nil && (a.Status != want || !strings.Contains(a.Body, body)) {
				err = fmt.Errorf("%s: %d %q, want %d %q", what, a.Status, a.Body, want, body)
			}
			return err
		}))
	}
	bearer := func(token string) string { return "authorization=Bearer " + token }
	tokens := func(rule string) {
		t.Helper()
		applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: NS}
spec:
  targetRefs: [{kind: Service, group: "", name: app}]
  jwtRules: [{issuer: "`+issuer+`", `+rule+`}]
`)
	}
	member := first.token(t, "staff", time.Hour)

	tokens(`jwksUri: "http://authority.NS.svc.cluster.local:9011/keys"`)
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: staff, namespace: NS}
spec:
  targetRefs: [{kind: Service, group: "", name: app}]
  rules: [{from: [{source: {requestPrincipals: ["`+issuer+`/*"]}}], when: [{key: "request.auth.claims[group]", values: [staff]}]}]
`)
	enforced(t, ns, "requestauthentication/tokens", "authorizationpolicy/staff")
	becomes("a token of the issuer", 200, "", "/headers", bearer(member))
	becomes("no token", 403, "", "/headers")
	becomes("a token of somebody else's group", 403, "", "/headers", bearer(first.token(t, "guests", time.Hour)))
	becomes("a token that has ended", 401, "", "/headers", bearer(first.token(t, "staff", -time.Hour)))
	becomes("a token that another key has signed", 401, "", "/headers", bearer(stranger.token(t, "staff", time.Hour)))

	// Keys are exchanged: both are good, then one.
	tokens("jwks: '" + keySet(t, first, second) + "'")
	becomes("a token of the next key", 200, "", "/headers", bearer(second.token(t, "staff", time.Hour)))
	becomes("a token of the key before", 200, "", "/headers", bearer(member))
	tokens("jwks: '" + keySet(t, second) + "'")
	becomes("a token of the key that was", 401, "", "/headers", bearer(member))
	becomes("a token of the key that is", 200, "", "/headers", bearer(second.token(t, "staff", time.Hour)))

	// Nobody has the keys.
	tokens(`jwksUri: "http://authority.NS.svc.cluster.local:9010/keys"`)
	if out, err := mesh.Kubectl(ctx, "-n", ns, "wait", `--for=jsonpath={.status.conditions[?(@.type=="Enforced")].reason}=KeysNotFetched`, "requestauthentication/tokens", "--timeout=60s"); err != nil {
		t.Fatal(err, out)
	}
	becomes("a token while there are no keys", 401, "", "/headers", bearer(second.token(t, "staff", time.Hour)))
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "requestauthentication/tokens", "authorizationpolicy/staff"); err != nil {
		t.Fatal(err)
	}

	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: asks, namespace: NS}
spec:
  targetRefs: [{kind: Service, group: "", name: app}]
  action: CUSTOM
  provider: {name: authority}
  rules: [{to: [{operation: {paths: [/headers]}}]}]
`)
	enforced(t, ns, "authorizationpolicy/asks")
	becomes("what the provider refuses", 403, "the authority says no to /headers", "/headers")
	becomes("what the provider lets in", 200, "X-Decided-By: the authority", "/headers", "x-ask=yes")
	becomes("what it is not asked about", 200, "ok", "/healthz")
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "pod/authority", "--wait=true"); err != nil {
		t.Fatal(err)
	}
	becomes("what nobody answers", 403, "", "/headers", "x-ask=yes")
	becomes("what nobody is asked about", 200, "ok", "/healthz")
	if a, err := ask("/headers", "x-ask=yes"); err != nil || a.Status != 403 {
		t.Errorf("without the provider: %+v %v, want 403", a, err)
	}
}

package policy

import (
	"encoding/json"
	"fmt"
	"net/url"

	securityv1beta1 "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
)

func (c *checker) request(p *securityv1.RequestAuthentication) {
	c.noDryRun(p.Annotations)
	c.attachment(p.Namespace, p.Spec.Selector, p.Spec.TargetRef, p.Spec.TargetRefs)
	for i, r := range p.Spec.JwtRules {
		c.tokens(fmt.Sprintf("spec.jwtRules[%d]", i), r)
	}
	if len(p.Spec.TargetRefs) == 0 && p.Spec.TargetRef == nil && !ForGateway(p.Spec.GetSelector().GetMatchLabels()) {
		c.warn(NeedsWaypoint, "spec", "tokens are of HTTP, which only a waypoint sees: without targetRefs no request is looked at, and AuthorizationPolicies that ask for requestPrincipals deny meanwhile. "+Waypoints)
	}
}

// LabelGateway names, on the pods that are made for a Gateway, which.
const LabelGateway = "gateway.networking.k8s.io/gateway-name"

// ForGateway reports whether a selector selects the pods of a Gateway and no others.
func ForGateway(selector map[string]string) bool { return selector[LabelGateway] != "" }

// tokens checks what Istio's validation refuses and its definitions do not.
func (c *checker) tokens(at string, r *securityv1beta1.JWTRule) {
	if r.GetIssuer() == "" && r.GetJwksUri() == "" {
		c.err(BadTokenRule, at, "there is neither an issuer nor a jwksUri; give the issuer as it stands in the tokens' claim iss")
	}
	if r.GetJwksUri() != "" {
		if u, err := url.Parse(r.JwksUri); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			c.err(BadTokenRule, at+".jwksUri", "%s is not the address of a key set; write it as in https://issuer.example/keys", quote(r.JwksUri))
		}
	}
	if r.GetJwks() != "" {
		c.keys(at+".jwks", r.Jwks)
	}
	for i, h := range r.GetFromHeaders() {
		if h.GetName() == "" {
			c.err(BadTokenRule, fmt.Sprintf("%s.fromHeaders[%d].name", at, i), "the header has no name; write it as in name: x-token")
		}
	}
	for i, h := range r.GetOutputClaimToHeaders() {
		if h.GetHeader() == "" || h.GetClaim() == "" {
			c.err(BadTokenRule, fmt.Sprintf("%s.outputClaimToHeaders[%d]", at, i), "a claim is copied to a header: both header and claim are needed")
		}
	}
}

// keys reads a key set only as far as is needed to tell that it is one and that nothing in it is secret.
func (c *checker) keys(at, text string) {
	type key struct {
		Kty string `json:"kty"`
		D   string `json:"d"` // RSA, EC, OKP: the private part
		K   string `json:"k"` // oct: the shared secret
	}
	var set struct {
		key
		Keys []key `json:"keys"`
	}
	if err := json.Unmarshal([]byte(text), &set); err != nil {
		c.err(BadTokenRule, at, "the key set is not JSON: %v", err)
		return
	}
	if set.Keys == nil && set.Kty != "" { // a single key
		set.Keys = []key{set.key}
	}
	if set.Keys == nil {
		c.err(BadTokenRule, at, "the key set has no keys; it has the form {\"keys\": [...]}")
	}
	for i, k := range set.Keys {
		if k.Kty == "" {
			c.err(BadTokenRule, at, "key %d has no type (kty)", i)
		}
		if k.D != "" || k.K != "" {
			c.warn(PrivateKey, at, "key %d is private, and only public ones are needed to verify; replace it, since whoever reads this policy has it", i)
		}
	}
}

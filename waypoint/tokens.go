package waypoint

import (
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	sfsvaluev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	jwtv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/jwt_authn/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	// tokenFilter notes who the token is of, for the decisions that follow.
	tokenFilter  = "warren.token"
	jwtNamespace = "envoy.filters.http.jwt_authn"
	payload      = "payload"
	// stateToken is issuer/subject of a verified token.
	stateToken = "warren.token_principal"
)

// tokenFilters verify tokens. What they know is a resource of its own (ECDS), so that a change reaches the next request of
// connections that are open.
func (b *builder) tokenFilters(c chain) []*hcmv3.HttpFilter {
	return []*hcmv3.HttpFilter{b.apart(c.name("tokens"), tokens(c.svc.Tokens)), b.httpFilter(tokenFilter, &sfsv3.Config{})}
}

// tokens has each token that comes verified by the rule of its issuer. Requests without any go on.
func tokens(rules []mesh.TokenRule) *jwtv3.JwtAuthentication {
	out := &jwtv3.JwtAuthentication{BypassCorsPreflight: true}
	if len(rules) == 0 {
		return out
	}
	out.Providers = map[string]*jwtv3.JwtProvider{}
	missing := &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_AllowMissing{AllowMissing: &emptypb.Empty{}}}
	any := func(l ...*jwtv3.JwtRequirement) *jwtv3.JwtRequirement {
		return &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_RequiresAny{RequiresAny: &jwtv3.JwtRequirementOrList{Requirements: l}}}
	}
	var each, one []*jwtv3.JwtRequirement
	for i, r := range rules {
		name := "rule-" + strconv.Itoa(i)
		out.Providers[name] = provider(r)
		this := &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_ProviderName{ProviderName: name}}
		one = append(one, this)
		each = append(each, any(this, missing))
	}
	all := each[0]
	if len(rules) > 1 {
		// Of several issuers whose tokens come in the same place one has to know the token; otherwise what each finds has
		// to be valid.
		all = any(append(one, &jwtv3.JwtRequirement{RequiresType: &jwtv3.JwtRequirement_RequiresAll{
			RequiresAll: &jwtv3.JwtRequirementAndList{Requirements: each},
		}})...)
	}
	out.Rules = []*jwtv3.RequirementRule{{Match: prefix("/"), RequirementType: &jwtv3.RequirementRule_Requires{Requires: all}}}
	return out
}

// nobodysKey verifies nothing: its point is the hash of "warren: nobody has this key 0". Envoy wants a key.
const nobodysKey = `{"keys":[{"kty":"EC","crv":"P-256","kid":"nobody","x":"mrZ-Co1ePQxhma2yMx8yCIQtdcVGfs6JSQJIqsIl6TY","y":"zXZTK7M2ubn-cUMEj766gAPDPqLwgqSDKbtRdv957qw"}]}`

func provider(r mesh.TokenRule) *jwtv3.JwtProvider {
	keys := r.Keys
	if keys == "" {
		keys = nobodysKey
	}
	p := &jwtv3.JwtProvider{
		Issuer: r.Issuer, Audiences: r.Audiences, Forward: r.Forward, FromParams: r.FromParams, FromCookies: r.FromCookies,
		ForwardPayloadHeader: r.PayloadHeader, PayloadInMetadata: payload,
		NormalizePayloadInMetadata: &jwtv3.JwtProvider_NormalizePayload{SpaceDelimitedClaims: append([]string{"scope", "permission"}, r.SpaceLists...)},
		JwksSourceSpecifier: &jwtv3.JwtProvider_LocalJwks{LocalJwks: &corev3.DataSource{
			Specifier: &corev3.DataSource_InlineString{InlineString: keys},
		}},
	}
	for _, h := range r.FromHeaders {
		p.FromHeaders = append(p.FromHeaders, &jwtv3.JwtHeader{Name: h.Name, ValuePrefix: h.Prefix})
	}
	for _, c := range r.Claims {
		p.ClaimToHeaders = append(p.ClaimToHeaders, &jwtv3.JwtClaimToHeader{HeaderName: c.Header, ClaimName: c.Claim})
	}
	return p
}

// noteToken is what the filter does where there are tokens.
func (b *builder) noteToken() *anypb.Any {
	value := func(claim string) string {
		return "%DYNAMIC_METADATA(" + jwtNamespace + ":" + payload + ":" + claim + ")%"
	}
	return b.config(&sfsv3.Config{OnRequestHeaders: []*sfsvaluev3.FilterStateValue{{
		Key: &sfsvaluev3.FilterStateValue_ObjectKey{ObjectKey: stateToken}, FactoryKey: "envoy.string",
		Value: &sfsvaluev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
			Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: value("iss") + "/" + value("sub")},
			}},
		}},
	}}})
}

// somebody is any text at all.
func somebody() *matcherv3.StringMatcher { return regexMatcher("(?s).+") }

// ofToken is a test of a verified token. Without a token nothing matches.
func ofToken(t mesh.AccessTest, v mesh.TextMatch) *rbacv3.Principal {
	if t.On == mesh.AccessClaim {
		m := stringMatcher(v)
		if m == nil {
			m = somebody()
		}
		return claim(t.Claim, m)
	}
	both := []*rbacv3.Principal{claim([]string{"iss"}, somebody()), claim([]string{"sub"}, somebody())}
	if m := stringMatcher(v); m != nil {
		both = append(both, &rbacv3.Principal{Identifier: &rbacv3.Principal_FilterState{FilterState: &matcherv3.FilterStateMatcher{
			Key: stateToken, Matcher: &matcherv3.FilterStateMatcher_StringMatch{StringMatch: m},
		}}})
	}
	return andIDs(both)
}

// claim compares one that is text, or a list of texts of which one has to match.
func claim(path []string, m *matcherv3.StringMatcher) *rbacv3.Principal {
	text := textValue(m)
	either := &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_OrMatch{
		OrMatch: &matcherv3.OrMatcher{ValueMatchers: []*matcherv3.ValueMatcher{text, {MatchPattern: &matcherv3.ValueMatcher_ListMatch{
			ListMatch: &matcherv3.ListMatcher{MatchPattern: &matcherv3.ListMatcher_OneOf{OneOf: text}},
		}}}},
	}}
	match := metadata(either, jwtNamespace, append([]string{payload}, path...)...)
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_SourcedMetadata{SourcedMetadata: &rbacv3.SourcedMetadata{MetadataMatcher: match}}}
}

// dryRun begins the names under which what policies would do is noted.
func dryRun(deny bool) string {
	return "istio_dry_run_" + map[bool]string{true: "deny", false: "allow"}[deny] + "_"
}

// reports are the fields of an access log that say what policies which decide nothing would have done.
func reports(fields map[string]string, rbac string) {
	for _, deny := range []bool{true, false} {
		name := strings.TrimSuffix(strings.TrimPrefix(dryRun(deny), "istio_"), "_")
		fields[name+"_result"] = "%DYNAMIC_METADATA(" + rbac + ":" + dryRun(deny) + "shadow_engine_result)%"
		fields[name+"_policy"] = "%DYNAMIC_METADATA(" + rbac + ":" + dryRun(deny) + "shadow_effective_policy_id)%"
	}
	fields["audit"] = "%DYNAMIC_METADATA(envoy.common:access_log_hint)%"
}

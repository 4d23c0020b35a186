package waypoint

import (
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// The two decisions, in this order, and what only takes note. They are in the table of routes, so that a change reaches the
// next request of connections that are open; what no route of the table has is what the filters themselves say: nobody.
const (
	auditFilter  = "warren.audit"
	customFilter = "warren.custom" // whether a provider has to be asked
	askFilter    = "envoy.filters.http.ext_authz"
	denyFilter   = "warren.deny"
	allowFilter  = "warren.allow"
)

// accessFilters decide about requests.
func (b *builder) accessFilters() []*hcmv3.HttpFilter {
	nobody := b.config(&httprbacv3.RBAC{Rules: &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: map[string]*rbacv3.Policy{"nobody": never()}}})
	filter := func(name string) *hcmv3.HttpFilter {
		return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: nobody}}
	}
	return []*hcmv3.HttpFilter{b.routesFilter(auditFilter, &httprbacv3.RBAC{}), b.routesFilter(customFilter, &httprbacv3.RBAC{}), b.askFilter(), filter(denyFilter), filter(allowFilter)}
}

// accessOf is what a table of routes says about who may ask for what.
func (b *builder) accessOf(c chain) map[string]*anypb.Any {
	d := decide(c.svc.Access, true)
	put := func(r, shadow *rbacv3.RBAC, prefix string) *anypb.Any {
		if r == nil && shadow == nil {
			return b.config(&httprbacv3.RBACPerRoute{}) // decides nothing
		}
		f := &httprbacv3.RBAC{Rules: r, ShadowRules: shadow}
		if shadow != nil {
			f.ShadowRulesStatPrefix = prefix
		}
		return b.config(&httprbacv3.RBACPerRoute{Rbac: f})
	}
	out := map[string]*anypb.Any{denyFilter: put(d.deny, d.dryDeny, dryRun(true)), allowFilter: put(d.allow, d.dryAllow, dryRun(false))}
	if d.audit != nil {
		out[auditFilter] = put(d.audit, nil, "")
	}
	if d.custom != nil {
		out[customFilter] = put(nil, d.custom, askPrefix)
		out[askFilter] = b.ask(d.ask)
	}
	if len(c.svc.Tokens) > 0 {
		out[tokenFilter] = b.noteToken()
	}
	return out
}

// connectionAccess decides about connections whose bytes nobody reads.
func (b *builder) connectionAccess(c chain) []*listenerv3.Filter {
	d := decide(c.svc.Access, false)
	var out []*listenerv3.Filter
	add := func(r, shadow *rbacv3.RBAC, prefix string) {
		if r == nil && shadow == nil {
			return
		}
		f := &networkrbacv3.RBAC{StatPrefix: c.name("tcp"), Rules: r, ShadowRules: shadow}
		if shadow != nil {
			f.ShadowRulesStatPrefix = prefix
		}
		out = append(out, b.networkFilter(connectionResults, f))
	}
	add(d.audit, nil, "")
	add(d.deny, d.dryDeny, dryRun(true))
	add(d.allow, d.dryAllow, dryRun(false))
	return out
}

// catchAll is what becomes of requests that no rule matches: they too belong to a table that says who may ask.
func catchAll() *routev3.Route {
	return &routev3.Route{Name: "none", Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_SafeRegex{
		SafeRegex: &matcherv3.RegexMatcher{Regex: "(?s).*"},
	}}, Action: respond(404, "")}
}

// decisions are the filters' rules; nil are those that need not be made.
type decisions struct {
	audit, custom, deny, allow, dryDeny, dryAllow *rbacv3.RBAC

	ask *mesh.AuthProvider // about what custom matches
}

// decide makes rules of policies. Without a request what is about requests matches nothing in an Allow policy, and is left
// out of a Deny policy.
func decide(policies []mesh.AccessPolicy, http bool) decisions {
	var out decisions
	for _, p := range policies {
		into, action := &out.audit, rbacv3.RBAC_LOG
		if p.Action == mesh.Custom && (!http || out.ask != nil && out.ask != p.Ask) {
			p.Action = mesh.Deny // there is no request to ask about, or somebody else to be asked
		}
		switch p.Action {
		case mesh.Custom:
			into, action, out.ask = &out.custom, rbacv3.RBAC_DENY, p.Ask
		case mesh.Deny:
			into, action = &out.deny, rbacv3.RBAC_DENY
			if p.DryRun {
				into = &out.dryDeny
			}
		case mesh.Allow:
			into, action = &out.allow, rbacv3.RBAC_ALLOW
			if p.DryRun {
				into = &out.dryAllow
			}
		}
		if *into == nil {
			*into = &rbacv3.RBAC{Action: action, Policies: map[string]*rbacv3.Policy{}}
			if action != rbacv3.RBAC_DENY { // Envoy lets everybody in where there is none
				(*into).Policies["nobody"] = never()
			}
		}
		for i, r := range p.Rules {
			if out, ok := rule(r, p.Action == mesh.Deny || p.Action == mesh.Custom, http); ok {
				(*into).Policies["ns["+p.Name.Namespace+"]-policy["+p.Name.Name+"]-rule["+strconv.Itoa(i)+"]"] = out
			}
		}
	}
	return out
}

func never() *rbacv3.Policy {
	return &rbacv3.Policy{
		Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_NotRule{NotRule: anything()}}},
		Principals:  []*rbacv3.Principal{{Identifier: &rbacv3.Principal_NotId{NotId: anybody()}}},
	}
}

func anything() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
}
func anybody() *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
}

// rule is one rule of a policy; false where it matches nothing.
func rule(r mesh.AccessRule, deny, http bool) (*rbacv3.Policy, bool) {
	what, who := []*rbacv3.Permission{}, []*rbacv3.Principal{}
	for _, c := range r.Clauses {
		var lists [][]mesh.AccessTest
		always := false
		for _, tests := range c.Any {
			if !http {
				seen := slices.DeleteFunc(slices.Clone(tests), func(t mesh.AccessTest) bool { return t.On.HTTP() })
				if len(seen) < len(tests) && !deny {
					continue
				}
				tests = seen
			}
			always = always || len(tests) == 0
			lists = append(lists, tests)
		}
		switch {
		case always:
		case len(lists) == 0:
			return nil, false
		case c.Who:
			who = append(who, anyOf(lists, principal, andIDs, orIDs))
		default:
			what = append(what, anyOf(lists, permission(deny), andRules, orRules))
		}
	}
	p := &rbacv3.Policy{Permissions: []*rbacv3.Permission{anything()}, Principals: []*rbacv3.Principal{anybody()}}
	if len(what) > 0 {
		p.Permissions[0] = andRules(what)
	}
	if len(who) > 0 {
		p.Principals[0] = andIDs(who)
	}
	return p, true
}

// anyOf has one of the lists hold, every test of it.
func anyOf[T any](lists [][]mesh.AccessTest, test func(mesh.AccessTest) T, and, or func([]T) T) T {
	out := make([]T, 0, len(lists))
	for _, tests := range lists {
		all := make([]T, 0, len(tests))
		for _, t := range tests {
			all = append(all, test(t))
		}
		out = append(out, and(all))
	}
	return or(out)
}

func andRules(l []*rbacv3.Permission) *rbacv3.Permission {
	if len(l) == 1 {
		return l[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: l}}}
}

func orRules(l []*rbacv3.Permission) *rbacv3.Permission {
	if len(l) == 1 {
		return l[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: l}}}
}

func andIDs(l []*rbacv3.Principal) *rbacv3.Principal {
	if len(l) == 1 {
		return l[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: l}}}
}

func orIDs(l []*rbacv3.Principal) *rbacv3.Principal {
	if len(l) == 1 {
		return l[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: l}}}
}

// permission is a test of what is asked for.
func permission(deny bool) func(mesh.AccessTest) *rbacv3.Permission {
	return func(t mesh.AccessTest) *rbacv3.Permission {
		var any []*rbacv3.Permission
		header := func(name string, m *matcherv3.StringMatcher) {
			h := present(name, false)
			if m != nil {
				h = &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m}}
			}
			any = append(any, &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: h}})
		}
		for _, p := range t.Ports {
			any = append(any, &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: uint32(p)}})
		}
		for _, n := range t.Nets {
			any = append(any, &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationIp{DestinationIp: cidr(n)}})
		}
		for _, v := range t.Text {
			switch t.On {
			case mesh.AccessHost:
				header(":authority", hostMatcher(v, deny != t.Not))
			case mesh.AccessMethod:
				header(":method", stringMatcher(v))
			case mesh.AccessHeader:
				header(t.Header, stringMatcher(v))
			case mesh.AccessPath:
				any = append(any, &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{
					Rule: &matcherv3.PathMatcher_Path{Path: pathMatcher(v, deny != t.Not)},
				}}})
			}
		}
		if t.Not {
			return &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: orRules(any)}}
		}
		return orRules(any)
	}
}

// hostMatcher compares the host in a request. A value without a port stands for itself; where that would let somebody in
// who only adds one, it stands for the host with any port too.
func hostMatcher(v mesh.TextMatch, anyPort bool) *matcherv3.StringMatcher {
	if anyPort && (v.Kind == mesh.TextExact || v.Kind == mesh.TextSuffix) && !strings.Contains(v.Value, ":") {
		r := "(?is)" + regexp.QuoteMeta(v.Value) + "(:[0-9]*)?"
		if v.Kind == mesh.TextSuffix {
			r = "(?is).*" + regexp.QuoteMeta(v.Value) + "(:[0-9]*)?"
		}
		return regexMatcher(r)
	}
	m := stringMatcher(v)
	if m != nil {
		m.IgnoreCase = true
	}
	return m
}

// slashes are what applications may take for one.
const slashes = `(?:/|\\|%2[fF]|%5[cC])+`

// pathMatcher compares the path of a request. Where somebody would get in who only writes a slash in another way, or
// twice, those are slashes too.
func pathMatcher(v mesh.TextMatch, anySlash bool) *matcherv3.StringMatcher {
	r := strings.ReplaceAll(regexp.QuoteMeta(v.Value), "/", slashes)
	switch {
	case v.Kind == mesh.TextAny:
		return regexMatcher("(?s).+")
	case !anySlash:
		return stringMatcher(v)
	case v.Kind == mesh.TextRegex: // of a template, where a slash between brackets is one of what a part may have
		r = anySlashOutside(v.Value)
	case v.Kind == mesh.TextPrefix:
		r += ".*"
	case v.Kind == mesh.TextSuffix:
		r = ".*" + r
	}
	return regexMatcher("(?s)" + r)
}

// anySlashOutside replaces the slashes of a regular expression but for those in brackets.
func anySlashOutside(r string) string {
	var b strings.Builder
	inside := false
	for _, c := range r {
		switch {
		case c == '[':
			inside = true
		case c == ']':
			inside = false
		case c == '/' && !inside:
			b.WriteString(slashes)
			continue
		}
		b.WriteRune(c)
	}
	return b.String()
}

// principal is a test of who asks.
func principal(t mesh.AccessTest) *rbacv3.Principal {
	var any []*rbacv3.Principal
	for _, n := range t.Nets {
		// Nobody's word about an address is taken, so that both are the client's. Envoy's "direct" address would be that of
		// the listener before.
		p := &rbacv3.Principal{Identifier: &rbacv3.Principal_RemoteIp{RemoteIp: cidr(n)}}
		any = append(any, p)
	}
	for _, v := range t.Text {
		if t.On == mesh.AccessTokenPrincipal || t.On == mesh.AccessClaim {
			any = append(any, ofToken(t, v))
			continue
		}
		any = append(any, &rbacv3.Principal{Identifier: &rbacv3.Principal_FilterState{FilterState: &matcherv3.FilterStateMatcher{
			Key: statePrincipal, Matcher: &matcherv3.FilterStateMatcher_StringMatch{StringMatch: peerMatcher(t.On, v)},
		}}})
	}
	if t.Not {
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: orIDs(any)}}
	}
	return orIDs(any)
}

// peerMatcher compares a part of the peer's identity, which is spiffe://domain/ns/namespace/sa/account.
func peerMatcher(on mesh.AccessAttribute, v mesh.TextMatch) *matcherv3.StringMatcher {
	const scheme = "spiffe://"
	part := func(any string) string {
		switch q := regexp.QuoteMeta(v.Value); v.Kind {
		case mesh.TextExact:
			return q
		case mesh.TextPrefix:
			return q + any + "*"
		case mesh.TextSuffix:
			return any + "*" + q
		}
		return any + "+"
	}
	switch on {
	case mesh.AccessNamespace:
		return regexMatcher(scheme + "[^/]+/ns/" + part("[^/]") + "/sa/[^/]+")
	case mesh.AccessTrustDomain:
		return regexMatcher(scheme + part("[^/]") + "/ns/[^/]+/sa/[^/]+")
	case mesh.AccessServiceAccount:
		ns, account, _ := strings.Cut(v.Value, "/")
		return regexMatcher(scheme + "[^/]+/ns/" + regexp.QuoteMeta(ns) + "/sa/" + regexp.QuoteMeta(account))
	}
	if v.Kind == mesh.TextExact {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: scheme + v.Value}}
	}
	return regexMatcher("(?s)" + scheme + part("."))
}

func regexMatcher(r string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: r}}}
}

func cidr(p netip.Prefix) *corev3.CidrRange {
	return &corev3.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(p.Bits()))}
}

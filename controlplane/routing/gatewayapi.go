package routing

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Backends finds what a reference of a route means. Where nothing can be sent there, unresolved says why, in a word of
// the Gateway API and in a sentence.
type Backends func(gatewayv1.BackendObjectReference) (b mesh.HTTPBackend, unresolved Verdict)

// Verdict is why something does not hold, as a condition has it. The zero Verdict: it does.
type Verdict struct{ Reason, Message string }

// OK reports whether there is nothing to say.
func (v Verdict) OK() bool { return v.Reason == "" }

// and adds what comes after it; the first reason stands for all.
func (v *Verdict) and(reason gatewayv1.RouteConditionReason, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if v.Reason == "" {
		*v = Verdict{string(reason), text}
	} else if !strings.Contains(v.Message, text) {
		v.Message += "; " + text
	}
}

// Route is what a route of the Gateway API says, whatever it is attached to.
type Route struct {
	Rules    []Rule             // one for each match, not yet in order
	Backends []mesh.HTTPBackend // of a route for connections, rather than Rules
	// Accepted says why nothing of the route is followed as it stands, Partly why some of it is not: requests of such
	// rules are answered with 500, and matches that cannot be had match nothing.
	Accepted, Partly Verdict
	Resolved         Verdict // what its references lack
}

// Rule is a rule with one match.
type Rule struct {
	mesh.HTTPRule
	specific [5]int // the greater comes first
}

// Compare orders rules by the precedence of the Gateway API. Of equal ones the older route's comes first, and of a
// route's the one that it names first: a stable sort of them in that order does it.
func (r Rule) Compare(o Rule) int { return slices.Compare(o.specific[:], r.specific[:]) }

// HTTPRoute converts a route.
func HTTPRoute(namespace, name string, spec *gatewayv1.HTTPRouteSpec, find Backends) Route {
	c := gatewayConverter{find: find}
	for i := range spec.Rules {
		r := &spec.Rules[i]
		h := c.rule(i, namespace, name, r.Name, r.Filters, r.BackendRefs, false)
		c.timing(&h, r)
		c.session(&h, r.SessionPersistence)
		if len(r.Matches) == 0 {
			c.add(h, []mesh.HTTPMatch{{Path: mesh.TextMatch{Kind: mesh.TextPath, Value: "/"}}}, specificHTTP)
			continue
		}
		var matches []mesh.HTTPMatch
		for j := range r.Matches {
			if m, bad := httpMatch(&r.Matches[j]); bad != "" {
				c.partly("matches[%d].%s: it matches nothing", j, bad)
			} else {
				matches = append(matches, m)
			}
		}
		c.add(h, matches, specificHTTP)
	}
	return c.done(len(spec.Rules))
}

// GRPCRoute converts a route.
func GRPCRoute(namespace, name string, spec *gatewayv1.GRPCRouteSpec, find Backends) Route {
	c := gatewayConverter{find: find}
	for i := range spec.Rules {
		r := &spec.Rules[i]
		var refs []gatewayv1.HTTPBackendRef
		for _, b := range r.BackendRefs {
			refs = append(refs, gatewayv1.HTTPBackendRef{BackendRef: b.BackendRef, Filters: httpFilters(b.Filters)})
		}
		h := c.rule(i, namespace, name, r.Name, httpFilters(r.Filters), refs, true)
		h.GRPC = true
		c.session(&h, r.SessionPersistence)
		if len(r.Matches) == 0 {
			c.add(h, []mesh.HTTPMatch{{}}, specificGRPC)
			continue
		}
		var matches []mesh.HTTPMatch
		for j := range r.Matches {
			if m, bad := grpcMatch(&r.Matches[j]); bad != "" {
				c.partly("matches[%d].%s: it matches nothing", j, bad)
			} else {
				matches = append(matches, m)
			}
		}
		c.add(h, matches, specificGRPC)
	}
	return c.done(len(spec.Rules))
}

// httpFilters are the same filters as HTTPRoute has them.
func httpFilters(list []gatewayv1.GRPCRouteFilter) (out []gatewayv1.HTTPRouteFilter) {
	for _, f := range list {
		out = append(out, gatewayv1.HTTPRouteFilter{
			Type: gatewayv1.HTTPRouteFilterType(f.Type), RequestHeaderModifier: f.RequestHeaderModifier, ResponseHeaderModifier: f.ResponseHeaderModifier,
			RequestMirror: f.RequestMirror, ExtensionRef: f.ExtensionRef,
		})
	}
	return out
}

type gatewayConverter struct {
	find   Backends
	at     int // rule
	out    Route
	broken int // rules whose requests fail because of what they ask for
}

func (c *gatewayConverter) partly(format string, args ...any) {
	c.out.Partly.and(gatewayv1.RouteReasonUnsupportedValue, "rules[%d]: %s", c.at, fmt.Sprintf(format, args...))
}

// refuse is a rule that asks for what is not there.
func (c *gatewayConverter) refuse(r *mesh.HTTPRule, reason gatewayv1.RouteConditionReason, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if r.Invalid == "" {
		c.broken++
	}
	c.out.Partly.and(reason, "rules[%d]: %s; its requests are answered with 500", c.at, text)
	r.Invalid = text
}

// backend finds what a reference of a rule means, or notes what it lacks and says it.
func (c *gatewayConverter) backend(ref gatewayv1.BackendObjectReference) (b mesh.HTTPBackend, lacking string) {
	b, unresolved := c.find(ref)
	if !unresolved.OK() {
		c.out.Resolved.and(gatewayv1.RouteConditionReason(unresolved.Reason), "rules[%d]: %s", c.at, unresolved.Message)
	}
	return b, unresolved.Message
}

// session has a rule's requests keep to an endpoint. The field is of the API's experimental channel: with the definitions of the standard one it
// never comes here.
func (c *gatewayConverter) session(r *mesh.HTTPRule, p *gatewayv1.SessionPersistence) {
	if p == nil {
		return
	}
	out := &mesh.HTTPSession{Name: text(p.SessionName, ""), Header: text(p.Type, gatewayv1.CookieBasedSessionPersistence) == gatewayv1.HeaderBasedSessionPersistence}
	if out.Name != "" && !httpguts.ValidHeaderFieldName(out.Name) { // a cookie's is a token too (RFC 6265, 4.1.1)
		c.partly("sessionPersistence.sessionName %q is no name of a cookie or a header: there is no session", out.Name)
		return
	}
	if out.Name == "" { // one for each rule
		h := fnv.New64a()
		_, _ = h.Write([]byte(r.Name)) // never fails
		out.Name = "session-" + strconv.FormatUint(h.Sum64(), 36)
	}
	permanent := p.CookieConfig != nil && text(p.CookieConfig.LifetimeType, gatewayv1.SessionCookieLifetimeType) == gatewayv1.PermanentCookieLifetimeType
	if p.AbsoluteTimeout != nil {
		d, err := time.ParseDuration(string(*p.AbsoluteTimeout))
		switch {
		case err != nil || d < time.Second:
			c.partly("sessionPersistence.absoluteTimeout %q is no time of a second or more, and left out", *p.AbsoluteTimeout)
		case permanent && !out.Header:
			out.TTL = d.Truncate(time.Second)
		default:
			c.partly("sessionPersistence.absoluteTimeout is followed of permanent cookies alone (cookieConfig.lifetimeType): the session has no end")
		}
	}
	weighted := 0
	for i := range r.Backends {
		if r.Backends[i].Weight > 0 {
			weighted++
		}
	}
	if weighted > 1 {
		c.partly("sessionPersistence is followed among the endpoints of each backend: to which of several a request goes is by their weights each time")
	}
	r.Session = out
}

// add notes a rule once for each of its matches.
func (c *gatewayConverter) add(r mesh.HTTPRule, matches []mesh.HTTPMatch, specific func(*mesh.HTTPMatch) [5]int) {
	if len(matches) == 0 { // none of them can be had
		c.broken++
	}
	for i := range matches {
		r.Matches = matches[i : i+1 : i+1]
		c.out.Rules = append(c.out.Rules, Rule{r, specific(&matches[i])})
	}
}

func (c *gatewayConverter) done(rules int) Route {
	if c.broken > 0 && c.broken >= rules {
		c.out.Accepted, c.out.Partly = c.out.Partly, Verdict{}
	}
	return c.out
}

// specificHTTP counts what the Gateway API has requests decided by.
func specificHTTP(m *mesh.HTTPMatch) (s [5]int) {
	switch m.Path.Kind {
	case mesh.TextExact:
		s[0] = 3
	case mesh.TextPath:
		s[0], s[1] = 2, len(m.Path.Value)
	case mesh.TextRegex: // left to implementations: as Istio has it
		s[0], s[1] = 1, len(m.Path.Value)
	}
	if m.Method.Kind != mesh.TextAny {
		s[2] = 1
	}
	s[3], s[4] = len(m.Headers), len(m.Query)
	if m.Authority.Kind != mesh.TextAny {
		s[3]++
	}
	return s
}

// specificGRPC is the same of calls: whole methods before services before patterns, then the longer name.
func specificGRPC(m *mesh.HTTPMatch) (s [5]int) {
	switch m.Path.Kind {
	case mesh.TextExact:
		service, method, _ := strings.Cut(strings.TrimPrefix(m.Path.Value, "/"), "/")
		s[0], s[1], s[2] = 3, len(service), len(method)
	case mesh.TextPrefix:
		s[0], s[1] = 2, len(m.Path.Value)
	case mesh.TextRegex:
		s[0], s[1] = 1, len(m.Path.Value)
	}
	s[3] = len(m.Headers)
	if m.Authority.Kind != mesh.TextAny {
		s[3]++
	}
	return s
}

func text[T ~string](t *T, otherwise T) T {
	if t == nil {
		return otherwise
	}
	return *t
}

func regexProblem(field, value string) string {
	if _, err := regexp.Compile(value); err != nil {
		return field + " has an invalid regular expression"
	}
	return ""
}

func httpMatch(m *gatewayv1.HTTPRouteMatch) (out mesh.HTTPMatch, bad string) {
	kind, value := gatewayv1.PathMatchPathPrefix, "/"
	if m.Path != nil {
		kind, value = text(m.Path.Type, kind), text(m.Path.Value, value)
	}
	switch kind {
	case gatewayv1.PathMatchExact:
		out.Path = mesh.TextMatch{Kind: mesh.TextExact, Value: value}
	case gatewayv1.PathMatchPathPrefix:
		out.Path = mesh.TextMatch{Kind: mesh.TextPath, Value: value}
	case gatewayv1.PathMatchRegularExpression:
		out.Path = mesh.TextMatch{Kind: mesh.TextRegex, Value: value}
		bad = cmp.Or(bad, regexProblem("path", value))
	default:
		bad = cmp.Or(bad, "path.type "+strconv.Quote(string(kind))+" is unknown")
	}
	if m.Method != nil {
		out.Method = mesh.TextMatch{Kind: mesh.TextExact, Value: string(*m.Method)}
	}
	for _, h := range m.Headers {
		bad = cmp.Or(bad, headerMatch(&out, string(h.Name), h.Value, text(h.Type, gatewayv1.HeaderMatchExact) == gatewayv1.HeaderMatchRegularExpression))
	}
	for _, q := range m.QueryParams {
		if slices.ContainsFunc(out.Query, func(o mesh.NamedMatch) bool { return o.Name == string(q.Name) }) {
			continue // of several the first counts
		}
		t := mesh.TextMatch{Kind: mesh.TextExact, Value: q.Value}
		if text(q.Type, gatewayv1.QueryParamMatchExact) == gatewayv1.QueryParamMatchRegularExpression {
			t.Kind = mesh.TextRegex
			bad = cmp.Or(bad, regexProblem("queryParams."+string(q.Name), q.Value))
		}
		out.Query = append(out.Query, mesh.NamedMatch{Name: string(q.Name), Match: t})
	}
	return out, bad
}

// headerMatch adds a condition on a header; of several for one the first counts.
func headerMatch(out *mesh.HTTPMatch, name, value string, regex bool) (bad string) {
	t := mesh.TextMatch{Kind: mesh.TextExact, Value: value}
	if regex {
		t.Kind = mesh.TextRegex
		bad = regexProblem("headers."+name, value)
	}
	if strings.EqualFold(name, "host") {
		if out.Authority.Kind == mesh.TextAny {
			out.Authority = t
		}
		return bad
	}
	if !slices.ContainsFunc(out.Headers, func(o mesh.NamedMatch) bool { return strings.EqualFold(o.Name, name) }) {
		out.Headers = append(out.Headers, mesh.NamedMatch{Name: name, Match: t})
	}
	return bad
}

func grpcMatch(m *gatewayv1.GRPCRouteMatch) (out mesh.HTTPMatch, bad string) {
	if m.Method != nil {
		service, method := text(m.Method.Service, ""), text(m.Method.Method, "")
		regex := text(m.Method.Type, gatewayv1.GRPCMethodMatchExact) == gatewayv1.GRPCMethodMatchRegularExpression
		pattern := func(s string) string {
			switch {
			case s == "":
				return "[^/]+"
			case regex:
				return "(?:" + s + ")"
			}
			return regexp.QuoteMeta(s)
		}
		switch {
		case service == "" && method == "":
		case regex:
			bad = cmp.Or(regexProblem("method.service", service), regexProblem("method.method", method))
			fallthrough
		case service == "":
			out.Path = mesh.TextMatch{Kind: mesh.TextRegex, Value: "/" + pattern(service) + "/" + pattern(method)}
		case method == "":
			out.Path = mesh.TextMatch{Kind: mesh.TextPrefix, Value: "/" + service + "/"}
		default:
			out.Path = mesh.TextMatch{Kind: mesh.TextExact, Value: "/" + service + "/" + method}
		}
	}
	for _, h := range m.Headers {
		bad = cmp.Or(bad, headerMatch(&out, string(h.Name), h.Value, text(h.Type, gatewayv1.GRPCHeaderMatchExact) == gatewayv1.GRPCHeaderMatchRegularExpression))
	}
	return out, bad
}

// rule converts what rules of both kinds have.
func (c *gatewayConverter) rule(i int, namespace, name string, own *gatewayv1.SectionName, filters []gatewayv1.HTTPRouteFilter, refs []gatewayv1.HTTPBackendRef, grpc bool) mesh.HTTPRule {
	c.at = i
	r := mesh.HTTPRule{Name: namespace + "/" + name + "/" + cmp.Or(string(text(own, "")), strconv.Itoa(i)), GRPC: grpc}
	for j := range filters {
		c.filter(&r, j, &filters[j])
	}
	if r.Redirect != nil {
		if r.Rewrite != nil {
			c.refuse(&r, gatewayv1.RouteReasonIncompatibleFilters, "RequestRedirect and URLRewrite exclude each other")
		}
		return r
	}
	c.backends(&r, refs)
	return r
}

// filter adds what a filter of a rule does.
func (c *gatewayConverter) filter(r *mesh.HTTPRule, j int, f *gatewayv1.HTTPRouteFilter) {
	switch {
	case f.RequestHeaderModifier != nil && f.Type == gatewayv1.HTTPRouteFilterRequestHeaderModifier:
		h, host := c.modifier(r, f.RequestHeaderModifier)
		r.Request = join(r.Request, h)
		if host != "" {
			if r.Rewrite == nil {
				r.Rewrite = &mesh.HTTPRewrite{}
			}
			r.Rewrite.Host = cmp.Or(r.Rewrite.Host, host)
		}
	case f.ResponseHeaderModifier != nil && f.Type == gatewayv1.HTTPRouteFilterResponseHeaderModifier:
		h, _ := c.modifier(r, f.ResponseHeaderModifier)
		r.Response = join(r.Response, h)
	case f.RequestRedirect != nil && f.Type == gatewayv1.HTTPRouteFilterRequestRedirect:
		c.redirect(r, f.RequestRedirect)
	case f.URLRewrite != nil && f.Type == gatewayv1.HTTPRouteFilterURLRewrite:
		if r.Rewrite == nil {
			r.Rewrite = &mesh.HTTPRewrite{}
		}
		r.Rewrite.Host = cmp.Or(string(text(f.URLRewrite.Hostname, "")), r.Rewrite.Host)
		r.Rewrite.Path, r.Rewrite.Prefix = c.path(r, f.URLRewrite.Path)
	case f.RequestMirror != nil && f.Type == gatewayv1.HTTPRouteFilterRequestMirror:
		c.mirror(r, f.RequestMirror)
	case f.CORS != nil && f.Type == gatewayv1.HTTPRouteFilterCORS:
		r.CORS = c.cors(f.CORS)
	case f.ExternalAuth != nil && f.Type == gatewayv1.HTTPRouteFilterExternalAuth:
		c.externalAuth(r, f.ExternalAuth)
	default:
		c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "filters[%d].type %s is not followed", j, f.Type)
	}
}

// modifier converts changes of headers. What HTTP calls a host is no header: it can be set by a rewrite alone.
func (c *gatewayConverter) modifier(r *mesh.HTTPRule, f *gatewayv1.HTTPHeaderFilter) (out mesh.HTTPHeaders, host string) {
	list := func(in []gatewayv1.HTTPHeader, set bool) (out []mesh.HTTPHeader) {
		for _, h := range in {
			name := string(h.Name)
			switch {
			case slices.ContainsFunc(out, func(o mesh.HTTPHeader) bool { return strings.EqualFold(o.Name, name) }): // of several the first counts
			case !c.plain(r, "the value for header "+name, h.Value):
			case set && strings.EqualFold(name, "host"):
				host = h.Value
			case strings.EqualFold(name, "host"):
				c.partly("header Host can be set but not added to, and is left out")
			default:
				out = append(out, mesh.HTTPHeader{Name: name, Value: h.Value})
			}
		}
		return out
	}
	out = mesh.HTTPHeaders{Set: list(f.Set, true), Add: list(f.Add, false)}
	for _, name := range f.Remove {
		if strings.EqualFold(name, "host") {
			c.partly("header Host cannot be removed, and is left")
			continue
		}
		out.Remove = append(out.Remove, name)
	}
	return out, host
}

// plain reports whether a text can be in a header; where it cannot the rule is refused.
func (c *gatewayConverter) plain(r *mesh.HTTPRule, what, value string) bool {
	if !strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return true
	}
	c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "%s has a control character", what)
	return false
}

// path is what replaces the path, or the prefix of it that was matched.
func (c *gatewayConverter) path(r *mesh.HTTPRule, p *gatewayv1.HTTPPathModifier) (full, prefix *string) {
	if p == nil || !c.plain(r, "a path", text(p.ReplaceFullPath, "")+text(p.ReplacePrefixMatch, "")) {
		return nil, nil
	}
	if p.Type == gatewayv1.FullPathHTTPPathModifier {
		return p.ReplaceFullPath, nil
	}
	return nil, p.ReplacePrefixMatch
}

func (c *gatewayConverter) redirect(r *mesh.HTTPRule, f *gatewayv1.HTTPRequestRedirectFilter) {
	d := &mesh.HTTPRedirect{Scheme: text(f.Scheme, ""), Host: string(text(f.Hostname, "")), Code: http.StatusFound, OwnPort: true}
	full, prefix := c.path(r, f.Path)
	d.Path, d.Prefix = text(full, ""), prefix
	if f.Port != nil {
		d.Port = uint16(*f.Port)
	}
	r.Redirect = d
	if f.StatusCode == nil {
		return
	}
	switch *f.StatusCode {
	case 301, 302, 303, 307, 308:
		d.Code = uint32(*f.StatusCode)
	default:
		c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "statusCode %d of its redirect is none of 301, 302, 303, 307 and 308", *f.StatusCode)
	}
}

func (c *gatewayConverter) mirror(r *mesh.HTTPRule, f *gatewayv1.HTTPRequestMirrorFilter) {
	b, lacking := c.backend(f.BackendRef)
	if lacking != "" {
		return
	}
	m := mesh.HTTPMirror{Backend: b, Millionths: mesh.Million}
	switch {
	case f.Percent != nil:
		m.Millionths = uint32(min(max(*f.Percent, 0), 100)) * (mesh.Million / 100)
	case f.Fraction != nil:
		of := int64(100)
		if f.Fraction.Denominator != nil {
			of = max(1, int64(*f.Fraction.Denominator))
		}
		m.Millionths = uint32(min(max(int64(f.Fraction.Numerator), 0)*mesh.Million/of, mesh.Million))
	}
	r.Mirrors = append(r.Mirrors, m)
}

func (c *gatewayConverter) cors(f *gatewayv1.HTTPCORSFilter) *mesh.HTTPCORS {
	out := &mesh.HTTPCORS{MaxAge: time.Duration(cmp.Or(f.MaxAge, 5)) * time.Second, Credentials: f.AllowCredentials != nil && *f.AllowCredentials, Answer: true}
	for _, o := range f.AllowOrigins {
		v := strings.ToLower(string(o))
		if rest, ok := strings.CutPrefix(v, "http://"); ok { // browsers leave the port out where it goes without saying
			v = "http://" + strings.TrimSuffix(rest, ":80")
		} else if rest, ok := strings.CutPrefix(v, "https://"); ok {
			v = "https://" + strings.TrimSuffix(rest, ":443")
		}
		switch {
		case v == "*":
			out.Origins = append(out.Origins, mesh.TextMatch{Kind: mesh.TextRegex, Value: ".*"})
		case strings.Contains(v, "*"):
			out.Origins = append(out.Origins, mesh.TextMatch{Kind: mesh.TextRegex, Value: strings.ReplaceAll(regexp.QuoteMeta(v), `\*`, "[^/:]+")})
		default:
			out.Origins = append(out.Origins, mesh.TextMatch{Kind: mesh.TextExact, Value: v})
		}
	}
	for _, m := range f.AllowMethods {
		out.Methods = append(out.Methods, string(m))
	}
	for _, h := range f.AllowHeaders {
		out.AllowHeaders = append(out.AllowHeaders, string(h))
	}
	for _, h := range f.ExposeHeaders {
		out.ExposeHeaders = append(out.ExposeHeaders, string(h))
	}
	out.Asked = out.Credentials && (slices.Contains(out.Methods, "*") || slices.Contains(out.AllowHeaders, "*"))
	if out.Credentials && slices.Contains(out.ExposeHeaders, "*") {
		c.partly("a CORS filter with allowCredentials has * for exposeHeaders, which browsers take for a header of that name")
	}
	return out
}

// decideWithin is how long a service that a route asks may take.
const decideWithin = 10 * time.Second

// externalAuth has a service decide about a rule's requests. Where it cannot be asked none is let through. The field is of the
// experimental channel, as those of sessions are.
func (c *gatewayConverter) externalAuth(r *mesh.HTTPRule, f *gatewayv1.HTTPExternalAuthFilter) {
	b, lacking := c.backend(f.BackendRef)
	if lacking != "" {
		r.Invalid = lacking
		return
	}
	if r.Ask != nil {
		c.refuse(r, gatewayv1.RouteReasonIncompatibleFilters, "it has two filters ExternalAuth")
		return
	}
	names := func(field string, list []string) (out []mesh.TextMatch) {
		for _, n := range list {
			if !httpguts.ValidHeaderFieldName(n) {
				c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "%s of its externalAuth names %q, which is no name of a header", field, n)
			}
			out = append(out, mesh.TextMatch{Kind: mesh.TextExact, Value: n})
		}
		return out
	}
	p := &mesh.AuthProvider{Service: b.Service, Port: b.Port, Timeout: decideWithin}
	if f.ForwardBody != nil {
		p.MaxBody = uint32(f.ForwardBody.MaxSize)
	}
	switch f.ExternalAuthProtocol {
	case gatewayv1.HTTPRouteExternalAuthGRPCProtocol:
		p.GRPC = true
		if g := f.GRPCAuthConfig; g != nil {
			p.Sees = names("grpc.allowedHeaders", g.AllowedRequestHeaders)
		}
	case gatewayv1.HTTPRouteExternalAuthHTTPProtocol:
		if h := f.HTTPAuthConfig; h != nil {
			p.Sees, p.ToApplication = names("http.allowedHeaders", h.AllowedRequestHeaders), names("http.allowedResponseHeaders", h.AllowedResponseHeaders)
			if h.Path != "" {
				p.PathPrefix = "/" + strings.Trim(h.Path, "/")
			}
			if c.plain(r, "http.path of its externalAuth", h.Path) && strings.ContainsAny(h.Path, "?# ") {
				c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "http.path %q of its externalAuth is no path", h.Path)
			}
		}
		if len(p.ToApplication) == 0 {
			p.ToApplication = []mesh.TextMatch{{Kind: mesh.TextRegex, Value: "[^:].*"}}
		}
	default:
		c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "protocol %q of its externalAuth is neither HTTP nor GRPC", f.ExternalAuthProtocol)
	}
	r.Ask = p
}

// backends adds where a rule's requests go.
func (c *gatewayConverter) backends(r *mesh.HTTPRule, refs []gatewayv1.HTTPBackendRef) {
	var total uint64
	for i := range refs {
		ref := &refs[i]
		b, lacking := c.backend(ref.BackendObjectReference)
		if lacking != "" {
			b = mesh.HTTPBackend{Invalid: lacking}
		}
		b.Weight = weight(ref.Weight)
		if b.Weight == 0 {
			continue
		}
		for j := range ref.Filters {
			switch f := &ref.Filters[j]; {
			case f.RequestHeaderModifier != nil && f.Type == gatewayv1.HTTPRouteFilterRequestHeaderModifier:
				h, host := c.modifier(r, f.RequestHeaderModifier)
				if host != "" {
					c.partly("backendRefs[%d] sets header Host, which is left out: a URLRewrite of the rule sets it", i)
				}
				b.Request = join(b.Request, h)
			case f.ResponseHeaderModifier != nil && f.Type == gatewayv1.HTTPRouteFilterResponseHeaderModifier:
				h, _ := c.modifier(r, f.ResponseHeaderModifier)
				b.Response = join(b.Response, h)
			case f.RequestMirror != nil && f.Type == gatewayv1.HTTPRouteFilterRequestMirror && len(refs) == 1:
				c.mirror(r, f.RequestMirror) // it is the rule's
			default:
				c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "backendRefs[%d].filters[%d].type %s is not followed there", i, j, f.Type)
			}
		}
		total += uint64(b.Weight)
		r.Backends = append(r.Backends, b)
	}
	switch {
	case r.Invalid != "":
	case len(refs) == 0:
		r.Invalid = "it has no backendRefs"
	case total == 0:
		r.Invalid = "the weights of its backendRefs are all zero"
	case total > math.MaxUint32:
		c.refuse(r, gatewayv1.RouteReasonUnsupportedValue, "the weights of its backendRefs exceed 2^32-1 together")
	case len(r.Backends) == 1:
		only := &r.Backends[0]
		r.Request, r.Response, r.Invalid = join(r.Request, only.Request), join(r.Response, only.Response), only.Invalid
		only.Request, only.Response = mesh.HTTPHeaders{}, mesh.HTTPHeaders{}
	}
}

// timing adds timeouts and retries.
func (c *gatewayConverter) timing(r *mesh.HTTPRule, rule *gatewayv1.HTTPRouteRule) {
	duration := func(field string, d *gatewayv1.Duration) time.Duration {
		if d == nil {
			return 0
		}
		t, err := time.ParseDuration(string(*d))
		if err != nil || t < 0 {
			c.partly("%s %q is no duration and is left out", field, *d)
			return 0
		}
		return t
	}
	if t := rule.Timeouts; t != nil {
		r.Timeout = duration("timeouts.request", t.Request)
		if per := duration("timeouts.backendRequest", t.BackendRequest); per > 0 {
			r.Retries = &mesh.HTTPRetries{Attempts: defaultAttempts, PerTry: per}
		}
	}
	if p := rule.Retry; p != nil {
		if r.Retries == nil {
			r.Retries = &mesh.HTTPRetries{Attempts: defaultAttempts}
		}
		if p.Attempts != nil {
			r.Retries.Attempts = uint32(max(0, *p.Attempts))
		}
		for _, code := range p.Codes {
			r.Retries.StatusCodes = append(r.Retries.StatusCodes, uint32(code))
		}
		r.Retries.Backoff = duration("retry.backoff", p.Backoff)
	}
}

// defaultAttempts is how often a request is tried again that nobody can have acted on.
const defaultAttempts = 2

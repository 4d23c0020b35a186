package routing

import (
	"cmp"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Resolve names the service that a host means in a namespace: a short name is one of that namespace.
type Resolve func(namespace, host string) mesh.ServiceName

// MeshGateway is the word for traffic within the mesh in lists of gateways.
const MeshGateway = "mesh"

// ForMesh reports whether a VirtualService is about traffic within the mesh.
func ForMesh(v *networking.VirtualService) bool {
	return len(v.Gateways) == 0 || slices.Contains(v.Gateways, MeshGateway)
}

// VirtualService returns what a VirtualService says within the mesh, and in words what of it does not work.
func VirtualService(namespace, name string, v *networking.VirtualService, resolve Resolve) (*AtGateway, []string) {
	c := &converter{namespace: namespace, resolve: resolve, sends: true, here: func(gateways []string) bool { return slices.Contains(gateways, MeshGateway) }}
	out := &AtGateway{}
	if len(v.Http) > 0 { // else it is not about requests
		out.HTTP = c.http(namespace+"/"+name, v.Http)
	}
	out.TLS, out.TCP = c.connectionRules(namespace, name, v)
	for _, list := range [][]ConnectionRule{out.TLS, out.TCP} { // otherwise they would go to the service
		for i := range list {
			if list[i].Backends == nil {
				list[i].Backends = []mesh.HTTPBackend{{Weight: 1, Invalid: "the route cannot be followed"}}
			}
		}
	}
	return out, c.problems
}

type converter struct {
	namespace string
	resolve   Resolve
	here      func(gateways []string) bool // whether what is for these is for whom is converted
	sends     bool                         // it does under its namespace's DestinationRules; gateways, which all namespaces share, do not
	at        string
	problems  []string
}

func (c *converter) say(format string, args ...any) {
	c.problems = append(c.problems, c.at+": "+fmt.Sprintf(format, args...))
}

// broken is a rule that cannot be followed.
func (c *converter) broken(r *mesh.HTTPRule, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.say("%s; requests that it matches are answered with 500", text)
	r.Invalid = text
}

// http converts the routes of the VirtualService of a name.
func (c *converter) http(name string, routes []*networking.HTTPRoute) []mesh.HTTPRule {
	rules := []mesh.HTTPRule{}
	for i, h := range routes {
		c.at = "http[" + strconv.Itoa(i) + "]"
		if r, ok := c.rule(h); ok {
			r.Name = cmp.Or(h.Name, name+"/"+strconv.Itoa(i))
			rules = append(rules, r)
		}
	}
	return rules
}

// rule converts one HTTPRoute; ok is false for one that nothing here can match.
func (c *converter) rule(h *networking.HTTPRoute) (r mesh.HTTPRule, ok bool) {
	for i, m := range h.Match {
		if len(m.Gateways) > 0 && !c.here(m.Gateways) {
			continue
		}
		switch {
		case len(m.SourceLabels) > 0 && !c.sends:
			c.say("match[%d] has sourceLabels, which clients of a gateway have none of: it matches nothing", i)
			continue
		case m.SourceNamespace != "" && !c.sends:
			c.say("match[%d] has sourceNamespace, which clients of a gateway have none of: it matches nothing", i)
			continue
		}
		if out, bad := c.match(m); bad != "" {
			c.say("match[%d].%s: it matches nothing", i, bad)
		} else {
			r.Matches = append(r.Matches, out)
		}
	}
	if len(h.Match) > 0 && len(r.Matches) == 0 {
		return r, false
	}
	switch {
	case h.Redirect != nil:
		r.Redirect = redirectOf(h.Redirect)
		if r.Redirect == nil {
			c.broken(&r, "redirect.redirectCode %d is none of 301, 302, 303, 307 and 308", h.Redirect.RedirectCode)
		}
	case h.DirectResponse != nil:
		r.Direct = &mesh.HTTPDirect{Status: h.DirectResponse.Status}
		switch b := h.DirectResponse.GetBody().GetSpecifier().(type) {
		case *networking.HTTPBody_String_:
			r.Direct.Body = b.String_
		case *networking.HTTPBody_Bytes:
			r.Direct.Body = string(b.Bytes)
		}
	case h.Delegate != nil:
		c.broken(&r, "delegate %s/%s is no VirtualService without hosts and gateways that may be one, or there are routes beside it", cmp.Or(h.Delegate.Namespace, c.namespace), h.Delegate.Name)
	case len(h.Route) == 0:
		c.broken(&r, "it has neither route, redirect nor directResponse")
	default:
		c.backends(&r, h.Route)
	}
	r.Request, r.Response = headersOf(h.Headers)
	c.rewrite(&r, h)
	r.Timeout = h.Timeout.AsDuration()
	c.retries(&r, h.Retries)
	c.fault(&r, h.Fault)
	c.mirrors(&r, h)
	c.cors(&r, h.CorsPolicy)
	return r, true
}

// match converts one match; bad says what of it is wrong.
func (c *converter) match(m *networking.HTTPMatchRequest) (out mesh.HTTPMatch, bad string) {
	if m.Port > 65535 {
		return out, "port is above 65535"
	}
	out.Port, out.IgnoreCase = uint16(m.Port), m.IgnoreUriCase
	note := func(field string, s mesh.TextMatch) mesh.TextMatch {
		if s.Kind == mesh.TextRegex {
			if _, err := regexp.Compile(s.Value); err != nil {
				bad = field + " has an invalid regular expression"
			}
		}
		return s
	}
	out.Path = note("uri", textOf(m.Uri))
	out.Method = note("method", textOf(m.Method))
	out.Scheme = note("scheme", textOf(m.Scheme))
	out.Authority = note("authority", textOf(m.Authority))
	named := func(field string, list map[string]*networking.StringMatch, invert bool) (all []mesh.NamedMatch) {
		for name, s := range list {
			all = append(all, mesh.NamedMatch{Name: name, Match: note(field+"."+name, textOf(s)), Invert: invert})
		}
		slices.SortFunc(all, func(a, b mesh.NamedMatch) int { return cmp.Compare(a.Name, b.Name) })
		return all
	}
	out.Headers = append(named("headers", m.Headers, false), named("withoutHeaders", m.WithoutHeaders, true)...)
	out.Query = named("queryParams", m.QueryParams, false)
	out.Source, out.Labels = m.SourceNamespace, m.SourceLabels
	return out, bad
}

func textOf(s *networking.StringMatch) mesh.TextMatch {
	switch m := s.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		return mesh.TextMatch{Kind: mesh.TextExact, Value: m.Exact}
	case *networking.StringMatch_Prefix:
		return mesh.TextMatch{Kind: mesh.TextPrefix, Value: m.Prefix}
	case *networking.StringMatch_Regex:
		return mesh.TextMatch{Kind: mesh.TextRegex, Value: m.Regex}
	}
	return mesh.TextMatch{}
}

func (c *converter) backends(r *mesh.HTTPRule, routes []*networking.HTTPRouteDestination) {
	var total int64
	for _, d := range routes {
		b, ok := c.destination(d.Destination)
		if !ok || d.Weight < 0 {
			c.broken(r, "a destination without a host, with a port above 65535 or with a negative weight")
			return
		}
		b.Weight = uint32(d.Weight)
		b.Request, b.Response = headersOf(d.Headers)
		total += int64(d.Weight)
		r.Backends = append(r.Backends, b)
	}
	switch {
	case len(r.Backends) == 1:
		only := &r.Backends[0] // whatever its weight
		only.Weight = 1
		r.Request, r.Response = join(r.Request, only.Request), join(r.Response, only.Response)
	case total == 0:
		c.broken(r, "the weights of its %d destinations are all zero", len(r.Backends))
	case total > 1<<32-1:
		c.broken(r, "the weights of its destinations exceed 2^32-1 together")
	}
}

func (c *converter) destination(d *networking.Destination) (mesh.HTTPBackend, bool) {
	if d.GetHost() == "" || d.GetPort().GetNumber() > 65535 {
		return mesh.HTTPBackend{}, false
	}
	b := mesh.HTTPBackend{Service: c.resolve(c.namespace, d.Host), Subset: d.Subset, Port: uint16(d.GetPort().GetNumber())}
	if c.sends && b.Service.Namespace != c.namespace {
		b.From = c.namespace
	}
	return b, true
}

func join(a, b mesh.HTTPHeaders) mesh.HTTPHeaders {
	return mesh.HTTPHeaders{Set: append(a.Set, b.Set...), Add: append(a.Add, b.Add...), Remove: append(a.Remove, b.Remove...)}
}

func headersOf(h *networking.Headers) (request, response mesh.HTTPHeaders) {
	one := func(o *networking.Headers_HeaderOperations) mesh.HTTPHeaders {
		sorted := func(m map[string]string) (out []mesh.HTTPHeader) {
			for k, v := range m {
				out = append(out, mesh.HTTPHeader{Name: k, Value: v})
			}
			slices.SortFunc(out, func(a, b mesh.HTTPHeader) int { return cmp.Compare(a.Name, b.Name) })
			return out
		}
		return mesh.HTTPHeaders{Set: sorted(o.GetSet()), Add: sorted(o.GetAdd()), Remove: o.GetRemove()}
	}
	return one(h.GetRequest()), one(h.GetResponse())
}

func redirectOf(h *networking.HTTPRedirect) *mesh.HTTPRedirect {
	r := &mesh.HTTPRedirect{Scheme: h.Scheme, Host: h.Authority, Path: h.Uri, Code: h.RedirectCode}
	if p := h.GetPort(); p > 0 && p <= 65535 {
		r.Port = uint16(p)
	}
	switch r.Code {
	case 0:
		r.Code = http.StatusMovedPermanently
	case 301, 302, 303, 307, 308:
	default:
		return nil
	}
	return r
}

func (c *converter) rewrite(r *mesh.HTTPRule, h *networking.HTTPRoute) {
	host := ""
	// Headers cannot set what HTTP calls a host; a rewrite can.
	r.Request.Set = slices.DeleteFunc(r.Request.Set, func(s mesh.HTTPHeader) bool {
		if strings.EqualFold(s.Name, "host") || s.Name == ":authority" {
			host = s.Value
			return true
		}
		return false
	})
	w := h.Rewrite
	if w == nil && host == "" {
		return
	}
	r.Rewrite = &mesh.HTTPRewrite{Host: cmp.Or(host, w.GetAuthority())}
	switch {
	case w.GetUriRegexRewrite() != nil:
		if _, err := regexp.Compile(w.UriRegexRewrite.Match); err != nil {
			c.broken(r, "rewrite.uriRegexRewrite.match is no regular expression")
			return
		}
		r.Rewrite.Regex, r.Rewrite.Substitution = w.UriRegexRewrite.Match, w.UriRegexRewrite.Rewrite
	case w.GetUri() != "":
		r.Rewrite.Prefix = &w.Uri
	}
}

// retryConditions are what Envoy may be told in words to try again on.
var retryConditions = []string{
	"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited", "retriable-4xx", "refused-stream",
	"retriable-status-codes", "retriable-headers", "http3-post-connect-failure", "cancelled", "deadline-exceeded", "internal",
	"resource-exhausted", "unavailable",
}

func (c *converter) retries(r *mesh.HTTPRule, p *networking.HTTPRetry) {
	if p == nil {
		return
	}
	out := &mesh.HTTPRetries{Attempts: uint32(max(0, p.Attempts)), PerTry: p.PerTryTimeout.AsDuration()}
	var on []string
	for _, word := range strings.Split(p.RetryOn, ",") {
		word = strings.TrimSpace(word)
		if code, err := strconv.Atoi(word); err == nil && code >= 100 && code < 600 {
			out.StatusCodes = append(out.StatusCodes, uint32(code))
		} else if slices.Contains(retryConditions, word) {
			on = append(on, word)
		} else if word != "" {
			c.say("retries.retryOn: %q is unknown and left out", word)
		}
	}
	if len(on) == 0 && len(out.StatusCodes) > 0 {
		on = []string{"retriable-status-codes"}
	}
	out.On = strings.Join(on, ",")
	r.Retries = out
}

func millionths(p *networking.Percent) uint32 {
	return uint32(min(max(p.GetValue(), 0), 100) * 10_000)
}

func (c *converter) fault(r *mesh.HTTPRule, f *networking.HTTPFaultInjection) {
	if d := f.GetDelay(); d != nil {
		share := millionths(d.Percentage)
		if d.Percentage == nil {
			c.say("fault.delay has no percentage, and delays nothing")
		}
		if fixed := d.GetFixedDelay(); fixed != nil {
			r.Delay = &mesh.HTTPDelay{Fixed: fixed.AsDuration(), Millionths: share}
		} else {
			c.say("fault.delay: only fixedDelay delays")
		}
	}
	if a := f.GetAbort(); a != nil {
		abort := &mesh.HTTPAbort{Millionths: mesh.Million}
		if a.Percentage != nil {
			abort.Millionths = millionths(a.Percentage)
		}
		switch e := a.GetErrorType().(type) {
		case *networking.HTTPFaultInjection_Abort_HttpStatus:
			if e.HttpStatus < 200 || e.HttpStatus >= 600 {
				c.say("fault.abort.httpStatus %d is none between 200 and 599, and aborts nothing", e.HttpStatus)
				return
			}
			abort.Status = uint32(e.HttpStatus)
		case *networking.HTTPFaultInjection_Abort_GrpcStatus:
			code, ok := grpcCodes[strings.ToUpper(e.GrpcStatus)]
			if !ok {
				c.say("fault.abort.grpcStatus %q is no code of gRPC, and aborts nothing", e.GrpcStatus)
				return
			}
			abort.GRPC = code
		default:
			c.say("fault.abort has neither httpStatus nor grpcStatus, and aborts nothing")
			return
		}
		r.Abort = abort
	}
}

var grpcCodes = map[string]uint32{
	"CANCELLED": 1, "UNKNOWN": 2, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5, "ALREADY_EXISTS": 6,
	"PERMISSION_DENIED": 7, "RESOURCE_EXHAUSTED": 8, "FAILED_PRECONDITION": 9, "ABORTED": 10, "OUT_OF_RANGE": 11, "UNIMPLEMENTED": 12,
	"INTERNAL": 13, "UNAVAILABLE": 14, "DATA_LOSS": 15, "UNAUTHENTICATED": 16,
}

func (c *converter) mirrors(r *mesh.HTTPRule, h *networking.HTTPRoute) {
	add := func(d *networking.Destination, share *networking.Percent) {
		b, ok := c.destination(d)
		if !ok {
			c.say("mirror has no host, or a port above 65535, and mirrors nothing")
			return
		}
		m := mesh.HTTPMirror{Backend: b, Millionths: mesh.Million}
		if share != nil {
			m.Millionths = millionths(share)
		}
		r.Mirrors = append(r.Mirrors, m)
	}
	if h.Mirror != nil {
		add(h.Mirror, h.MirrorPercentage)
	}
	for _, m := range h.Mirrors {
		add(m.Destination, m.Percentage)
	}
}

func (c *converter) cors(r *mesh.HTTPRule, p *networking.CorsPolicy) {
	if p == nil {
		return
	}
	out := &mesh.HTTPCORS{
		Methods: p.AllowMethods, AllowHeaders: p.AllowHeaders, ExposeHeaders: p.ExposeHeaders,
		MaxAge: p.MaxAge.AsDuration(), Credentials: p.AllowCredentials.GetValue(), Answer: p.UnmatchedPreflights == networking.CorsPolicy_IGNORE,
	}
	for i, o := range p.AllowOrigins {
		s := textOf(o)
		if _, err := regexp.Compile(s.Value); s.Kind == mesh.TextRegex && err != nil {
			c.say("corsPolicy.allowOrigins[%d] is no regular expression and allows nothing", i)
			continue
		}
		if s.Kind == mesh.TextExact && s.Value == "*" {
			s = mesh.TextMatch{Kind: mesh.TextRegex, Value: ".*"}
		}
		out.Origins = append(out.Origins, s)
	}
	r.CORS = out
}

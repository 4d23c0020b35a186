package reference

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Asked is what a client asks a Service for.
type Asked struct {
	ClientNamespace string
	Port            int32 // of the Service
	Method, Host    string
	Path            string // without the query
	Query           string // as written
	Headers         map[string]string
}

// Outcome is what becomes of it.
type Outcome struct {
	Status   int    // of an answer that no backend gives; 0 where one does
	Location string // of a redirect
	Backends []string
	Path     string // as the backend gets it, with the query
	Host     string
	Headers  map[string]string // of the request, lower case
	Answer   map[string]string // what is added to the answer, lower case
}

// Route says by the words of the Gateway API what becomes of a request to a Service of a namespace: which of the routes that are
// attached to it decides, and what it does. exists tells which backends there are, "namespace/name:port".
func Route(r Asked, namespace, service string, routes []*gatewayv1.HTTPRoute, exists func(string) bool) Outcome {
	attached := func(consumers bool) (out []*gatewayv1.HTTPRoute) {
		for _, route := range routes {
			if consumers != (route.Namespace != namespace) || consumers && route.Namespace != r.ClientNamespace {
				continue
			}
			for _, p := range route.Spec.ParentRefs {
				ns := route.Namespace
				if p.Namespace != nil {
					ns = string(*p.Namespace)
				}
				if ns == namespace && string(p.Name) == service && (p.Port == nil || int32(*p.Port) == r.Port) {
					out = append(out, route)
					break
				}
			}
		}
		return out
	}
	mine := attached(true)
	if len(mine) == 0 {
		mine = attached(false)
	}
	out := Outcome{Path: r.Path + r.Query, Host: r.Host, Headers: r.Headers, Answer: map[string]string{}}
	if len(mine) == 0 {
		out.Backends = []string{namespace + "/" + service + ":" + strconv.Itoa(int(r.Port))}
		return out
	}
	var best *candidate
	for _, route := range mine {
		for i := range route.Spec.Rules {
			rule := &route.Spec.Rules[i]
			matches := rule.Matches
			if len(matches) == 0 {
				matches = []gatewayv1.HTTPRouteMatch{{}}
			}
			for j := range matches {
				c := &candidate{route, rule, &matches[j], i, j}
				if c.matches(r) && (best == nil || c.before(best)) {
					best = c
				}
			}
		}
	}
	if best == nil {
		return Outcome{Status: 404}
	}
	return best.follow(out, r, exists)
}

type candidate struct {
	route *gatewayv1.HTTPRoute
	rule  *gatewayv1.HTTPRouteRule
	match *gatewayv1.HTTPRouteMatch
	i, j  int
}

func (c *candidate) path() (kind gatewayv1.PathMatchType, value string) {
	kind, value = gatewayv1.PathMatchPathPrefix, "/"
	if p := c.match.Path; p != nil {
		if p.Type != nil {
			kind = *p.Type
		}
		if p.Value != nil {
			value = *p.Value
		}
	}
	return kind, value
}

func whole(pattern, s string) bool { return regexp.MustCompile("^(?:" + pattern + ")$").MatchString(s) }

func (c *candidate) matches(r Asked) bool {
	switch kind, value := c.path(); kind {
	case gatewayv1.PathMatchExact:
		if r.Path != value {
			return false
		}
	case gatewayv1.PathMatchPathPrefix:
		p := strings.TrimSuffix(value, "/")
		if r.Path != p && !strings.HasPrefix(r.Path, p+"/") {
			return false
		}
	default:
		if !whole(value, r.Path) {
			return false
		}
	}
	if c.match.Method != nil && string(*c.match.Method) != r.Method {
		return false
	}
	for _, h := range c.match.Headers {
		have, ok := r.Headers[strings.ToLower(string(h.Name))]
		if strings.EqualFold(string(h.Name), "host") {
			have, ok = r.Host, true
		}
		regex := h.Type != nil && *h.Type == gatewayv1.HeaderMatchRegularExpression
		if !ok || regex && !whole(h.Value, have) || !regex && have != h.Value {
			return false
		}
	}
	query := map[string]string{}
	for pair := range strings.SplitSeq(strings.TrimPrefix(r.Query, "?"), "&") {
		k, v, _ := strings.Cut(pair, "=")
		if _, again := query[k]; !again {
			query[k] = v
		}
	}
	for _, q := range c.match.QueryParams {
		have, ok := query[string(q.Name)]
		regex := q.Type != nil && *q.Type == gatewayv1.QueryParamMatchRegularExpression
		if !ok || regex && !whole(q.Value, have) || !regex && have != q.Value {
			return false
		}
	}
	return true
}

// before is the precedence of the Gateway API; patterns, of which it says nothing, come last.
func (c *candidate) before(o *candidate) bool {
	rank := func(c *candidate) []int {
		kind, value := c.path()
		out := []int{0, 0, 0, len(c.match.Headers), len(c.match.QueryParams)}
		switch kind {
		case gatewayv1.PathMatchExact:
			out[0] = 2
		case gatewayv1.PathMatchPathPrefix:
			out[0], out[1] = 1, len(value)
		default:
			out[1] = len(value)
		}
		if c.match.Method != nil {
			out[2] = 1
		}
		return out
	}
	if n := slices.Compare(rank(c), rank(o)); n != 0 {
		return n > 0
	}
	return cmp.Or(c.route.CreationTimestamp.Compare(o.route.CreationTimestamp.Time), cmp.Compare(c.route.Namespace+"/"+c.route.Name, o.route.Namespace+"/"+o.route.Name),
		cmp.Compare(c.i, o.i), cmp.Compare(c.j, o.j)) < 0
}

// replaced is a path as a modifier leaves it.
func (c *candidate) replaced(path string, m *gatewayv1.HTTPPathModifier) string {
	switch {
	case m == nil:
		return path
	case m.ReplaceFullPath != nil:
		return *m.ReplaceFullPath
	case m.ReplacePrefixMatch == nil:
		return path
	}
	_, value := c.path()
	rest := strings.TrimPrefix(path, strings.TrimSuffix(value, "/"))
	if path = strings.TrimSuffix(*m.ReplacePrefixMatch, "/") + rest; path == "" {
		return "/"
	}
	return path
}

// changed are headers as a modifier leaves them.
func changed(h map[string]string, f *gatewayv1.HTTPHeaderFilter) map[string]string {
	out := map[string]string{}
	for k, v := range h {
		out[k] = v
	}
	for _, s := range f.Set {
		out[strings.ToLower(string(s.Name))] = s.Value
	}
	for _, a := range f.Add {
		name := strings.ToLower(string(a.Name))
		if was, ok := out[name]; ok {
			out[name] = was + "," + a.Value
		} else {
			out[name] = a.Value
		}
	}
	for _, name := range f.Remove {
		delete(out, strings.ToLower(name))
	}
	return out
}

func (c *candidate) follow(out Outcome, r Asked, exists func(string) bool) Outcome {
	for _, f := range c.rule.Filters {
		switch {
		case f.RequestHeaderModifier != nil:
			out.Headers = changed(out.Headers, f.RequestHeaderModifier)
		case f.ResponseHeaderModifier != nil:
			out.Answer = changed(out.Answer, f.ResponseHeaderModifier)
		case f.URLRewrite != nil:
			out.Path = c.replaced(r.Path, f.URLRewrite.Path) + r.Query
			if f.URLRewrite.Hostname != nil {
				out.Host = string(*f.URLRewrite.Hostname)
			}
		case f.RequestRedirect != nil:
			return Outcome{Status: status(f.RequestRedirect), Location: c.location(r, f.RequestRedirect)}
		}
	}
	for _, b := range c.rule.BackendRefs {
		if b.Weight != nil && *b.Weight == 0 {
			continue
		}
		ns := c.route.Namespace
		if b.Namespace != nil {
			ns = string(*b.Namespace)
		}
		name := ns + "/" + string(b.Name) + ":" + strconv.Itoa(int(*b.Port))
		if !exists(name) {
			name = ""
		}
		out.Backends = append(out.Backends, name)
	}
	if !slices.ContainsFunc(out.Backends, func(b string) bool { return b != "" }) {
		return Outcome{Status: 500}
	}
	return out
}

func status(f *gatewayv1.HTTPRequestRedirectFilter) int {
	if f.StatusCode == nil {
		return 302
	}
	return *f.StatusCode
}

func (c *candidate) location(r Asked, f *gatewayv1.HTTPRequestRedirectFilter) string {
	scheme, port := "http", r.Port
	usual := map[string]int32{"http": 80, "https": 443}
	if f.Scheme != nil {
		scheme = *f.Scheme
		port = usual[scheme]
	}
	if f.Port != nil {
		port = int32(*f.Port)
	}
	host, _, _ := strings.Cut(r.Host, ":")
	if f.Hostname != nil {
		host = string(*f.Hostname)
	}
	if port != usual[scheme] {
		host += ":" + strconv.Itoa(int(port))
	}
	return scheme + "://" + host + c.replaced(r.Path, f.Path) + r.Query
}

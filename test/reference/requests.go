package reference

import (
	"regexp"
	"slices"
	"strings"

	securityapi "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
)

// Request is one that arrives at a waypoint, by a connection.
type Request struct {
	Connection           // To is not looked at; DestIP and DestPort are those of the Service
	Method, Target, Host string
	Headers              map[string][]string // by lower-case name
	Claims               map[string]any      // of a verified token; nil without one
}

// Admits decides about a request by the policies that are about its Service.
func (w *World) Admits(policies []*securityv1.AuthorizationPolicy, r Request) bool {
	path, ok := cleaned(r.Target)
	if !ok {
		return false
	}
	closed, admitted := false, false
	for _, p := range policies {
		if p.Spec.Action == securityapi.AuthorizationPolicy_AUDIT || p.Annotations["istio.io/dry-run"] == "true" {
			continue
		}
		deny := p.Spec.Action != securityapi.AuthorizationPolicy_ALLOW
		m := requestMatcher{matcher: matcher{w: w, c: r.Connection, namespace: p.Namespace}, r: r, path: path, deny: deny}
		matches := slices.ContainsFunc(p.Spec.Rules, m.rule)
		switch {
		case deny && matches:
			return false
		case !deny:
			closed = true
			admitted = admitted || matches
		}
	}
	return !closed || admitted
}

// unreserved are percent-encodings that mean the same as the letter.
var unreserved = regexp.MustCompile(`%(2[dDeE]|3[0-9]|4[1-9a-fA-F]|5[0-9aA]|5[fF]|6[1-9a-fA-F]|7[0-9aA]|7[eE])`)

// cleaned is the path of a request's target as it is compared: letters are not encoded, a backslash is a slash, dots are
// resolved, and the query is gone. A target that has a fragment or a NUL is refused.
func cleaned(target string) (string, bool) {
	path, _, _ := strings.Cut(target, "?")
	if strings.ContainsAny(target, "#\x00") || strings.Contains(path, "%00") {
		return "", false
	}
	path = unreserved.ReplaceAllStringFunc(path, func(s string) string {
		var b byte
		for _, c := range []byte(strings.ToLower(s[1:])) {
			b <<= 4
			if c >= 'a' {
				b += c - 'a' + 10
			} else {
				b += c - '0'
			}
		}
		return string(b)
	})
	path = strings.ReplaceAll(path, `\`, "/")
	var out []string
	segments := strings.Split(path, "/")[1:]
	for i, s := range segments {
		last := i == len(segments)-1
		switch {
		case s == "." && !last:
		case s == "..":
			if len(out) > 0 {
				out = out[:len(out)-1]
			}
			if last {
				out = append(out, "")
			}
		case s == ".":
			out = append(out, "")
		default:
			out = append(out, s)
		}
	}
	return "/" + strings.Join(out, "/"), true
}

// requestMatcher evaluates rules of one policy about one request.
type requestMatcher struct {
	matcher
	r    Request
	path string
	deny bool
}

func (m *requestMatcher) rule(r *securityapi.Rule) bool {
	if len(r.From) > 0 && !slices.ContainsFunc(r.From, func(f *securityapi.Rule_From) bool { return m.source(f.Source) }) {
		return false
	}
	if len(r.To) > 0 && !slices.ContainsFunc(r.To, func(t *securityapi.Rule_To) bool { return m.operation(t.Operation) }) {
		return false
	}
	return !slices.ContainsFunc(r.When, func(c *securityapi.Condition) bool { return !m.condition(c) })
}

func (m *requestMatcher) source(s *securityapi.Source) bool {
	return list(s.Principals, s.NotPrincipals, m.principal) && list(s.Namespaces, s.NotNamespaces, m.sourceNS) &&
		list(s.ServiceAccounts, s.NotServiceAccounts, m.account) && list(s.TrustDomains, s.NotTrustDomains, m.domain) &&
		list(s.IpBlocks, s.NotIpBlocks, m.sourceIP) && list(s.RemoteIpBlocks, s.NotRemoteIpBlocks, m.sourceIP) && // nobody forwards for others
		list(s.RequestPrincipals, s.NotRequestPrincipals, m.token)
}

func (m *requestMatcher) operation(o *securityapi.Operation) bool {
	method := func(v string) bool { return text(v, m.r.Method) }
	host := func(v string) bool { return m.host(v, m.deny) }
	notHost := func(v string) bool { return m.host(v, !m.deny) }
	path := func(v string) bool { return m.onPath(v, m.deny) }
	notPath := func(v string) bool { return m.onPath(v, !m.deny) }
	return list(o.Ports, o.NotPorts, m.port) && list(o.Methods, o.NotMethods, method) &&
		list(o.Hosts, nil, host) && list(nil, o.NotHosts, notHost) && list(o.Paths, nil, path) && list(nil, o.NotPaths, notPath)
}

// host compares without regard to case or to a dot at the end. Where a match keeps somebody out a name without a port
// stands for it with any.
func (m *requestMatcher) host(v string, wide bool) bool {
	v, host := strings.ToLower(v), strings.ToLower(m.r.Host)
	name, port, has := strings.Cut(host, ":")
	name = strings.TrimSuffix(name, ".")
	host = name
	if has {
		host += ":" + port
	}
	return text(v, host) || wide && !strings.Contains(v, ":") && text(v, name)
}

// onPath compares. Where a match keeps somebody out, slashes are slashes however they are written, and however many, and
// are none too.
func (m *requestMatcher) onPath(v string, wide bool) bool {
	matches := func(path string) bool { return text(v, path) }
	if strings.Contains(v, "{") {
		r := regexp.QuoteMeta(v)
		r = strings.ReplaceAll(r, `\{\*\*\}`, `[^?#\\]*`)
		r = strings.ReplaceAll(r, `\{\*\}`, `[^/?#\\]+`)
		matches = regexp.MustCompile("^" + r + "$").MatchString
	}
	return matches(m.path) || wide && matches(regexp.MustCompile(`(/|\\|%2[fF]|%5[cC])+`).ReplaceAllString(m.path, "/"))
}

func (m *requestMatcher) token(v string) bool {
	iss, _ := m.r.Claims["iss"].(string)
	sub, _ := m.r.Claims["sub"].(string)
	return iss != "" && sub != "" && text(v, iss+"/"+sub)
}

// claim is true where it is text that matches, or a list that has such a text.
func (m *requestMatcher) claim(path []string, v string) bool {
	var at any = m.r.Claims
	for _, k := range path {
		inside, _ := at.(map[string]any)
		at = inside[k]
	}
	switch c := at.(type) {
	case string:
		if len(path) == 1 && (path[0] == "scope" || path[0] == "permission") {
			return slices.ContainsFunc(strings.Fields(c), func(s string) bool { return text(v, s) })
		}
		return text(v, c)
	case []string:
		return slices.ContainsFunc(c, func(s string) bool { return text(v, s) })
	}
	return false
}

func (m *requestMatcher) condition(c *securityapi.Condition) bool {
	match := m.principal
	key, arg, bracket := strings.Cut(c.Key, "[")
	args := strings.Split(strings.TrimSuffix(arg, "]"), "][")
	switch {
	case key == "request.headers" && bracket:
		values := m.r.Headers[strings.ToLower(args[0])]
		match = func(v string) bool {
			return slices.ContainsFunc(values, func(one string) bool { return text(v, one) })
		}
	case key == "request.auth.claims" && bracket:
		match = func(v string) bool { return m.claim(args, v) }
	case key == "request.auth.principal":
		match = m.token
	case key == "request.auth.audiences":
		match = func(v string) bool { return m.claim([]string{"aud"}, v) }
	case key == "request.auth.presenter":
		match = func(v string) bool { return m.claim([]string{"azp"}, v) }
	case key == "source.ip", key == "remote.ip":
		match = m.sourceIP
	case key == "source.namespace":
		match = m.sourceNS
	case key == "source.serviceAccount":
		match = m.account
	case key == "source.trustDomain":
		match = m.domain
	case key == "destination.ip":
		match = m.destIP
	case key == "destination.port":
		match = m.port
	}
	return list(c.Values, c.NotValues, match)
}

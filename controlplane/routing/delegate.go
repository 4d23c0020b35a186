package routing

import (
	"cmp"
	"fmt"
	"maps"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"
)

// A VirtualService may leave what becomes of some of its requests to another one, which has neither hosts nor gateways. What both
// ask of a request has to hold, and what the first says of it holds before what the second says.

// Delegate is the VirtualService that a route leaves its requests to.
type Delegate struct{ Namespace, Name string }

// Delegates are those of a VirtualService.
func Delegates(namespace string, v *networking.VirtualService) (out []Delegate) {
	for _, h := range v.Http {
		if d := h.Delegate; d != nil {
			out = append(out, Delegate{cmp.Or(d.Namespace, namespace), d.Name})
		}
	}
	return out
}

// Delegated is a VirtualService with the routes of its delegates in their place, and in words what of those does not work. A
// route whose delegate is not there, or cannot be one, stays as it is: requests that it matches fail. v is not changed. Short
// names of a delegate are of its own namespace.
func Delegated(namespace string, v *networking.VirtualService, find func(Delegate) *networking.VirtualService, resolve Resolve) (_ *networking.VirtualService, problems []string) {
	out, ok := proto.Clone(v).(*networking.VirtualService)
	if !ok {
		return v, nil
	}
	out.Http = nil
	for i, h := range v.Http {
		d := h.Delegate
		if d == nil {
			out.Http = append(out.Http, h)
			continue
		}
		to := Delegate{cmp.Or(d.Namespace, namespace), d.Name}
		other := find(to)
		if other == nil || len(other.Hosts) > 0 || len(other.Gateways) > 0 || len(h.Route) > 0 || h.Redirect != nil || h.DirectResponse != nil {
			out.Http = append(out.Http, h)
			continue
		}
		for j, leaf := range other.Http {
			leaf = qualified(leaf, to.Namespace, resolve)
			at := fmt.Sprintf("http[%d].delegate %s/%s http[%d]", i, to.Namespace, to.Name, j)
			if leaf.Delegate != nil {
				problems = append(problems, at+": a delegate cannot delegate; the route is left out")
				continue
			}
			matches, conflict := bothMatch(h.Match, leaf.Match)
			if conflict != "" {
				problems = append(problems, at+": "+conflict)
			}
			if len(matches) == 0 && len(h.Match)+len(leaf.Match) > 0 {
				continue
			}
			out.Http = append(out.Http, overlaid(h, leaf, matches))
		}
	}
	return out, problems
}

// qualified is a route of a namespace whose destinations mean the same anywhere.
func qualified(h *networking.HTTPRoute, namespace string, resolve Resolve) *networking.HTTPRoute {
	out, ok := proto.Clone(h).(*networking.HTTPRoute)
	if !ok {
		return h
	}
	destinations := []*networking.Destination{out.Mirror}
	for _, d := range out.Route {
		destinations = append(destinations, d.Destination)
	}
	for _, m := range out.Mirrors {
		destinations = append(destinations, m.Destination)
	}
	for _, d := range destinations {
		if d.GetHost() != "" {
			d.Host = resolve(namespace, d.Host).Hostname
		}
	}
	return out
}

// overlaid is a delegate's route with what the route that delegates says.
func overlaid(root, leaf *networking.HTTPRoute, matches []*networking.HTTPMatchRequest) *networking.HTTPRoute {
	out := &networking.HTTPRoute{
		Name: strings.Trim(root.Name+"-"+leaf.Name, "-"), Match: matches,
		Route: leaf.Route, Redirect: leaf.Redirect, DirectResponse: leaf.DirectResponse,
		Rewrite: cmp.Or(root.Rewrite, leaf.Rewrite), Timeout: cmp.Or(root.Timeout, leaf.Timeout), Retries: cmp.Or(root.Retries, leaf.Retries),
		Fault: cmp.Or(root.Fault, leaf.Fault), CorsPolicy: cmp.Or(root.CorsPolicy, leaf.CorsPolicy),
		Mirror: leaf.Mirror, Mirrors: leaf.Mirrors, MirrorPercentage: leaf.MirrorPercentage,
		Headers: &networking.Headers{
			Request:  bothHeaders(root.GetHeaders().GetRequest(), leaf.GetHeaders().GetRequest()),
			Response: bothHeaders(root.GetHeaders().GetResponse(), leaf.GetHeaders().GetResponse()),
		},
	}
	if root.Mirror != nil || len(root.Mirrors) > 0 {
		out.Mirror, out.Mirrors, out.MirrorPercentage = root.Mirror, root.Mirrors, root.MirrorPercentage
	}
	return out
}

func bothHeaders(root, leaf *networking.Headers_HeaderOperations) *networking.Headers_HeaderOperations {
	both := func(a, b map[string]string) map[string]string {
		out := map[string]string{}
		maps.Copy(out, b)
		maps.Copy(out, a)
		return out
	}
	return &networking.Headers_HeaderOperations{
		Set: both(root.GetSet(), leaf.GetSet()), Add: both(root.GetAdd(), leaf.GetAdd()),
		Remove: append(append([]string{}, root.GetRemove()...), leaf.GetRemove()...),
	}
}

// bothMatch has a request match one of either list. Pairs that contradict each other are left out, and the last of them is told.
func bothMatch(root, leaf []*networking.HTTPMatchRequest) (out []*networking.HTTPMatchRequest, conflict string) {
	if len(root) == 0 {
		return leaf, ""
	}
	if len(leaf) == 0 {
		return root, ""
	}
	for i, r := range root {
		for j, l := range leaf {
			m, bad := both(r, l)
			if bad != "" {
				conflict = fmt.Sprintf("match[%d] and match[%d] of the route that delegates differ in %s: nothing matches both", j, i, bad)
				continue
			}
			out = append(out, m)
		}
	}
	return out, conflict
}

// both is what two matches ask for together; bad names a field that both have and that cannot be had of both.
func both(r, l *networking.HTTPMatchRequest) (out *networking.HTTPMatchRequest, bad string) {
	out, ok := proto.Clone(l).(*networking.HTTPMatchRequest)
	if !ok {
		return l, "type"
	}
	one := func(field string, r, l *networking.StringMatch) *networking.StringMatch {
		switch {
		case r == nil:
			return l
		case l == nil || proto.Equal(r, l):
			return r
		case field == "uri" && within(r, l):
			return l
		}
		bad = field
		return nil
	}
	out.Uri, out.Scheme = one("uri", r.Uri, l.Uri), one("scheme", r.Scheme, l.Scheme)
	out.Method, out.Authority = one("method", r.Method, l.Method), one("authority", r.Authority, l.Authority)
	if r.Uri != nil && l.Uri != nil && r.IgnoreUriCase != l.IgnoreUriCase {
		bad = "ignoreUriCase"
	}
	out.IgnoreUriCase = r.IgnoreUriCase || l.IgnoreUriCase
	all := func(field string, r, l map[string]*networking.StringMatch) map[string]*networking.StringMatch {
		out := map[string]*networking.StringMatch{}
		maps.Copy(out, l)
		for name, m := range r {
			out[name] = one(field+"."+name, m, l[name])
		}
		return out
	}
	out.Headers, out.WithoutHeaders = all("headers", r.Headers, l.Headers), all("withoutHeaders", r.WithoutHeaders, l.WithoutHeaders)
	out.QueryParams = all("queryParams", r.QueryParams, l.QueryParams)
	if r.Port != 0 && l.Port != 0 && r.Port != l.Port {
		bad = "port"
	}
	out.Port = cmp.Or(r.Port, l.Port)
	if out.SourceNamespace = cmp.Or(r.SourceNamespace, l.SourceNamespace); r.SourceNamespace != "" && l.SourceNamespace != "" && r.SourceNamespace != l.SourceNamespace {
		bad = "sourceNamespace"
	}
	out.SourceLabels = maps.Clone(l.SourceLabels)
	for name, value := range r.SourceLabels {
		if was, ok := out.SourceLabels[name]; ok && was != value {
			bad = "sourceLabels." + name
		}
		if out.SourceLabels == nil {
			out.SourceLabels = map[string]string{}
		}
		out.SourceLabels[name] = value
	}
	if len(l.Gateways) == 0 {
		out.Gateways = r.Gateways
	}
	return out, bad
}

// within reports whether whatever matches l matches the prefix r, too.
func within(r, l *networking.StringMatch) bool {
	prefix, ok := r.GetMatchType().(*networking.StringMatch_Prefix)
	if !ok {
		return false
	}
	switch m := l.GetMatchType().(type) {
	case *networking.StringMatch_Prefix:
		return strings.HasPrefix(m.Prefix, prefix.Prefix)
	case *networking.StringMatch_Exact:
		return strings.HasPrefix(m.Exact, prefix.Prefix)
	}
	return false
}

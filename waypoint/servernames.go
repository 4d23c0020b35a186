package waypoint

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// asked is a server name, and the filter chain that is for it.
type asked struct {
	name  string // perhaps "*.domain"
	chain string
}

// byServerName has connections with TLS to a port go where the server names say that they ask for, by the routes for the clients of a
// namespace. The most specific name holds, and of several routes for one the first; what asks for another goes on as without.
func (b *builder) byServerName(out *served, from string) {
	var names []asked
	c := out.chain
	c.port.App = mesh.AppTLS
	for i := range out.svc.Routed {
		r := &out.svc.Routed[i]
		if r.Port != out.port.Port || r.From != from || len(r.Names) == 0 {
			continue
		}
		p := b.tcpProxy(c)
		b.share(p, c, r.Backends)
		name := c.name("tls/" + strconv.Itoa(i))
		out.chains = append(out.chains, &listenerv3.FilterChain{
			Name: name, Filters: append(b.connectionAccess(c), b.networkFilter("envoy.filters.network.tcp_proxy", p)),
		})
		for _, n := range r.Names {
			if !slices.ContainsFunc(names, func(a asked) bool { return a.name == n }) {
				names = append(names, asked{n, name})
			}
		}
	}
	if len(names) == 0 {
		return
	}
	out.named = true
	slices.SortStableFunc(names, func(x, y asked) int {
		wild := func(n string) int { return len(n) - len(strings.TrimPrefix(n, "*")) }
		return cmp.Or(cmp.Compare(wild(x.name), wild(y.name)), cmp.Compare(len(y.name), len(x.name)))
	})
	m := &matcherv3.Matcher{OnNoMatch: out.on}
	list := &matcherv3.Matcher_MatcherList{}
	for _, a := range names {
		list.Matchers = append(list.Matchers, &matcherv3.Matcher_MatcherList_FieldMatcher{
			Predicate: b.serverName(a.name), OnMatch: b.chainNamed(a.chain),
		})
	}
	m.MatcherType = &matcherv3.Matcher_MatcherList_{MatcherList: list}
	out.on = nested(m)
}

// byClient has connections of the clients of some namespaces go where routes say that are for these alone. requests and opaque are
// where others go that no such route has: requests where both may come, and what is none.
func (b *builder) byClient(out *served, requests, opaque *matcherv3.Matcher_OnMatch) {
	rest, clients := out.on, map[string]*matcherv3.Matcher_OnMatch{}
	for i := range out.svc.Routed {
		from := out.svc.Routed[i].From
		if from == "" || clients[from] != nil || out.svc.Routed[i].Port != out.port.Port {
			continue
		}
		all := out.svc.RoutedAt(from, out.port.Port)
		out.on = opaque
		if all != nil { // whatever is in them
			c := out.chain
			c.port.App = mesh.AppTCP
			p := b.tcpProxy(c)
			b.share(p, c, all.Backends)
			name := c.name("tcp/" + from)
			out.chains = append(out.chains, &listenerv3.FilterChain{
				Name: name, Filters: append(b.connectionAccess(c), b.networkFilter("envoy.filters.network.tcp_proxy", p)),
			})
			out.on = b.chainNamed(name)
		}
		b.byServerName(out, from)
		if all == nil && out.sniffed() {
			out.on = b.byProtocol(requests, out.on)
		}
		clients[from] = out.on
	}
	if out.on = rest; len(clients) > 0 {
		m := exactly("client", b.extension(&networkinputsv3.FilterStateInput{Key: stateNamespace}), clients)
		m.OnNoMatch = rest
		out.on = nested(m)
	}
}

// serverName matches a server name, "*.domain" or "*", which is any.
func (b *builder) serverName(n string) *matcherv3.Matcher_MatcherList_Predicate {
	input := b.extension(&networkinputsv3.ServerNameInput{})
	input.Name = "server-name"
	match := &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: n}}
	if rest, wild := strings.CutPrefix(n, "*"); wild && rest != "" {
		match.MatchPattern = &matcherv3.StringMatcher_Suffix{Suffix: rest}
	} else if wild {
		match.MatchPattern = &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{
			EngineType: &matcherv3.RegexMatcher_GoogleRe2{GoogleRe2: &matcherv3.RegexMatcher_GoogleRE2{}}, Regex: ".+",
		}}
	}
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
		SinglePredicate: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate{
			Input: input, Matcher: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: match},
		},
	}}
}

package waypoint

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	ipv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/input_matchers/ip/v3"
	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/internal/mesh"
)

// asked is a server name, and the filter chain that is for it.
type asked struct {
	name  string // perhaps "*.domain"
	only  *mesh.RoutedOnly
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
		name := b.routedChain(out, c, "tls/"+strconv.Itoa(i), r.Backends)
		for _, n := range r.Names {
			if !slices.ContainsFunc(names, func(a asked) bool { return a.name == n && a.only == nil }) {
				names = append(names, asked{n, r.Only, name})
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
			Predicate: bothHold(b.serverName(a.name), b.only(a.only)), OnMatch: b.chainNamed(a.chain),
		})
	}
	m.MatcherType = &matcherv3.Matcher_MatcherList_{MatcherList: list}
	out.on = nested(m)
}

// routedChain adds a chain that shares connections out to backends, and returns its name.
func (b *builder) routedChain(out *served, c chain, kind string, backends []mesh.HTTPBackend) string {
	p, name := b.tcpProxy(c), c.name(kind)
	b.share(p, c, backends)
	out.chains = append(out.chains, &listenerv3.FilterChain{
		Name: name, Filters: append(b.connectionAccess(c), b.networkFilter("envoy.filters.network.tcp_proxy", p)),
	})
	return name
}

// byRest has connections to a port go where the first route says of which all holds that it asks of them; others go on as without.
func (b *builder) byRest(out *served) {
	list := &matcherv3.Matcher_MatcherList{}
	c := out.chain
	c.port.App = mesh.AppTCP
	for i := range out.svc.Routed {
		r := &out.svc.Routed[i]
		if r.Port != out.port.Port || r.From != "" || len(r.Names) > 0 || r.Only == nil {
			continue
		}
		name := b.routedChain(out, c, "tcp-only/"+strconv.Itoa(i), r.Backends)
		list.Matchers = append(list.Matchers, &matcherv3.Matcher_MatcherList_FieldMatcher{Predicate: b.only(r.Only), OnMatch: b.chainNamed(name)})
	}
	if len(list.Matchers) > 0 {
		out.on = nested(&matcherv3.Matcher{OnNoMatch: out.on, MatcherType: &matcherv3.Matcher_MatcherList_{MatcherList: list}})
	}
}

// only matches connections of which something holds; nil for nil.
func (b *builder) only(o *mesh.RoutedOnly) (all *matcherv3.Matcher_MatcherList_Predicate) {
	if o == nil {
		return nil
	}
	add := func(name string, input, custom proto.Message, text string) {
		one := &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate{Input: b.extension(input)}
		one.Input.Name = name
		if custom != nil {
			m := b.extension(custom)
			m.Name = "envoy.matching.matchers.ip"
			one.Matcher = &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_CustomMatch{CustomMatch: m}
		} else {
			one.Matcher = &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: text}}}
		}
		all = bothHold(all, &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{SinglePredicate: one}})
	}
	ranges := func(list []netip.Prefix) *ipv3.Ip {
		out := &ipv3.Ip{StatPrefix: "routes"}
		for _, p := range list {
			out.CidrRanges = append(out.CidrRanges, cidr(p))
		}
		return out
	}
	if o.Source != "" {
		add("client", &networkinputsv3.FilterStateInput{Key: stateNamespace}, nil, o.Source)
	}
	if len(o.From) > 0 {
		add("source", &networkinputsv3.SourceIPInput{}, ranges(o.From), "")
	}
	if len(o.To) > 0 {
		add("destination", &networkinputsv3.DestinationIPInput{}, ranges(o.To), "")
	}
	return all
}

// bothHold matches where two do, of which either may be nil.
func bothHold(x, y *matcherv3.Matcher_MatcherList_Predicate) *matcherv3.Matcher_MatcherList_Predicate {
	if x == nil || y == nil {
		return cmp.Or(x, y)
	}
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_AndMatcher{
		AndMatcher: &matcherv3.Matcher_MatcherList_Predicate_PredicateList{Predicate: []*matcherv3.Matcher_MatcherList_Predicate{x, y}},
	}}
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
			out.on = b.chainNamed(b.routedChain(out, c, "tcp/"+from, all.Backends))
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

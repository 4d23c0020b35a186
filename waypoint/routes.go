package waypoint

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	commonfaultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/fault/v3"
	corsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	headermutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	sessionv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/stateful_session/v3"
	cookiesessionv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/stateful_session/cookie/v3"
	headersessionv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/stateful_session/header/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	typehttpv3 "github.com/envoyproxy/go-control-plane/envoy/type/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	corsFilter  = "envoy.filters.http.cors"
	askedFilter = "envoy.filters.http.header_mutation"
	faultFilter = "envoy.filters.http.fault"

	sessionFilter  = "envoy.filters.http.stateful_session"
	routeAskFilter = "warren.external-auth" // asks whom a route itself names
)

// routes is the route table of a port. The address has chosen the service: the request's host plays no part in that.
func (b *builder) routes(c chain) *routev3.RouteConfiguration {
	vh := &routev3.VirtualHost{Name: c.svc.Name.Hostname, Domains: c.domains(), IncludeAttemptCountInResponse: false}
	last := "" // whose rules came last
	ended := func() {
		if last != "" {
			rest := catchAll()
			from(rest.Match, last)
			vh.Routes = append(vh.Routes, rest)
		}
	}
	written := c.svc.HTTP != nil && len(c.svc.HTTP) == 0
	for i := range c.svc.HTTP {
		r := &c.svc.HTTP[i]
		if r.Port != 0 && r.Port != c.port.Port {
			continue
		}
		if r.From != last {
			ended()
			last = r.From
		}
		written = written || r.From == ""
		vh.Routes = append(vh.Routes, b.rule(c, r)...)
	}
	ended()
	if !written { // about nobody, or about some clients alone
		vh.Routes = append(vh.Routes, again(b.plain(c))...)
	}
	vh.Routes = append(vh.Routes, catchAll())
	vh.TypedPerFilterConfig, vh.RateLimits = b.accessOf(c), askedOf(c.svc.Limits)
	out := &routev3.RouteConfiguration{
		Name: c.name("http"), VirtualHosts: []*routev3.VirtualHost{vh},
		ValidateClusters: wrapperspb.Bool(false),
		// Said by Envoy of clients that it takes to be outside; to the application it would be noise.
		RequestHeadersToRemove: []string{"x-envoy-external-address"},
	}
	if len(vh.Domains) == 0 {
		out.VirtualHosts = nil
	}
	b.patchRoutes(c, out)
	return out
}

// plain sends everything to the service itself.
func (b *builder) plain(c chain) *routev3.Route {
	r := &mesh.HTTPRule{Backends: []mesh.HTTPBackend{{Service: c.svc.Name, Weight: 1}}}
	return &routev3.Route{Name: "default", Match: prefix("/"), Action: b.forward(c, r, nil)}
}

// idempotent are the methods whose requests may be sent twice (RFC 9110).
const idempotent = "GET|HEAD|OPTIONS|TRACE|PUT|DELETE"

// again is a route that nobody has said anything of retries about. What may be sent twice is sent to another endpoint where a
// connection ends before there is an answer, too: to Envoy a tunnel is a connection before it leads anywhere, so that a pod
// that is gone looks as if it had taken the request.
func again(r *routev3.Route) []*routev3.Route {
	forward, ok := r.Action.(*routev3.Route_Route)
	if !ok || forward.Route.RetryPolicy == nil {
		return []*routev3.Route{r}
	}
	twice := proto.Clone(r).(*routev3.Route)
	twice.Match.Headers = append(twice.Match.Headers, headerMatch(":method", mesh.TextMatch{Kind: mesh.TextRegex, Value: idempotent}, false))
	twice.GetRoute().RetryPolicy.RetryOn += ",reset"
	return []*routev3.Route{twice, r}
}

func prefix(p string) *routev3.RouteMatch {
	return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: p}}
}

// rule makes a route of each of a rule's matches.
func (b *builder) rule(c chain, r *mesh.HTTPRule) []*routev3.Route {
	matches := r.Matches
	if len(matches) == 0 {
		matches = []mesh.HTTPMatch{{}}
	}
	var out []*routev3.Route
	for i := range matches {
		m := &matches[i]
		if m.Port != 0 && m.Port != c.port.Port || len(m.Labels) > 0 && len(m.At) == 0 {
			continue
		}
		route := &routev3.Route{Name: r.Name, Match: match(m)}
		from(route.Match, r.From)
		from(route.Match, m.Source)
		comesFrom(route.Match, m)
		switch {
		case r.Invalid != "" && r.GRPC:
			route.Action = respond(503, "") // which gRPC calls UNAVAILABLE
		case r.Invalid != "":
			route.Action = respond(500, "")
		case r.Redirect != nil:
			route.Action = redirect(c, r.Redirect, m)
		case r.Direct != nil:
			route.Action = respond(r.Direct.Status, r.Direct.Body)
		default:
			route.Action = b.forward(c, r, m)
		}
		headers(r.Request, &route.RequestHeadersToAdd, &route.RequestHeadersToRemove)
		headers(r.Response, &route.ResponseHeadersToAdd, &route.ResponseHeadersToRemove)
		route.TypedPerFilterConfig = b.perFilter(r)
		if r.Retries == nil && !r.GRPC {
			out = append(out, again(route)...)
		} else {
			out = append(out, route)
		}
	}
	return out
}

// from has a match hold for clients of a namespace alone.
func from(m *routev3.RouteMatch, namespace string) {
	if namespace == "" {
		return
	}
	m.FilterState = append(m.FilterState, &matcherv3.FilterStateMatcher{
		Key: statePrincipal, Matcher: &matcherv3.FilterStateMatcher_StringMatch{
			StringMatch: peerMatcher(mesh.AccessNamespace, mesh.TextMatch{Kind: mesh.TextExact, Value: namespace}),
		},
	})
}

// comesFrom has a match hold for clients at certain addresses alone.
func comesFrom(to *routev3.RouteMatch, m *mesh.HTTPMatch) {
	if len(m.Labels) == 0 {
		return
	}
	at := &matcherv3.AddressMatcher{}
	for _, a := range m.At {
		at.Ranges = append(at.Ranges, &xdscore.CidrRange{AddressPrefix: a.String(), PrefixLen: wrapperspb.UInt32(uint32(a.BitLen()))})
	}
	to.FilterState = append(to.FilterState, &matcherv3.FilterStateMatcher{Key: stateAddress, Matcher: &matcherv3.FilterStateMatcher_AddressMatch{AddressMatch: at}})
}

// match is all conditions of one match.
func match(m *mesh.HTTPMatch) *routev3.RouteMatch {
	out := prefix("/")
	if m.IgnoreCase {
		out.CaseSensitive = wrapperspb.Bool(false)
	}
	switch m.Path.Kind {
	case mesh.TextExact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Path.Value}
	case mesh.TextPrefix:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: m.Path.Value}
	case mesh.TextPath:
		if p := strings.TrimRight(m.Path.Value, "/"); p != "" {
			out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: p}
		}
	case mesh.TextRegex:
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: m.Path.Value}}
	}
	header := func(name string, s mesh.TextMatch, invert bool) {
		if h := headerMatch(name, s, invert); h != nil {
			out.Headers = append(out.Headers, h)
		}
	}
	header(":method", m.Method, false)
	header(":scheme", m.Scheme, false)
	header(":authority", m.Authority, false)
	for _, h := range m.Headers {
		if h.Match.Kind == mesh.TextAny {
			out.Headers = append(out.Headers, present(h.Name, h.Invert))
			continue
		}
		header(h.Name, h.Match, h.Invert)
	}
	for _, q := range m.Query {
		p := &routev3.QueryParameterMatcher{Name: q.Name}
		if s := stringMatcher(q.Match); s != nil {
			p.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_StringMatch{StringMatch: s}
		} else {
			p.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_PresentMatch{PresentMatch: true}
		}
		out.QueryParameters = append(out.QueryParameters, p)
	}
	return out
}

func present(name string, invert bool) *routev3.HeaderMatcher {
	return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}, InvertMatch: invert}
}

func headerMatch(name string, s mesh.TextMatch, invert bool) *routev3.HeaderMatcher {
	if s.Kind == mesh.TextAbsent {
		return present(name, true)
	}
	m := stringMatcher(s)
	if m == nil {
		return nil
	}
	return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m}, InvertMatch: invert}
}

func stringMatcher(s mesh.TextMatch) *matcherv3.StringMatcher {
	switch s.Kind {
	case mesh.TextExact:
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s.Value}}
	case mesh.TextPrefix, mesh.TextPath:
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: s.Value}}
	case mesh.TextSuffix:
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: s.Value}}
	case mesh.TextRegex:
		return regexMatcher(s.Value)
	}
	return nil
}

func respond(status uint32, body string) *routev3.Route_DirectResponse {
	a := &routev3.DirectResponseAction{Status: status}
	if body != "" {
		a.Body = &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: body}}
	}
	return &routev3.Route_DirectResponse{DirectResponse: a}
}

var redirectCodes = map[uint32]routev3.RedirectAction_RedirectResponseCode{
	301: routev3.RedirectAction_MOVED_PERMANENTLY, 302: routev3.RedirectAction_FOUND, 303: routev3.RedirectAction_SEE_OTHER,
	307: routev3.RedirectAction_TEMPORARY_REDIRECT, 308: routev3.RedirectAction_PERMANENT_REDIRECT,
}

func redirect(c chain, r *mesh.HTTPRedirect, m *mesh.HTTPMatch) *routev3.Route_Redirect {
	a := &routev3.RedirectAction{HostRedirect: r.Host, PortRedirect: redirectPort(c, r), ResponseCode: redirectCodes[r.Code]}
	if r.Scheme != "" {
		a.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: r.Scheme}
	}
	switch {
	case r.Prefix != nil:
		prefix, regex := replacePrefix(*r.Prefix, m)
		a.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: prefix}
		if regex != nil {
			a.PathRewriteSpecifier = &routev3.RedirectAction_RegexRewrite{RegexRewrite: regex}
		}
	case r.Path != "":
		a.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: r.Path}
	}
	return &routev3.Route_Redirect{Redirect: a}
}

// redirectPort is the port that a redirect names; 0 leaves what is in the request, without one of a new host.
func redirectPort(c chain, r *mesh.HTTPRedirect) uint32 {
	usual := map[string]uint16{"http": 80, "https": 443}
	if !r.OwnPort {
		return uint32(r.Port)
	}
	port := r.Port
	if port == 0 && r.Scheme != "" {
		port = usual[r.Scheme]
	} else if port == 0 {
		port = c.port.Port
	}
	// What goes without saying is left out where nothing else would stand there instead.
	own := "http"
	if c.ingress != nil && c.ingress.TLS != nil {
		own = "https"
	}
	implied := port == usual[cmp.Or(r.Scheme, own)]
	if implied && (r.Host != "" || c.port.Port == usual[own]) {
		return 0
	}
	if r.Port == 0 && r.Scheme == "" && r.Host == "" { // the request's host says it
		return 0
	}
	return uint32(port)
}

// forward sends requests to backends.
func (b *builder) forward(c chain, r *mesh.HTTPRule, m *mesh.HTTPMatch) *routev3.Route_Route {
	a := &routev3.RouteAction{Timeout: durationpb.New(r.Timeout), RetryPolicy: b.retries(r.Retries), ClusterNotFoundResponseCode: routev3.RouteAction_INTERNAL_SERVER_ERROR}
	if r.GRPC {
		a.ClusterNotFoundResponseCode = routev3.RouteAction_SERVICE_UNAVAILABLE
	}
	if r.Timeout > 0 { // for gRPC's own header, which may only shorten it
		a.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(r.Timeout)}
	}
	var total uint32
	for _, t := range r.Backends {
		total += t.Weight
	}
	switch {
	case len(r.Backends) == 1:
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: b.backend(c, &r.Backends[0])}
	case total == 0:
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: blackHole}
	default:
		w := &routev3.WeightedCluster{}
		for i := range r.Backends {
			t := &r.Backends[i]
			share := &routev3.WeightedCluster_ClusterWeight{Name: b.backend(c, t), Weight: wrapperspb.UInt32(t.Weight)}
			headers(t.Request, &share.RequestHeadersToAdd, &share.RequestHeadersToRemove)
			headers(t.Response, &share.ResponseHeadersToAdd, &share.ResponseHeadersToRemove)
			w.Clusters = append(w.Clusters, share)
		}
		a.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: w}
	}
	if r.Rewrite != nil {
		rewrite(a, r.Rewrite, m)
	}
	a.HashPolicy = b.hashPolicies(c, r)
	for i := range r.Mirrors {
		a.RequestMirrorPolicies = append(a.RequestMirrorPolicies, &routev3.RouteAction_RequestMirrorPolicy{
			Cluster:                       b.backend(c, &r.Mirrors[i].Backend),
			RuntimeFraction:               &corev3.RuntimeFractionalPercent{DefaultValue: share(r.Mirrors[i].Millionths)},
			DisableShadowHostSuffixAppend: true,
		})
	}
	a.UpgradeConfigs = []*routev3.RouteAction_UpgradeConfig{{UpgradeType: "websocket"}}
	return &routev3.Route_Route{Route: a}
}

// backend names the cluster of a backend, and has it made.
func (b *builder) backend(c chain, t *mesh.HTTPBackend) string {
	if t.Invalid != "" {
		return nowhere
	}
	if b.lookup(t.Service) == nil {
		return blackHole
	}
	k := b.target(c, t)
	k.http = true
	b.targets[k] = true
	return k.name()
}

// target is where a backend is.
func (b *builder) target(c chain, t *mesh.HTTPBackend) target {
	k := target{service: t.Service, port: b.portOf(c, t), subset: t.Subset}
	if svc := b.lookup(t.Service); svc != nil && svc.RuledBy(t.From) {
		k.from = t.From
	}
	return k
}

// portOf is the port of a backend. One that none is named of has the only port of the service, at a gateway, whose own ports are
// not the service's; or else that of the listener.
func (b *builder) portOf(c chain, t *mesh.HTTPBackend) uint16 {
	if t.Port != 0 {
		return t.Port
	}
	if s := b.lookup(t.Service); c.ingress != nil && s != nil && len(s.Ports) == 1 {
		return s.Ports[0].Port
	}
	return c.port.Port
}

func rewrite(a *routev3.RouteAction, r *mesh.HTTPRewrite, m *mesh.HTTPMatch) {
	if r.Host != "" {
		a.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: r.Host}
	}
	switch {
	case r.Regex != "":
		a.RegexRewrite = substitute(r.Regex, r.Substitution)
	case r.Path != nil:
		a.RegexRewrite = substitute("^[^?]*", literal(*r.Path)) // the query stays
	case r.Prefix != nil:
		a.PrefixRewrite, a.RegexRewrite = replacePrefix(*r.Prefix, m)
	}
}

func literal(s string) string { return strings.ReplaceAll(s, `\`, `\\`) }

// replacePrefix puts another prefix for the one that was matched. Where either ends with a slash Envoy would leave one too
// many, or one too few: there it is done by an expression.
func replacePrefix(to string, m *mesh.HTTPMatch) (prefix string, _ *matcherv3.RegexMatchAndSubstitute) {
	if m == nil || m.Path.Kind != mesh.TextPath {
		return to, nil
	}
	from, to := strings.TrimRight(m.Path.Value, "/"), strings.TrimRight(to, "/")
	switch {
	case from == "":
		return "", substitute("^/", literal(to)+"/")
	case to == "":
		return "", substitute("^"+regexp.QuoteMeta(from)+"/*", "/")
	}
	return to, nil
}

func substitute(pattern, by string) *matcherv3.RegexMatchAndSubstitute {
	return &matcherv3.RegexMatchAndSubstitute{Pattern: &matcherv3.RegexMatcher{Regex: pattern}, Substitution: by}
}

// defaultRetryOn is what nobody can have acted on.
const defaultRetryOn = "connect-failure,refused-stream,unavailable,cancelled"

// defaultAttempts is how often. Who refuses has the fewest requests and is chosen first: while 3 of 15 endpoints are gone and
// not known to be, as in a rollout, one request in 70 finds all three with its first attempt and two more.
const defaultAttempts = 5

func (b *builder) retries(r *mesh.HTTPRetries) *routev3.RetryPolicy {
	if r == nil {
		r = &mesh.HTTPRetries{Attempts: defaultAttempts}
	}
	if r.Attempts == 0 {
		return nil
	}
	p := &routev3.RetryPolicy{
		RetryOn: r.On, NumRetries: wrapperspb.UInt32(r.Attempts),
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name:       "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: b.config(&previoushostsv3.PreviousHostsPredicate{})},
		}},
		HostSelectionRetryMaxAttempts: 5,
		RetriableStatusCodes:          r.StatusCodes,
	}
	if p.RetryOn == "" {
		p.RetryOn = defaultRetryOn
	}
	if len(r.StatusCodes) > 0 && !slices.Contains(strings.Split(p.RetryOn, ","), "retriable-status-codes") {
		p.RetryOn += ",retriable-status-codes"
	}
	if r.Backoff > 0 {
		p.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: durationpb.New(r.Backoff), MaxInterval: durationpb.New(10 * r.Backoff)}
	}
	if r.PerTry > 0 {
		p.PerTryTimeout = durationpb.New(r.PerTry)
	}
	return p
}

func share(millionths uint32) *typev3.FractionalPercent {
	return &typev3.FractionalPercent{Numerator: min(millionths, mesh.Million), Denominator: typev3.FractionalPercent_MILLION}
}

// perFilter is what filters before the router do for a rule.
func (b *builder) perFilter(r *mesh.HTTPRule) map[string]*anypb.Any {
	out := map[string]*anypb.Any{}
	if r.Delay != nil || r.Abort != nil {
		f := &faultv3.HTTPFault{}
		if r.Delay != nil {
			f.Delay = &commonfaultv3.FaultDelay{
				FaultDelaySecifier: &commonfaultv3.FaultDelay_FixedDelay{FixedDelay: durationpb.New(r.Delay.Fixed)}, Percentage: share(r.Delay.Millionths),
			}
		}
		if r.Abort != nil {
			f.Abort = &faultv3.FaultAbort{Percentage: share(r.Abort.Millionths)}
			if r.Abort.Status != 0 {
				f.Abort.ErrorType = &faultv3.FaultAbort_HttpStatus{HttpStatus: r.Abort.Status}
			} else {
				f.Abort.ErrorType = &faultv3.FaultAbort_GrpcStatus{GrpcStatus: r.Abort.GRPC}
			}
		}
		out[faultFilter] = b.config(f)
	}
	if r.CORS != nil {
		policy, asked := corsPolicy(r.CORS)
		out[corsFilter] = b.config(policy)
		if len(asked) > 0 {
			out[askedFilter] = b.config(&headermutationv3.HeaderMutationPerRoute{Mutations: &headermutationv3.Mutations{ResponseMutations: asked}})
		}
	}
	if r.Ask != nil {
		out[routeAskFilter] = b.routeAsks(r.Ask)
	}
	if r.Session != nil {
		out[sessionFilter] = b.config(&sessionv3.StatefulSessionPerRoute{Override: &sessionv3.StatefulSessionPerRoute_StatefulSession{StatefulSession: b.session(r.Session)}})
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// session has Envoy write the address of an endpoint into answers.
func (b *builder) session(s *mesh.HTTPSession) *sessionv3.StatefulSession {
	if s.Header {
		return &sessionv3.StatefulSession{SessionState: &corev3.TypedExtensionConfig{
			Name: "envoy.http.stateful_session.header", TypedConfig: b.config(&headersessionv3.HeaderBasedSessionState{Name: s.Name}),
		}}
	}
	cookie := &typehttpv3.Cookie{Name: s.Name, Path: "/"}
	if s.TTL > 0 {
		cookie.Ttl = durationpb.New(s.TTL)
	}
	return &sessionv3.StatefulSession{SessionState: &corev3.TypedExtensionConfig{
		Name: "envoy.http.stateful_session.cookie", TypedConfig: b.config(&cookiesessionv3.CookieBasedSessionState{Cookie: cookie}),
	}}
}

// corsPolicy is what the filter for CORS does, and what of its answers another one says: what the preflight asks for.
func corsPolicy(c *mesh.HTTPCORS) (p *corsv3.CorsPolicy, asked []*mutationv3.HeaderMutation) {
	list := func(values []string, name, of string) string {
		if !c.Asked || !slices.Contains(values, "*") {
			return strings.Join(values, ",")
		}
		asked = append(asked, &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Append{Append: &corev3.HeaderValueOption{
			Header:       &corev3.HeaderValue{Key: name, Value: "%REQ(" + of + ")%"},
			AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
		}}})
		return ""
	}
	p = &corsv3.CorsPolicy{
		AllowMethods:  list(c.Methods, "access-control-allow-methods", "access-control-request-method"),
		AllowHeaders:  list(c.AllowHeaders, "access-control-allow-headers", "access-control-request-headers"),
		ExposeHeaders: strings.Join(c.ExposeHeaders, ","), AllowCredentials: wrapperspb.Bool(c.Credentials),
		FilterEnabled: &corev3.RuntimeFractionalPercent{DefaultValue: share(mesh.Million)},
		// What is not allowed is not kept from the application, only its answer from the page.
		ForwardNotMatchingPreflights: wrapperspb.Bool(!c.Answer),
	}
	if c.MaxAge > 0 {
		p.MaxAge = fmt.Sprint(int(c.MaxAge / time.Second))
	}
	for _, o := range c.Origins {
		if s := stringMatcher(o); s != nil {
			p.AllowOriginStringMatch = append(p.AllowOriginStringMatch, s)
		}
	}
	return p, asked
}

func headers(h mesh.HTTPHeaders, add *[]*corev3.HeaderValueOption, remove *[]string) {
	put := func(list []mesh.HTTPHeader, how corev3.HeaderValueOption_HeaderAppendAction) {
		for _, v := range list {
			// A percent sign begins one of Envoy's variables.
			*add = append(*add, &corev3.HeaderValueOption{
				Header: &corev3.HeaderValue{Key: v.Name, Value: strings.ReplaceAll(v.Value, "%", "%%")}, AppendAction: how, KeepEmptyValue: true,
			})
		}
	}
	put(h.Set, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD)
	put(h.Add, corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD)
	*remove = append(*remove, h.Remove...)
}

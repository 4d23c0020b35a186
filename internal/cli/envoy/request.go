package envoy

import (
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Names that the configuration of waypoints has.
const (
	mainListener   = "main_internal"
	peerPrincipal  = "io.istio.peer_principal"
	peerAddress    = "envoy.filters.listener.original_dst.remote_ip"
	tokenPrincipal = "warren.token_principal"
	tokenFilter    = "warren.token"  // is told what to do where tokens are verified
	customFilter   = "warren.custom" // notes whether a provider is to be asked
	askFilter      = "envoy.filters.http.ext_authz"
	routeAskFilter = "warren.external-auth"
	tokenChain     = "|tokens|" // in the name of the filter that verifies them
	limitChain     = "|limits|" // in the name of the filter that counts requests

	counterPrefix = "warren.counted." // and of those that ask a service which does
)

// followed are the HTTP filters whose doing is followed, or that let everything pass.
var followed = []string{"warren.audit", customFilter, "warren.deny", "warren.allow", tokenFilter, "envoy.filters.http.cors", "envoy.filters.http.header_mutation", "envoy.filters.http.fault", "envoy.filters.http.stateful_session", "envoy.filters.http.router", "envoy.filters.http.set_filter_state"}

// Config is what a waypoint's Envoy holds.
type Config struct {
	Listeners  Value // of /config_dump?resource=dynamic_listeners
	Routes     Value // of /config_dump?resource=dynamic_route_configs
	Extensions Value // of /config_dump?resource=ecds_filters
	Clusters   Value // of /clusters?format=json
}

// Request is what a client asks of a waypoint.
type Request struct {
	Dst       netip.AddrPort // what the client connected to: the service's address and port
	Source    netip.Addr
	Principal string // the client's, spiffe://...
	Method    string
	Host      string
	Path      string
	Headers   map[string]string // by lower-case name

	tokens bool // the waypoint looks for some
}

func (q *Request) header(name string) (string, bool) {
	switch name {
	case ":method":
		return q.Method, true
	case ":authority", "host":
		return q.Host, true
	case ":path":
		return q.Path, true
	case ":scheme":
		return "http", true
	}
	v, ok := q.Headers[name]
	return v, ok
}

// Outcome is what becomes of a request.
type Outcome struct {
	HTTP    bool // it is looked at as a request; else as a connection
	Allowed bool
	Why     string   // in words
	Policy  string   // namespace/name of the policy that decided
	Rule    int      // of it, from 1
	Route   string   // name of the route
	Status  int      // with which Envoy itself answers; 0: it does not
	To      []Target // where it is sent
	Limits  []Limit  // that it is counted by; whether it is one too many is not known
	Unknown []string // what was not followed
}

// Limit is how many requests a bucket lets through.
type Limit struct {
	Name     string // namespace/object/number
	Requests int
	Per      string // seconds, as in "60s"
	Clients  bool   // there is a bucket for each client
	Together bool   // for all pods, which a service counts
}

// Target is a cluster to which a part of the requests goes.
type Target struct {
	Cluster string
	Weight  int
}

// Decide says what becomes of a request, by what Envoy holds.
func (c Config) Decide(q Request) Outcome {
	q.Path = normal(q.Path)
	l := c.listener()
	if !l.Is() {
		return Outcome{Why: "the waypoint has no configuration yet"}
	}
	name, known := choose(l.At("filter_chain_matcher"), &q)
	if !known {
		return Outcome{Unknown: []string{unknown{"a route of connections by server names, or by clients"}.Error()}}
	}
	chain := Value{}
	for _, x := range l.At("filter_chains").List() {
		if x.At("name").Text() == name {
			chain = x
		}
	}
	if name == "" || !chain.Is() {
		return Outcome{Why: "the waypoint does not take " + q.Dst.String()}
	}
	for _, f := range chain.At("filters").List() {
		cfg := f.At("typed_config")
		kind := cfg.At("@type").Text()
		switch {
		case strings.HasSuffix(kind, ".rbac.v3.RBAC"):
			if cfg.At("rules").Is() {
				allow, by, err := q.rbac(cfg.At("rules"))
				if err != nil {
					return Outcome{Unknown: []string{err.Error()}}
				}
				if !allow {
					return refusedBy(Outcome{}, by)
				}
			}
		case strings.HasSuffix(kind, ".HttpConnectionManager"):
			return c.http(cfg, q)
		case strings.HasSuffix(kind, ".TcpProxy"):
			return Outcome{Allowed: true, Why: "no policy keeps the connection out", To: []Target{{cfg.At("cluster").Text(), 1}}}
		default:
			return Outcome{Unknown: []string{"the filter " + f.At("name").Text() + " is not followed here"}}
		}
	}
	return Outcome{Why: "the waypoint does nothing with it"}
}

func (c Config) listener() Value {
	for _, x := range c.Listeners.At("configs").List() {
		if l := x.At("active_state", "listener"); l.At("name").Text() == mainListener {
			return l
		}
	}
	return Value{}
}

// limits are those of a filter that count a request.
func (c Config) limits(filter string, q *Request) (out []Limit, err error) {
	counts := map[string]bool{}
	for _, x := range c.Extensions.At("configs").List() {
		f := x.At("ecds_filter")
		if f.At("name").Text() != filter {
			continue
		}
		for _, r := range f.At("typed_config", "rate_limits").List() {
			actions := r.At("actions").List()
			if len(actions) == 0 {
				continue
			}
			name, ok, e := countedBy(actions[0], q) // the others say whose bucket
			counts[name], err = ok, cmpErr(err, e)
		}
		for _, d := range f.At("typed_config", "descriptors").List() {
			entries, b := d.At("entries").List(), d.At("token_bucket")
			if len(entries) > 0 && counts[entries[0].At("value").Text()] {
				out = append(out, Limit{entries[0].At("value").Text(), b.At("tokens_per_fill").Int(), b.At("fill_interval").Text(), len(entries) > 1, false})
			}
		}
	}
	return out, err
}

// countedBy reports whether a request is counted by the limit that an action names.
func countedBy(which Value, q *Request) (name string, ok bool, err error) {
	if match := which.At("header_value_match"); match.Is() {
		ok, err = allOf(match.At("headers").List(), func(m Value) (bool, error) { return matchHeader(m, q) })
		return match.At("descriptor_value").Text(), ok, err
	}
	return which.At("generic_key", "descriptor_value").Text(), true, nil
}

// unitSeconds are the times that services count by.
var unitSeconds = map[string]string{"SECOND": "1s", "MINUTE": "60s", "HOUR": "3600s"}

// together adds the limits that a service is asked about at a stage.
func (o *Outcome) together(host Value, stage int, q *Request) (err error) {
	for _, r := range host.At("rate_limits").List() {
		actions := r.At("actions").List()
		if r.At("stage").Int() != stage || len(actions) == 0 {
			continue
		}
		name, ok, e := countedBy(actions[0], q)
		if err = cmpErr(err, e); ok {
			limit := r.At("limit", "rate_limit")
			o.Limits = append(o.Limits, Limit{name, limit.At("requests_per_unit").Int(), unitSeconds[limit.At("unit").Text()], len(actions) > 1, true})
		}
	}
	return err
}

// choose walks a matcher to the name of a filter chain; ok is false where it asks for what is not known here.
func choose(m Value, q *Request) (_ string, ok bool) {
	for m.Is() {
		key := ""
		switch m.At("matcher_tree", "input", "name").Text() {
		case "ip":
			key = q.Dst.Addr().String()
		case "port":
			key = strconv.Itoa(int(q.Dst.Port()))
		case "protocol":
			if q.Method != "" {
				key = "'http/1.1'"
			}
		default:
			return "", false
		}
		on := m.At("matcher_tree", "exact_match_map", "map", key)
		if !on.Is() {
			on = m.At("on_no_match")
		}
		if n := on.At("action", "name").Text(); n != "" {
			return n, true
		}
		m = on.At("matcher")
	}
	return "", true
}

func (c Config) http(hcm Value, q Request) Outcome {
	out := Outcome{HTTP: true}
	table := hcm.At("route_config")
	if name := hcm.At("rds", "route_config_name").Text(); name != "" {
		table = Value{}
		for _, x := range c.Routes.At("configs").List() {
			if r := x.At("route_config"); r.At("name").Text() == name {
				table = r
			}
		}
	}
	if !table.Is() {
		out.Why = "the waypoint has no routes for it yet"
		return out
	}
	q.tokens = table.At("typed_per_filter_config", tokenFilter).Is()
	host := hostOf(table, q.Host)
	route := Value{}
	for _, r := range host.At("routes").List() {
		ok, err := q.matches(r.At("match"))
		if err != nil {
			out.Unknown = append(out.Unknown, err.Error())
			return out
		}
		if ok {
			route = r
			break
		}
	}
	out.Route = route.At("name").Text()
	allowedBy, asked := "", false
	for _, f := range hcm.At("http_filters").List() {
		name := f.At("name").Text()
		if strings.Contains(name, tokenChain) {
			if q.mayHaveToken() {
				out.Unknown = append(out.Unknown, "whether a token in the request is valid is not followed here")
			}
			continue
		}
		if strings.Contains(name, limitChain) {
			var err error
			if out.Limits, err = c.limits(name, &q); err != nil {
				out.Unknown = append(out.Unknown, err.Error())
			}
			continue
		}
		if strings.HasPrefix(name, counterPrefix) {
			if err := out.together(host, f.At("typed_config", "stage").Int(), &q); err != nil {
				out.Unknown = append(out.Unknown, err.Error())
			}
			continue
		}
		own := Value{}
		for _, at := range []Value{route, host, table} { // the closest says it
			if own = at.At("typed_per_filter_config", name); own.Is() {
				break
			}
		}
		if f.At("disabled").True() && !own.Is() {
			continue // it is not there for this route
		}
		if name == askFilter {
			if asked && own.Is() {
				out.Unknown = append(out.Unknown, "what the provider of a CUSTOM policy answers is not followed here")
			}
			continue
		}
		if name == routeAskFilter {
			out.Unknown = append(out.Unknown, "the route asks a service (ExternalAuth), whose answer is not followed here")
			continue
		}
		if !slices.Contains(followed, name) {
			out.Unknown = append(out.Unknown, "the filter "+name+" is not followed here")
			continue
		}
		rules := f.At("typed_config", "rules")
		decides := strings.HasSuffix(f.At("typed_config", "@type").Text(), ".rbac.v3.RBAC")
		if strings.HasSuffix(own.At("@type").Text(), ".RBACPerRoute") {
			rules = own.At("rbac", "rules")
			if shadow := own.At("rbac", "shadow_rules"); name == customFilter && shadow.Is() {
				_, by, err := q.rbac(shadow)
				asked = err != nil || by != ""
			}
		}
		if !decides || !rules.Is() {
			continue
		}
		allow, by, err := q.rbac(rules)
		switch {
		case err != nil:
			out.Unknown = append(out.Unknown, err.Error())
			return out
		case !allow:
			return refusedBy(out, by)
		case by != "":
			allowedBy = by
		}
	}
	out.Policy, out.Rule = policyOf(allowedBy)
	out.Why = "no policy keeps the request out"
	if out.Policy != "" {
		out.Why = "allowed"
	}
	return act(out, route)
}

// act says what a route does with a request that may be.
func act(out Outcome, route Value) Outcome {
	to := route.At("route")
	switch {
	case !route.Is():
		out.Status, out.Why, out.Policy, out.Rule = 404, "no route matches", "", 0
	case route.At("direct_response").Is():
		out.Policy, out.Rule = "", 0
		out.Status, out.Why = route.At("direct_response", "status").Int(), "the route answers by itself"
		if out.Route == "none" {
			out.Why = "no rule matches"
		}
	case route.At("redirect").Is():
		out.Allowed, out.Status, out.Why = true, 301, "the route redirects"
		if code := route.At("redirect", "response_code").Text(); code != "" {
			out.Status = map[string]int{"FOUND": 302, "SEE_OTHER": 303, "TEMPORARY_REDIRECT": 307, "PERMANENT_REDIRECT": 308}[code]
		}
	case to.At("cluster").Is():
		out.Allowed, out.To = true, []Target{{to.At("cluster").Text(), 1}}
	case to.At("weighted_clusters").Is():
		out.Allowed = true
		for _, w := range to.At("weighted_clusters", "clusters").List() {
			if n := w.At("weight").Int(); n > 0 {
				out.To = append(out.To, Target{w.At("name").Text(), n})
			}
		}
	default:
		out.Unknown = append(out.Unknown, "what the route "+out.Route+" does is not followed here")
	}
	if f := route.At("typed_per_filter_config", "envoy.filters.http.fault"); f.At("abort").Is() {
		out.Unknown = append(out.Unknown, "the route answers some requests with a fault")
	}
	return out
}

func refusedBy(out Outcome, by string) Outcome {
	out.Allowed, out.Why = false, "no ALLOW policy matches"
	if out.Policy, out.Rule = policyOf(by); out.Policy != "" {
		out.Why = "denied"
	}
	return out
}

// policyOf reads the name that the control plane gives to a rule of a policy.
func policyOf(name string) (policy string, rule int) {
	ns, rest, ok := strings.Cut(strings.TrimPrefix(name, "ns["), "]-policy[")
	p, n, ok2 := strings.Cut(rest, "]-rule[")
	if !ok || !ok2 {
		return "", 0
	}
	i, err := strconv.Atoi(strings.TrimSuffix(n, "]"))
	if err != nil {
		return "", 0
	}
	return ns + "/" + p, i + 1
}

// hostOf finds the virtual host of a name: the exact one, else the longest end, else the longest beginning, else all.
func hostOf(table Value, host string) Value {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if table.At("ignore_port_in_host_matching").True() {
		if h, _, ok := strings.Cut(host, ":"); ok && !strings.Contains(h, "[") {
			host = h
		}
	}
	var best Value
	rank, length := 0, 0
	for _, h := range table.At("virtual_hosts").List() {
		for _, d := range h.At("domains").List() {
			domain, r := strings.ToLower(d.Text()), 0
			switch {
			case domain == "*":
				r = 1
			case domain == host:
				r = 4
			case strings.HasPrefix(domain, "*") && strings.HasSuffix(host, domain[1:]) && len(host) >= len(domain):
				r = 3
			case strings.HasSuffix(domain, "*") && strings.HasPrefix(host, strings.TrimSuffix(domain, "*")) && len(host) >= len(domain):
				r = 2
			}
			if r > rank || r > 0 && r == rank && len(domain) > length {
				best, rank, length = h, r, len(domain)
			}
		}
	}
	return best
}

// matches compares a request with a RouteMatch.
func (q *Request) matches(m Value) (bool, error) {
	if m.At("runtime_fraction").Is() || m.At("dynamic_metadata").Is() || m.At("tls_context").Is() || m.At("grpc").Is() || m.At("cookies").Is() {
		return false, unknown{"a route by " + strings.Join(m.Keys(), ", ")}
	}
	if ok, err := allOf(m.At("filter_state").List(), q.comesFrom); !ok || err != nil {
		return false, err
	}
	p, query, _ := strings.Cut(q.Path, "?")
	lower := func(s string) string { return s }
	if cs := m.At("case_sensitive"); cs.Is() && !cs.True() {
		lower = strings.ToLower
	}
	ok, err := true, error(nil)
	switch {
	case m.At("path").Is():
		ok = lower(p) == lower(m.At("path").Text())
	case m.At("path_separated_prefix").Is():
		prefix := lower(m.At("path_separated_prefix").Text())
		ok = lower(p) == prefix || strings.HasPrefix(lower(p), prefix+"/")
	case m.At("safe_regex").Is():
		ok, err = matchRegex(m.At("safe_regex", "regex").Text(), p)
	case m.At("prefix").Is():
		ok = strings.HasPrefix(lower(p), lower(m.At("prefix").Text()))
	default:
		return false, unknown{"a route by " + strings.Join(m.Keys(), ", ")}
	}
	if !ok || err != nil {
		return false, err
	}
	if ok, err = allOf(m.At("headers").List(), func(h Value) (bool, error) { return matchHeader(h, q) }); !ok || err != nil {
		return false, err
	}
	given := map[string]string{}
	for kv := range strings.SplitSeq(query, "&") {
		if k, v, _ := strings.Cut(kv, "="); k != "" {
			if _, twice := given[k]; !twice {
				given[k] = v
			}
		}
	}
	return allOf(m.At("query_parameters").List(), func(x Value) (bool, error) {
		v, there := given[x.At("name").Text()]
		if !there || !x.At("string_match").Is() {
			return there, nil
		}
		return matchString(x.At("string_match"), v)
	})
}

// comesFrom compares who asks, and from where, with a FilterStateMatcher.
func (q *Request) comesFrom(m Value) (bool, error) {
	switch key := m.At("key").Text(); {
	case key == peerPrincipal && m.At("string_match").Is():
		return matchString(m.At("string_match"), q.Principal)
	case key == peerAddress && m.At("address_match").Is():
		return anyOf(m.At("address_match", "ranges").List(), func(r Value) (bool, error) { return matchCIDR(r, q.Source) })
	default:
		return false, unknown{"a route by " + key}
	}
}

// normal resolves the dots of a path, as Envoy is told to.
func normal(p string) string {
	p, query, asked := strings.Cut(p, "?")
	p = strings.ReplaceAll(p, `\`, "/")
	if strings.Contains(p, "/.") {
		segments := strings.Split(p, "/")
		out := segments[:0:0]
		for i, s := range segments {
			last := i == len(segments)-1
			switch {
			case s == "." && last:
				out = append(out, "")
			case s == ".":
			case s == "..":
				if len(out) > 1 {
					out = out[:len(out)-1]
				}
				if last {
					out = append(out, "")
				}
			default:
				out = append(out, s)
			}
		}
		p = strings.Join(out, "/")
	}
	if !strings.HasPrefix(p, "/") {
		p = path.Join("/", p)
	}
	if asked {
		p += "?" + query
	}
	return p
}

// Endpoints are the addresses that a cluster sends to, and whether Envoy thinks that they work.
func (c Config) Endpoints(cluster string) map[string]bool {
	out := map[string]bool{}
	for _, x := range c.Clusters.At("cluster_statuses").List() {
		if x.At("name").Text() != cluster {
			continue
		}
		for _, h := range x.At("host_statuses").List() {
			out[addressText(h.At("address"))] = health(h.At("health_status")) == "healthy"
		}
	}
	return out
}

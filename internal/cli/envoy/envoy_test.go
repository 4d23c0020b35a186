package envoy

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

func load(t *testing.T, name string) Value {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	v, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestRequestsAreDecidedAsEnvoyHasIt(t *testing.T) {
	c := Config{Listeners: load(t, "listeners.json"), Routes: load(t, "routes.json"), Extensions: load(t, "extensions.json"), Clusters: load(t, "clusters.json")}
	const ui, other = "spiffe://cluster.local/ns/shop/sa/ui", "spiffe://cluster.local/ns/shop/sa/other"
	for name, x := range map[string]struct {
		change func(*Request)
		want   string
	}{
		"allowed":                      {nil, "true allowed shop/stock 1 status 0 to outbound|80|http|inventory.shop.svc.cluster.local 1"},
		"another path":                 {func(q *Request) { q.Path = "/other" }, "false no ALLOW policy matches  0 status 0 to "},
		"another client":               {func(q *Request) { q.Principal = other }, "false no ALLOW policy matches  0 status 0 to "},
		"a denied header":              {func(q *Request) { q.Headers = map[string]string{"x-debug": "1"} }, "false denied shop/no-debug 1 status 0 to "},
		"dots in the path":             {func(q *Request) { q.Path = "/x/.././stock" }, "true allowed shop/stock 1 status 0 to outbound|80|http|inventory.shop.svc.cluster.local 1"},
		"a rule of the routes":         {func(q *Request) { q.Path = "/split"; q.Headers = map[string]string{"x-user": "anna"} }, "true allowed shop/stock 2 status 0 to outbound|80|http/v1|inventory.shop.svc.cluster.local 80, outbound|80|http/v2|inventory.shop.svc.cluster.local 20"},
		"what no rule matches":         {func(q *Request) { q.Path = "/split" }, "false no rule matches  0 status 404 to "},
		"an answer of the route's own": {func(q *Request) { q.Path = "/teapot" }, "false the route answers by itself  0 status 418 to "},
		"an address it has not":        {func(q *Request) { q.Dst = netip.MustParseAddrPort("10.96.0.8:80") }, "false the waypoint does not take 10.96.0.8:80  0 status 0 to "},
		"a connection":                 {func(q *Request) { q.Dst = netip.MustParseAddrPort("10.96.0.7:3306") }, "true no policy keeps the connection out  0 status 0 to outbound|3306|tcp|inventory.shop.svc.cluster.local 1"},
		"a connection, denied": {func(q *Request) { q.Dst = netip.MustParseAddrPort("10.96.0.7:3306"); q.Principal = other },
			"false denied shop/no-debug 2 status 0 to "},
		"a token": {func(q *Request) { q.Path = "/token"; q.Headers = map[string]string{"authorization": "x"} },
			"unknown [whether a token in the request is valid is not followed here ns[shop]-policy[stock]-rule[3]: what is in a token is not followed here]"},
		"a provider that is asked": {func(q *Request) { q.Path = "/asked" }, "unknown [what the provider of a CUSTOM policy answers is not followed here]"},
		"a route that asks":        {func(q *Request) { q.Headers = map[string]string{"x-guard": "1"} }, "unknown [the route asks a service (ExternalAuth), whose answer is not followed here]"},
		"no provider for that":     {func(q *Request) { q.Path, q.Method = "/asked", "PUT" }, "false no ALLOW policy matches  0 status 0 to "},
		"no token":                 {func(q *Request) { q.Path = "/token" }, "false no ALLOW policy matches  0 status 0 to "},
		"an unknown filter":        {func(q *Request) { q.Dst = netip.MustParseAddrPort("10.96.0.7:81") }, "unknown [the filter someone.elses is not followed here]"},
	} {
		q := Request{Dst: netip.MustParseAddrPort("10.96.0.7:80"), Source: netip.MustParseAddr("10.1.0.5"), Principal: ui, Method: "GET", Host: "inventory.shop", Path: "/stock"}
		if x.change != nil {
			x.change(&q)
		}
		out := c.Decide(q)
		var to []string
		for _, t := range out.To {
			to = append(to, fmt.Sprint(t.Cluster, " ", t.Weight))
		}
		got := fmt.Sprint(out.Allowed, " ", out.Why, " ", out.Policy, " ", out.Rule, " status ", out.Status, " to ", strings.Join(to, ", "))
		if len(out.Unknown) > 0 {
			got = fmt.Sprint("unknown ", out.Unknown)
		}
		if got != x.want {
			t.Errorf("%s: %s, want %s", name, got, x.want)
		}
	}
	got := fmt.Sprint(c.Endpoints("outbound|80|http|inventory.shop.svc.cluster.local"))
	if got != "map[10.1.0.9:8080:true 10.1.1.9:8080:false]" {
		t.Error(got)
	}
}

func TestStringsAreComparedAsEnvoyDoes(t *testing.T) {
	for _, x := range []struct {
		matcher, text string
		want          bool
	}{
		{`{"exact":"a"}`, "a", true}, {`{"exact":"a"}`, "A", false}, {`{"exact":"a","ignore_case":true}`, "A", true},
		{`{"prefix":"/a"}`, "/ab", true}, {`{"suffix":"/a"}`, "b/a", true}, {`{"contains":"b"}`, "abc", true},
		{`{"safe_regex":{"regex":"a+"}}`, "aab", false}, {`{"safe_regex":{"regex":"a|ab"}}`, "ab", true}, {`{}`, "", true}, {`{}`, "a", false},
	} {
		v, err := Parse([]byte(x.matcher))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := matchString(v, x.text); got != x.want || err != nil {
			t.Errorf("%s on %q: %t, %v", x.matcher, x.text, got, err)
		}
	}
	v, _ := Parse([]byte(`{"custom":{}}`))
	if _, err := matchString(v, "a"); err == nil {
		t.Error("an unknown comparison is decided")
	}
}

func TestHostsAreChosenAsEnvoyDoes(t *testing.T) {
	table, err := Parse([]byte(`{"virtual_hosts":[{"name":"all","domains":["*"]},{"name":"end","domains":["*.shop"]},{"name":"longer","domains":["*.x.shop"]},
		{"name":"begin","domains":["ui.*"]},{"name":"exact","domains":["ui.shop","ui.shop:80"]}]}`))
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{"ui.shop": "exact", "UI.shop:80": "exact", "a.shop": "end", "a.x.shop": "longer", "ui.bank": "begin", "shop": "all"} {
		if got := hostOf(table, host).At("name").Text(); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
}

func TestPathsAreNormalised(t *testing.T) {
	for in, want := range map[string]string{"/": "/", "/a/../b": "/b", "/a/./b/": "/a/b/", "/a/..": "/", "/../../a": "/a", `/a\b?x=/..`: "/a/b?x=/..", "/.hidden": "/.hidden"} {
		if got := normal(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestTables(t *testing.T) {
	files := map[string]string{"listeners": "listeners.json", "routes": "routes.json", "endpoints": "clusters.json"}
	for _, x := range Tables {
		if files[x.Name] == "" {
			continue
		}
		rows := x.Rows(load(t, files[x.Name]))
		for _, r := range rows {
			if len(r) != len(x.Head) {
				t.Errorf("%s: %d cells under %d heads", x.Name, len(r), len(x.Head))
			}
		}
		if !slices.ContainsFunc(rows, func(r []string) bool {
			return strings.Contains(strings.Join(r, " "), "inventory.shop.svc.cluster.local")
		}) {
			t.Errorf("%s: %v", x.Name, rows)
		}
	}
}

// TestLimitsThatCountARequestAreNamed: whether a request is one too many nobody can say beforehand.
func TestLimitsThatCountARequestAreNamed(t *testing.T) {
	c := Config{Listeners: load(t, "listeners.json"), Routes: load(t, "routes.json"), Extensions: load(t, "extensions.json"), Clusters: load(t, "clusters.json")}
	each, all := Limit{"shop/stock/0", 5, "1s", true, false}, Limit{"shop/stock/1", 3, "60s", false, false}
	for path, want := range map[string][]Limit{"/stock": {each}, "/split?a": {each, all}} {
		out := c.Decide(Request{Dst: netip.MustParseAddrPort("10.96.0.7:80"), Source: netip.MustParseAddr("10.1.0.5"), Principal: "spiffe://cluster.local/ns/shop/sa/ui",
			Method: "GET", Host: "inventory.shop", Path: path, Headers: map[string]string{"x-user": "anna"}})
		if !slices.Equal(out.Limits, want) {
			t.Errorf("%s is counted by %v, want %v", path, out.Limits, want)
		}
	}
}

// TestRoutesByClients compares who asks, and from where; what else a route may ask of a client is not guessed.
func TestRoutesByClients(t *testing.T) {
	q := &Request{Source: netip.MustParseAddr("10.1.0.5"), Principal: "spiffe://cluster.local/ns/shop/sa/ui", Path: "/"}
	const principal, address = `{"prefix": "/", "filter_state": [{"key": "io.istio.peer_principal", "string_match": %s}]}`, `{"prefix": "/", "filter_state": [{"key": "envoy.filters.listener.original_dst.remote_ip", "address_match": {"ranges": [%s]}}]}`
	for _, x := range []struct {
		match string
		want  bool
		known bool
	}{
		{fmt.Sprintf(principal, `{"safe_regex": {"regex": "spiffe://[^/]*/ns/shop/.*"}}`), true, true},
		{fmt.Sprintf(principal, `{"safe_regex": {"regex": "spiffe://[^/]*/ns/blog/.*"}}`), false, true},
		{fmt.Sprintf(address, `{"address_prefix": "10.1.0.4", "prefix_len": 32}, {"address_prefix": "10.1.0.5", "prefix_len": 32}`), true, true},
		{fmt.Sprintf(address, `{"address_prefix": "10.1.0.4", "prefix_len": 32}`), false, true},
		{`{"prefix": "/", "filter_state": [{"key": "other", "string_match": {"exact": "x"}}]}`, false, false},
	} {
		m, err := Parse([]byte(x.match))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := q.matches(m); got != x.want || (err == nil) != x.known {
			t.Errorf("%s: %t %v", x.match, got, err)
		}
	}
	m, err := Parse([]byte(`{"matcher_list": {"matchers": [{"predicate": {}, "on_match": {"action": {"name": "a"}}}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	if name, known := choose(m, q); name != "" || known {
		t.Errorf("a listener's list is taken for known: %q", name)
	}
}

package interop

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
	"github.com/warrenmesh/warren/test/reference"
	"github.com/warrenmesh/warren/waypoint"
)

// TestRouteDifferential draws HTTPRoutes and requests, and compares what Envoy does with what the Gateway API says, as package
// reference reads it.
func TestRouteDifferential(t *testing.T) {
	bin := envoyBinary(t)
	rounds, services, requests := 1, 60, 50
	if *long {
		rounds, services, requests = 20, 100, 50
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	cases, wrong := 0, 0
	for round := range rounds {
		n, bad := routeRound(t, bin, rand.New(rand.NewPCG(seed, uint64(round))), services, requests)
		cases, wrong = cases+n, wrong+bad
	}
	t.Logf("%d requests, %d disagreements", cases, wrong)
	if err := results.Record("route-differential", results.Row{Name: "route-differential", Inputs: cases, Failures: wrong, Figure: float64(wrong), Unit: "disagreements of Envoy and the reference"}); err != nil {
		t.Error(err)
	}
}

var routePorts = []int32{80, 8080}

// routeWorld is Services, each with routes of its own.
type routeWorld struct {
	x      *index.Index
	routes map[string][]*gatewayv1.HTTPRoute // by Service
}

func routeRound(t *testing.T, bin string, r *rand.Rand, services, requests int) (cases, wrong int) {
	x, err := index.New(index.Config{ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", RootNamespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	w := routeWorld{x, map[string][]*gatewayv1.HTTPRoute{}}
	for _, ns := range []string{"shop", "blog"} {
		x.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{"istio.io/use-waypoint": "way", "istio.io/use-waypoint-namespace": "shop"}}})
	}
	for from, to := range map[string]string{"shop": "blog", "blog": "shop"} {
		x.Set(&gatewayv1beta1.ReferenceGrant{ObjectMeta: metav1.ObjectMeta{Namespace: to, Name: "all"}, Spec: gatewayv1.ReferenceGrantSpec{
			From: []gatewayv1.ReferenceGrantFrom{{Group: gatewayv1.GroupName, Kind: "HTTPRoute", Namespace: gatewayv1.Namespace(from)}},
			To:   []gatewayv1.ReferenceGrantTo{{Kind: "Service"}},
		}})
	}
	x.Set(&gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "way"}, Spec: gatewayv1.GatewaySpec{GatewayClassName: "istio-waypoint"}})
	service := func(ns, name string, vip string, labels map[string]string, target int) {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{Selector: labels, ClusterIPs: []string{vip}}}
		for _, p := range routePorts {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http-" + strconv.Itoa(int(p)), Port: p, TargetPort: intstr.FromInt(target)})
		}
		x.Set(s)
	}
	for i, name := range []string{"shop/a", "shop/b", "blog/c", "shop/own"} {
		ns, app, _ := strings.Cut(name, "/")
		ip := "127.1.0." + strconv.Itoa(i+1)
		port := echoBackend(t, ip, name)
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: app, UID: types.UID(app), Labels: map[string]string{"app": app}}}
		p.Spec.NodeName, p.Status.Phase, p.Status.PodIP = "n", corev1.PodRunning, ip
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		x.Set(p)
		if app != "own" {
			service(ns, app, "10.96.1."+strconv.Itoa(i+1), p.Labels, port)
			continue
		}
		for i := range services {
			s := "s" + strconv.Itoa(i)
			service("shop", s, "10.97."+strconv.Itoa(i>>8)+"."+strconv.Itoa(i&255), p.Labels, port)
			for j := range 1 + r.IntN(4) {
				route := drawRoute(t, r, s, j)
				w.routes[s] = append(w.routes[s], route)
				x.Set(route)
			}
		}
	}
	u := x.Commit()
	for k, state := range u.Routes {
		for _, p := range state.Parents {
			if !p.Accepted.OK() || !p.Partly.OK() {
				t.Fatalf("%v: %+v", k, p)
			}
		}
	}
	dir := serveRoutes(t, bin, u.Snapshot)
	for s := range w.routes {
		for range requests {
			q := drawRequest(r, s)
			cases++
			want := reference.Route(q, "shop", s, w.routes[s], func(b string) bool {
				return slices.Contains([]string{"shop/a:80", "shop/b:80", "blog/c:80"}, b) || strings.HasPrefix(b, "shop/"+s+":")
			})
			if said := askRoute(t, dir, s, q, want); said != "" {
				wrong++
				if wrong <= 5 {
					var objects bytes.Buffer
					for _, route := range w.routes[s] {
						b, _ := yaml.Marshal(route)
						fmt.Fprintf(&objects, "%s---\n", b)
					}
					t.Errorf("%+v\nwant %+v\n%s\n%s", q, want, said, objects.String())
				}
			}
		}
	}
	return cases, wrong
}

// echoBackend answers with what it was asked.
func echoBackend(t *testing.T, ip, name string) int {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", ip+":0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		headers := map[string]string{}
		for k, v := range r.Header {
			if strings.HasPrefix(k, "X-T-") {
				headers[strings.ToLower(k)] = strings.Join(v, ",")
			}
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"backend": name, "path": r.RequestURI, "host": r.Host, "headers": headers})
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

func pickOf[T any](r *rand.Rand, of ...T) T { return of[r.IntN(len(of))] }

// drawRoute makes a route of few words, so that they meet.
func drawRoute(t *testing.T, r *rand.Rand, service string, nth int) *gatewayv1.HTTPRoute {
	var rules []string
	for range 1 + r.IntN(3) {
		var matches, filters, backends []string
		prefixes := true
		for range pickOf(r, 0, 1, 1, 2) {
			var m []string
			switch r.IntN(5) {
			case 0:
				m = append(m, fmt.Sprintf("path: {type: Exact, value: %s}", pickOf(r, "/", "/a", "/a/b", "/a/")))
				prefixes = false
			case 1:
				m = append(m, fmt.Sprintf("path: {type: RegularExpression, value: %q}", pickOf(r, "/a.*", "/[ab]", "/.*/b")))
				prefixes = false
			case 2, 3:
				m = append(m, fmt.Sprintf("path: {type: PathPrefix, value: %s}", pickOf(r, "/", "/a", "/a/b", "/a/", "/b")))
			}
			if r.IntN(4) == 0 {
				m = append(m, "method: "+pickOf(r, "GET", "POST"))
			}
			if r.IntN(3) == 0 {
				m = append(m, "headers: ["+pickOf(r, `{name: X-T-A, value: "1"}`, `{name: x-t-a, type: RegularExpression, value: "[12]"}`, `{name: x-t-a, value: "1"}, {name: X-T-B, value: "1"}`, `{name: Host, value: `+service+`}`)+"]")
			}
			if r.IntN(4) == 0 {
				m = append(m, "queryParams: ["+pickOf(r, `{name: q, value: "1"}`, `{name: q, type: RegularExpression, value: "1|2"}`, `{name: q, value: "1"}, {name: p, value: "1"}`)+"]")
			}
			matches = append(matches, "{"+strings.Join(m, ", ")+"}")
		}
		modifier := func(what string) string {
			return pickOf(r, what+`: {set: [{name: X-T-C, value: "9"}], add: [{name: x-t-a, value: "7%"}]}`, what+`: {remove: [x-t-b], set: [{name: x-t-a, value: "5"}]}`)
		}
		replace := func() string {
			if prefixes && len(matches) == 1 && r.IntN(8) > 0 {
				return "path: {type: ReplacePrefixMatch, replacePrefixMatch: " + pickOf(r, "/", "/x", "/x/") + "}"
			}
			return "path: {type: ReplaceFullPath, replaceFullPath: " + pickOf(r, "/", "/full") + "}"
		}
		if r.IntN(3) == 0 {
			filters = append(filters, "{type: RequestHeaderModifier, "+modifier("requestHeaderModifier")+"}")
		}
		if r.IntN(4) == 0 {
			filters = append(filters, "{type: ResponseHeaderModifier, "+modifier("responseHeaderModifier")+"}")
		}
		switch r.IntN(5) {
		case 0:
			f := []string{pickOf(r, "statusCode: 301", "statusCode: 303", "statusCode: 307", "statusCode: 308")}
			for _, more := range []string{"hostname: other.example", "scheme: https", "port: 8443", "port: 80", replace()} {
				if r.IntN(3) == 0 && !(strings.HasPrefix(more, "port") && strings.Contains(strings.Join(f, " "), "port")) {
					f = append(f, more)
				}
			}
			filters = append(filters, "{type: RequestRedirect, requestRedirect: {"+strings.Join(f, ", ")+"}}")
		case 1:
			filters = append(filters, "{type: URLRewrite, urlRewrite: {hostname: other.example, "+replace()+"}}")
			fallthrough
		default:
			for range r.IntN(4) {
				backends = append(backends, pickOf(r, `{name: a, namespace: shop, port: 80}`, `{name: b, namespace: shop, port: 80, weight: 3}`, `{name: c, namespace: blog, port: 80}`,
					`{name: absent, port: 80}`, `{name: a, namespace: shop, port: 81}`, `{name: b, namespace: shop, port: 80, weight: 0}`, `{name: `+service+`, namespace: shop, port: 8080}`))
			}
		}
		rules = append(rules, fmt.Sprintf("{matches: [%s], filters: [%s], backendRefs: [%s]}", strings.Join(matches, ", "), strings.Join(filters, ", "), strings.Join(backends, ", ")))
	}
	route := &gatewayv1.HTTPRoute{ObjectMeta: metav1.ObjectMeta{Namespace: pickOf(r, "shop", "shop", "blog"), Name: service + "-" + strconv.Itoa(nth), CreationTimestamp: metav1.NewTime(time.Unix(int64(r.IntN(3)), 0))}}
	parent := pickOf(r, "", ", port: 80", ", port: 8080")
	if err := yaml.UnmarshalStrict([]byte(fmt.Sprintf(`{parentRefs: [{group: "", kind: Service, namespace: shop, name: %s%s}], rules: [%s]}`, service, parent, strings.Join(rules, ", "))), &route.Spec); err != nil {
		t.Fatal(err)
	}
	return route
}

func drawRequest(r *rand.Rand, service string) reference.Asked {
	q := reference.Asked{
		ClientNamespace: pickOf(r, "shop", "blog"), Port: pickOf(r, routePorts...), Method: pickOf(r, "GET", "GET", "POST"), Host: service,
		Path: pickOf(r, "/", "/a", "/a/", "/a/b", "/a/b/c", "/ab", "/b", "/b/a"), Query: pickOf(r, "", "", "?q=1", "?q=2&p=1", "?p=1&q=1", "?q=12"), Headers: map[string]string{},
	}
	if q.Port != 80 {
		q.Host += ":" + strconv.Itoa(int(q.Port))
	}
	for _, name := range []string{"x-t-a", "x-t-b"} {
		if v := pickOf(r, "", "", "1", "2", "12"); v != "" {
			q.Headers[name] = v
		}
	}
	return q
}

// serveRoutes has Envoy serve every port of every service at a socket of its own, once for each namespace of clients.
func serveRoutes(t *testing.T, bin string, s *mesh.Snapshot) string {
	t.Helper()
	built, err := waypoint.Build(s, mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	g := goldenOf(t, built)
	var chains []object
	for _, l := range g.Listeners {
		if l["name"] == "main_internal" {
			for _, c := range l["filterChains"].([]any) {
				chains = append(chains, c.(object))
			}
		}
	}
	clusters, routes, extensions := static(t, g)
	// The tunnels' certificates would be waited for, and no endpoint here has a tunnel.
	clusters = slices.DeleteFunc(clusters, func(c object) bool {
		return !strings.HasPrefix(c["name"].(string), "outbound|") && c["name"] != "black_hole"
	})
	dir := t.TempDir()
	var listeners []object
	for _, c := range chains {
		parts := strings.Split(c["name"].(string), "|") // inbound-vip|80|http|name
		host, _, _ := strings.Cut(parts[3], ".")
		if parts[2] != "http" || !strings.HasPrefix(host, "s") {
			continue
		}
		for _, ns := range []string{"shop", "blog"} {
			b, _ := json.Marshal(c)
			var chain object
			if err := json.Unmarshal(b, &chain); err != nil {
				t.Fatal(err)
			}
			inline(t, chain, routes, extensions)
			peer := object{"name": "peer", "typedConfig": object{
				"@type": "type.googleapis.com/envoy.extensions.filters.network.set_filter_state.v3.Config",
				"onNewConnection": []any{object{"objectKey": "io.istio.peer_principal", "factoryKey": "envoy.string",
					"formatString": object{"textFormatSource": object{"inlineString": "spiffe://cluster.local/ns/" + ns + "/sa/client"}}}},
			}}
			chain["filters"] = append([]any{peer}, chain["filters"].([]any)...)
			name := host + "-" + parts[1] + "-" + ns
			listeners = append(listeners, object{"name": name, "address": object{"pipe": object{"path": filepath.Join(dir, name)}}, "filterChains": []any{chain}})
		}
	}
	config, err := json.Marshal(object{
		"node": object{"id": "test", "cluster": "test"},
		"bootstrap_extensions": []any{object{"name": "envoy.bootstrap.internal_listener", "typed_config": object{
			"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener"}}},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "envoy.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), bin, "--disable-hot-restart", "--concurrency", "1", "-l", "error", "-c", file)
	cmd.Stdout, cmd.Stderr = io.Discard, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	eventually(t, "Envoy's sockets", time.Minute, func() error {
		for _, l := range listeners {
			c, err := new(net.Dialer).DialContext(t.Context(), "unix", filepath.Join(dir, l["name"].(string)))
			if err != nil {
				return err
			}
			c.Close()
		}
		return nil
	})
	return dir
}

func goldenOf(t *testing.T, r *waypoint.Resources) goldenFile {
	t.Helper()
	var g goldenFile
	put := func(into *[]object, m proto.Message) {
		b, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var o object
		if err := json.Unmarshal(b, &o); err != nil {
			t.Fatal(err)
		}
		*into = append(*into, o)
	}
	for _, m := range r.Listeners {
		put(&g.Listeners, m)
	}
	for _, m := range r.Routes {
		put(&g.Routes, m)
	}
	for _, m := range r.Clusters {
		put(&g.Clusters, m)
	}
	for _, m := range r.Endpoints {
		put(&g.Endpoints, m)
	}
	for _, m := range r.Extensions {
		put(&g.Extensions, m)
	}
	return g
}

// askRoute sends a request and says what is not as it should be.
func askRoute(t *testing.T, dir, service string, q reference.Asked, want reference.Outcome) string {
	t.Helper()
	socket := filepath.Join(dir, service+"-"+strconv.Itoa(int(q.Port))+"-"+q.ClientNamespace)
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, Timeout: time.Minute,
	}
	req, err := http.NewRequestWithContext(t.Context(), q.Method, "http://"+q.Host+q.Path+q.Query, nil)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range q.Headers {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	if want.Status != 0 {
		usual := func(s string) string { // what goes without saying may be said
			scheme, rest, _ := strings.Cut(s, "://")
			host, path, _ := strings.Cut(rest, "/")
			return scheme + "://" + strings.TrimSuffix(host, map[string]string{"http": ":80", "https": ":443"}[scheme]) + "/" + path
		}
		if res.StatusCode != want.Status || want.Location != "" && usual(res.Header.Get("Location")) != usual(want.Location) {
			return fmt.Sprintf("got %d to %q", res.StatusCode, res.Header.Get("Location"))
		}
		return ""
	}
	if res.StatusCode != 200 {
		if res.StatusCode == 500 && slices.Contains(want.Backends, "") {
			return ""
		}
		return fmt.Sprintf("got %d", res.StatusCode)
	}
	var got struct {
		Backend, Path, Host string
		Headers             map[string]string
	}
	if err := json.Unmarshal(body, &got); err != nil {
		return err.Error()
	}
	from := slices.ContainsFunc(want.Backends, func(b string) bool {
		name, _, _ := strings.Cut(b, ":")
		return name == got.Backend || got.Backend == "shop/own" && name == "shop/"+service
	})
	same := len(got.Headers) == len(want.Headers)
	for k, v := range want.Headers {
		same = same && got.Headers[k] == v
	}
	for k, v := range want.Answer {
		same = same && strings.Join(res.Header.Values(k), ",") == v
	}
	if !from || got.Path != want.Path || got.Host != want.Host || !same {
		return fmt.Sprintf("got %s with %v", body, res.Header)
	}
	return ""
}

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

var refusedWith = regexp.MustCompile(`\b([45]\d\d) [A-Z]`)

var failedCalls = regexp.MustCompile(`(\d+) of \d+ calls of \S+ failed, last: (.*)`)

// A waypoint lets through what a RateLimit says, for all clients together or for each identity, and so does a gateway; what
// means nothing is refused, and what counts nothing says so.
func TestRateLimits(t *testing.T) {
	ns := behindWaypoint(t, "e2e-limits", 1, "client", "other")
	ctx := t.Context()
	balance(t)
	// refused is how many of ten calls of a client are.
	refused := func(client string) int {
		t.Helper()
		out, err := mesh.Exec(ctx, ns, client, "/demo", "load", "-n", "10", "-every", "5ms", "-url", "http://inventory/stock")
		if err == nil {
			return 0
		}
		m := failedCalls.FindStringSubmatch(out + err.Error())
		if m == nil || !strings.Contains(m[2], "429") {
			t.Fatalf("%s: %v\n%s", client, err, out)
		}
		n := 0
		if _, err := fmt.Sscan(m[1], &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	limit := func(name, target, limits string) error {
		return mesh.Apply(ctx, strings.NewReplacer("NS", ns, "NAME", name, "TARGET", target, "LIMITS", limits).Replace(`
apiVersion: policy.warren.io/v1alpha1
kind: RateLimit
metadata: {name: NAME, namespace: NS}
spec: {targetRefs: [TARGET], limits: LIMITS}
`))
	}
	const inventory = `{kind: Service, name: inventory}`
	if n := refused("client"); n != 0 {
		t.Fatalf("without a limit %d of 10 calls are refused", n)
	}
	must(t, limit("stock", inventory, `[{requests: 6, per: Hour}]`))
	enforced(t, ns, "ratelimit/stock")
	if one, two := refused("client"), refused("other"); one != 4 || two != 10 {
		t.Errorf("with 6 an hour %d of 10 calls of one client are refused and %d of another, want 4 and 10", one, two)
	}
	must(t, limit("stock", inventory, `[{requests: 6, per: Hour, by: [{type: Principal}]}]`))
	enforced(t, ns, "ratelimit/stock")
	if one, two := refused("client"), refused("other"); one != 4 || two != 4 {
		t.Errorf("with 6 an hour for each identity %d of 10 calls of one client are refused and %d of another, want 4 of both", one, two)
	}
	shown, err := mesh.Kubectl(ctx, "-n", ns, "get", "ratelimits")
	if err != nil || !regexp.MustCompile(`(?m)^stock +True +True`).MatchString(shown) {
		t.Errorf("kubectl get: %v\n%s", err, shown)
	}
	logged, err := mesh.Kubectl(ctx, "-n", ns, "logs", "-l", "gateway.networking.k8s.io/gateway-name=way", "--tail=-1")
	must(t, err)
	if !strings.Contains(logged, `"response_flags":"RL"`) {
		t.Errorf("no line of the access log says that a request was refused by a limit: %.2000s", logged)
	}
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "ratelimit", "stock"); err != nil {
		t.Fatal(err)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if n := refused("client"); n != 0 {
			return fmt.Errorf("without the limit %d of 10 calls are refused", n)
		}
		return nil
	}))

	t.Run("gateway", func(t *testing.T) {
		address := edgeOf(t, ns, "inventory")
		outside{address: address}.becomes(t, "http://shop.example/stock", 200)
		must(t, limit("edge", `{group: gateway.networking.k8s.io, kind: Gateway, name: edge}`, `[{requests: 5, per: Hour, by: [{type: Address}], match: {paths: [{value: /stock}]}}]`))
		enforced(t, ns, "ratelimit/edge")
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return mesh.DialOutside(ctx, network, net.JoinHostPort(address, "80"))
		}}}
		ok := 0
		for range 8 {
			res, err := client.Get("http://shop.example/stock")
			must(t, err)
			body, err := io.ReadAll(res.Body)
			must(t, err)
			res.Body.Close()
			switch {
			case res.StatusCode == 200:
				ok++
			case res.StatusCode != 429 || string(body) != "local_rate_limited" || res.Header.Get("Retry-After") == "" || res.Header.Get("X-Ratelimit-Remaining") != "0":
				t.Errorf("what is refused is answered with %d %q %v", res.StatusCode, body, res.Header)
			}
		}
		if ok != 5 {
			t.Errorf("a gateway lets through %d of 8 requests, want 5", ok)
		}
		if got, body, _, err := (outside{address: address}).get(ctx, "http://shop.example/healthz"); err != nil || got != 200 {
			t.Errorf("a path that is not counted: %d %s %v", got, body, err)
		}
	})

	for spec, want := range map[string]string{
		`[{requests: 0, per: Second}]`:                       "spec.limits[0].requests",
		`[{requests: -1, per: Second}]`:                      "spec.limits[0].requests",
		`[{requests: 4294967296, per: Second}]`:              "spec.limits[0].requests",
		`[{requests: 1, per: Second, burst: 0}]`:             "spec.limits[0].burst",
		`[{requests: 1, per: Day}]`:                          "spec.limits[0].per",
		`[]`:                                                 "spec.limits",
		`[{requests: 1, per: Second, by: [{type: Header}]}]`: "header is for type Header",
		`[{requests: 1, per: Second, by: [{type: Address}, {type: Address}]}]`:   "the same is there twice",
		`[{requests: 1, per: Second, match: {paths: [{value: "/a?b"}]}}]`:        "spec.limits[0].match.paths[0].value",
		`[{requests: 1, per: Second, match: {headers: [{name: "bad header"}]}}]`: "spec.limits[0].match.headers[0].name",
	} {
		if err := limit("bad", inventory, spec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want to hear of %s", spec, err, want)
		}
	}
	if err := limit("bad", `{kind: Pod, name: inventory}`, `[{requests: 1, per: Second}]`); err == nil || !strings.Contains(err.Error(), "a target is a Service") {
		t.Errorf("a limit for a pod: %v", err)
	}
	must(t, limit("nobody", `{kind: Service, name: absent}`, `[{requests: 1, per: Second}]`))
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		said, err := mesh.Kubectl(ctx, "-n", ns, "get", "ratelimit", "nobody", "-o", `jsonpath={range .status.conditions[*]}{.type}={.status},{.reason} {end}`)
		if err == nil && (!strings.Contains(said, "Accepted=False,TargetNotFound") || !strings.Contains(said, "Enforced=False,TargetNotFound")) {
			err = fmt.Errorf("%s", said)
		}
		return err
	}))
}

// Two pods of a waypoint have a service count for both of them together, which is Envoy's own one. Without its answer requests are
// refused, or let through where that was asked for.
func TestRateLimitsOfAllPodsTogether(t *testing.T) {
	ctx := t.Context()
	program, err := mesh.Peer(ctx, "limiter")
	must(t, err)
	ns := behindWaypoint(t, "e2e-limits-together", 1, "client", "other")
	applyIn(t, ns, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: two, namespace: NS}\ndata: {deployment: \"spec: {replicas: 2}\"}\n")
	if out, err := mesh.Kubectl(ctx, "-n", ns, "patch", "gateway.gateway.networking.k8s.io/way", "--type=merge", "-p",
		`{"spec":{"infrastructure":{"parametersRef":{"group":"","kind":"ConfigMap","name":"two"}}}}`); err != nil {
		t.Fatal(err, out)
	}
	fieldBecomes(t, ns, "deployment/way", "{.status.readyReplicas}", "2")
	must(t, mesh.RunLimiter(ctx, program, ns, nodes[0]))
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	limit := func(counted string) {
		t.Helper()
		applyIn(t, ns, `
apiVersion: policy.warren.io/v1alpha1
kind: RateLimit
metadata: {name: together, namespace: NS}
spec:
  targetRefs: [{kind: Service, name: inventory}]
  countedBy: {service: {name: limiter, port: 8081}, `+counted+`}
  limits: [{requests: 7, per: Hour, by: [{type: Namespace}]}]
`)
		enforced(t, ns, "ratelimit/together")
	}
	// codes are how often each status was the answer to one of n calls, each by a connection of its own.
	codes := func(n int) map[string]int {
		t.Helper()
		out := map[string]int{}
		for i := range n {
			text, err := mesh.Exec(ctx, ns, []string{"client", "other"}[i%2], "/demo", "load", "-n", "1", "-url", "http://inventory/stock")
			if err == nil {
				out["200"]++
				continue
			}
			m := refusedWith.FindStringSubmatch(text + err.Error())
			if m == nil {
				t.Fatalf("%v\n%s", err, text)
			}
			out[m[1]]++
		}
		return out
	}
	const second = "timeout: 1s"
	limit(second)
	if left := time.Until(time.Now().Truncate(time.Hour).Add(time.Hour)); left < time.Minute { // it counts by the hour of the clock
		time.Sleep(left + time.Second)
	}
	if got := codes(20); got["200"] != 7 || got["429"] != 13 {
		t.Errorf("of 20 calls by two pods %v, want 7 let through and 13 refused with 429", got)
	}
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "pod", "limiter", "--wait=true"); err != nil {
		t.Fatal(err)
	}
	if got := codes(4); got["503"] != 4 {
		t.Errorf("without an answer %v, want 503", got)
	}
	limit(second + ", failOpen: true")
	if got := codes(4); got["200"] != 4 {
		t.Errorf("without an answer that is needed %v, want 200", got)
	}
	limit("timeout: 100ms, domain: other")
	if _, err := mesh.Kubectl(ctx, "-n", ns, "delete", "service", "limiter"); err != nil {
		t.Fatal(err)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		said, err := mesh.Kubectl(ctx, "-n", ns, "get", "ratelimit", "together", "-o", `jsonpath={.status.conditions[?(@.type=="Enforced")]}`)
		if err == nil && (!strings.Contains(said, "NoCounter") || !strings.Contains(said, "answered with 503")) {
			err = fmt.Errorf("%s", said)
		}
		return err
	}))
}

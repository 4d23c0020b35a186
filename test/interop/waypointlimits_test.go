package interop

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// waypointLimits has a waypoint count requests, refuse those that are too many, and say so once it does. get answers with
// the status, and what the application or the waypoint said.
func waypointLimits(t *testing.T, kube kubernetes.Interface, dyn dynamic.Interface, route func(string), get func(authority, path string, headers ...string) (int, string, error)) {
	ctx := t.Context()
	api := dyn.Resource(policy.RateLimits).Namespace("shop")
	generation := int64(0)
	limit := func(name, limits string) {
		t.Helper()
		generation++
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(fmt.Sprintf(`{apiVersion: policy.warren.io/v1alpha1, kind: RateLimit, metadata: {namespace: shop, name: %s, uid: uid-%[1]s, generation: %d},
spec: {targetRefs: [{kind: Service, name: inventory}], limits: %s}}`, name, generation, limits)), &o.Object); err != nil {
			t.Fatal(err)
		}
		_ = api.Delete(ctx, name, metav1.DeleteOptions{}) // there may be none
		if _, err := api.Create(ctx, o, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" to be enforced", time.Minute, func() error {
			o, err := api.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			held := policy.ReadRateLimit(o).Status.Conditions
			said := map[string]bool{}
			for _, c := range held {
				said[c.Type] = c.Status == "True" && c.ObservedGeneration == generation
			}
			if !said["Accepted"] || !said["Enforced"] {
				return fmt.Errorf("%v", held)
			}
			return nil
		})
	}
	// answers are how many of n requests are let through, and how many refused.
	answers := func(n int, headers ...string) (ok, refused int) {
		t.Helper()
		for range n {
			code, body, err := get("10.96.0.9:80", "/items", headers...)
			switch {
			case err == nil && code == 200:
				ok++
			case err == nil && code == 429 && strings.Contains(body, "local_rate_limited"):
				refused++
			default:
				t.Fatalf("%d %v\n%s", code, err, body)
			}
		}
		return ok, refused
	}
	counts := func(what string, n, want int, headers ...string) {
		t.Helper()
		if ok, _ := answers(n, headers...); ok != want {
			t.Errorf("%s: %d of %d requests are let through, want %d", what, ok, n, want)
		}
	}

	limit("all", `[{requests: 5, per: Hour, match: {paths: [{value: /items}]}}]`)
	counts("five an hour", 12, 5)
	// What else changes leaves the bucket as it is.
	route(`http: [{headers: {request: {set: {x-way: one}}}, route: [{destination: {host: inventory}}]}]`)
	eventually(t, "the route", time.Minute, func() error {
		_, body, err := get("10.96.0.9:80", "/other")
		if err == nil && !strings.Contains(body, "X-Way: one") {
			err = fmt.Errorf("%s", body)
		}
		return err
	})
	counts("another route being followed", 3, 0)
	if _, err := kube.CoreV1().Services("shop").Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "later"}, Spec: corev1.ServiceSpec{
		ClusterIP: "10.96.0.50", ClusterIPs: []string{"10.96.0.50"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
	}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another Service to be served", time.Minute, func() error {
		code, _, err := get("10.96.0.50:80", "/")
		if err == nil && code != 503 {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
	counts("another Service being served, which changes the listener", 3, 0)
	// A change of the limit does begin it anew, and with it what is counted at the same port.
	limit("all", `[{requests: 1000, per: Hour, burst: 3}]`)
	counts("a burst of three", 10, 3)

	limit("all", `[{requests: 4, per: Hour, by: [{type: Header, header: X-User}]}]`)
	counts("a user", 6, 4, "x-user: a\r\n")
	counts("another one", 6, 4, "x-user: b\r\n")
	counts("those without a name", 6, 4)
	counts("the first one again", 2, 0, "x-user: a\r\n")

	limit("all", `[{requests: 2, per: Hour, match: {methods: [GET, POST], paths: [{value: /items}], headers: [{name: x-tier, value: free}]}}]`)
	counts("what does not match", 5, 5)
	counts("what matches", 5, 2, "x-tier: free\r\n")
	for _, path := range []string{"/items/1", "//items", "/items?a=/b", "/./items", "/items%2F1"} {
		if code, _, err := get("10.96.0.9:80", path, "x-tier: free\r\n"); err != nil || code != 429 {
			t.Errorf("%s: %d %v: written in another way it is another path", path, code, err)
		}
	}
	if code, _, err := get("10.96.0.9:80", "/itemsandmore", "x-tier: free\r\n"); err != nil || code != 200 {
		t.Errorf("what only begins in the same way: %d %v", code, err)
	}

	// Whoever it is has an identity, which no header changes.
	for _, by := range []string{"Principal", "Namespace", "Address"} {
		limit("all", `[{requests: 3, per: Hour, by: [{type: `+by+`}]}]`)
		n := 0
		for i := range 6 {
			ok, _ := answers(1, fmt.Sprintf("x-warren-proven-principal: spiffe://cluster.local/ns/n%d/sa/x\r\nx-forwarded-for: 10.1.1.%[1]d\r\n", i))
			n += ok
		}
		if n != 3 {
			t.Errorf("by %s: %d of 6 requests of one client are let through, want 3", by, n)
		}
	}

	// Of two objects at one Service both hold.
	limit("all", `[{requests: 8, per: Hour}]`)
	limit("more", `[{requests: 3, per: Hour, by: [{type: Header, header: x-user}]}]`)
	counts("one user", 5, 3, "x-user: a\r\n")
	counts("another user", 5, 3, "x-user: b\r\n")
	counts("a third user", 5, 2, "x-user: c\r\n")
	refused, err := scraped("istio_requests_total")
	if err != nil {
		t.Fatal(err)
	}
	counted := 0
	for _, s := range refused {
		if s["response_code"] == "429" && s["response_flags"] == "RL" && s["destination_service"] == "inventory.shop.svc.cluster.local" {
			counted++
		}
	}
	if counted == 0 {
		t.Errorf("no metric says what was refused: %v", refused)
	}
	for _, name := range []string{"all", "more"} {
		if err := api.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "no limit", time.Minute, func() error {
		if ok, _ := answers(10); ok != 10 {
			return fmt.Errorf("%d of 10 requests are let through", ok)
		}
		return nil
	})
}

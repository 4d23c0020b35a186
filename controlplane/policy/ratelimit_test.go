package policy

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

func rateLimitOf(t *testing.T, spec string) CompiledLimits {
	t.Helper()
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte("{metadata: {namespace: shop, name: r}, spec: "+spec+"}"), &o.Object); err != nil {
		t.Fatal(err)
	}
	return CompileRateLimit(ReadRateLimit(o))
}

func TestCompileRateLimit(t *testing.T) {
	got := rateLimitOf(t, `{targetRefs: [{kind: Service, name: a}, {group: networking.istio.io, kind: ServiceEntry, name: b}, {group: gateway.networking.k8s.io, kind: Gateway, name: c}, {group: networking.istio.io, kind: Gateway, name: d}, {kind: Pod, name: e}],
limits: [{requests: 5, per: Second}, {requests: 1, per: Hour, burst: 1000000000, by: [{type: Namespace}, {type: Header, header: X-User}], match: {methods: [GET], paths: [{value: /a}, {type: Exact, value: /b}], headers: [{name: X-A, value: ""}, {name: b}]}}]}`)
	want := CompiledLimits{
		Targets: []Target{{TargetService, "a"}, {TargetServiceEntry, "b"}, {TargetGateway, "c"}, {TargetIstioGateway, "d"}, {TargetUnknown, "e"}},
		Limits: []mesh.RateLimit{
			{Name: "shop/r/0", Requests: 5, Burst: 5, Per: time.Second},
			{Name: "shop/r/1", Requests: 1, Burst: MaxRequests, Per: time.Hour, By: []mesh.LimitKey{{On: mesh.LimitNamespace}, {On: mesh.LimitHeader, Header: "x-user"}}, Match: mesh.LimitMatch{
				Methods: []string{"GET"}, Paths: []mesh.TextMatch{{Kind: mesh.TextPath, Value: "/a"}, {Kind: mesh.TextExact, Value: "/b"}},
				Headers: []mesh.NamedMatch{{Name: "x-a", Match: mesh.TextMatch{Kind: mesh.TextExact}}, {Name: "b"}},
			}},
		},
		Identities: []string{"spec.limits[1].by[0]"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
}

// What the definition of the kind refuses counts nothing where it is stored nevertheless, and the rest holds.
func TestMeaninglessLimits(t *testing.T) {
	for spec, want := range map[string]string{
		`{requests: 0, per: Second}`:                                                    `requests: 0 is not between 1 and 1000000000`,
		`{requests: -5, per: Second}`:                                                   `requests: -5 is not between 1 and 1000000000`,
		`{requests: 4294967296, per: Second}`:                                           `requests: 4294967296 is not between 1 and 1000000000`,
		`{requests: 1, per: Second, burst: -1}`:                                         `burst: -1 is not between 1 and 1000000000`,
		`{requests: 1, per: Day}`:                                                       `per: "Day" is not Second, Minute or Hour`,
		`{requests: 1, per: Second, match: {paths: [{value: a}]}}`:                      `match.paths[0].value: "a" does not begin with a slash`,
		`{requests: 1, per: Second, match: {paths: [{type: Regex, value: /a}]}}`:        `match.paths[0].type: "Regex" is not Exact or Prefix`,
		`{requests: 1, per: Second, match: {headers: [{name: ":path"}]}}`:               `match.headers[0].name: ":path" is not the name of a header`,
		`{requests: 1, per: Second, by: [{type: Cookie}]}`:                              `by[0].type: "Cookie" is not Principal, Namespace, Address or Header`,
		`{requests: 1, per: Second, by: [{type: Header}]}`:                              `by[0].header: "" is not the name of a header`,
		`{requests: 1, per: Second, by: [{type: Header, header: "a)%%START_TIME(%s"}]}`: `by[0].header: "a)%%START_TIME(%s" is not the name of a header`,
	} {
		got := rateLimitOf(t, `{limits: [`+spec+`, {requests: 1, per: Second}]}`)
		if !slices.Equal(got.Problems, []string{"spec.limits[0]." + want}) || len(got.Limits) != 1 || got.Limits[0].Name != "shop/r/1" {
			t.Errorf("%s: %q, %v", spec, got.Problems, got.Limits)
		}
	}
	if got := rateLimitOf(t, `{limits: many}`); len(got.Problems) != 1 || len(got.Limits) != 0 {
		t.Errorf("of what cannot be read: %+v", got)
	}
}

// Who counts for all pods, of another namespace too; without one that can be followed nothing is counted in another way.
func TestCompileCountedBy(t *testing.T) {
	got := rateLimitOf(t, `{countedBy: {service: {namespace: infra, name: counts, port: 8081}, domain: d, timeout: 1s500ms, failOpen: true}, limits: [{requests: 5, per: Second}, {requests: 5, per: Second, burst: 9}]}`)
	want := CompiledLimits{
		CountedBy: &Counter{"infra", "counts", mesh.LimitCounter{Port: 8081, Domain: "d", Timeout: 1500 * time.Millisecond, FailOpen: true}},
		Limits:    []mesh.RateLimit{{Name: "shop/r/0", Requests: 5, Burst: 5, Per: time.Second}},
		Problems:  []string{"spec.limits[1].burst: who counts for all pods does so by the second, the minute or the hour, and knows no burst"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if got := rateLimitOf(t, `{countedBy: {service: {name: counts, port: 1}}}`).CountedBy; *got != (Counter{"shop", "counts", mesh.LimitCounter{Port: 1, Domain: DefaultDomain, Timeout: DefaultCountTimeout}}) {
		t.Errorf("what is not said: %+v", got)
	}
	for spec, want := range map[string]string{
		`{service: {name: counts}}`:                            "spec.countedBy.service: it needs a name and a port",
		`{service: {port: 1}}`:                                 "spec.countedBy.service: it needs a name and a port",
		`{service: {name: counts, port: 65536}}`:               "spec.countedBy.service: it needs a name and a port",
		`{service: {name: counts, port: 1}, timeout: 1us}`:     `spec.countedBy.timeout: "1us" is not between 1ms and 1m`,
		`{service: {name: counts, port: 1}, timeout: forever}`: `spec.countedBy.timeout: "forever" is not between 1ms and 1m`,
	} {
		got := rateLimitOf(t, `{countedBy: `+spec+`, limits: [{requests: 1, per: Second}]}`)
		if !slices.Equal(got.Problems, []string{want}) || len(got.Limits) != 0 {
			t.Errorf("%s: %q, %v", spec, got.Problems, got.Limits)
		}
	}
}

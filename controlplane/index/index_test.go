package index

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	kubenetworkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

var update = flag.Bool("update", false, "write what the scenarios give as what they are to give")

var testConfig = Config{
	ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", RootNamespace: "istio-system",
	Telemetry: policy.TelemetryProviders{ByName: map[string]*mesh.TelemetryProvider{
		"otel": {Name: "otel", Kind: mesh.TelemetryOpenTelemetry, Service: mesh.ServiceName{Namespace: "a", Hostname: "s0.a.svc.cluster.local"}, Port: 80},
		"logs": {Name: "logs", Kind: mesh.TelemetryOTLPLogs, Service: mesh.ServiceName{Namespace: "b", Hostname: "s1.b.svc.cluster.local"}, Port: 80},
		"old":  {Name: "old", Problem: "it is of another kind"},
	}},
	Enablement: []EnablementSelector{{NamespaceSelector: metav1.LabelSelector{MatchLabels: map[string]string{"team": "meshed"}}}},
}

// patchYAML is an EnvoyFilter for something that adds a filter to all.
func patchYAML(to string) string {
	return `spec: {` + to + `configPatches: [{applyTo: HTTP_FILTER, patch: {operation: ADD, value: {name: gzip, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb}}}}]}`
}

// decode reads one YAML document.
func decode(t testing.TB, doc string) any {
	t.Helper()
	var meta metav1.TypeMeta
	if err := yaml.Unmarshal([]byte(doc), &meta); err != nil {
		t.Fatal(err)
	}
	var obj any
	switch meta.Kind {
	case "Pod":
		obj = &corev1.Pod{}
	case "Namespace":
		obj = &corev1.Namespace{}
	case "Service":
		obj = &corev1.Service{}
	case "EndpointSlice":
		obj = &discoveryv1.EndpointSlice{}
	case "Node":
		obj = &corev1.Node{}
	case "AuthorizationPolicy":
		obj = &securityv1.AuthorizationPolicy{}
	case "PeerAuthentication":
		obj = &securityv1.PeerAuthentication{}
	case "RequestAuthentication":
		obj = &securityv1.RequestAuthentication{}
	case "Telemetry":
		obj = &telemetryv1.Telemetry{}
	case "EnvoyFilter":
		obj = &networkingv1alpha3.EnvoyFilter{}
	case "WasmPlugin":
		obj = &extensionsv1alpha1.WasmPlugin{}
	case "RateLimit":
		obj = &policy.RateLimit{}
	case "ValidatingWebhookConfiguration":
		obj = &admissionv1.ValidatingWebhookConfiguration{}
	case "MutatingWebhookConfiguration":
		obj = &admissionv1.MutatingWebhookConfiguration{}
	case "APIService", "CustomResourceDefinition":
		o := &unstructured.Unstructured{}
		text, err := yaml.YAMLToJSON([]byte(doc))
		if err == nil {
			err = o.UnmarshalJSON(text)
		}
		if err != nil {
			t.Fatalf("%s: %v", meta.Kind, err)
		}
		return o
	case "ServiceEntry":
		obj = &networkingv1.ServiceEntry{}
	case "WorkloadEntry":
		obj = &networkingv1.WorkloadEntry{}
	case "VirtualService":
		obj = &networkingv1.VirtualService{}
	case "DestinationRule":
		obj = &networkingv1.DestinationRule{}
	case "Gateway":
		obj = &gatewayv1.Gateway{}
		if strings.HasPrefix(meta.APIVersion, "networking.istio.io/") {
			obj = &networkingv1.Gateway{}
		}
	case "ListenerSet":
		obj = &gatewayv1.ListenerSet{}
	case "GatewayClass":
		obj = &gatewayv1.GatewayClass{}
	case "HTTPRoute":
		obj = &gatewayv1.HTTPRoute{}
	case "GRPCRoute":
		obj = &gatewayv1.GRPCRoute{}
	case "TLSRoute":
		obj = &gatewayv1.TLSRoute{}
	case "TCPRoute":
		obj = &gatewayv1.TCPRoute{}
	case "BackendTLSPolicy":
		obj = &gatewayv1.BackendTLSPolicy{}
	case "ReferenceGrant":
		obj = &gatewayv1beta1.ReferenceGrant{}
	default:
		t.Fatalf("kind %q", meta.Kind)
	}
	if err := yaml.Unmarshal([]byte(doc), obj); err != nil {
		t.Fatalf("%s: %v", meta.Kind, err)
	}
	return obj
}

// TestScenarios reads clusters as YAML and compares what the index makes of them.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatal("no scenarios", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			x, err := New(testConfig)
			if err != nil {
				t.Fatal(err)
			}
			want := -1
			for i, f := range ar.Files {
				if f.Name == "want" {
					want = i
					continue
				}
				for _, doc := range strings.Split(string(f.Data), "\n---\n") {
					x.Set(decode(t, doc))
				}
			}
			x.Commit()
			got := dump(x)
			if *update {
				if want < 0 {
					ar.Files = append(ar.Files, txtar.File{Name: "want"})
					want = len(ar.Files) - 1
				}
				ar.Files[want].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want < 0 {
				t.Fatal("the scenario does not say what it wants")
			}
			if d := gocmp.Diff(string(ar.Files[want].Data), got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

// world is a set of objects by kind and name.
type world map[ref]any

// TestIncrementalEqualsFromScratch: whatever happened, and however it was cut into commits, the index is what one
// built from the objects that are left would be; and the Updates add up to it.
func TestIncrementalEqualsFromScratch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, err := New(testConfig)
		if err != nil {
			t.Fatal(err)
		}
		objects := world{}
		seen := seenUpdates{map[string]*LocalPod{}, map[string]*NamespaceState{}, map[PolicyKey]*PolicyState{}, map[RouteKey]*RouteState{}, map[GatewayKey]*GatewayState{}, map[NoticeKey]*Notice{}}
		known := rapid.IntRange(0, 45).Draw(t, "NetworkPolicies are read")
		for i := range rapid.IntRange(1, 40).Draw(t, "events") {
			if i == known {
				x.KnowNetworkPolicies()
			}
			r, obj := drawObject(t)
			switch _, exists := objects[r]; {
			case exists && rapid.IntRange(0, 2).Draw(t, "delete") == 0:
				delete(objects, r)
				x.Delete(r.kind, r.Namespace, r.Name)
			default:
				objects[r] = obj
				x.Set(obj)
			}
			if rapid.Bool().Draw(t, "commit") {
				seen.take(x.Commit())
			}
		}
		seen.take(x.Commit())

		fresh, _ := New(testConfig)
		if x.selectorsKnown {
			fresh.KnowNetworkPolicies()
		}
		order := slices.Collect(maps.Keys(objects))
		slices.SortFunc(order, func(a, b ref) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		for _, r := range rapid.Permutation(order).Draw(t, "order") {
			fresh.Set(objects[r])
		}
		fresh.Commit()
		if d := gocmp.Diff(dump(fresh), dump(x)); d != "" {
			t.Fatalf("-from scratch +incremental:\n%s", d)
		}
		if d := gocmp.Diff(byUID(x.locals), seen.pods, gocmp.Comparer(func(a, b *LocalPod) bool { return fmt.Sprint(*a) == fmt.Sprint(*b) })); d != "" {
			t.Fatalf("the Updates do not add up to the local pods: %s", d)
		}
		if d := gocmp.Diff(x.nsStates, seen.namespaces); d != "" {
			t.Fatalf("the Updates do not add up to the namespaces: %s", d)
		}
		if d := gocmp.Diff(x.states, seen.policies); d != "" {
			t.Fatalf("the Updates do not add up to the states of policies: %s", d)
		}
		if d := gocmp.Diff(x.routeStates, seen.routes); d != "" {
			t.Fatalf("the Updates do not add up to the states of routes: %s", d)
		}
		gateways := map[GatewayKey]*GatewayState{}
		for k, s := range x.gatewayStates {
			gateways[GatewayKey(k)] = s
		}
		if d := gocmp.Diff(gateways, seen.gateways); d != "" {
			t.Fatalf("the Updates do not add up to the states of gateways: %s", d)
		}
		if d := gocmp.Diff(x.notices, seen.notices); d != "" {
			t.Fatalf("the Updates do not add up to the notices: %s", d)
		}
	})
}

type seenUpdates struct {
	pods       map[string]*LocalPod
	namespaces map[string]*NamespaceState
	policies   map[PolicyKey]*PolicyState
	routes     map[RouteKey]*RouteState
	gateways   map[GatewayKey]*GatewayState
	notices    map[NoticeKey]*Notice
}

func (s *seenUpdates) take(u *Update) {
	overlay(s.pods, u.LocalPods)
	overlay(s.namespaces, u.Namespaces)
	overlay(s.policies, u.Policies)
	overlay(s.routes, u.Routes)
	overlay(s.gateways, u.Gateways)
	overlay(s.notices, u.Notices)
}

func overlay[K comparable, V any](dst, src map[K]*V) {
	for k, v := range src {
		if v == nil {
			delete(dst, k)
		} else {
			dst[k] = v
		}
	}
}

func byUID(m map[key]*LocalPod) map[string]*LocalPod {
	out := map[string]*LocalPod{}
	for _, p := range m {
		out[p.UID] = p
	}
	return out
}

func pick[T any](t *rapid.T, name string, of ...T) T { return rapid.SampledFrom(of).Draw(t, name) }

func drawMeta(t *rapid.T, name string, names ...string) metav1.ObjectMeta {
	ns := pick(t, "namespace", "a", "b", "istio-system")
	m := metav1.ObjectMeta{Namespace: ns, Name: pick(t, name, names...)}
	m.CreationTimestamp = metav1.NewTime(time.Unix(rapid.Int64Range(1, 3).Draw(t, "created"), 0))
	return m
}

var podLabels = []map[string]string{
	nil, {"app": "x"}, {"app": "z"}, {"app": "x", labelMode: "none"}, {"app": "x", labelMode: "ambient"}, {labelMode: "odd"}, {"app": "z", labelTunnel: "http"},
	{"app": "z", LabelWaypoint: "w", LabelWaypointNamespace: "b"}, {LabelWaypoint: "none"},
	{"app": "x", labelServing: "true"}, {"app": "x", labelServing: "true", labelTunnel: "http"}, {"app": "z", labelServing: "true"}, {labelServing: "true"},
	{"app": "x", labelManaged: "istio.io-gateway-controller", policy.LabelGateway: "w"}, {labelManaged: "istio.io-gateway-controller", policy.LabelGateway: "w1"},
}

func drawParents(t *rapid.T) (out []gatewayv1.ParentReference) {
	core, service := gatewayv1.Group(""), gatewayv1.Kind("Service")
	for range rapid.IntRange(1, 2).Draw(t, "parents") {
		if rapid.Bool().Draw(t, "at a gateway") {
			ns := pick(t, "gateway's namespace", gatewayv1.Namespace("a"), "b")
			p := gatewayv1.ParentReference{Name: pick(t, "gateway", gatewayv1.ObjectName("w"), "w1"), Namespace: &ns}
			if rapid.IntRange(0, 2).Draw(t, "at a set") == 0 {
				p.Kind, p.Name = new(gatewayv1.Kind("ListenerSet")), pick(t, "set", gatewayv1.ObjectName("ls0"), "ls1")
			}
			out = append(out, p)
			continue
		}
		p := gatewayv1.ParentReference{Group: &core, Kind: &service, Name: pick(t, "parent", gatewayv1.ObjectName("s0"), "s1")}
		if ns := pick(t, "parent's namespace", gatewayv1.Namespace(""), "b"); ns != "" {
			p.Namespace = &ns
		}
		if port := pick(t, "port", gatewayv1.PortNumber(0), 80, 443); port != 0 {
			p.Port = &port
		}
		out = append(out, p)
	}
	return out
}

// drawObject draws one of few objects, so that they meet.
func drawObject(t *rapid.T) (ref, any) {
	kind := Kind(rapid.IntRange(0, int(ValidatingWebhookConfiguration)+16).Draw(t, "kind"))
	if kind > ValidatingWebhookConfiguration {
		kind += VirtualService - ValidatingWebhookConfiguration - 1
	}
	switch kind {
	case VirtualService:
		v := &networkingv1.VirtualService{ObjectMeta: drawMeta(t, "name", "vs0", "vs1")}
		mustYAML(t, pick(t, "spec", `{hosts: [s0], http: [{route: [{destination: {host: s0, subset: v1}}]}]}`,
			`{hosts: [s0, s1.b.svc.cluster.local], http: [{match: [{uri: {regex: "("}}], route: [{destination: {host: s1}}]}]}`,
			`{hosts: [s1], gateways: [g], http: [{redirect: {uri: /}}]}`, `{hosts: [s0], exportTo: [a], http: [{redirect: {uri: /}}]}`, `{hosts: [s0, s1], http: [{match: [{sourceLabels: {app: x}, sourceNamespace: a}, {sourceLabels: {app: z}}], redirect: {uri: /}}]}`,
			`{hosts: [db.example], http: [{route: [{destination: {host: s1.b.svc.cluster.local, subset: v1}}]}]}`,
			`{hosts: ["*"], gateways: [a/g, mesh], http: [{match: [{gateways: [mesh]}], redirect: {uri: /m}}, {route: [{destination: {host: s0}}]}]}`,
			`{hosts: [x.example], exportTo: ["."], gateways: [a/g, b/g], tls: [{match: [{sniHosts: [x.example]}], route: [{destination: {host: s0}}]}], tcp: [{route: [{destination: {host: s1}}]}]}`), &v.Spec)
		return ref{kind, keyOf(v)}, v
	case DestinationRule:
		d := &networkingv1.DestinationRule{ObjectMeta: drawMeta(t, "name", "dr0", "dr1")}
		mustYAML(t, pick(t, "spec", `{host: s0, subsets: [{name: v1, labels: {app: x}}]}`, `{host: s1, exportTo: ["b"], trafficPolicy: {loadBalancer: {simple: RANDOM}}}`,
			`{host: s1.b.svc.cluster.local, trafficPolicy: {tls: {mode: SIMPLE, credentialName: c}}, subsets: [{name: v1, labels: {app: x}}]}`), &d.Spec)
		return ref{kind, keyOf(d)}, d
	case Gateway:
		g := &gatewayv1.Gateway{ObjectMeta: drawMeta(t, "name", "w", "w1")}
		g.Labels = pick(t, "labels", nil, map[string]string{labelWaypointFor: "none"}, map[string]string{labelWaypointFor: "all"})
		g.Spec.GatewayClassName = pick(t, "class", gatewayv1.ObjectName(WaypointClass), "istio", "ours")
		mustYAML(t, pick(t, "sets", `{}`, `{allowedListeners: {namespaces: {from: All}}}`, `{allowedListeners: {namespaces: {from: Same}}}`,
			`{allowedListeners: {namespaces: {from: Selector, selector: {matchLabels: {istio.io/dataplane-mode: ambient}}}}}`), &g.Spec)
		mustYAML(t, pick(t, "listeners", `{listeners: [{name: any, port: 80, protocol: HTTP}, {name: x, port: 443, protocol: HTTP, hostname: "*.x", allowedRoutes: {namespaces: {from: All}}}]}`,
			`{listeners: [{name: any, port: 80, protocol: HTTP, hostname: a.x, allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {istio.io/dataplane-mode: ambient}}}}}, {name: s, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: c, namespace: b}]}}]}`,
			`{listeners: [{name: any, port: 80, protocol: TCP}, {name: x, port: 443, protocol: TLS, hostname: "*.x", tls: {mode: Passthrough}}, {name: s, port: 443, protocol: TLS, hostname: a.x, allowedRoutes: {namespaces: {from: All}}, tls: {mode: Passthrough}}]}`), &g.Spec)
		return ref{kind, keyOf(g)}, g
	case ListenerSet:
		l := &gatewayv1.ListenerSet{ObjectMeta: drawMeta(t, "name", "ls0", "ls1")}
		l.CreationTimestamp = metav1.Unix(int64(rapid.IntRange(0, 2).Draw(t, "created")), 0)
		l.Spec.ParentRef = gatewayv1.ParentGatewayReference{Name: pick(t, "gateway", gatewayv1.ObjectName("w"), "w1"), Namespace: pick(t, "in", nil, new(gatewayv1.Namespace("a")))}
		mustYAML(t, pick(t, "listeners", `{listeners: [{name: any, port: 80, protocol: HTTP}, {name: y, port: 8080, protocol: HTTP, hostname: a.x}]}`,
			`{listeners: [{name: x, port: 443, protocol: HTTPS, hostname: a.x, tls: {certificateRefs: [{name: c}]}, allowedRoutes: {namespaces: {from: All}}}]}`), &l.Spec)
		return ref{kind, keyOf(l)}, l
	case IstioGateway:
		g := &networkingv1.Gateway{ObjectMeta: drawMeta(t, "name", "g", "h")}
		mustYAML(t, pick(t, "servers", `{selector: {app: x}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ["*"]}]}`,
			`{selector: {app: x}, servers: [{port: {number: 80, name: t, protocol: TCP}, hosts: ["*"]}, {port: {number: 443, name: s, protocol: HTTPS}, hosts: [b/x.example], tls: {mode: MUTUAL, credentialName: c}}]}`,
			`{selector: {app: x}, servers: [{port: {number: 80, name: s, protocol: HTTPS}, hosts: ["*"], tls: {mode: ISTIO_MUTUAL}}]}`,
			`{selector: {app: z}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: [./x.example], tls: {httpsRedirect: true}}, {port: {number: 443, name: s, protocol: TLS}, hosts: ["*"], tls: {mode: PASSTHROUGH}}]}`), &g.Spec)
		return ref{IstioGateway, keyOf(g)}, g
	case GatewayClass:
		c := &gatewayv1.GatewayClass{ObjectMeta: metav1.ObjectMeta{Name: "ours"}}
		c.Spec.ControllerName = pick(t, "controller", gatewayv1.GatewayController(IngressController), "other.example/controller")
		return ref{kind, keyOf(c)}, c
	case HTTPRoute:
		r := &gatewayv1.HTTPRoute{ObjectMeta: drawMeta(t, "name", "r0", "r1")}
		r.Spec.ParentRefs = drawParents(t)
		mustYAML(t, pick(t, "rules", `{rules: [{matches: [{path: {value: /a}}], backendRefs: [{name: s0, port: 80}]}, {}]}`,
			`{rules: [{backendRefs: [{name: s1, namespace: b, port: 80, weight: 3}, {name: s0, port: 443}]}]}`,
			`{rules: [{matches: [{path: {type: RegularExpression, value: "("}}], filters: [{type: RequestMirror, requestMirror: {backendRef: {name: s1, port: 80}}}]}]}`), &r.Spec)
		return ref{kind, keyOf(r)}, r
	case GRPCRoute:
		r := &gatewayv1.GRPCRoute{ObjectMeta: drawMeta(t, "name", "r0", "r1")}
		r.Spec.ParentRefs = drawParents(t)
		mustYAML(t, `{rules: [{matches: [{method: {service: x}}], backendRefs: [{name: s1, port: 80}]}]}`, &r.Spec)
		return ref{kind, keyOf(r)}, r
	case TLSRoute:
		r := &gatewayv1.TLSRoute{ObjectMeta: drawMeta(t, "name", "r0", "r1")}
		r.Spec.ParentRefs = drawParents(t)
		mustYAML(t, pick(t, "rules", `{hostnames: ["*.x", a.y], rules: [{backendRefs: [{name: s0, port: 80}, {name: s1, namespace: b, port: 80, weight: 3}]}]}`,
			`{hostnames: [a.x], rules: [{backendRefs: [{name: s1, port: 443}]}]}`), &r.Spec)
		return ref{kind, keyOf(r)}, r
	case TCPRoute:
		r := &gatewayv1.TCPRoute{ObjectMeta: drawMeta(t, "name", "r0", "r1")}
		r.Spec.ParentRefs = drawParents(t)
		mustYAML(t, `{rules: [{backendRefs: [{name: s0, port: 80}]}]}`, &r.Spec)
		return ref{kind, keyOf(r)}, r
	case BackendTLSPolicy:
		p := &gatewayv1.BackendTLSPolicy{ObjectMeta: drawMeta(t, "name", "bt0", "bt1")}
		mustYAML(t, pick(t, "policy", `{targetRefs: [{group: "", kind: Service, name: s0}], validation: {hostname: a.x, caCertificateRefs: [{group: "", kind: ConfigMap, name: c}]}}`,
			`{targetRefs: [{group: "", kind: Service, name: s0, sectionName: http}, {group: "", kind: Service, name: s1}], validation: {hostname: a.x, wellKnownCACertificates: System}}`), &p.Spec)
		return ref{kind, keyOf(p)}, p
	case ReferenceGrant:
		g := &gatewayv1beta1.ReferenceGrant{ObjectMeta: drawMeta(t, "name", "g0", "g1")}
		mustYAML(t, pick(t, "grant", `{from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}], to: [{group: "", kind: Service}]}`,
			`{from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: istio-system}], to: [{group: "", kind: Service, name: s1}]}`), &g.Spec)
		return ref{kind, keyOf(g)}, g
	case Telemetry:
		p := &telemetryv1.Telemetry{}
		mustYAML(t, pick(t, "telemetry",
			`spec: {tracing: [{providers: [{name: otel}], randomSamplingPercentage: 10}]}`,
			`spec: {tracing: [{disableSpanReporting: true}], accessLogging: [{disabled: true}]}`,
			`spec: {selector: {matchLabels: {app: x}}, metrics: [{overrides: [{disabled: true}]}]}`,
			`spec: {targetRefs: [{kind: Service, name: s0}], accessLogging: [{providers: [{name: logs}, {name: absent}], filter: {expression: response.code >= 400}}]}`,
			`spec: {targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}], metrics: [{overrides: [{tagOverrides: {a: {operation: REMOVE}}}]}]}`,
			`spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], tracing: [{customTags: {a: {literal: {value: b}}}}]}`), p)
		p.ObjectMeta = drawMeta(t, "name", "te0", "te1")
		return ref{kind, keyOf(p)}, p
	case EnvoyFilter:
		p := &networkingv1alpha3.EnvoyFilter{}
		mustYAML(t, pick(t, "patches",
			patchYAML(`targetRefs: [{kind: Service, name: s0}], `), patchYAML(`targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], priority: 1, `),
			patchYAML(`targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: se0}, {kind: Service, name: s1}], `),
			patchYAML(`targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}], `),
			patchYAML(`workloadSelector: {labels: {app: x}}, `), patchYAML(``), `spec: {configPatches: [{applyTo: BOOTSTRAP, patch: {operation: MERGE}}]}`), p)
		p.ObjectMeta = drawMeta(t, "name", "ef0", "ef1")
		return ref{kind, keyOf(p)}, p
	case WasmPlugin:
		p := &extensionsv1alpha1.WasmPlugin{}
		mustYAML(t, pick(t, "plugin",
			`spec: {targetRefs: [{kind: Service, name: s0}], url: "https://m.x/a"}`,
			`spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], url: "https://m.x/b", phase: AUTHZ, priority: 1, failStrategy: FAIL_OPEN}`,
			`spec: {targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: se0}, {kind: Service, name: s1}], url: "https://m.x/a", match: [{mode: SERVER, ports: [{number: 80}]}]}`,
			`spec: {targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}], url: "https://m.x/c", imagePullPolicy: Always}`,
			`spec: {selector: {matchLabels: {app: x}}, url: "https://m.x/a", match: [{mode: CLIENT}]}`, `spec: {url: "file:///m"}`), p)
		p.ObjectMeta = drawMeta(t, "name", "wp0", "wp1")
		return ref{kind, keyOf(p)}, p
	case RateLimit:
		p := &policy.RateLimit{}
		mustYAML(t, pick(t, "limits",
			`spec: {targetRefs: [{kind: Service, name: s0}], limits: [{requests: 1, per: Second}]}`,
			`spec: {targetRefs: [{kind: Service, name: s1}, {kind: ServiceEntry, group: networking.istio.io, name: se0}], limits: [{requests: 9, per: Hour, burst: 3, by: [{type: Header, header: X-User}]}]}`,
			`spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], limits: [{requests: 1, per: Minute, by: [{type: Principal}]}]}`,
			`spec: {targetRefs: [{kind: Gateway, group: networking.istio.io, name: g}], limits: [{requests: 1, per: Minute}]}`,
			`spec: {targetRefs: [{kind: Secret, name: s0}], limits: [{requests: 0, per: Minute}]}`), p)
		p.ObjectMeta = drawMeta(t, "name", "rl0", "rl1")
		return ref{kind, keyOf(p)}, p
	case RequestAuthentication:
		r := &securityv1.RequestAuthentication{}
		mustYAML(t, pick(t, "tokens", `{}`, `spec: {jwtRules: [{issuer: https://a.x, jwksUri: "https://a.x/k"}]}`,
			`spec: {selector: {matchLabels: {app: x}}, jwtRules: [{issuer: https://a.x, jwks: '{"keys":[]}'}]}`,
			`spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], jwtRules: [{issuer: https://b.x}]}`), r)
		r.ObjectMeta = drawMeta(t, "name", "ra0", "ra1")
		return ref{kind, keyOf(r)}, r
	case NetworkPolicy:
		p := &kubenetworkingv1.NetworkPolicy{ObjectMeta: drawMeta(t, "name", "np0", "np1")}
		mustYAML(t, pick(t, "selector", `{}`, `{matchLabels: {app: x}}`, `{matchExpressions: [{key: app, operator: NotIn, values: [x]}]}`), &p.Spec.PodSelector)
		return ref{kind, keyOf(p)}, p
	case ValidatingWebhookConfiguration:
		v := &admissionv1.ValidatingWebhookConfiguration{}
		v.Name = pick(t, "name", "v0", "v1")
		for range rapid.IntRange(0, 2).Draw(t, "webhooks") {
			port := pick(t, "port", int32(80), 443)
			v.Webhooks = append(v.Webhooks, admissionv1.ValidatingWebhook{ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{
				Namespace: pick(t, "namespace", "a", "b", "istio-system"), Name: pick(t, "service", "s0", "s1"), Port: &port}}})
		}
		return ref{kind, key{"", v.Name}}, v
	case Pod:
		p := &corev1.Pod{ObjectMeta: drawMeta(t, "pod", "p0", "p1", "p2")}
		p.UID = types.UID(pick(t, "uid", "u0-", "u1-") + p.Namespace + "-" + p.Name)
		p.Labels = pick(t, "labels", podLabels...)
		p.Spec.NodeName = pick(t, "node", "", "n0", "n1")
		p.Spec.ServiceAccountName = pick(t, "sa", "", "s")
		p.Spec.HostNetwork = rapid.IntRange(0, 5).Draw(t, "host") == 0
		p.Spec.Containers = []corev1.Container{{Ports: pick(t, "ports", nil, []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}})}}
		p.Status.Phase = pick(t, "phase", corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded)
		p.Status.PodIP = pick(t, "ip", "", "10.0.0.1", "10.0.0.2")
		if rapid.Bool().Draw(t, "ready") {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		}
		if rapid.IntRange(0, 3).Draw(t, "terminating") == 0 {
			p.DeletionTimestamp = &metav1.Time{Time: time.Unix(9, 0)}
		}
		p.Annotations = pick(t, "annotations", nil, map[string]string{AnnotationRedirection: "enabled"}, map[string]string{annotationSidecar: "{}"})
		return ref{kind, keyOf(p)}, p
	case Namespace:
		n := &corev1.Namespace{}
		n.Name = pick(t, "namespace", "a", "b", "istio-system")
		n.Labels = pick(t, "labels", nil, map[string]string{labelMode: "ambient"}, map[string]string{labelMode: "odd"},
			map[string]string{labelInjection: "enabled"}, map[string]string{"team": "meshed"}, map[string]string{LabelWaypoint: "w"}, map[string]string{labelIngressUses: "true"},
			map[string]string{labelUDP: udpEnforce}, map[string]string{labelUDP: "odd"})
		n.Annotations = pick(t, "annotations", nil, map[string]string{annotationTrafficDistribution: "PreferClose"})
		return ref{kind, key{"", n.Name}}, n
	case Service:
		s := &corev1.Service{ObjectMeta: drawMeta(t, "service", "s0", "s1")}
		s.Labels = pick(t, "labels", nil, map[string]string{LabelWaypoint: "w"}, map[string]string{LabelWaypoint: "w", labelIngressUses: "false"})
		s.Spec.Selector = pick(t, "selector", nil, map[string]string{"app": "x"}, map[string]string{"app": "z"})
		s.Spec.ClusterIP = pick(t, "vip", "None", "10.96.0.1", "10.96.0.2")
		s.Spec.Type = pick(t, "type", corev1.ServiceTypeClusterIP, corev1.ServiceTypeClusterIP, corev1.ServiceTypeExternalName)
		s.Spec.Ports = pick(t, "ports",
			[]corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("web")}},
			[]corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}})
		return ref{kind, keyOf(s)}, s
	case EndpointSlice:
		e := &discoveryv1.EndpointSlice{ObjectMeta: drawMeta(t, "slice", "e0", "e1"), AddressType: discoveryv1.AddressTypeIPv4}
		if rapid.IntRange(0, 2).Draw(t, "api server") == 0 {
			e.Namespace, e.Name, e.Labels = "default", "kubernetes", map[string]string{discoveryv1.LabelServiceName: "kubernetes"}
			e.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{pick(t, "address", "192.0.2.1", "192.0.2.2")}}}
			return ref{kind, keyOf(e)}, e
		}
		e.Labels = map[string]string{discoveryv1.LabelServiceName: pick(t, "of", "s0", "s1")}
		name, port := "http", int32(8080)
		e.Ports = []discoveryv1.EndpointPort{{Name: &name, Port: &port}}
		if rapid.Bool().Draw(t, "pod") {
			e.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1"}, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: pick(t, "of pod", "p0", "p1")}}}
		} else {
			e.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{pick(t, "address", "192.0.2.1", "192.0.2.2")}}}
		}
		return ref{kind, keyOf(e)}, e
	case Node:
		n := &corev1.Node{}
		n.Name = pick(t, "node", "n0", "n1")
		n.Labels = pick(t, "labels", nil, map[string]string{corev1.LabelTopologyZone: "z"})
		n.Spec.PodCIDRs = pick(t, "cidr", nil, []string{"10.0.0.0/24"})
		n.Status.Addresses = pick(t, "addresses", nil, []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}})
		return ref{kind, key{"", n.Name}}, n
	case AuthorizationPolicy:
		p := &securityv1.AuthorizationPolicy{}
		mustYAML(t, pick(t, "policy",
			`spec: {}`,
			`spec: {selector: {matchLabels: {app: x}}, action: DENY, rules: [{from: [{source: {namespaces: [b]}}]}]}`,
			`spec: {action: ALLOW, rules: [{to: [{operation: {methods: [GET]}}]}]}`,
			`spec: {action: AUDIT, rules: [{}]}`,
			`spec: {action: AUDIT, selector: {matchLabels: {app: x}}, rules: [{}]}`,
			`spec: {targetRefs: [{kind: Service, name: s0}], rules: [{}]}`,
			`spec: {targetRefs: [{kind: ServiceEntry, group: networking.istio.io, name: se0}], rules: [{}]}`,
			`spec: {targetRefs: [{kind: GatewayClass, group: gateway.networking.k8s.io, name: istio-waypoint}], rules: [{}]}`,
			`spec: {targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}], rules: [{}]}`), p)
		p.ObjectMeta = drawMeta(t, "name", "ap0", "ap1")
		return ref{kind, keyOf(p)}, p
	case PeerAuthentication:
		p := &securityv1.PeerAuthentication{}
		mustYAML(t, pick(t, "peers",
			`spec: {mtls: {mode: STRICT}}`,
			`spec: {mtls: {mode: PERMISSIVE}}`,
			`spec: {selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}, portLevelMtls: {"8080": {mode: PERMISSIVE}}}`,
			`spec: {selector: {matchLabels: {app: x}}, portLevelMtls: {"8080": {mode: STRICT}}}`,
			`spec: {selector: {matchLabels: {app: z}}, mtls: {mode: DISABLE}}`), p)
		p.ObjectMeta = drawMeta(t, "name", "pa0", "pa1")
		return ref{kind, keyOf(p)}, p
	case ServiceEntry:
		e := &networkingv1.ServiceEntry{}
		mustYAML(t, pick(t, "entry",
			`spec: {hosts: [db.example], ports: [{number: 5432, name: pg, protocol: TCP}], resolution: DNS}`,
			`spec: {hosts: [db.example, s0.a.svc.cluster.local], addresses: [240.0.0.1], ports: [{number: 80, name: web, protocol: HTTP}], resolution: STATIC, endpoints: [{address: 192.0.2.9}]}`,
			`spec: {hosts: [api.example], exportTo: [., b], ports: [{number: 443, name: tls, protocol: TLS}], resolution: STATIC, workloadSelector: {labels: {app: x}}}`,
			`spec: {hosts: ["*.example"], addresses: [203.0.113.0/24], ports: [{number: 443, name: tls, protocol: TLS}], resolution: NONE}`), e)
		e.ObjectMeta = drawMeta(t, "name", "se0", "se1")
		return ref{kind, keyOf(e)}, e
	default:
		e := &networkingv1.WorkloadEntry{}
		mustYAML(t, pick(t, "endpoint",
			`spec: {address: 198.51.100.1, labels: {app: x}, serviceAccount: vm}`,
			`spec: {address: vm.example, labels: {app: z}, ports: {web: 9090}, locality: r/z/s, weight: 3}`), e)
		e.ObjectMeta = drawMeta(t, "name", "we0", "we1")
		return ref{WorkloadEntry, keyOf(e)}, e
	}
}

func mustYAML(t *rapid.T, text string, into any) {
	if err := yaml.Unmarshal([]byte(text), into); err != nil {
		t.Fatal(err)
	}
}

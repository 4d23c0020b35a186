package interop

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	istioapi "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
	"github.com/warrenmesh/warren/waypoint/bootstrap"
)

const (
	ownNetwork = "WARREN_TEST_OWN_NETWORK"
	pluginPath = "WARREN_TEST_PLUGIN" // built where modules can be fetched
)

// TestWaypointServes runs a waypoint, its Envoy and a control plane, everything but Kubernetes: the certificate comes from
// the CA, the configuration from the objects, and a client's tunnel leads to the endpoints that a VirtualService says. It
// has a network of its own, because a waypoint's ports are given.
func TestWaypointServes(t *testing.T) {
	bin := envoyBinary(t)
	if os.Getenv(ownNetwork) == "" {
		if os.Geteuid() != 0 {
			t.Skip("a network of one's own needs root")
		}
		cmd := exec.CommandContext(t.Context(), "unshare", "-n", "-m", "sh", "-c", `ip link set lo up && ip addr add `+publicServer+`/32 dev lo &&
echo nameserver `+testResolver+` > "$1" && mount --bind "$1" /etc/resolv.conf && exec "$0" -test.run '^TestWaypointServes$' -test.timeout 10m`, os.Args[0], filepath.Join(t.TempDir(), "resolv.conf"))
		cmd.Env = append(os.Environ(), ownNetwork+"=1", "WARREN_ENVOY="+bin, pluginPath+"="+pluginBinary(t),
			"KUBE_FEATURE_WatchListClient=false") // the fakes cannot do it
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		// The waypoint's standard output tells of what was refused, and not of what went well, as gRPC without a status did not.
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, `"response_code":200`) && strings.Contains(line, `"response_flags":"-"`) && !strings.Contains(line, `"path":"/items.v1.Items/Get"`) {
				t.Errorf("a request that was answered well has a line: %s", line)
			}
		}
		if !regexp.MustCompile(`"path":"/other".*"response_code":403,"response_code_details":"rbac_access_denied`).Match(out) {
			t.Errorf("a request that was refused has no line:\n%s", out)
		}
		return
	}
	ctx, stop := context.WithCancel(t.Context())
	kube, istio, gateways := waypointCluster(t)
	dyn := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		policy.RateLimits: "RateLimitList",
		{Group: "apiregistration.k8s.io", Version: "v1", Resource: "apiservices"}:             "APIServiceList",
		{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}: "CustomResourceDefinitionList",
	})
	traces := collects(t, "127.0.1.4:9411")
	done := make(chan error, 2)
	go func() {
		done <- controlplane.Run(ctx, controlplane.Config{XDSAddr: "127.0.0.1:15012", Log: slog.New(slog.DiscardHandler)},
			controlplane.Clients{Kube: kube, Istio: istio, Gateways: gateways, Dynamic: dyn})
	}()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var root []byte
	eventually(t, "the mesh's root", time.Minute, func() error {
		cm, err := kube.CoreV1().ConfigMaps("shop").Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
		if err == nil {
			root = []byte(cm.Data["root-cert.pem"])
		}
		return err
	})
	cfg := bootstrap.Config{
		PodName: "way-1", PodNamespace: "shop", PodIP: "127.0.0.9", ServiceAccount: "way", TrustDomain: "cluster.local", ClusterID: "Kubernetes",
		ControlAddress: "127.0.0.1:15012", ControlName: "istiod.istio-system.svc", RootFile: write("root.pem", root), TokenFile: write("token", []byte("way")),
		Envoy: bin, RunDir: dir, Concurrency: 1, Drain: time.Second, LogLevel: "error", StatusAddr: "127.0.0.1:15021", TelemetryAddr: "127.0.0.1:15020", AdminPort: 15000,
		Log: slog.New(slog.DiscardHandler),
	}
	running, end := context.WithCancel(ctx)
	go func() { done <- bootstrap.Run(running, cfg) }()
	t.Cleanup(func() {
		end()
		if err := <-done; err != nil {
			t.Errorf("the waypoint ended: %v", err)
		}
		stop()
		if err := <-done; err != nil {
			t.Errorf("the control plane ended: %v", err)
		}
	})
	eventually(t, "readiness", time.Minute, func() error { return fetch("http://127.0.0.1:15021/healthz/ready") })
	// Nobody has asked for the waypoint until now.
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/use-waypoint": "way"}}}
	if _, err := kube.CoreV1().Namespaces().Update(ctx, ns, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}

	// The client is a pod that the CA knows.
	ca, err := identity.NewOwnCA(identity.CAConfig{Address: cfg.ControlAddress, ServerName: cfg.ControlName, Roots: identity.ControlPlaneRoots{File: cfg.RootFile}, TokenFile: write("client", []byte("client"))})
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	manager := identity.NewManager(identity.Config{Signer: ca, RootFile: cfg.RootFile, Log: cfg.Log})
	go func() { _ = manager.Run(ctx) }()
	me, err := manager.Bundle(ctx, mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "client"})
	if err != nil {
		t.Fatal(err)
	}
	want := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "way"}.String()
	tunnels := hbone.NewPool(hbone.PoolConfig{Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", k.Addr.String())
		if err != nil {
			return nil, err
		}
		tc := tls.Client(c, me.ClientTLS(k.Wanted()))
		return tc, tc.HandshakeContext(ctx)
	}})
	defer tunnels.Close()
	ask := func(authority, path string, headers ...string) (*http.Response, string, error) {
		st, _, err := tunnels.Open(ctx, hbone.Key{Src: me.ID, Want: hbone.WantKey([]string{want}), Addr: netip.MustParseAddrPort("127.0.0.1:15008")}, hbone.Request{Authority: authority,
			Header: hbone.Header{{Name: hbone.HeaderBaggage, Value: "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=client-v7,service.name=client,service.version=v7"}}})
		if err != nil {
			return nil, "", err
		}
		defer st.Close()
		return roundTrip(st, "inventory", path, headers...)
	}
	get := func(authority, path string, headers ...string) (int, string, error) {
		res, body, err := ask(authority, path, headers...)
		if err != nil {
			return 0, body, err
		}
		return res.StatusCode, body, nil
	}
	eventually(t, "an answer", time.Minute, func() error {
		code, body, err := get("10.96.0.9:80", "/")
		if err == nil && code != 200 {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	if _, body, err := get("10.96.0.9:80", "/", "x-envoy-original-path: /x\r\n", "x-forwarded-client-cert: By=me\r\n", "x-envoy-max-retries: 9\r\n"); err != nil || strings.Contains(strings.ToLower(body), "x-envoy") || strings.Contains(strings.ToLower(body), "client-cert") {
		t.Errorf("what a client says of itself reaches the application: %v\n%s", err, body)
	}
	if code, body, err := get("10.96.0.77:80", "/"); err == nil {
		t.Errorf("an address that is not bound is answered: %d %s", code, body)
	}

	// The application's end comes as an end, with everything before it.
	for i := range 50 {
		b, err := func() ([]byte, error) {
			st, _, err := tunnels.Open(ctx, hbone.Key{Src: me.ID, Want: hbone.WantKey([]string{want}), Addr: netip.MustParseAddrPort("127.0.0.1:15008")}, hbone.Request{Authority: "10.96.0.9:80"})
			if err != nil {
				return nil, err
			}
			defer st.Close()
			// The answer may be complete, and the tunnel's stream over, before the writer hears that it has written.
			_, _ = io.WriteString(st, "GET / HTTP/1.1\r\nhost: inventory\r\nconnection: close\r\n\r\n")
			return io.ReadAll(st)
		}()
		if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 200") || !strings.Contains(string(b), "version v") {
			t.Fatalf("request %d with Connection: close: %v after %q", i, err, b)
		}
	}

	// Who may ask for what is decided by the next request too, and said when Envoy does it.
	guarded := func(name, spec string) {
		t.Helper()
		a := &securityv1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Generation: 1}}
		if err := yaml.Unmarshal([]byte("targetRefs: [{kind: Service, name: inventory}]\n"+spec), &a.Spec); err != nil {
			t.Fatal(err)
		}
		if _, err := istio.SecurityV1().AuthorizationPolicies("shop").Create(ctx, a, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" to be enforced", time.Minute, func() error {
			a, err := istio.SecurityV1().AuthorizationPolicies("shop").Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, c := range a.Status.Conditions {
				if c.Type == "Enforced" && c.Status == "True" && strings.Contains(c.Message, "1/1 pods of waypoint shop/way") {
					return nil
				}
			}
			return fmt.Errorf("%v", a.Status.Conditions)
		})
	}
	guarded("readers", `rules: [{from: [{source: {principals: ["cluster.local/ns/shop/sa/client"]}}], to: [{operation: {methods: [GET], paths: ["/items*", "/adm*", /], hosts: [inventory]}}]}, {from: [{source: {namespaces: [nobody]}}]}]`)
	guarded("no-admin", "action: DENY\n"+`rules: [{from: [{source: {namespaces: [shop]}}], to: [{operation: {paths: ["/admin/x"]}}]}, {when: [{key: "request.headers[x-no]", values: ["1*"]}]}]`)
	for _, c := range []struct {
		path, header string
		want         int
	}{
		{"/items/1?a=/x", "", 200}, {"/", "", 200}, {"/other", "", 403}, {"/items", "x-no: 12\r\n", 403}, {"/items", "x-no: 21\r\n", 200},
		{"/admin/x", "", 403}, {"/admin//x", "", 403}, {"/admin%2Fx", "", 403}, {"/admin/./x", "", 403}, {"/adm", "", 200},
	} {
		if code, body, err := get("10.96.0.9:80", c.path, c.header); err != nil || code != c.want {
			t.Errorf("%s %q: %d %v, want %d\n%s", c.path, c.header, code, err, c.want, body)
		}
	}
	for _, name := range []string{"readers", "no-admin"} {
		if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "no policy", time.Minute, func() error {
		code, _, err := get("10.96.0.9:80", "/other")
		if err == nil && code != 200 {
			err = fmt.Errorf("%d", code)
		}
		return err
	})

	t.Run("tunnels", func(t *testing.T) { waypointTunnels(t, istio, me, get) })
	t.Run("names below a domain", func(t *testing.T) {
		waypointDynamic(t, istio, func(authority string) (net.Conn, error) {
			st, _, err := tunnels.Open(ctx, hbone.Key{Src: me.ID, Want: hbone.WantKey([]string{want}), Addr: netip.MustParseAddrPort("127.0.0.1:15008")}, hbone.Request{Authority: authority})
			return st, err
		})
	})
	t.Run("sessions", func(t *testing.T) { waypointSessions(t, gateways, ask) })
	t.Run("routes that ask", func(t *testing.T) { waypointRouteAsks(t, gateways, ask) })
	t.Run("clients", func(t *testing.T) { waypointClients(t, istio, me, want) })
	t.Run("proxies", func(t *testing.T) { waypointForward(t, istio, me, want) })
	t.Run("metrics", func(t *testing.T) { waypointMetrics(t, get) })
	t.Run("spans", func(t *testing.T) { waypointSpans(t, istio, traces, get) })
	t.Run("provider", func(t *testing.T) { waypointAsks(t, istio, guarded, get) })
	t.Run("tokens", func(t *testing.T) { waypointTokens(t, istio, guarded, get) })
	t.Run("patches", func(t *testing.T) { waypointPatches(t, istio, guarded, ask) })
	t.Run("plugins", func(t *testing.T) { waypointPlugins(t, istio, guarded, ask) })

	// A change reaches the next request.
	apply := func(spec string) {
		t.Helper()
		v := &networkingv1.VirtualService{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory"}}
		if err := yaml.Unmarshal([]byte("hosts: [inventory]\n"+spec), &v.Spec); err != nil {
			t.Fatal(err)
		}
		api := istio.NetworkingV1().VirtualServices("shop")
		_, err := api.Update(ctx, v, metav1.UpdateOptions{})
		if err != nil {
			_, err = api.Create(ctx, v, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("limits", func(t *testing.T) { waypointLimits(t, kube, dyn, apply, get) })
	shares := func(n int) (v1, v2 int) {
		for range n {
			_, body, err := get("10.96.0.9:80", "/")
			if err != nil {
				t.Fatal(err)
			}
			v1 += strings.Count(body, "version v1")
			v2 += strings.Count(body, "version v2")
		}
		return v1, v2
	}
	apply(`http: [{route: [{destination: {host: inventory, subset: v2}}]}]`)
	eventually(t, "everything to v2", time.Minute, func() error {
		if v1, v2 := shares(20); v1 != 0 || v2 != 20 {
			return fmt.Errorf("v1 got %d of 20", v1)
		}
		return nil
	})
	apply(`http: [{route: [{destination: {host: inventory, subset: v1}, weight: 80}, {destination: {host: inventory, subset: v2}, weight: 20}]}]`)
	eventually(t, "80 and 20", time.Minute, func() error {
		if v1, v2 := shares(500); v1+v2 != 500 || v1 < 350 || v1 > 450 {
			return fmt.Errorf("v1 got %d, v2 %d of 500", v1, v2)
		}
		return nil
	})
	// Requests that share a header meet the same endpoint, whatever the weights were.
	rule := &networkingv1.DestinationRule{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory"}, Spec: istioapi.DestinationRule{Host: "inventory"}}
	if err := yaml.Unmarshal([]byte("host: inventory\ntrafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x-user}}, connectionPool: {http: {http2MaxRequests: 100}}, outlierDetection: {consecutive5xxErrors: 3}}"), &rule.Spec); err != nil {
		t.Fatal(err)
	}
	if _, err := istio.NetworkingV1().DestinationRules("shop").Update(ctx, rule, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	apply(`http: [{route: [{destination: {host: inventory}}]}]`)
	eventually(t, "the same endpoint for a user, and not for all", time.Minute, func() error {
		met := map[string]int{}
		for user := range 30 {
			first := ""
			for range 4 {
				_, body, err := get("10.96.0.9:80", "/", fmt.Sprintf("x-user: %d\r\n", user))
				if err != nil {
					return err
				}
				now := versionName(strings.Count(body, "version v1"))
				if first == "" {
					first = now
					met[now]++
				} else if first != now {
					return fmt.Errorf("user %d met %s and %s", user, first, now)
				}
			}
		}
		if len(met) != 2 {
			return fmt.Errorf("all users met %v", met)
		}
		return nil
	})
	apply(`http: [{match: [{uri: {prefix: /old}}], redirect: {uri: /new, redirectCode: 308}}, {fault: {abort: {httpStatus: 418, percentage: {value: 100}}}, route: [{destination: {host: inventory}}]}]`)
	eventually(t, "the fault", time.Minute, func() error {
		code, _, err := get("10.96.0.9:80", "/")
		if err == nil && code != 418 {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
	if code, _, err := get("10.96.0.9:80", "/old/x"); err != nil || code != 308 {
		t.Errorf("%d %v instead of a redirect", code, err)
	}
}

func versionName(v1 int) string {
	if v1 > 0 {
		return "v1"
	}
	return "v2"
}

func fetch(url string) error {
	res, err := http.Get(url)
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.StatusCode != 200 {
		return fmt.Errorf("%s: %s", url, res.Status)
	}
	return nil
}

// waypointCluster has a waypoint, two versions of a service on loopback addresses and a client.
func waypointCluster(t *testing.T) (*fake.Clientset, *istiofake.Clientset, *gatewayfake.Clientset) {
	pod := func(name, account, ip string, labels map[string]string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: labels},
			Spec:       corev1.PodSpec{NodeName: "n1", ServiceAccountName: account},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
				Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		}
	}
	for i, version := range []string{"v1", "v2"} {
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "version %s\nAsked-Host: %s\n", version, r.Host)
			_ = r.Header.Write(w)
		})}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.1.%d:8080", i+1))
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = srv.Serve(l) }()
		t.Cleanup(func() { _ = srv.Close() })
	}
	authorizes(t, "127.0.1.3:9001")
	checks(t, "127.0.1.3:9002")
	stock := pod("stock-1", "stock", "127.0.1.5", map[string]string{"app": "stock"})
	stock.Annotations = map[string]string{"ambient.istio.io/redirection": "enabled"}
	kube := fake.NewClientset(
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"mesh": `
extensionProviders:
- name: zipkin
  zipkin: {service: zipkin.shop.svc.cluster.local, port: 9411}
- name: asked
  envoyExtAuthzHttp: {service: authz.shop.svc.cluster.local, port: 9001, timeout: 2s, includeRequestHeadersInCheck: [x-ask], headersToUpstreamOnAllow: [x-said], headersToDownstreamOnDeny: [x-why]}
- name: absent
  envoyExtAuthzGrpc: {service: nobody.shop.svc.cluster.local, port: 9002}
`}},
		pod("authz-1", "authz", "127.0.1.3", map[string]string{"app": "authz"}),
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "authz", Labels: map[string]string{"istio.io/use-waypoint": "none"}}, Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.10", ClusterIPs: []string{"10.96.0.10"}, Selector: map[string]string{"app": "authz"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 9001, TargetPort: intstr.FromInt32(9001), Protocol: corev1.ProtocolTCP},
				{Name: "grpc-check", Port: 9002, TargetPort: intstr.FromInt32(9002), Protocol: corev1.ProtocolTCP}, {Name: "http-nobody", Port: 9003, TargetPort: intstr.FromInt32(9003), Protocol: corev1.ProtocolTCP}},
		}},
		pod("zipkin-1", "zipkin", "127.0.1.4", map[string]string{"app": "zipkin"}),
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "zipkin", Labels: map[string]string{"istio.io/use-waypoint": "none"}}, Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.11", ClusterIPs: []string{"10.96.0.11"}, Selector: map[string]string{"app": "zipkin"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 9411, TargetPort: intstr.FromInt32(9411), Protocol: corev1.ProtocolTCP}},
		}},
		stock,
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "stock"}, Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.12", ClusterIPs: []string{"10.96.0.12"}, Selector: map[string]string{"app": "stock"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP}},
		}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}},
		pod("way-1", "way", "127.0.0.9", nil), pod("client", "client", "127.0.0.8", map[string]string{"role": "reader"}),
		pod("inventory-1", "inventory", "127.0.1.1", map[string]string{"app": "inventory", "version": "v1"}),
		pod("inventory-2", "inventory", "127.0.1.2", map[string]string{"app": "inventory", "version": "v2"}),
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory"}, Spec: corev1.ServiceSpec{
			ClusterIP: "10.96.0.9", ClusterIPs: []string{"10.96.0.9"}, Selector: map[string]string{"app": "inventory"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP}},
		}},
	)
	kube.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		r := a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		account := r.Spec.Token
		name := map[string]string{"way": "way-1", "client": "client"}[account]
		r.Status = authenticationv1.TokenReviewStatus{Authenticated: name != "", Audiences: []string{"istio-ca"}, User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:shop:" + account,
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {name}, "authentication.kubernetes.io/pod-uid": {"uid-" + name}, "authentication.kubernetes.io/node-name": {"n1"},
			},
		}}
		return true, r, nil
	})
	kube.Resources = []*metav1.APIResourceList{
		{GroupVersion: "networking.istio.io/v1", APIResources: []metav1.APIResource{{Name: "virtualservices"}, {Name: "destinationrules"}, {Name: "serviceentries"}}},
		{GroupVersion: "networking.istio.io/v1alpha3", APIResources: []metav1.APIResource{{Name: "envoyfilters"}}},
		{GroupVersion: "extensions.istio.io/v1alpha1", APIResources: []metav1.APIResource{{Name: "wasmplugins"}}},
		{GroupVersion: "security.istio.io/v1", APIResources: []metav1.APIResource{{Name: "authorizationpolicies"}, {Name: "requestauthentications"}}},
		{GroupVersion: "policy.warren.io/v1alpha1", APIResources: []metav1.APIResource{{Name: "ratelimits"}}},
		{GroupVersion: "telemetry.istio.io/v1", APIResources: []metav1.APIResource{{Name: "telemetries"}}},
		{GroupVersion: "gateway.networking.k8s.io/v1", APIResources: []metav1.APIResource{{Name: "gateways"}, {Name: "httproutes"}}},
	}
	istio := istiofake.NewSimpleClientset(&networkingv1.DestinationRule{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory"},
		Spec: istioapi.DestinationRule{Host: "inventory", Subsets: []*istioapi.Subset{
			{Name: "v1", Labels: map[string]string{"version": "v1"}}, {Name: "v2", Labels: map[string]string{"version": "v2"}},
		}},
	})
	gateways := gatewayfake.NewSimpleClientset()
	if _, err := gateways.GatewayV1().Gateways("shop").Create(t.Context(), &gatewayv1.Gateway{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "way", UID: "g1"},
		Spec:       gatewayv1.GatewaySpec{GatewayClassName: "istio-waypoint", Listeners: []gatewayv1.Listener{{Name: "mesh", Port: 15008, Protocol: "HBONE"}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return kube, istio, gateways
}

// roundTrip makes a request over a connection that is open, and reads the answer. headers are lines with their ends.
func roundTrip(c io.ReadWriter, host, path string, headers ...string) (*http.Response, string, error) {
	// The answer may be complete, and the connection over, before the writer hears that it has written.
	_, lost := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nhost: %s\r\n%s\r\n", path, host, strings.Join(headers, ""))
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return nil, "", errors.Join(lost, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, string(b), err
}

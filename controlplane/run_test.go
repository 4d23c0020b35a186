package controlplane

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	caapi "github.com/warrenmesh/warren/api/ca"
	nodeapi "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/controlplane/xds"
)

// tokens are what the fake API server knows: token → namespace/account/pod/uid/node, and audience.
var tokens = map[string]authenticationv1.TokenReviewStatus{
	"node-1": boundToken("istio-system", "warren-node", "warren-node-a", "uid-node-a", "n1"),
	"node-2": boundToken("istio-system", "warren-node", "warren-node-b", "uid-node-b", "n2"),
	"app":    boundToken("shop", "ui", "ui-1", "uid-ui", "n1"),
	// As istioctl makes them, and others of the same account.
	"istioctl":          unboundToken("istio-system", "default"),
	"istioctl-of-shop":  unboundToken("shop", "default"),
	"istioctl-in-a-pod": boundToken("istio-system", "default", "warren-node-a", "uid-node-a", "n1"),
	"foreign": func() authenticationv1.TokenReviewStatus {
		s := boundToken("istio-system", "warren-node", "warren-node-a", "uid-node-a", "n1")
		s.Audiences = []string{"vault"}
		return s
	}(),
}

func boundToken(ns, sa, pod, uid, node string) authenticationv1.TokenReviewStatus {
	return authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{"istio-ca"},
		User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + ns + ":" + sa,
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name":  {pod},
				"authentication.kubernetes.io/pod-uid":   {uid},
				"authentication.kubernetes.io/node-name": {node},
			},
		},
	}
}

func unboundToken(ns, sa string) authenticationv1.TokenReviewStatus {
	s := boundToken(ns, sa, "", "", "")
	s.User.Extra = nil
	return s
}

func testPod(ns, name, uid, sa, node, ip string, labels map[string]string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(uid), Labels: labels},
		Spec:       corev1.PodSpec{ServiceAccountName: sa, NodeName: node},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
	if ip != "" {
		p.Status.PodIP, p.Status.PodIPs = ip, []corev1.PodIP{{IP: ip}}
	}
	return p
}

// cluster is a control plane that runs against fake API servers.
type cluster struct {
	*testing.T
	kube *fake.Clientset
	cp   *controlPlane
	addr string
}

func start(t *testing.T, objects ...runtime.Object) *cluster {
	t.Helper()
	objects = append(objects,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "istio-system"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/dataplane-mode": "ambient"}}},
		testPod("istio-system", "warren-node-a", "uid-node-a", "warren-node", "n1", "", nil),
		testPod("istio-system", "warren-node-b", "uid-node-b", "warren-node", "n2", "", nil),
		testPod("shop", "ui-1", "uid-ui", "ui", "n1", "10.0.0.1", map[string]string{"app": "ui"}),
		testPod("shop", "catalog-1", "uid-catalog", "catalog", "n2", "10.0.0.2", map[string]string{"app": "catalog"}),
		&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "catalog"},
			Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.9", ClusterIPs: []string{"10.96.0.9"}, Selector: map[string]string{"app": "catalog"},
				Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP}}},
		},
	)
	kube := fake.NewClientset(objects...)
	kube.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		r := a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		r.Status = tokens[r.Spec.Token]
		if !slices.Equal(r.Spec.Audiences, []string{"istio-ca"}) {
			t.Errorf("token review asks for the audience %q", r.Spec.Audiences)
		}
		return true, r, nil
	})
	cp, err := newControlPlane(t.Context(), Config{
		Version: "1.2.3", XDSAddr: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler),
	}, Clients{Kube: kube, Istio: istiofake.NewSimpleClientset()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cp.cfg.XDSAddr = addr
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cp.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	c := &cluster{T: t, kube: kube, cp: cp, addr: addr}
	c.eventually("ready", cp.ready.Load)
	return c
}

// patience bounds what a busy machine may take; nothing here measures time.
const patience = 30 * time.Second

func (c *cluster) eventually(what string, ok func() bool) {
	c.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	c.Fatalf("not within %s: %s", patience, what)
}

// dial connects as a client of istiod does: by the root certificate and the Service's name.
func (c *cluster) dial() *grpc.ClientConn {
	c.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.cp.root())
	conn, err := grpc.NewClient(c.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: pool, ServerName: "istiod.istio-system.svc", MinVersion: tls.VersionTLS13,
	})))
	if err != nil {
		c.Fatal(err)
	}
	c.Cleanup(func() { conn.Close() })
	return conn
}

func as(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// watcher is a client of the delta protocol that acknowledges what it gets and keeps it.
type watcher struct {
	*testing.T
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	have   map[string]map[string]*discovery.Resource
	order  []string // types in the order of responses
}

func (c *cluster) watch(token string, kinds ...string) *watcher {
	c.Helper()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(c.dial()).DeltaAggregatedResources(as(c.Context(), token))
	if err != nil {
		c.Fatal(err)
	}
	w := &watcher{T: c.T, stream: stream, have: map[string]map[string]*discovery.Resource{}}
	for _, k := range kinds {
		w.have[k] = map[string]*discovery.Resource{}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: k}); err != nil {
			c.Fatal(err)
		}
	}
	return w
}

func (w *watcher) next() {
	w.Helper()
	res, err := w.stream.Recv()
	if err != nil {
		w.Fatal(err)
	}
	w.order = append(w.order, res.TypeUrl)
	for _, r := range res.Resources {
		w.have[res.TypeUrl][r.Name] = r
	}
	for _, n := range res.RemovedResources {
		delete(w.have[res.TypeUrl], n)
	}
	if err := w.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: res.TypeUrl, ResponseNonce: res.Nonce}); err != nil {
		w.Fatal(err)
	}
}

func (w *watcher) until(what string, ok func() bool) {
	w.Helper()
	for range 50 {
		if ok() {
			return
		}
		w.next()
	}
	w.Fatalf("not within 50 responses: %s", what)
}

func (w *watcher) workload(uid string) *workload.Workload {
	r := w.have[xds.TypeAddress][uid]
	if r == nil {
		return nil
	}
	var a workload.Address
	if err := r.Resource.UnmarshalTo(&a); err != nil {
		w.Fatal(err)
	}
	return a.GetWorkload()
}

const catalogUID = "Kubernetes//Pod/shop/catalog-1"

func TestNodeGetsTheMesh(t *testing.T) {
	c := start(t)
	// A ztunnel subscribes to Istio's two types; ours come on top for our agent.
	w := c.watch("node-1", xds.TypeAddress, xds.TypeAuthorization, xds.TypeLocalPod, xds.TypeNamespace, xds.TypeMeshConfig)
	w.until("first state", func() bool {
		return w.workload(catalogUID) != nil && len(w.have[xds.TypeLocalPod]) > 0 && len(w.have[xds.TypeNamespace]) > 1 && len(w.have[xds.TypeMeshConfig]) > 0
	})
	if i, j := slices.Index(w.order, xds.TypeAuthorization), slices.Index(w.order, xds.TypeAddress); i < 0 || i > j {
		t.Errorf("policies came at %d, addresses at %d", i, j)
	}
	got := w.workload(catalogUID)
	if got.TunnelProtocol != workload.TunnelProtocol_NONE || got.Services["shop/catalog.shop.svc.cluster.local"].GetPorts()[0].GetTargetPort() != 8080 {
		t.Errorf("catalog: %v", got)
	}
	for uid := range w.have[xds.TypeLocalPod] {
		if uid != "uid-ui" && uid != "uid-node-a" {
			t.Errorf("node n1 was told about the pod %s of another node", uid)
		}
	}
	// The node says that catalog is captured; the annotation and with it the tunnel follow.
	report, err := nodeapi.NewNodeStatusClient(c.dial()).Report(as(t.Context(), "node-2"))
	if err != nil {
		t.Fatal(err)
	}
	if err := report.Send(&nodeapi.StatusReport{Node: "n2", Pods: []*nodeapi.PodStatus{
		{Uid: "uid-catalog", Namespace: "shop", Name: "catalog-1", Redirection: nodeapi.PodStatus_REDIRECTION_ENABLED},
		{Uid: "uid-ui", Namespace: "shop", Name: "ui-1", Redirection: nodeapi.PodStatus_REDIRECTION_ENABLED}, // not its own
	}}); err != nil {
		t.Fatal(err)
	}
	w.until("catalog by tunnel", func() bool { return w.workload(catalogUID).TunnelProtocol == workload.TunnelProtocol_HBONE })
	if ui := w.workload("Kubernetes//Pod/shop/ui-1"); ui.TunnelProtocol != workload.TunnelProtocol_NONE {
		t.Error("node n2 could report about a pod of n1")
	}
	if _, err := report.CloseAndRecv(); err != nil {
		t.Error(err)
	}
	// A pod goes.
	if err := c.kube.CoreV1().Pods("shop").Delete(t.Context(), "catalog-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.until("catalog gone", func() bool { return w.workload(catalogUID) == nil })
	for _, st := range c.cp.xds.Streams() {
		if ts := st.Types()[xds.TypeAuthorization]; st.Node != "n1" || ts.Acked == "" || ts.Nack != "" {
			t.Errorf("stream %+v, policies %+v", st, ts)
		}
	}
}

func TestReconnectSendsOnlyWhatChanged(t *testing.T) {
	c := start(t)
	w := c.watch("node-1", xds.TypeAuthorization, xds.TypeAddress)
	w.until("first state", func() bool { return w.workload(catalogUID) != nil })
	versions := map[string]string{"Kubernetes//Pod/shop/gone": "1"}
	for n, r := range w.have[xds.TypeAddress] {
		versions[n] = r.Version
	}
	versions[catalogUID] = "old"
	again := c.watch("node-1", xds.TypeAuthorization)
	if err := again.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeAddress, InitialResourceVersions: versions}); err != nil {
		t.Fatal(err)
	}
	for {
		res, err := again.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if res.TypeUrl != xds.TypeAddress {
			continue
		}
		if len(res.Resources) != 1 || res.Resources[0].Name != catalogUID || !slices.Equal(res.RemovedResources, []string{"Kubernetes//Pod/shop/gone"}) {
			t.Errorf("sent again: %v, removed %v", res.Resources, res.RemovedResources)
		}
		return
	}
}

func TestOnDemandByAddress(t *testing.T) {
	c := start(t)
	w := c.watch("node-1", xds.TypeAuthorization)
	w.have[xds.TypeAddress] = map[string]*discovery.Resource{}
	if err := w.stream.Send(&discovery.DeltaDiscoveryRequest{
		TypeUrl: xds.TypeAddress, ResourceNamesSubscribe: []string{"/10.0.0.2", "/10.9.9.9"},
	}); err != nil {
		t.Fatal(err)
	}
	w.until("catalog", func() bool { return w.workload(catalogUID) != nil })
	if len(w.have[xds.TypeAddress]) != 1 {
		t.Errorf("got %d resources for one address", len(w.have[xds.TypeAddress]))
	}
	if got := w.have[xds.TypeAddress][catalogUID].Aliases; !slices.Equal(got, []string{"/10.0.0.2"}) {
		t.Errorf("aliases %q", got)
	}
	if err := c.kube.CoreV1().Pods("shop").Delete(t.Context(), "catalog-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.until("catalog gone", func() bool { return w.workload(catalogUID) == nil })
}

func TestXDSRefuses(t *testing.T) {
	c := start(t)
	for token, want := range map[string]codes.Code{
		"app": codes.PermissionDenied, "foreign": codes.Unauthenticated, "nobody": codes.Unauthenticated,
	} {
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(c.dial()).DeltaAggregatedResources(as(t.Context(), token))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != want {
			t.Errorf("token %s: %v, want %s", token, err, want)
		}
	}
}

func signingRequest(t *testing.T, uris ...string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, parsed)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func TestCertificateForALocalPod(t *testing.T) {
	c := start(t)
	const id = "spiffe://cluster.local/ns/shop/sa/ui"
	client := caapi.NewIstioCertificateServiceClient(c.dial())
	ask := func(token, id string) (*caapi.IstioCertificateResponse, error) {
		return client.CreateCertificate(as(t.Context(), token), &caapi.IstioCertificateRequest{
			Csr:      signingRequest(t, id),
			Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(id)}},
		})
	}
	res, err := ask("node-1", id)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.CertChain) != 2 || res.CertChain[1] != string(c.cp.root()) {
		t.Fatalf("chain of %d", len(res.CertChain))
	}
	block, _ := pem.Decode([]byte(res.CertChain[0]))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.cp.root())
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != id || len(leaf.DNSNames) != 0 || leaf.IsCA {
		t.Errorf("leaf for %v %v", leaf.URIs, leaf.DNSNames)
	}
	if ttl := time.Until(leaf.NotAfter); ttl < 23*time.Hour || ttl > 25*time.Hour {
		t.Errorf("valid for %s", ttl)
	}
	// Only while the pod runs there.
	if _, err := ask("node-2", id); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "node n2") {
		t.Errorf("another node: %v", err)
	}
	if err := c.kube.CoreV1().Pods("shop").Delete(t.Context(), "ui-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("refused once the pod is gone", func() bool {
		_, err := ask("node-1", id)
		return status.Code(err) == codes.PermissionDenied
	})
}

func TestRootInEveryNamespace(t *testing.T) {
	c := start(t)
	root := func(ns string) string {
		cm, err := c.kube.CoreV1().ConfigMaps(ns).Get(t.Context(), "istio-ca-root-cert", metav1.GetOptions{})
		if err != nil {
			return ""
		}
		return cm.Data["root-cert.pem"]
	}
	want := string(c.cp.root())
	c.eventually("root in shop", func() bool { return root("shop") == want && root("istio-system") == want })
	// The fake API server has no resource versions: what happens between a list and its watch is never seen.
	c.eventually("watch of ConfigMaps", func() bool {
		return slices.ContainsFunc(c.kube.Actions(), func(a k8stesting.Action) bool { return a.Matches("watch", "configmaps") })
	})
	time.Sleep(100 * time.Millisecond) // the fake notes the action before the watch is there
	if err := c.kube.CoreV1().ConfigMaps("shop").Delete(t.Context(), "istio-ca-root-cert", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("root in shop again", func() bool { return root("shop") == want })
	if _, err := c.kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "later"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("root in a new namespace", func() bool { return root("later") == want })
}

func TestInjectionLabelIsExplained(t *testing.T) {
	c := start(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "old", Labels: map[string]string{"istio-injection": "enabled"}}})
	c.eventually("event", func() bool {
		list, err := c.kube.CoreV1().Events("old").List(t.Context(), metav1.ListOptions{})
		return err == nil && len(list.Items) > 0 && list.Items[0].Reason == "InjectionLabelIgnored"
	})
}

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
}

// A change of the mesh's ConfigMap takes effect by itself, and one that is wrong takes none.
func TestTheMeshConfigurationIsFollowed(t *testing.T) {
	config := func(warren string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio"}, Data: map[string]string{"warren": warren}}
	}
	kube := fake.NewClientset(config("clusterID: one"), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "istio-system"}})
	said := &lines{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Log: slog.New(slog.NewTextHandler(said, nil))}, Clients{Kube: kube, Istio: istiofake.NewSimpleClientset()})
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	c := &cluster{T: t}
	heard := func(what string, n int) {
		t.Helper()
		c.eventually(what, func() bool { return said.count(what) >= n })
	}
	heard("state of the cluster read", 1)
	for _, step := range []struct {
		warren, says string
		starts       int
	}{
		{"sameNode: anything", "mesh configuration refused", 1},
		{"clusterID: one\nsameNode: kernel", "the mesh configuration has changed", 2},
	} {
		if _, err := kube.CoreV1().ConfigMaps("istio-system").Update(t.Context(), config(step.warren), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		heard(step.says, 1)
		heard("state of the cluster read", step.starts)
		if n := said.count("state of the cluster read"); n != step.starts {
			t.Errorf("%q: started %d times", step.warren, n)
		}
	}
	if err := kube.CoreV1().ConfigMaps("istio-system").Delete(t.Context(), "istio", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		done <- err
		t.Fatalf("ended without the ConfigMap: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	if n := said.count("state of the cluster read"); n != 2 {
		t.Errorf("started %d times", n)
	}
}

// lines is a log that is read while it is written.
type lines struct {
	mu  sync.Mutex
	all []string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, string(b))
	return len(b), nil
}

func (l *lines) count(with string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.all {
		if strings.Contains(s, with) {
			n++
		}
	}
	return n
}

package controlplane

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	caapi "github.com/warrenmesh/warren/api/ca"
	"github.com/warrenmesh/warren/results"
)

// csrFor is a request as change has it; the key is the same for all, which is what costs time.
func csrFor(t *testing.T, key *ecdsa.PrivateKey, change func(*x509.CertificateRequest), uris ...string) string {
	t.Helper()
	template := &x509.CertificateRequest{}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

// TestNoIdentityButTheNodes asks for identities that the caller's node does not run, in every way there is:
// nothing may be issued. Between the rounds it asks for what the node does run, which has to be issued.
func TestNoIdentityButTheNodes(t *testing.T) {
	const requests = 10_000
	finished := func(name, sa string, phase corev1.PodPhase) *corev1.Pod {
		p := testPod("shop", name, "uid-"+name, sa, "n1", "", nil)
		p.Status.Phase = phase
		return p
	}
	other := testPod("shop", "web-1", "uid-web", "web", "n2", "10.0.0.9", nil)
	c := start(t, other,
		finished("job-1", "job", corev1.PodSucceeded), finished("crash-1", "crash", corev1.PodFailed),
		testPod("shop", "pending-1", "uid-pending", "pending", "", "", nil), // on no node yet
		testPod("shop", "gone-1", "uid-gone", "gone", "n1", "10.0.0.8", nil),
		// The name of an agent whose token is still around, under a new UID.
		testPod("istio-system", "warren-node-c", "uid-new", "warren-node", "n1", "", nil),
	)
	tokens["replaced"] = boundToken("istio-system", "warren-node", "warren-node-c", "uid-old", "n1")
	tokens["moved"] = boundToken("istio-system", "warren-node", "warren-node-a", "uid-node-a", "n2")
	tokens["vanished"] = boundToken("istio-system", "warren-node", "warren-node-z", "uid-z", "n1")
	tokens["unbound"] = boundToken("istio-system", "warren-node", "", "", "")
	t.Cleanup(func() {
		for _, name := range []string{"replaced", "moved", "vanished", "unbound"} {
			delete(tokens, name)
		}
	})
	c.eventually("all pods are known", func() bool { return c.cp.source.Runs("n1", "shop", "gone") })
	if err := c.kube.CoreV1().Pods("shop").Delete(t.Context(), "gone-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually("the deleted pod is gone", func() bool { return !c.cp.source.Runs("n1", "shop", "gone") })

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const ui = "spiffe://cluster.local/ns/shop/sa/ui"
	const catalog = "spiffe://cluster.local/ns/shop/sa/catalog"
	honest := csrFor(t, key, nil, ui)
	sa := func(name string) string { return "spiffe://cluster.local/ns/shop/sa/" + name }
	ask := func(want string, csr string) *caapi.IstioCertificateRequest {
		r := &caapi.IstioCertificateRequest{Csr: csr, ValidityDuration: 3600}
		if want != "" {
			r.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(want)}}
		}
		return r
	}
	bad := []struct {
		name, token string
		req         *caapi.IstioCertificateRequest
	}{
		{"another node's", "node-1", ask(catalog, csrFor(t, key, nil, catalog))},
		{"another node's, from a pod there", "node-2", ask(ui, honest)},
		{"its own request with another node's name beside", "node-1", ask(catalog, honest)},
		{"a deleted pod's", "node-1", ask(sa("gone"), csrFor(t, key, nil, sa("gone")))},
		{"a Succeeded pod's", "node-1", ask(sa("job"), csrFor(t, key, nil, sa("job")))},
		{"a Failed pod's", "node-1", ask(sa("crash"), csrFor(t, key, nil, sa("crash")))},
		{"a pod's that is on no node", "node-1", ask(sa("pending"), csrFor(t, key, nil, sa("pending")))},
		{"an account that never was", "node-1", ask(sa("nobody"), csrFor(t, key, nil, sa("nobody")))},
		{"the same account of another namespace", "node-1", ask("spiffe://cluster.local/ns/other/sa/ui", honest)},
		{"the control plane's", "node-1", ask("spiffe://cluster.local/ns/istio-system/sa/warren-control", honest)},
		{"a wildcard", "node-1", ask(sa("*"), honest)},
		{"a wildcard namespace", "node-1", ask("spiffe://cluster.local/ns/*/sa/ui", honest)},
		{"another trust domain's", "node-1", ask("spiffe://elsewhere/ns/shop/sa/ui", honest)},
		{"no trust domain's", "node-1", ask("spiffe:///ns/shop/sa/ui", honest)},
		{"the trust domain in capitals", "node-1", ask("spiffe://CLUSTER.LOCAL/ns/shop/sa/ui", honest)},
		{"a path that goes up", "node-1", ask(sa("ui/../catalog"), honest)},
		{"a path that is longer", "node-1", ask(ui+"/catalog", honest)},
		{"two slashes", "node-1", ask("spiffe://cluster.local//ns/shop/sa/ui", honest)},
		{"percent", "node-1", ask(sa("u%69"), honest)},
		{"percent slash", "node-1", ask(sa("ui%2f..%2fcatalog"), honest)},
		{"a query", "node-1", ask(ui+"?x=1", honest)},
		{"a fragment", "node-1", ask(ui+"#x", honest)},
		{"a port", "node-1", ask("spiffe://cluster.local:80/ns/shop/sa/ui", honest)},
		{"a user", "node-1", ask("spiffe://x@cluster.local/ns/shop/sa/ui", honest)},
		{"a space", "node-1", ask(ui+" ", honest)},
		{"two lines", "node-1", ask(ui+"\n"+catalog, honest)},
		{"a NUL", "node-1", ask(ui+"\x00", honest)},
		{"not a SPIFFE ID", "node-1", ask("https://cluster.local/ns/shop/sa/ui", honest)},
		{"several names in the request", "node-1", ask(ui, csrFor(t, key, nil, ui, catalog))},
		{"another name in the request", "node-1", ask(ui, csrFor(t, key, nil, catalog))},
		{"a DNS name in the request", "node-1", ask(ui, csrFor(t, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"istiod.istio-system.svc"} }, ui))},
		{"another name in raw form", "node-1", ask(ui, csrFor(t, key, func(r *x509.CertificateRequest) {
			value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(ui)}, {Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(catalog)}})
			if err != nil {
				t.Fatal(err)
			}
			r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: value}}
		}))},
		{"an old token, its pod's name taken by another", "replaced", ask(ui, honest)},
		{"a token of the agent's pod on another node", "moved", ask(ui, honest)},
		{"a token whose pod is gone", "vanished", ask(ui, honest)},
		{"a token that is bound to no pod", "unbound", ask(ui, honest)},
		{"a token for somebody else's ears", "foreign", ask(ui, honest)},
		{"a pod that is no agent", "app", ask(catalog, honest)},
		{"a pod that is no agent, for itself by another name", "app", ask(ui, honest)},
		{"no token that anybody knows", "forged", ask(ui, honest)},
	}

	client := caapi.NewIstioCertificateServiceClient(c.dial())
	var issued, wrongly atomic.Int64
	work := make(chan int)
	var workers sync.WaitGroup
	for range 256 {
		workers.Go(func() {
			for i := range work {
				b := bad[i%len(bad)]
				res, err := client.CreateCertificate(as(t.Context(), b.token), b.req)
				switch status.Code(err) {
				case codes.OK:
					issued.Add(1)
					t.Errorf("%s: a certificate was issued: %v", b.name, res.CertChain)
				case codes.PermissionDenied, codes.InvalidArgument, codes.Unauthenticated:
				default:
					wrongly.Add(1)
					t.Errorf("%s: not refused but failed: %v", b.name, err)
				}
			}
		})
	}
	begun := time.Now()
	for i := range requests {
		if i%1000 == 0 { // what the node runs goes on being issued
			if _, err := client.CreateCertificate(as(t.Context(), "node-1"), ask(ui, honest)); err != nil {
				t.Errorf("the node's own: %v", err)
			}
		}
		work <- i
	}
	close(work)
	workers.Wait()
	t.Logf("%d requests in %d ways refused in %s", requests, len(bad), time.Since(begun).Round(time.Millisecond))
	if err := results.Record("certificates", results.Row{
		Name: "ca-node-authorization", Inputs: requests, Failures: int(issued.Load() + wrongly.Load()), Figure: float64(issued.Load()), Unit: "issued",
	}); err != nil {
		t.Error(err)
	}
	// And the reasons are counted.
	families, err := c.cp.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counted := map[string]float64{}
	for _, f := range families {
		if f.GetName() == "warren_ca_refused_total" {
			for _, m := range f.Metric {
				counted[m.Label[0].GetValue()] = m.Counter.GetValue()
			}
		}
	}
	total := 0.0
	for _, reason := range []string{"not-on-node", "not-permitted", "bad-request", "unauthenticated"} {
		if counted[reason] == 0 {
			t.Errorf("no refusal is counted as %s: %v", reason, counted)
		}
		total += counted[reason]
	}
	if fmt.Sprint(total) != fmt.Sprint(float64(requests)) {
		t.Errorf("%v refusals are counted of %d", total, requests)
	}
}

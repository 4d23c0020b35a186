package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	caapi "github.com/warrenmesh/warren/api/ca"
	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/internal/mesh"
)

const uiID = "spiffe://cluster.local/ns/shop/sa/ui"

// caller answers for whoever asks.
type caller struct {
	*auth.Caller
	err error
}

func (c caller) Authenticate(context.Context) (*auth.Caller, error) { return c.Caller, c.err }

// pods is a Placement made of what a test says.
type pods struct {
	byName map[string]PlacedPod
	runs   map[string]bool
}

func (p pods) PodByName(namespace, name string) (PlacedPod, bool) {
	f, ok := p.byName[namespace+"/"+name]
	return f, ok
}
func (p pods) Runs(node, namespace, sa string) bool { return p.runs[node+"/"+namespace+"/"+sa] }

func nodeAgent() *auth.Caller {
	return &auth.Caller{
		Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "istio-system", ServiceAccount: "warren-node"},
		PodName:  "agent-1", PodUID: "uid-1", Node: "n1",
	}
}

func placed() pods {
	return pods{
		byName: map[string]PlacedPod{"istio-system/agent-1": {UID: "uid-1", ServiceAccount: "warren-node", Node: "n1"}},
		runs:   map[string]bool{"n1/shop/ui": true, "n2/shop/catalog": true},
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func request(t *testing.T, key crypto.Signer, change func(*x509.CertificateRequest)) string {
	t.Helper()
	u, _ := url.Parse(uiID)
	template := &x509.CertificateRequest{URIs: []*url.URL{u}}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pemBlock("CERTIFICATE REQUEST", der))
}

// rawSAN is a subject alternative name extension with the given URIs, whatever bytes they have.
func rawSAN(t *testing.T, uris ...string) func(*x509.CertificateRequest) {
	t.Helper()
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	value, err := asn1.Marshal(names)
	if err != nil {
		t.Fatal(err)
	}
	return func(r *x509.CertificateRequest) {
		r.URIs = nil
		r.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: value}}
	}
}

func selfSigned(t *testing.T) *Signer {
	t.Helper()
	cert, key, err := NewSelfSigned("cluster.local", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewSigner(cert, key, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newServer(t *testing.T, c caller, p Placement) *Server {
	t.Helper()
	s := NewServer(Config{
		Callers: c, Log: slog.New(slog.DiscardHandler),
		Authorizer: &Authorizer{TrustDomain: "cluster.local", Nodes: map[string]bool{"istio-system/warren-node": true}, Pods: p},
	})
	s.Set(alone(selfSigned(t)))
	return s
}

func impersonate(id string) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{impersonated: structpb.NewStringValue(id)}}
}

// TestWhoGetsACertificate goes through what a stolen or confused agent may try.
func TestWhoGetsACertificate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		caller func(*auth.Caller)
		pods   func(*pods)
		want   string // identity asked for
		code   codes.Code
		says   string
	}{
		{name: "a pod of the node", want: uiID, code: codes.OK},
		{name: "a service account of another node", want: "spiffe://cluster.local/ns/shop/sa/catalog", code: codes.PermissionDenied, says: "node n1"},
		{name: "the pod is gone", want: uiID, pods: func(p *pods) { delete(p.runs, "n1/shop/ui") }, code: codes.PermissionDenied, says: "no pod"},
		{name: "its own account, which runs on the node, without a pod of it there", want: "spiffe://cluster.local/ns/istio-system/sa/warren-node", code: codes.PermissionDenied},
		{name: "another trust domain", want: "spiffe://evil/ns/shop/sa/ui", code: codes.PermissionDenied, says: "trust domain"},
		{name: "not an identity", want: "spiffe://cluster.local/ns/shop", code: codes.PermissionDenied},
		{name: "a wildcard", want: "spiffe://cluster.local/ns/shop/sa/*", code: codes.PermissionDenied},
		{name: "a path inside the name", want: "spiffe://cluster.local/ns/shop/sa/ui/../catalog", code: codes.PermissionDenied},
		{name: "a NUL in the name", want: "spiffe://cluster.local/ns/shop/sa/ui\x00x", code: codes.PermissionDenied},
		{name: "no identity at all", want: "", code: codes.PermissionDenied},
		{name: "an account that is no agent", caller: func(c *auth.Caller) { c.Identity.ServiceAccount = "ui" }, want: uiID, code: codes.PermissionDenied, says: "not a trusted node agent"},
		{name: "the agent's account of another namespace", caller: func(c *auth.Caller) { c.Identity.Namespace = "shop" }, want: uiID, code: codes.PermissionDenied},
		{name: "a token without a pod", caller: func(c *auth.Caller) { c.PodName, c.PodUID = "", "" }, want: uiID, code: codes.PermissionDenied, says: "not bound"},
		{name: "the agent's pod is gone", caller: func(c *auth.Caller) { c.PodName = "agent-0" }, want: uiID, code: codes.PermissionDenied, says: "does not exist"},
		{name: "another pod has the name now", caller: func(c *auth.Caller) { c.PodUID = "uid-0" }, want: uiID, code: codes.PermissionDenied, says: "uid"},
		{name: "the token names another node", caller: func(c *auth.Caller) { c.Node = "n2" }, want: uiID, code: codes.PermissionDenied, says: "node n2"},
		{name: "the agent's pod has finished", pods: func(p *pods) {
			p.byName["istio-system/agent-1"] = PlacedPod{UID: "uid-1", ServiceAccount: "warren-node", Node: "n1", Finished: true}
		}, want: uiID, code: codes.PermissionDenied, says: "finished"},
		{name: "the pod runs as somebody else", pods: func(p *pods) {
			p.byName["istio-system/agent-1"] = PlacedPod{UID: "uid-1", ServiceAccount: "ui", Node: "n1"}
		}, want: uiID, code: codes.PermissionDenied, says: "runs as"},
		{name: "the pod is not scheduled", pods: func(p *pods) {
			p.byName["istio-system/agent-1"] = PlacedPod{UID: "uid-1", ServiceAccount: "warren-node"}
		}, want: uiID, code: codes.PermissionDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, p := nodeAgent(), placed()
			if tt.caller != nil {
				tt.caller(c)
			}
			if tt.pods != nil {
				tt.pods(&p)
			}
			s := newServer(t, caller{Caller: c}, p)
			_, err := s.CreateCertificate(t.Context(), &caapi.IstioCertificateRequest{
				Csr: request(t, newKey(t), nil), Metadata: impersonate(tt.want),
			})
			if status.Code(err) != tt.code || (err != nil && !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("got %v, want %s with %q", err, tt.code, tt.says)
			}
		})
	}
}

func TestWhatIsCertified(t *testing.T) {
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	weak, _ := rsa.GenerateKey(rand.Reader, 1024)
	key := newKey(t)
	other, _ := url.Parse("spiffe://cluster.local/ns/shop/sa/catalog")
	good := request(t, key, nil)
	block, _ := pem.Decode([]byte(good))
	broken := bytes.Clone(block.Bytes)
	broken[len(broken)-1] ^= 1
	for _, tt := range []struct{ name, csr, says string }{
		{"as ztunnel asks", good, ""},
		{"without names", request(t, key, func(r *x509.CertificateRequest) { r.URIs = nil }), ""},
		{"another identity", request(t, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{other} }), "catalog"},
		{"two identities", request(t, key, func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, other) }), "2 URI"},
		{"the same identity twice", request(t, key, rawSAN(t, uiID, uiID)), "2 URI"},
		{"a DNS name besides", request(t, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"istiod.istio-system.svc"} }), "DNS"},
		{"a NUL in the name", request(t, key, rawSAN(t, uiID+"\x00.evil")), "certificate refused"},
		{"a curve that is too small", request(t, p224, nil), "P-224"},
		{"an RSA key that is too small", request(t, weak, nil), "1024"},
		{"not signed by its key", string(pemBlock("CERTIFICATE REQUEST", broken)), "certificate refused"},
		{"a certificate", string(selfSigned(t).RootPEM()), "not a certificate request"},
		{"two requests", good + good, "more than one"},
		{"nothing", "", "not a certificate request"},
		{"too much", strings.Repeat("x", maxRequest+1), "bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newServer(t, caller{Caller: nodeAgent()}, placed())
			res, err := s.CreateCertificate(t.Context(), &caapi.IstioCertificateRequest{Csr: tt.csr, Metadata: impersonate(uiID)})
			if tt.says != "" {
				if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("got %v, want a refusal with %q", err, tt.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			certs, err := parseCertificates([]byte(res.CertChain[0]))
			if err != nil {
				t.Fatal(err)
			}
			leaf := certs[0]
			if len(leaf.URIs) != 1 || leaf.URIs[0].String() != uiID || len(leaf.DNSNames) > 0 || leaf.IsCA || len(leaf.ExtKeyUsage) != 2 {
				t.Errorf("leaf: URIs %v, DNS %v, CA %t, usage %v", leaf.URIs, leaf.DNSNames, leaf.IsCA, leaf.ExtKeyUsage)
			}
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: s.Standing().Pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCallers(t *testing.T) {
	s := newServer(t, caller{err: errors.New("API server away")}, placed())
	_, err := s.CreateCertificate(t.Context(), &caapi.IstioCertificateRequest{Csr: request(t, newKey(t), nil)})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("an API server that does not answer: %v", err)
	}
	// Without an identity to impersonate, a caller gets its own, while the pod runs that its token was made for.
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	p := placed()
	p.byName["shop/ui-1"] = PlacedPod{UID: "uid-ui", ServiceAccount: "ui", Node: "n1"}
	p.byName["shop/ui-2"] = PlacedPod{UID: "uid-2", ServiceAccount: "ui", Node: "n1", Finished: true}
	for name, tt := range map[string]struct {
		caller auth.Caller
		code   codes.Code
	}{
		"its pod runs":             {auth.Caller{Identity: id, PodName: "ui-1", PodUID: "uid-ui"}, codes.OK},
		"a certificate, no token":  {auth.Caller{Identity: id}, codes.PermissionDenied},
		"another pod has the name": {auth.Caller{Identity: id, PodName: "ui-1", PodUID: "uid-0"}, codes.PermissionDenied},
		"its pod has finished":     {auth.Caller{Identity: id, PodName: "ui-2", PodUID: "uid-2"}, codes.PermissionDenied},
		"its pod is gone":          {auth.Caller{Identity: id, PodName: "ui-3", PodUID: "uid-3"}, codes.PermissionDenied},
	} {
		s = newServer(t, caller{Caller: &tt.caller}, p)
		if _, err := s.CreateCertificate(t.Context(), &caapi.IstioCertificateRequest{Csr: request(t, newKey(t), nil)}); status.Code(err) != tt.code {
			t.Errorf("%s: got %v, want %s", name, err, tt.code)
		}
	}
}

func TestLifetime(t *testing.T) {
	s := newServer(t, caller{Caller: nodeAgent()}, placed())
	for seconds, want := range map[int64]time.Duration{
		0: 24 * time.Hour, -5: 24 * time.Hour, 60: time.Minute, 3600: time.Hour, 1 << 40: 24 * time.Hour,
	} {
		if got := s.ttl(seconds); got != want {
			t.Errorf("%d s asked for: %s, want %s", seconds, got, want)
		}
	}
	// A leaf never outlives the certificate that signed it.
	signer := selfSigned(t)
	signer.now = func() time.Time { return signer.cert.NotAfter.Add(-time.Minute) }
	_, notAfter, err := signer.sign(newKey(t).Public(), leaf{dns: []string{"x"}, ttl: time.Hour})
	if err != nil || !notAfter.Equal(signer.cert.NotAfter) {
		t.Errorf("until %s (%v), the root until %s", notAfter, err, signer.cert.NotAfter)
	}
	signer.now = func() time.Time { return signer.cert.NotAfter }
	if _, _, err := signer.sign(newKey(t).Public(), leaf{ttl: time.Hour}); err == nil {
		t.Error("an expired root signed")
	}
}

// TestOneRoot: replicas that start at once agree on a root.
func TestOneRoot(t *testing.T) {
	kube := fake.NewClientset()
	var wg sync.WaitGroup
	roots := make([]*Signer, 8)
	for i := range roots {
		wg.Add(1)
		go func() {
			defer wg.Done()
			s, err := (&Keys{Client: kube, Namespace: "istio-system", TrustDomain: "cluster.local"}).load(context.Background())
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = s.want
		}()
	}
	wg.Wait()
	for _, s := range roots {
		if !s.Equal(roots[0]) {
			t.Fatal("two roots")
		}
	}
}

// A control plane that joins a mesh makes no root of its own: it waits for the mesh's, and signs with that.
func TestJoinsTheRootThatIsThere(t *testing.T) {
	client := fake.NewClientset()
	joins := &Keys{Client: client, Namespace: "istio-system", TrustDomain: "cluster.local", Joins: true}
	if _, err := joins.load(t.Context()); err == nil || !strings.Contains(err.Error(), "has to be there first") {
		t.Errorf("without a root: %v", err)
	}
	if list, err := client.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{}); err != nil || len(list.Items) > 0 {
		t.Fatalf("it made %v, %v", list, err)
	}
	there, err := (&Keys{Client: client, Namespace: "istio-system", TrustDomain: "cluster.local"}).load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if m, err := joins.load(t.Context()); err != nil || !m.want.Equal(there.want) {
		t.Errorf("it signs with another key than the mesh's: %v", err)
	}
}

// TestPluggedIn: an intermediate under the operator's own root, in the Secret cacerts.
func TestPluggedIn(t *testing.T) {
	rootCert, rootKey, err := NewSelfSigned("operator", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	root, err := NewSigner(rootCert, rootKey, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, Subject: pkix.Name{CommonName: "mesh"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, _ := x509.MarshalECPrivateKey(key)
	between := pemBlock("CERTIFICATE", der)
	kube := fake.NewClientset(&corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "cacerts"},
		Data: map[string][]byte{
			"ca-cert.pem": between, "ca-key.pem": pemBlock("EC PRIVATE KEY", keyDER),
			"cert-chain.pem": append(bytes.Clone(between), rootCert...), "root-cert.pem": rootCert,
		},
	})
	s, err := (&Keys{Client: kube, Namespace: "istio-system", TrustDomain: "cluster.local"}).load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	chain := s.want.chainPEM([]byte("leaf"), s.want.RootPEM())
	if len(chain) != 3 || chain[1] != string(between) || chain[2] != string(rootCert) {
		t.Errorf("a chain of %d", len(chain))
	}
	// Keys that do not fit are refused, not used.
	if _, err := NewSigner(between, rootKey, nil, rootCert); err == nil {
		t.Error("a key that is not the certificate's")
	}
	if _, err := NewSigner(between, pemBlock("EC PRIVATE KEY", keyDER), nil, selfSigned(t).RootPEM()); err == nil {
		t.Error("a certificate under a foreign root")
	}
}

func TestAwait(t *testing.T) {
	var mu sync.Mutex
	running := false
	z := &Authorizer{TrustDomain: "cluster.local", Nodes: map[string]bool{"istio-system/warren-node": true}, Grace: 5 * time.Second,
		Pods: lateRuns{placed(), func() bool { mu.Lock(); defer mu.Unlock(); return running }}}
	time.AfterFunc(20*time.Millisecond, func() { mu.Lock(); defer mu.Unlock(); running = true })
	if _, err := z.Impersonate(t.Context(), nodeAgent(), uiID); err != nil {
		t.Errorf("a pod that the watch had not shown yet: %v", err)
	}
}

type lateRuns struct {
	pods
	now func() bool
}

func (l lateRuns) Runs(string, string, string) bool { return l.now() }

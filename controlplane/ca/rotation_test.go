package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
)

const life = 24 * time.Hour

// cluster is what replicas share: the API server's objects and what nodes have reported.
type cluster struct {
	t      *testing.T
	kube   kubernetes.Interface
	agents []Agent
	events []string
}

func newCluster(t *testing.T, objects ...*corev1.Secret) *cluster {
	c := &cluster{t: t, kube: fake.NewClientset()}
	for _, o := range objects {
		c.put(o)
	}
	return c
}

func (c *cluster) put(s *corev1.Secret) {
	c.t.Helper()
	secrets := c.kube.CoreV1().Secrets("istio-system")
	_ = secrets.Delete(context.Background(), s.Name, metav1.DeleteOptions{})
	if _, err := secrets.Create(context.Background(), s, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// replica is one that has just started.
func (c *cluster) replica() *Authority {
	return &Authority{
		Keys: &Keys{Client: c.kube, Namespace: "istio-system", TrustDomain: "cluster.local"}, Life: life,
		Agents:   func(context.Context) ([]Agent, error) { return c.agents, nil },
		OnChange: func(*Standing) {},
		Event: func(_ corev1.ObjectReference, kind, reason, message string) {
			c.events = append(c.events, kind+" "+reason+" "+message)
		},
		Log: slog.New(slog.DiscardHandler),
	}
}

// look is one look of a replica; the one that leads and a fresh one have to agree.
func (c *cluster) look(a *Authority) *Standing {
	c.t.Helper()
	if err := a.look(context.Background(), true); err != nil {
		c.t.Fatal(err)
	}
	return a.Standing()
}

// restarted is what a replica without memory makes of the same objects.
func (c *cluster) restarted() *Standing {
	c.t.Helper()
	a := c.replica()
	if err := a.look(context.Background(), false); err != nil {
		c.t.Fatal(err)
	}
	return a.Standing()
}

// report has every node trust what is published.
func (c *cluster) report(s *Standing) {
	for i := range c.agents {
		c.agents[i].Trusts = identity.RootsDigest(s.DERs)
	}
}

func (c *cluster) status() string {
	c.t.Helper()
	cm, err := c.kube.CoreV1().ConfigMaps("istio-system").Get(context.Background(), TrustConfigMap, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return cm.Data[trustStatus]
}

func (c *cluster) wants(phase string, s *Standing, signer *x509.Certificate, roots int) {
	c.t.Helper()
	if got := c.status(); !strings.HasPrefix(got, phase) {
		c.t.Errorf("the status is %q, want %s", got, phase)
	}
	for who, s := range map[string]*Standing{"the replica that leads": s, "one that was restarted": c.restarted()} {
		switch {
		case s.Signer == nil:
			c.t.Errorf("%s, %s: nobody signs: %v", phase, who, s.Why)
		case !s.Signer.cert.Equal(signer):
			c.t.Errorf("%s, %s: the wrong root signs", phase, who)
		}
		if len(s.DERs) != roots {
			c.t.Errorf("%s, %s: %d roots are published, want %d", phase, who, len(s.DERs), roots)
		}
	}
}

func (c *cluster) askToRotate() {
	c.t.Helper()
	secrets := c.kube.CoreV1().Secrets("istio-system")
	s, err := secrets.Get(context.Background(), secretName, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	s.Annotations = map[string]string{AnnotationRotate: "now"}
	if _, err := secrets.Update(context.Background(), s, metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func TestRootRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.replica()
		first := c.look(a)
		c.agents = []Agent{{Node: "n1"}, {Node: "n2"}} // a mesh has none when it begins
		c.report(first)
		old := first.Signer.cert
		c.wants("settled", first, old, 1)
		time.Sleep(time.Hour)

		c.askToRotate()
		s := c.look(a)
		c.wants("phase 1", s, old, 2)
		if !strings.Contains(c.status(), "n1, n2") {
			t.Errorf("the status does not name the nodes that lack: %s", c.status())
		}
		time.Sleep(time.Hour)
		c.agents[0].Trusts = identity.RootsDigest(s.DERs)
		s = c.look(a)
		c.wants("phase 1", s, old, 2) // n2 does not trust it yet
		c.report(s)
		s = c.look(a)
		next := s.Signer.cert
		if next.Equal(old) {
			t.Fatal("the new root does not sign although every node trusts it")
		}
		c.wants("phase 2", s, next, 2)
		time.Sleep(life)
		c.wants("phase 2", c.look(a), next, 2) // clocks differ
		time.Sleep(margin(life) + time.Second)
		c.look(a)
		c.wants("settled", c.look(a), next, 1)

		secret, err := c.kube.CoreV1().Secrets("istio-system").Get(t.Context(), secretName, metav1.GetOptions{})
		if err != nil || len(secret.Data[filePreviousKey]) > 0 || len(secret.Annotations) > 0 {
			t.Errorf("the Secret still has the old key or the annotation: %v", err)
		}
		if len(c.events) != 3 {
			t.Errorf("events: %q, want one for each phase", c.events)
		}
	})
}

func TestNodesThatDoNotReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.replica()
		old := c.look(a).Signer.cert
		c.agents = []Agent{{Node: "with-ztunnel"}}
		c.askToRotate()
		c.wants("phase 1", c.look(a), old, 2)
		time.Sleep(life)
		c.wants("phase 1", c.look(a), old, 2)
		time.Sleep(margin(life) + time.Second) // whatever is valid came with both roots
		s := c.look(a)
		if s.Signer.cert.Equal(old) {
			t.Error("a node that does not report is waited for although all its certificates are renewed or ended")
		}
	})
}

func TestRotationBeforeTheRootEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.replica()
		a.Keys.RootLife = 100 * 24 * time.Hour
		old := c.look(a).Signer.cert
		time.Sleep(79 * 24 * time.Hour)
		c.wants("settled", c.look(a), old, 1)
		time.Sleep(2 * 24 * time.Hour)
		c.look(a) // no agents: nobody to wait for
		if s := c.look(a); s.Signer.cert.Equal(old) {
			t.Error("four fifths of the root's life are over and it still signs")
		}
		time.Sleep(2 * life)
		c.look(a)
		if s := c.look(a); len(s.DERs) != 1 {
			t.Errorf("%d roots are published in the end", len(s.DERs))
		}
	})
}

// operator is a CA of the operator's own: a root, and intermediates that are plugged in.
type operator struct {
	t       *testing.T
	root    *x509.Certificate
	rootKey *ecdsa.PrivateKey
}

func newOperator(t *testing.T, name string) *operator {
	key := newKey(t)
	o := &operator{t: t, rootKey: key}
	o.root = o.certify(&x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true}, nil, key.Public(), key)
	return o
}

func (o *operator) certify(template, parent *x509.Certificate, pub crypto.PublicKey, by crypto.Signer) *x509.Certificate {
	o.t.Helper()
	template.SerialNumber, template.BasicConstraintsValid = big.NewInt(time.Now().UnixNano()), true
	if template.NotBefore.IsZero() {
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(1000*time.Hour)
	}
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, by)
	if err != nil {
		o.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		o.t.Fatal(err)
	}
	return c
}

func certPEM(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pemBlock("CERTIFICATE", c.Raw)...)
	}
	return out
}

// secret plugs in an intermediate; change may spoil its template or the data.
func (o *operator) secret(change func(*x509.Certificate), spoil func(map[string][]byte)) *corev1.Secret {
	o.t.Helper()
	key := newKey(o.t)
	template := &x509.Certificate{Subject: pkix.Name{CommonName: "mesh"}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, IsCA: true}
	if change != nil {
		change(template)
	}
	between := o.certify(template, o.root, key.Public(), o.rootKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		o.t.Fatal(err)
	}
	s := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "cacerts"},
		Data: map[string][]byte{
			fileCert: certPEM(between), fileKey: pemBlock("PRIVATE KEY", der),
			fileChain: certPEM(between, o.root), fileRoot: certPEM(o.root),
		},
	}
	if spoil != nil {
		spoil(s.Data)
	}
	return s
}

// list revokes serial numbers under the operator's root.
func (o *operator) list(serials ...*big.Int) []byte {
	o.t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(time.Now().UnixNano()), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	for _, n := range serials {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: n, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, o.root, o.rootKey)
	if err != nil {
		o.t.Fatal(err)
	}
	return pemBlock("X509 CRL", der)
}

// TestPluggedInKeyIsExchanged: the operator writes another CA into the Secret, in one step.
func TestPluggedInKeyIsExchanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := newOperator(t, "one"), newOperator(t, "two")
		c := newCluster(t, one.secret(nil, nil))
		a := c.replica()
		s := c.look(a)
		old := s.Signer.cert
		c.agents = []Agent{{Node: "n1"}}
		c.report(s)

		// Another intermediate under the same root needs no phases.
		c.put(one.secret(nil, nil))
		if s = c.look(a); s.Signer.cert.Equal(old) || len(s.DERs) != 1 {
			t.Error("an intermediate under the same root did not take over at once")
		}
		old = s.Signer.cert

		c.put(two.secret(nil, nil))
		s = c.look(a)
		if !s.Signer.cert.Equal(old) || len(s.DERs) != 2 {
			t.Errorf("with the new root not trusted yet: the old one signs: %t, %d roots", s.Signer.cert.Equal(old), len(s.DERs))
		}
		// A replica that was restarted has not got the old key: it does not sign rather than sign what peers refuse.
		if r := c.restarted(); r.Signer != nil || !strings.Contains(r.Why.Error(), "not trusted by every node") || len(r.DERs) != 2 {
			t.Errorf("a restarted replica: %v", r.Why)
		}
		c.report(s)
		s = c.look(a)
		if s.Signer.cert.Equal(old) || len(s.DERs) != 2 {
			t.Error("the new key does not sign although every node trusts it")
		}
		time.Sleep(life + margin(life) + time.Second)
		if s = c.look(a); len(s.DERs) != 1 || !bytes.Equal(s.DERs[0], two.root.Raw) {
			t.Errorf("%d roots in the end", len(s.DERs))
		}
	})
}

func TestFromSelfSignedToPluggedIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.replica()
		s := c.look(a)
		old := s.Signer.cert
		c.agents = []Agent{{Node: "n1"}}
		c.report(s)
		c.put(newOperator(t, "one").secret(nil, nil))
		s = c.look(a)
		c.wants("phase 1", s, old, 2) // also after a restart: the self-signed key is there
		c.report(s)
		s = c.look(a)
		c.wants("phase 2", s, s.Signer.cert, 2)
		if s.Signer.cert.Equal(old) {
			t.Error("the plugged-in key does not sign")
		}
	})
}

// A mesh that a control plane without a state has served: what its namespaces were given is trusted, no more.
func TestStateIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		a := c.replica()
		s := c.look(a)
		old := s.Signer.cert
		c.agents = []Agent{{Node: "n1"}}
		if _, err := c.kube.CoreV1().ConfigMaps("istio-system").Create(t.Context(), &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: RootConfigMap, Namespace: "istio-system"}, Data: map[string]string{rootKey: string(s.Roots)},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		c.askToRotate()
		c.wants("phase 1", c.look(a), old, 2)
		if err := c.kube.CoreV1().ConfigMaps("istio-system").Delete(t.Context(), TrustConfigMap, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		if r := c.restarted(); r.Signer == nil || !r.Signer.cert.Equal(old) || len(r.DERs) != 2 {
			t.Error("without the state, a root that nobody has seen signs")
		}
	})
}

func TestBadKeysAreRefused(t *testing.T) {
	o, foreign := newOperator(t, "one"), newOperator(t, "two")
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	weakCert := o.certify(&x509.Certificate{Subject: pkix.Name{CommonName: "weak"}, KeyUsage: x509.KeyUsageCertSign, IsCA: true}, o.root, weak.Public(), o.rootKey)
	abroad := &url.URL{Scheme: "spiffe", Host: "elsewhere"}
	for _, tt := range []struct {
		name   string
		change func(*x509.Certificate)
		spoil  func(map[string][]byte)
		says   string
	}{
		{"another key", nil, func(d map[string][]byte) {
			der, _ := x509.MarshalPKCS8PrivateKey(newKey(t))
			d[fileKey] = pemBlock("PRIVATE KEY", der)
		}, "does not belong"},
		{"no key", nil, func(d map[string][]byte) { delete(d, fileKey) }, "has no ca-key.pem"},
		{"no root", nil, func(d map[string][]byte) { delete(d, fileRoot) }, "has no root-cert.pem"},
		{"empty", nil, func(d map[string][]byte) { clear(d) }, "has no ca-cert.pem"},
		{"garbage", nil, func(d map[string][]byte) { d[fileCert] = []byte("hello") }, "no certificate in PEM form"},
		{"key where a certificate belongs", nil, func(d map[string][]byte) { d[fileCert] = d[fileKey] }, "PRIVATE KEY"},
		{"expired", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}, nil, "is valid from"},
		{"not yet valid", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		}, nil, "is valid from"},
		{"not a CA", func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }, nil, "may not sign"},
		{"may not sign certificates", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, nil, "may not sign"},
		{"only for servers", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, nil, "peers would refuse"},
		{"only for another trust domain", func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{abroad.Host}, true
		}, nil, "peers would refuse"},
		{"a foreign root", nil, func(d map[string][]byte) { d[fileRoot] = certPEM(foreign.root) }, "does not lead to a trusted root"},
		{"a chain that breaks", nil, func(d map[string][]byte) { d[fileChain], d[fileRoot] = d[fileCert], certPEM(foreign.root) }, "does not lead"},
		{"a weak key", nil, func(d map[string][]byte) {
			der, _ := x509.MarshalPKCS8PrivateKey(weak)
			d[fileCert], d[fileKey], d[fileChain] = certPEM(weakCert), pemBlock("PRIVATE KEY", der), nil
		}, "1024 bits"},
		{"a list of somebody else", nil, func(d map[string][]byte) { d[fileLists] = foreign.list() }, "signed by none"},
		{"a list that is no list", nil, func(d map[string][]byte) { d[fileLists] = []byte("x") }, "not in PEM form"},
		{"a list that revokes the key itself", nil, func(d map[string][]byte) {
			certs, _ := parseCertificates(d[fileCert])
			d[fileLists] = o.list(certs[0].SerialNumber)
		}, "was revoked"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t, o.secret(nil, nil))
			a := c.replica()
			was := c.look(a)
			c.put(o.secret(tt.change, tt.spoil))
			err := a.look(t.Context(), true)
			var bad *badKey
			if !errors.As(err, &bad) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), "istio-system/cacerts") {
				t.Errorf("got %v, want a refusal with %q that names the Secret", err, tt.says)
			}
			if a.Standing() != was {
				t.Error("the key before it is not kept")
			}
			_ = a.look(t.Context(), true)
			if len(c.events) != 1 || !strings.Contains(c.events[0], tt.says) || !strings.HasPrefix(c.events[0], "Warning BadSigningKey") {
				t.Errorf("events: %q", c.events)
			}
			c.put(o.secret(nil, nil)) // mended
			if s := c.look(a); s == was || s.Signer == nil {
				t.Error("the mended Secret is not taken over")
			}
		})
	}
}

// TestRevocationListIsPublished: peers below another intermediate of the same root are refused once it is on the
// root's list.
func TestRevocationListIsPublished(t *testing.T) {
	o := newOperator(t, "one")
	stolen, err := (&Keys{TrustDomain: "cluster.local"}).signer(secretFiles(o.secret(nil, nil)))
	if err != nil {
		t.Fatal(err)
	}
	der, _, err := stolen.sign(newKey(t).Public(), leaf{identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}, ttl: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	peer, err := parseCertificates(append(pemBlock("CERTIFICATE", der), certPEM(stolen.cert)...))
	if err != nil {
		t.Fatal(err)
	}
	secret := o.secret(nil, nil)
	c := newCluster(t, secret)
	a := c.replica()
	check := func(s *Standing) error {
		trust, err := identity.NewTrust(s.DERs, s.Lists)
		if err != nil {
			t.Fatal(err)
		}
		return trust.Check(peer, time.Now())
	}
	if err := check(c.look(a)); err != nil {
		t.Errorf("before it is revoked: %v", err)
	}
	secret.Data[fileLists] = append(o.list(big.NewInt(1)), o.list(stolen.cert.SerialNumber)...)
	c.put(secret)
	if err := check(c.look(a)); identity.Reason(err) != identity.ReasonRevoked {
		t.Errorf("after it is revoked: %v", err)
	}
	delete(secret.Data, fileLists)
	c.put(secret)
	if err := check(c.look(a)); err != nil {
		t.Errorf("when the list is taken back: %v", err)
	}
}

func secretFiles(s *corev1.Secret) (cert, key, chain, roots, lists []byte) {
	return s.Data[fileCert], s.Data[fileKey], s.Data[fileChain], s.Data[fileRoot], s.Data[fileLists]
}

package plan

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

type leaf struct {
	name   string // file name
	user   string // common name
	groups []string
	dns    []string
	ips    []netip.Addr
}

// WritePKI creates both authorities, every certificate and every kubeconfig of
// the cluster below Path("pki"). All keys are P-256: making them takes
// milliseconds.
func (c *Cluster) WritePKI() error {
	dir := c.Path("pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(dir, "ca")
	if err != nil {
		return err
	}
	front, err := newAuthority(dir, "front-proxy-ca")
	if err != nil {
		return err
	}
	server := leaf{
		name: "apiserver", user: "kube-apiserver",
		dns: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc." + ClusterDomain},
		ips: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()},
	}
	for _, f := range c.Families() {
		server.ips = append(server.ips, f.Host.Addr(), f.Service(1))
	}
	leaves := []leaf{
		server,
		{name: "kubelet-client", user: "apiserver-kubelet-client", groups: []string{"system:masters"}},
		{name: "admin", user: "admin", groups: []string{"system:masters"}},
		{name: "kube-controller-manager", user: "system:kube-controller-manager"},
		{name: "kube-scheduler", user: "system:kube-scheduler"},
		{name: "kube-proxy", user: "system:kube-proxy"},
	}
	for _, n := range c.NodeList() {
		leaves = append(leaves, leaf{
			name: n.Name, user: "system:node:" + n.Name, groups: []string{"system:nodes"},
			dns: []string{n.Name}, ips: c.Addrs(n),
		})
	}
	for _, l := range leaves {
		if err := ca.issue(dir, l); err != nil {
			return err
		}
	}
	if err := front.issue(dir, leaf{name: "front-proxy-client", user: "front-proxy-client"}); err != nil {
		return err
	}
	if err := writeServiceAccountKey(dir); err != nil {
		return err
	}
	return c.writeKubeconfigs(leaves[2:])
}

// writeKubeconfigs writes one file per client for use inside the cluster's
// namespaces, and Path("kubeconfig") for the host.
func (c *Cluster) writeKubeconfigs(clients []leaf) error {
	ca, err := os.ReadFile(c.Path("pki", "ca.crt"))
	if err != nil {
		return err
	}
	for _, l := range clients {
		cert, err := os.ReadFile(c.Path("pki", l.name+".crt"))
		if err != nil {
			return err
		}
		key, err := os.ReadFile(c.Path("pki", l.name+".key"))
		if err != nil {
			return err
		}
		write := func(path, server string) error {
			return os.WriteFile(path, kubeconfig(server, l.user, ca, cert, key), 0o600)
		}
		if err := write(c.Path("pki", l.name+".conf"), "https://"+c.APIAddr().String()); err != nil {
			return err
		}
		if l.name != "admin" {
			continue
		}
		if err := write(c.Path("kubeconfig"), fmt.Sprintf("https://127.0.0.1:%d", c.HostPort)); err != nil {
			return err
		}
	}
	return nil
}

func kubeconfig(server, user string, ca, cert, key []byte) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: warren
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: %q
  user:
    client-certificate-data: %s
    client-key-data: %s
contexts:
- name: warren
  context: {cluster: warren, user: %q}
current-context: warren
`, server, b64(ca), user, b64(cert), b64(key), user)
}

func newAuthority(dir, name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := template(pkix.Name{CommonName: name})
	t.IsCA, t.BasicConstraintsValid = true, true
	t.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("create authority %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert, key}, writePair(dir, name, der, key)
}

func (a *authority) issue(dir string, l leaf) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := template(pkix.Name{CommonName: l.user, Organization: l.groups})
	t.KeyUsage = x509.KeyUsageDigitalSignature
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	t.DNSNames = l.dns
	for _, ip := range l.ips {
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return fmt.Errorf("issue certificate %s: %w", l.name, err)
	}
	return writePair(dir, l.name, der, key)
}

func template(subject pkix.Name) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      subject,
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.AddDate(1, 0, 0),
	}
}

func writePair(dir, name string, der []byte, key *ecdsa.PrivateKey) error {
	if err := writePEM(filepath.Join(dir, name+".crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, name+".key"), key)
}

func writeServiceAccountKey(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", pub); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, "sa.key"), key)
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

package plan

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

func dual(nodes int) *Cluster {
	return &Cluster{Spec: Spec{Nodes: nodes, DualStack: true, CNI: "bridge"}, Dir: "/var/lib/x"}
}

func TestAddressesOfNodesAreDistinct(t *testing.T) {
	c := dual(maxNodes)
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	for _, n := range c.NodeList() {
		var all []string
		for i, f := range c.Families() {
			a, p := c.Addrs(n)[i], c.PodCIDRs(n)[i]
			if !f.Host.Contains(a) || a == f.Host.Addr() {
				t.Errorf("%s: address %s is not a free one of %s", n.Name, a, f.Host)
			}
			if !f.Pods.Overlaps(p) || p != p.Masked() {
				t.Errorf("%s: pod range %s is not in %s", n.Name, p, f.Pods)
			}
			all = append(all, a.String(), p.String())
		}
		for _, s := range append(all, n.Port(), n.Name) {
			if other, ok := seen[s]; ok {
				t.Errorf("%s of %s belongs to %s", s, n.Name, other)
			}
			seen[s] = n.Name
		}
		if len(n.Port()) > 15 {
			t.Errorf("interface name %s is too long", n.Port())
		}
	}
}

func TestSpec(t *testing.T) {
	for _, tc := range []struct {
		spec Spec
		want string
	}{
		{Spec{Nodes: 1, CNI: "ptp"}, ""},
		{Spec{Nodes: 0, CNI: "ptp"}, "nodes is 0"},
		{Spec{Nodes: 201, CNI: "ptp"}, "nodes is 201"},
		{Spec{Nodes: 2, CNI: "calico"}, `cni is "calico"`},
	} {
		err := tc.spec.Validate()
		if (err == nil) != (tc.want == "") || (err != nil && !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%+v: error %v, want %q", tc.spec, err, tc.want)
		}
	}
}

func TestIDDependsOnTheDirectoryAlone(t *testing.T) {
	a, b := dual(2), &Cluster{Dir: "/var/lib/x/"}
	if a.ID() != b.ID() {
		t.Errorf("%s and %s differ", a.ID(), b.ID())
	}
	if b.Dir = "/var/lib/y"; a.ID() == b.ID() {
		t.Error("two directories have one id")
	}
}

func TestSaveAndLoad(t *testing.T) {
	c := dual(3)
	c.Dir = t.TempDir()
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	got, err := Load(c.Dir)
	if err != nil || *got != *c {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestCNIListHasOneRangePerFamilyAndRoomForMore(t *testing.T) {
	c := dual(2)
	n, err := c.Node("node2")
	if err != nil {
		t.Fatal(err)
	}
	_, b, err := c.CNIConf(n)
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Plugins []struct {
			Type string
			IPAM struct {
				Ranges [][]struct{ Subnet netip.Prefix }
				Routes []struct{ Dst netip.Prefix }
			}
		}
	}
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Plugins) != 2 || list.Plugins[0].Type != "bridge" || list.Plugins[1].Type != "portmap" {
		t.Fatalf("plugins: %+v", list.Plugins)
	}
	ipam := list.Plugins[0].IPAM
	for i, want := range []string{"10.244.2.0/24", "fd00:10:244:2::/64"} {
		if got := ipam.Ranges[i][0].Subnet.String(); got != want {
			t.Errorf("range %d is %s: want %s", i, got, want)
		}
		if ipam.Routes[i].Dst.Bits() != 0 {
			t.Errorf("route %d goes to %s: want the default route", i, ipam.Routes[i].Dst)
		}
	}
}

func TestSingleStackHasNoIPv6(t *testing.T) {
	c := dual(2)
	c.DualStack = false
	for _, p := range []Process{c.APIServer(), c.ControllerManager(), c.Kubelet(c.NodeList()[0]), c.KubeProxy(c.NodeList()[0])} {
		if s := strings.Join(p.Args, " "); strings.Contains(s, "fd00") {
			t.Errorf("%s: %s", p.Name, s)
		}
	}
	b, err := json.Marshal(c.Objects())
	if err != nil || strings.Contains(string(b), "fd00") {
		t.Errorf("objects: %s, %v", b, err)
	}
}

func TestPKI(t *testing.T) {
	c := dual(2)
	c.Dir, c.HostPort = t.TempDir(), 12345
	if err := c.WritePKI(); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(c.Path("pki", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	for _, tc := range []struct {
		name, user, group string
		hosts             []string
	}{
		{"apiserver", "kube-apiserver", "", []string{"127.0.0.1", "::1", "172.30.0.1", "fd00:172:30::1", "10.96.0.1", "fd00:10:96::1", "kubernetes.default.svc.cluster.local"}},
		{"admin", "admin", "system:masters", nil},
		{"node2", "system:node:node2", "system:nodes", []string{"node2", "172.30.0.12", "fd00:172:30::c"}},
	} {
		pair, err := tls.LoadX509KeyPair(c.Path("pki", tc.name+".crt"), c.Path("pki", tc.name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		s := pair.Leaf.Subject
		if s.CommonName != tc.user || (tc.group != "" && !slices.Contains(s.Organization, tc.group)) {
			t.Errorf("%s: subject %s", tc.name, s)
		}
		for _, h := range tc.hosts {
			if err := pair.Leaf.VerifyHostname(h); err != nil {
				t.Errorf("%s: %v", tc.name, err)
			}
		}
	}
	kc, err := os.ReadFile(c.Path("kubeconfig"))
	if err != nil || !strings.Contains(string(kc), "server: https://127.0.0.1:12345\n") {
		t.Errorf("kubeconfig (%v): %s", err, kc)
	}
	if fi, err := os.Stat(c.Path("kubeconfig")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("kubeconfig: %v, %v", fi.Mode(), err)
	}
}

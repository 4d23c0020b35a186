// Package plan says what a cluster consists of: where its files are, which
// addresses its nodes have, which certificates it needs, which arguments and
// configuration each component gets. It is values in, values out; only the PKI
// writes files. It must not know how processes, namespaces or links are made.
package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Fixed by convention: every cluster lives in network namespaces of its own, so
// two of them may use the same numbers.
const (
	ClusterDomain = "cluster.local"
	Bridge        = "warren0" // the inter-node link, in the supervisor's network namespace
	APIPort       = 6443
	// SandboxImage is the pod sandbox, built by this module.
	SandboxImage = "warren.local/pause:1"
	maxNodes     = 200
)

// Spec is what a user chooses.
type Spec struct {
	Nodes     int    `json:"nodes"`
	DualStack bool   `json:"dualStack"`
	CNI       string `json:"cni"` // "bridge" or "ptp": the first plugin of the chain
}

// Validate reports the first value that cannot work.
func (s Spec) Validate() error {
	if s.Nodes < 1 || s.Nodes > maxNodes {
		return fmt.Errorf("nodes is %d: use 1 to %d", s.Nodes, maxNodes)
	}
	if s.CNI != "bridge" && s.CNI != "ptp" {
		return fmt.Errorf("cni is %q: use bridge or ptp", s.CNI)
	}
	return nil
}

// Cluster is a Spec bound to a directory. It is stored as cluster.json so that
// every later command sees the same plan.
type Cluster struct {
	Spec
	Dir      string `json:"dir"`      // everything the cluster writes
	Binaries string `json:"binaries"` // kubebox, its links, the shim
	Launcher string `json:"launcher"` // the program that is supervisor and node PID 1
	HostPort int    `json:"hostPort"` // where the host reaches the API server, on 127.0.0.1
}

// ID names the cluster in the kernel's global name spaces (cgroups). It depends
// on the directory alone, so that leftovers can be found without any state.
func (c *Cluster) ID() string {
	sum := sha256.Sum256([]byte(filepath.Clean(c.Dir)))
	return "warren-" + hex.EncodeToString(sum[:4])
}

// Path joins below the cluster's directory.
func (c *Cluster) Path(elem ...string) string {
	return filepath.Join(append([]string{c.Dir}, elem...)...)
}

// Save writes cluster.json.
func (c *Cluster) Save() error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(c.Path("cluster.json"), append(b, '\n'), 0o600)
}

// Load reads cluster.json from dir.
func Load(dir string) (*Cluster, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cluster.json"))
	if err != nil {
		return nil, err
	}
	c := new(Cluster)
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(dir, "cluster.json"), err)
	}
	return c, nil
}

// Family is the addressing of one IP family.
type Family struct {
	Host     netip.Prefix // the bridge's address and the link's prefix
	Pods     netip.Prefix
	Services netip.Prefix
	podBits  int // prefix length of one node's share of Pods
}

var (
	v4 = Family{
		Host:     netip.MustParsePrefix("172.30.0.1/24"),
		Pods:     netip.MustParsePrefix("10.244.0.0/16"),
		Services: netip.MustParsePrefix("10.96.0.0/16"),
		podBits:  24,
	}
	v6 = Family{
		Host:     netip.MustParsePrefix("fd00:172:30::1/64"),
		Pods:     netip.MustParsePrefix("fd00:10:244::/48"),
		Services: netip.MustParsePrefix("fd00:10:96::/112"),
		podBits:  64,
	}
)

// Families lists the IP families, IPv4 first.
func (c *Cluster) Families() []Family {
	if c.DualStack {
		return []Family{v4, v6}
	}
	return []Family{v4}
}

// Service returns the n-th address of the family's Service range; 1 is the API
// server, 10 is DNS.
func (f Family) Service(n byte) netip.Addr { return offset(f.Services.Addr(), n) }

// Node returns the address and link prefix of node number i (from 1).
func (f Family) Node(i int) netip.Prefix {
	return netip.PrefixFrom(offset(f.Host.Masked().Addr(), byte(10+i)), f.Host.Bits())
}

// PodCIDR returns the pod range of node number i (from 1).
func (f Family) PodCIDR(i int) netip.Prefix {
	b := f.Pods.Addr().AsSlice()
	b[f.podBits/8-1] += byte(i)
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, f.podBits)
}

func offset(a netip.Addr, n byte) netip.Addr {
	b := a.AsSlice()
	b[len(b)-1] += n
	r, _ := netip.AddrFromSlice(b)
	return r
}

// Node is one machine of the plan.
type Node struct {
	Name  string
	Index int // from 1
}

// NodeList returns the nodes in order.
func (c *Cluster) NodeList() []Node {
	var l []Node
	for i := 1; i <= c.Nodes; i++ {
		l = append(l, Node{Name: "node" + strconv.Itoa(i), Index: i})
	}
	return l
}

// Node finds a node by name.
func (c *Cluster) Node(name string) (Node, error) {
	var names []string
	for _, n := range c.NodeList() {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return Node{}, fmt.Errorf("no node %q: the cluster has %s", name, strings.Join(names, ", "))
}

// Addrs returns the node's addresses, IPv4 first.
func (c *Cluster) Addrs(n Node) []netip.Addr {
	var l []netip.Addr
	for _, f := range c.Families() {
		l = append(l, f.Node(n.Index).Addr())
	}
	return l
}

// PodCIDRs returns the node's pod ranges, IPv4 first.
func (c *Cluster) PodCIDRs(n Node) []netip.Prefix {
	var l []netip.Prefix
	for _, f := range c.Families() {
		l = append(l, f.PodCIDR(n.Index))
	}
	return l
}

// Port is the node's port on the bridge. Interface names have 15 characters.
func (n Node) Port() string { return "port" + strconv.Itoa(n.Index) }

// MAC is the hardware address of the node's eth0. It stays over a reboot, as a
// machine's does: with a new one, the node's neighbours would go on to send to
// the old one for half a minute.
func (n Node) MAC() net.HardwareAddr { return mac(byte(n.Index)) }

// BridgeMAC is the hardware address of the link's own end.
func BridgeMAC() net.HardwareAddr { return mac(0) }

func mac(n byte) net.HardwareAddr { return net.HardwareAddr{0x02, 'w', 'r', 'n', 0, n} }

// Disk is what survives the node's reboot.
func (c *Cluster) Disk(n Node) string { return c.Path("nodes", n.Name, "disk") }

// APIAddr is where nodes and the supervisor reach the API server.
func (c *Cluster) APIAddr() netip.AddrPort { return netip.AddrPortFrom(v4.Host.Addr(), APIPort) }

func join[T fmt.Stringer](l []T) string {
	var s []string
	for _, v := range l {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// topology is nodes on one link, each a network namespace, and pods on nodes, each another, with a veth to its node
// that routes for it. Every node has the conntrack and NAT hooks that kube-proxy and a CNI would bring.
//
//	bridge in a namespace of its own
//	├─ node client  10.79.255.1 ── pods 10.79.1.x
//	├─ node server  10.79.255.2 ── pods 10.79.2.x
//	└─ node encrypt 10.79.255.3 ── pods 10.79.3.x
type topology struct {
	fabric *netns.Handle
	nodes  map[string]*node
	cgroup string
	scope  string // of cgroups and files
}

type node struct {
	name   string
	number int
	ns     *netns.Handle
	cgroup string
	pods   int
}

type pod struct {
	node *node
	ns   *netns.Handle
	addr netip.Addr
}

var gateway = netip.MustParseAddr("169.254.1.1")

func build(scope string, names ...string) (t *topology, err error) {
	t = &topology{nodes: map[string]*node{}, scope: scope}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.close())
		}
	}()
	if t.cgroup, err = makeCgroup(scope); err != nil {
		return t, err
	}
	if t.fabric, err = netns.New(); err != nil {
		return t, err
	}
	if err = t.fabric.Do(func() error {
		return errors.Join(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "fabric"}}), up("fabric"))
	}); err != nil {
		return t, err
	}
	for i, name := range names {
		if err = t.addNode(name, i+1); err != nil {
			return t, fmt.Errorf("node %s: %w", name, err)
		}
	}
	return t, nil
}

// makeCgroup makes a cgroup v2 for everything.
func makeCgroup(scope string) (string, error) {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(root, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			dir := filepath.Join(root, scope)
			return dir, os.Mkdir(dir, 0o755)
		}
	}
	return "", errors.New("neither /sys/fs/cgroup nor /sys/fs/cgroup/unified is a cgroup v2 file system")
}

func (t *topology) addNode(name string, number int) (err error) {
	n := &node{name: name, number: number, cgroup: filepath.Join(t.cgroup, name)}
	if err := os.MkdirAll(filepath.Join(n.cgroup, "kubepods"), 0o755); err != nil {
		return err
	}
	if n.ns, err = netns.New(); err != nil {
		return err
	}
	t.nodes[name] = n
	port := fmt.Sprint("port", number)
	if err := t.fabric.Do(func() error {
		return n.ns.WithFD(func(fd int) error {
			fabric, err := netlink.LinkByName("fabric")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: port, MasterIndex: fabric.Attrs().Index}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}), up(port))
		})
	}); err != nil {
		return err
	}
	return n.ns.Do(func() error {
		err := errors.Join(up("lo"), up("eth0"), os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			address("eth0", netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 79, 255, byte(number)}), 24)))
		for other := range 4 {
			if other+1 != number {
				to := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 79, byte(other + 1), 0}), 24)
				err = errors.Join(err, route("eth0", to, netip.AddrFrom4([4]byte{10, 79, 255, byte(other + 1)})))
			}
		}
		if err != nil {
			return err
		}
		nft := exec.Command("nft", "-f", "-")
		nft.Stdin = strings.NewReader(rules)
		if out, err := nft.CombinedOutput(); err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		return nil
	})
}

// rules are the hooks of a node with kube-proxy and a masquerading CNI; none matches the benchmark's traffic.
const rules = `
table ip kube-proxy {
	map services {
		type ipv4_addr . inet_service : ipv4_addr . inet_service
		elements = { 10.96.0.1 . 443 : 10.79.255.1 . 6443 }
	}
	chain prerouting {
		type nat hook prerouting priority dstnat
		dnat ip to ip daddr . tcp dport map @services
	}
	chain output {
		type nat hook output priority -100
		dnat ip to ip daddr . tcp dport map @services
	}
	chain postrouting {
		type nat hook postrouting priority srcnat
		ip daddr != 10.79.0.0/16 ip saddr 10.79.0.0/16 masquerade
	}
	chain forward {
		type filter hook forward priority filter
		ct state invalid drop
	}
}
`

// newPod is a pod that nothing leads to.
func (t *topology) newPod(nodeName string) (p *pod, err error) {
	n := t.nodes[nodeName]
	n.pods++
	p = &pod{node: n, addr: netip.AddrFrom4([4]byte{10, 79, byte(n.number), byte(n.pods + 1)})}
	p.ns, err = netns.New()
	return p, err
}

func (t *topology) addPod(nodeName string) (*pod, error) {
	p, err := t.newPod(nodeName)
	if err != nil {
		return nil, err
	}
	n := p.node
	veth := fmt.Sprint("pod", n.pods)
	err = n.ns.Do(func() error {
		return p.ns.WithFD(func(fd int) error {
			return errors.Join(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: veth}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)}),
				up(veth), address(veth, netip.PrefixFrom(gateway, 32)), route(veth, netip.PrefixFrom(p.addr, 32), netip.Addr{}))
		})
	})
	if err != nil {
		return nil, err
	}
	return p, p.ns.Do(func() error {
		return errors.Join(up("lo"), up("eth0"), address("eth0", netip.PrefixFrom(p.addr, 32)), route("eth0", netip.PrefixFrom(gateway, 32), netip.Addr{}),
			route("eth0", netip.PrefixFrom(netip.IPv4Unspecified(), 0), gateway))
	})
}

// addPair makes two pods with a veth between them, past the node.
func (t *topology) addPair(nodeName string) (a, b *pod, err error) {
	if a, err = t.newPod(nodeName); err != nil {
		return nil, nil, err
	}
	if b, err = t.newPod(nodeName); err != nil {
		return nil, nil, err
	}
	if err := a.ns.Do(func() error {
		return b.ns.WithFD(func(fd int) error {
			return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(fd)})
		})
	}); err != nil {
		return nil, nil, err
	}
	for own, other := range map[*pod]*pod{a: b, b: a} {
		err = errors.Join(err, own.ns.Do(func() error {
			return errors.Join(up("lo"), up("eth0"), address("eth0", netip.PrefixFrom(own.addr, 32)), route("eth0", netip.PrefixFrom(other.addr, 32), netip.Addr{}))
		}))
	}
	return a, b, err
}

// close removes the cgroups; the namespaces end with their last user.
func (t *topology) close() error {
	var errs []error
	for _, n := range t.nodes {
		errs = append(errs, remove(filepath.Join(n.cgroup, "kubepods")), remove(n.cgroup), n.ns.Close())
	}
	if t.fabric != nil {
		errs = append(errs, t.fabric.Close())
	}
	if t.cgroup != "" {
		errs = append(errs, remove(t.cgroup))
	}
	return errors.Join(errs...)
}

// remove a cgroup whose last process may not be quite gone.
func remove(dir string) (err error) {
	for range 100 {
		if err = os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(l)
}

func address(link string, p netip.Prefix) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

func route(link string, to netip.Prefix, via netip.Addr) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), 32)}}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	return netlink.RouteAdd(r)
}

package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BringUpLoopback sets lo up in the current network namespace.
func BringUpLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// NewBridge creates a bridge with the given addresses. Without a hardware address
// that is set, it would have the lowest of its ports', and another one whenever
// these change.
func NewBridge(name string, mac net.HardwareAddr, addrs []netip.Prefix) error {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac}}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("create bridge %s: %w", name, err)
	}
	return configure(br, addrs)
}

// NewPort connects a bridge with the network namespace of process pid by a veth
// pair called port here and eth0 there, which has the given hardware address.
func NewPort(bridge, port string, pid int, mac net.HardwareAddr) error {
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	v := &netlink.Veth{
		LinkAttrs:        netlink.LinkAttrs{Name: port, MasterIndex: br.Attrs().Index},
		PeerName:         "eth0",
		PeerNamespace:    netlink.NsPid(pid),
		PeerHardwareAddr: mac,
	}
	if err := netlink.LinkAdd(v); err != nil {
		return fmt.Errorf("create veth %s: %w", port, err)
	}
	return netlink.LinkSetUp(v)
}

// DeleteLink removes a link; a missing one is fine.
func DeleteLink(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

// ConfigureLink gives a link its addresses and sets it up.
func ConfigureLink(name string, addrs []netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	return configure(l, addrs)
}

// configure adds IPv6 addresses without duplicate address detection, which would
// make them unusable for a second.
func configure(l netlink.Link, addrs []netip.Prefix) error {
	name := l.Attrs().Name
	for _, p := range addrs {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, name, err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// AddRoute adds a route; a zero-length prefix is the default route.
func AddRoute(dst netip.Prefix, via netip.Addr) error {
	r := &netlink.Route{Dst: ipNet(dst), Gw: via.AsSlice()}
	if err := netlink.RouteReplace(r); err != nil {
		return fmt.Errorf("add route %s via %s: %w", dst, via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Sysctl writes below /proc/sys; name is a path. Settings that this kernel does
// not have are skipped.
func Sysctl(name, value string) error {
	err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set %s to %s: %w", name, value, err)
	}
	return nil
}

// Forwarding turns the network namespace into a router for both families.
func Forwarding() error {
	return errors.Join(
		Sysctl("net/ipv4/ip_forward", "1"),
		Sysctl("net/ipv6/conf/all/disable_ipv6", "0"),
		Sysctl("net/ipv6/conf/default/disable_ipv6", "0"),
		Sysctl("net/ipv6/conf/all/forwarding", "1"),
		Sysctl("net/ipv6/conf/default/forwarding", "1"),
		Sysctl("net/bridge/bridge-nf-call-iptables", "1"),
		Sysctl("net/bridge/bridge-nf-call-ip6tables", "1"),
	)
}

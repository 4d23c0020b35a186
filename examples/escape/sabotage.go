package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// captureTable is the routing table of marked packets.
const captureTable = 1337

// sabotage are the ways of a process with NET_ADMIN: it changes its own namespace and then connects.
var sabotage = map[string]way{
	"delete-rule": func(o options) (string, error) {
		list, err := netlink.RuleListFiltered(family(o.to.Addr()), &netlink.Rule{Table: captureTable}, netlink.RT_FILTER_TABLE)
		if err != nil || len(list) == 0 {
			return "", fmt.Errorf("%d rules: %v", len(list), err)
		}
		for _, r := range list {
			r.Family = family(o.to.Addr())
			if err := netlink.RuleDel(&r); err != nil {
				return "", fmt.Errorf("delete the rule: %w", err)
			}
		}
		return dial(o, socket{})
	},
	"delete-route": func(o options) (string, error) {
		list, err := netlink.RouteListFiltered(family(o.to.Addr()), &netlink.Route{Table: captureTable}, netlink.RT_FILTER_TABLE)
		if err != nil || len(list) == 0 {
			return "", fmt.Errorf("%d routes: %v", len(list), err)
		}
		for _, r := range list {
			if err := netlink.RouteDel(&r); err != nil {
				return "", fmt.Errorf("delete the route: %w", err)
			}
		}
		return dial(o, socket{})
	},
	"earlier-rule": func(o options) (string, error) { // a rule of its own before the one that captures
		r := netlink.NewRule()
		mask := uint32(captureMask)
		r.Family, r.Priority, r.Mark, r.Mask, r.Table = family(o.to.Addr()), 1, captureMark, &mask, unix.RT_TABLE_MAIN
		if err := netlink.RuleAdd(r); err != nil {
			return "", fmt.Errorf("add a rule: %w", err)
		}
		defer netlink.RuleDel(r)
		return dial(o, socket{})
	},
	"second-interface": func(o options) (string, error) {
		parent, err := netlink.LinkByName("eth0")
		if err != nil {
			return "", err
		}
		m := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "out0", ParentIndex: parent.Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE}
		if err := netlink.LinkAdd(m); err != nil {
			return "", fmt.Errorf("add an interface: %w", err)
		}
		defer netlink.LinkDel(m)
		if err := netlink.LinkSetUp(m); err != nil {
			return "", err
		}
		// Straight to the gateway, whose hardware address is known, and by no table of the agent's.
		_, gateway, err := link("eth0", false)
		if err != nil {
			return "", err
		}
		me, err := own("eth0", false)
		if err != nil {
			return "", err
		}
		if err := errors.Join(
			netlink.NeighSet(&netlink.Neigh{LinkIndex: m.Attrs().Index, IP: gateway.AsSlice(), HardwareAddr: gatewayMAC(), State: netlink.NUD_PERMANENT}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: m.Attrs().Index, Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK), Src: me.AsSlice(),
				Dst: &net.IPNet{IP: o.to.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}}),
		); err != nil {
			return "", fmt.Errorf("route by the second interface: %w", err)
		}
		return dial(o, socket{set: func(fd int) error { return unix.BindToDevice(fd, "out0") }})
	},
	"second-address": func(o options) (string, error) { // another pod's, put on the own interface
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return "", err
		}
		bits := o.as.BitLen()
		a := &netlink.Addr{IPNet: &net.IPNet{IP: o.as.AsSlice(), Mask: net.CIDRMask(bits, bits)}}
		if err := netlink.AddrAdd(l, a); err != nil {
			return "", fmt.Errorf("add an address: %w", err)
		}
		defer netlink.AddrDel(l, a)
		return dial(o, socket{set: func(fd int) error { return unix.Bind(fd, sockaddr(netip.AddrPortFrom(o.as, 0), false)) }})
	},
	"dnat": func(o options) (string, error) { // connect to -via, have the packets go to -to
		if err := translate(o.via.Addr(), o.to.Addr()); err != nil {
			return "", fmt.Errorf("in-pod DNAT: %w", err)
		}
		defer nft(message(nftDelTable, nl.NewRtAttr(1, nl.ZeroTerminated("escape"))))
		o.to = o.via
		return dial(o, socket{})
	},
}

func family(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// nftables' messages (linux/netfilter/nf_tables.h).
const (
	nftNewTable = 0
	nftDelTable = 2
	nftNewChain = 3
	nftNewRule  = 6
	nftSubsys   = 10
)

// translate adds to a table of its own: on output, ip daddr from dnat to to.
func translate(from, to netip.Addr) error {
	table, chain := nl.ZeroTerminated("escape"), nl.ZeroTerminated("out")
	hook := nest(4, attr32(1, 3), attr32(2, 0xffffff9c)) // NF_INET_LOCAL_OUT, priority -100
	value := func(kind int, a netip.Addr) *nl.RtAttr { return nest(kind, nl.NewRtAttr(1, a.AsSlice())) }
	expr := func(name string, attrs ...*nl.RtAttr) *nl.RtAttr {
		return nest(1, nl.NewRtAttr(1, nl.ZeroTerminated(name)), nest(2, attrs...))
	}
	return nft(
		message(nftNewTable, nl.NewRtAttr(1, table)),
		message(nftNewChain, nl.NewRtAttr(1, table), nl.NewRtAttr(3, chain), hook, nl.NewRtAttr(7, nl.ZeroTerminated("nat"))),
		message(nftNewRule, nl.NewRtAttr(1, table), nl.NewRtAttr(2, chain), nest(4,
			expr("payload", attr32(1, 1), attr32(2, 1), attr32(3, 16), attr32(4, 4)), // the destination into register 1
			expr("cmp", attr32(1, 1), attr32(2, 0), value(3, from)),
			expr("immediate", attr32(1, 1), value(2, to)),
			expr("nat", attr32(1, 1), attr32(2, unix.AF_INET), attr32(3, 1)), // destination, from register 1
		)),
	)
}

func attr32(kind int, v uint32) *nl.RtAttr {
	return nl.NewRtAttr(kind, binary.BigEndian.AppendUint32(nil, v))
}

func nest(kind int, attrs ...*nl.RtAttr) *nl.RtAttr {
	a := nl.NewRtAttr(kind|unix.NLA_F_NESTED, nil)
	for _, c := range attrs {
		a.AddChild(c)
	}
	return a
}

func message(kind int, attrs ...*nl.RtAttr) []byte {
	body := []byte{unix.NFPROTO_IPV4, 0, 0, 0}
	for _, a := range attrs {
		body = append(body, a.Serialize()...)
	}
	return envelope(uint16(nftSubsys<<8|kind), unix.NLM_F_CREATE|unix.NLM_F_ACK, body)
}

func envelope(kind uint16, flags int, body []byte) []byte {
	m := make([]byte, 16, 16+len(body))
	binary.NativeEndian.PutUint32(m, uint32(16+len(body)))
	binary.NativeEndian.PutUint16(m[4:], kind)
	binary.NativeEndian.PutUint16(m[6:], uint16(unix.NLM_F_REQUEST|flags))
	return append(m, body...)
}

// nft commits messages as one batch.
func nft(messages ...[]byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.Timeval{Sec: 1}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return err
	}
	edge := []byte{0, 0, 0, nftSubsys}
	batch := envelope(unix.NLMSG_MIN_TYPE, 0, edge)
	for _, m := range messages {
		batch = append(batch, m...)
	}
	batch = append(batch, envelope(unix.NLMSG_MIN_TYPE+1, 0, edge)...)
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	b := make([]byte, 8192)
	for acks := 0; acks < len(messages); {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			return fmt.Errorf("answer of nftables: %w", err)
		}
		for p := b[:n]; len(p) >= 20; acks++ {
			if e := int32(binary.NativeEndian.Uint32(p[16:])); binary.NativeEndian.Uint16(p[4:]) == unix.NLMSG_ERROR && e != 0 {
				return unix.Errno(-e)
			}
			size := int(binary.NativeEndian.Uint32(p)+3) &^ 3
			if size > len(p) {
				break
			}
			p = p[size:]
		}
	}
	return nil
}

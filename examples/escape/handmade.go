package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	syn = 0x02
	psh = 0x08
	ack = 0x10
)

// extension is an IPv6 extension header; the first byte of its body is filled in.
type extension struct {
	protocol byte
	body     string
}

var options6 = extension{60, "\x00\x00\x01\x04\x00\x00\x00\x00"}

// handmade are the ways of a process with NET_RAW: packets that no TCP socket sent.
var handmade = map[string]way{
	"raw-syn": func(o options) (string, error) { return sendIP(o, syn) },
	"raw-syn-extension": func(o options) (string, error) {
		return sendIP(o, syn, options6)
	},
	"raw-syn-extensions": func(o options) (string, error) {
		return sendIP(o, syn, options6, options6, options6, options6, options6, options6, options6)
	},
	"raw-answer": func(o options) (string, error) { return sendIP(o, ack|psh) },
	"frame-syn": func(o options) (string, error) {
		p, err := packet(o, syn)
		if err != nil {
			return "", err
		}
		return sendFrame("eth0", 0x0800, p)
	},
	"frame-vlan": func(o options) (string, error) {
		p, err := packet(o, syn)
		if err != nil {
			return "", err
		}
		return sendFrame("eth0", 0x8100, append([]byte{0, 1, 8, 0}, p...))
	},
	"frame-fragments": func(o options) (string, error) { // the flags are in the second fragment (RFC 3128)
		p, err := packet(o, syn)
		if err != nil {
			return "", err
		}
		first := append([]byte{}, p[:28]...)
		binary.BigEndian.PutUint16(first[2:], 28)
		first[6] = 0x20
		rest := append(append([]byte{}, p[:20]...), p[28:]...)
		binary.BigEndian.PutUint16(rest[2:], uint16(len(rest)))
		rest[7] = 1
		for _, f := range [][]byte{first, rest} {
			binary.BigEndian.PutUint16(f[10:], 0)
			binary.BigEndian.PutUint16(f[10:], checksum(0, f[:20]))
			if said, err := sendFrame("eth0", 0x0800, f); err != nil {
				return said, err
			}
		}
		return "sent", nil
	},
	"arp": func(o options) (string, error) { // "-as is at my address"
		mac, gateway, err := link("eth0", false)
		if err != nil {
			return "", err
		}
		p := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, mac...)
		p = append(append(p, o.as.AsSlice()...), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		return sendFrame("eth0", 0x0806, append(p, gateway.AsSlice()...))
	},
	"neighbour": func(o options) (string, error) { // the same for IPv6
		mac, gateway, err := link("eth0", true)
		if err != nil {
			return "", err
		}
		me, err := own("eth0", true)
		if err != nil {
			return "", err
		}
		p := make([]byte, 40)
		p[0], p[6], p[7] = 0x60, unix.IPPROTO_ICMPV6, 255
		copy(p[8:], me.AsSlice())
		copy(p[24:], gateway.AsSlice())
		body := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, o.as.AsSlice()...)
		body = append(append(body, 2, 1), mac...)
		binary.BigEndian.PutUint16(p[4:], uint16(len(body)))
		binary.BigEndian.PutUint16(body[2:], checksum(pseudo(me, gateway, unix.IPPROTO_ICMPV6, len(body)), body))
		return sendFrame("eth0", 0x86dd, append(p, body...))
	},
}

// packet is a TCP segment to -to with the token as its payload, from -as or from the pod itself.
func packet(o options, flags byte, ext ...extension) ([]byte, error) {
	src, err := o.as, error(nil)
	if !src.IsValid() {
		if src, err = own("eth0", o.to.Addr().Is6()); err != nil {
			return nil, err
		}
	}
	dst := o.to.Addr()
	tcp := make([]byte, 20, 20+len(o.token))
	binary.BigEndian.PutUint16(tcp[0:], 5555)
	binary.BigEndian.PutUint16(tcp[2:], o.to.Port())
	binary.BigEndian.PutUint32(tcp[4:], 7)
	tcp[12], tcp[13] = 5<<4, flags
	binary.BigEndian.PutUint16(tcp[14:], 1024)
	tcp = append(tcp, o.token...)
	binary.BigEndian.PutUint16(tcp[16:], checksum(pseudo(src, dst, unix.IPPROTO_TCP, len(tcp)), tcp))
	if dst.Is4() {
		p := make([]byte, 20)
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(p[2:], uint16(20+len(tcp)))
		copy(p[12:], src.AsSlice())
		copy(p[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(p[10:], checksum(0, p))
		return append(p, tcp...), nil
	}
	p := make([]byte, 40)
	p[0], p[7] = 0x60, 64
	copy(p[8:], src.AsSlice())
	copy(p[24:], dst.AsSlice())
	next := 6
	for _, e := range ext {
		p[next] = e.protocol
		next = len(p)
		p = append(p, e.body...)
	}
	p[next] = unix.IPPROTO_TCP
	p = append(p, tcp...)
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	return p, nil
}

func pseudo(src, dst netip.Addr, protocol, length int) uint32 {
	var sum uint32
	for _, a := range [][]byte{src.AsSlice(), dst.AsSlice()} {
		for ; len(a) > 1; a = a[2:] {
			sum += uint32(a[0])<<8 | uint32(a[1])
		}
	}
	return sum + uint32(protocol) + uint32(length)
}

func checksum(sum uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// sendIP sends a packet by a raw socket, headers included.
func sendIP(o options, flags byte, ext ...extension) (string, error) {
	p, err := packet(o, flags, ext...)
	if err != nil {
		return "", err
	}
	family := unix.AF_INET
	if o.to.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
	if err != nil {
		return "", fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	return "sent", unix.Sendto(fd, p, 0, sockaddr(netip.AddrPortFrom(o.to.Addr(), 0), false))
}

// sendFrame sends an Ethernet frame to the gateway.
func sendFrame(device string, kind uint16, payload []byte) (string, error) {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return "", err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return "", fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	frame := make([]byte, 14, 14+len(payload))
	copy(frame, gatewayMAC())
	copy(frame[6:], l.Attrs().HardwareAddr)
	binary.BigEndian.PutUint16(frame[12:], kind)
	return "sent", unix.Sendto(fd, append(frame, payload...), 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index})
}

// gatewayMAC is the gateway's hardware address, or everybody's where that is not known.
func gatewayMAC() []byte {
	for _, v6 := range []bool{false, true} {
		_, gateway, err := link("eth0", v6)
		if err != nil {
			continue
		}
		list, _ := netlink.NeighList(0, netlink.FAMILY_ALL)
		for _, n := range list {
			if a, _ := netip.AddrFromSlice(n.IP); a.Unmap() == gateway && len(n.HardwareAddr) == 6 {
				return n.HardwareAddr
			}
		}
	}
	return []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
}

// link returns a device's hardware address and the gateway behind it.
func link(device string, v6 bool) (mac []byte, gateway netip.Addr, err error) {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return nil, gateway, err
	}
	family := netlink.FAMILY_V4
	if v6 {
		family = netlink.FAMILY_V6
	}
	routes, err := netlink.RouteList(l, family)
	if err != nil {
		return nil, gateway, err
	}
	for _, r := range routes {
		if g, ok := netip.AddrFromSlice(r.Gw); ok {
			return l.Attrs().HardwareAddr, g.Unmap(), nil
		}
	}
	return nil, gateway, errors.New("no gateway on " + device)
}

// own is the pod's address on a device.
func own(device string, v6 bool) (netip.Addr, error) {
	l, err := netlink.LinkByName(device)
	if err != nil {
		return netip.Addr{}, err
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range list {
		if ip, _ := netip.AddrFromSlice(a.IP); ip.Unmap().Is6() == v6 && !ip.IsLinkLocalUnicast() {
			return ip.Unmap(), nil
		}
	}
	return netip.Addr{}, errors.New("no address on " + device)
}

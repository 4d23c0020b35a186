package datapath

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tcpPacket is an IPv4 or IPv6 packet with a bare TCP header; ext are IPv6 extension headers, each with its
// protocol number in ext[i][0] replaced by that of what follows.
func tcpPacket(src, dst netip.AddrPort, flags byte, ext ...extension) []byte {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp[0:], src.Port())
	binary.BigEndian.PutUint16(tcp[2:], dst.Port())
	tcp[12], tcp[13] = 5<<4, flags
	binary.BigEndian.PutUint16(tcp[14:], 1024)
	var p []byte
	if src.Addr().Is4() {
		p = make([]byte, 20)
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(p[2:], 40)
		copy(p[12:], src.Addr().AsSlice())
		copy(p[16:], dst.Addr().AsSlice())
		return append(p, tcp...)
	}
	p = make([]byte, 40)
	p[0], p[7] = 0x60, 64
	copy(p[8:], src.Addr().AsSlice())
	copy(p[24:], dst.Addr().AsSlice())
	next := &p[6]
	for _, e := range ext {
		*next = e.protocol
		p = append(p, e.body...)
		next = &p[len(p)-len(e.body)]
	}
	*next = unix.IPPROTO_TCP
	p = append(p, tcp...)
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	return p
}

type extension struct {
	protocol byte
	body     []byte // the first byte is filled in
}

// sendRaw sends a whole IP packet from the pod.
func (h *host) sendRaw(packet []byte) error {
	return h.as(func() error {
		family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte(packet[16:20])})
		if packet[0]>>4 == 6 {
			family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte(packet[24:40])}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, packet, 0, to)
	})
}

// sendFrame sends an Ethernet frame from the pod's eth0.
func (h *host) sendFrame(etherType uint16, payload []byte) error {
	return h.as(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := make([]byte, 14, 14+len(payload))
		copy(frame, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
		copy(frame[6:], l.Attrs().HardwareAddr)
		binary.BigEndian.PutUint16(frame[12:], etherType)
		return unix.Sendto(fd, append(frame, payload...), 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index})
	})
}

// receive puts a frame on the node's end of the veth, so that it arrives at the pod.
func (h *host) receive(etherType uint16, payload []byte) error {
	var mac net.HardwareAddr
	if err := h.ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil {
			mac = l.Attrs().HardwareAddr
		}
		return err
	}); err != nil {
		return err
	}
	return h.lab.node.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := make([]byte, 14, 14+len(payload))
		copy(frame, mac)
		binary.BigEndian.PutUint16(frame[12:], etherType)
		return unix.Sendto(fd, append(frame, payload...), 0, &unix.SockaddrLinklayer{Ifindex: h.nodeIndex})
	})
}

// setChecksums completes an IPv4 packet of tcpPacket, which has 20 bytes of each header.
func setChecksums(p []byte) {
	sum := func(b []byte, start uint32) uint16 {
		for i := 0; i < len(b); i += 2 {
			start += uint32(b[i])<<8 | uint32(b[i+1])
		}
		for start > 0xffff {
			start = start>>16 + start&0xffff
		}
		return ^uint16(start)
	}
	pseudo := uint32(^sum(p[12:20], 0)) + unix.IPPROTO_TCP + uint32(len(p)-20)
	binary.BigEndian.PutUint16(p[10:], sum(p[:20], 0))
	binary.BigEndian.PutUint16(p[36:], sum(p[20:], pseudo))
}

func arpReply(sender netip.Addr) []byte {
	p := []byte{0, 1, 8, 0, 6, 4, 0, 2, 2, 2, 2, 2, 2, 2}
	p = append(p, sender.AsSlice()...)
	p = append(p, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	return append(p, gateway4.AsSlice()...)
}

func neighbourAdvertisement(src, target netip.Addr) []byte {
	p := make([]byte, 40+24)
	p[0], p[6], p[7] = 0x60, unix.IPPROTO_ICMPV6, 255
	binary.BigEndian.PutUint16(p[4:], 24)
	copy(p[8:], src.AsSlice())
	copy(p[24:], gateway6.AsSlice())
	p[40] = 136
	copy(p[48:], target.AsSlice())
	return p
}

const (
	syn = 0x02
	ack = 0x10
)

// What a pod with NET_RAW can put on the wire by itself.
func TestGuardDropsHandmadePackets(t *testing.T) {
	l := enrolled(t)
	ui4, ui6 := netip.AddrPortFrom(l.ui.v4, 5555), netip.AddrPortFrom(l.ui.v6, 5555)
	cat4, cat6 := netip.AddrPortFrom(l.cat.v4, appPort), netip.AddrPortFrom(l.cat.v6, appPort)
	out4, out6 := netip.AddrPortFrom(l.outside.v4, appPort), netip.AddrPortFrom(l.outside.v6, appPort)
	pad := extension{protocol: 60, body: []byte{0, 0, 1, 4, 0, 0, 0, 0}}
	hop := extension{protocol: 0, body: []byte{0, 0, 1, 4, 0, 0, 0, 0}}
	first := extension{protocol: 44, body: []byte{0, 0, 0, 1, 0, 0, 0, 7}}
	tiny := tcpPacket(ui4, cat4, syn)[:28]
	binary.BigEndian.PutUint16(tiny[2:], 28)
	tiny[6] = 0x20
	second := append(tcpPacket(ui4, cat4, syn)[:20], make([]byte, 12)...)
	binary.BigEndian.PutUint16(second[2:], 32)
	second[7] = 1

	for _, p := range []struct {
		name, counter string
		send          func() error
	}{
		{"SYN, IPv4", "guard_drop_unvouched", func() error { return l.ui.sendRaw(tcpPacket(ui4, cat4, syn)) }},
		{"SYN, IPv6", "guard_drop_unvouched", func() error { return l.ui.sendRaw(tcpPacket(ui6, cat6, syn)) }},
		{"SYN to outside", "guard_drop_unvouched", func() error { return l.ui.sendRaw(tcpPacket(ui4, out4, syn)) }},
		{"SYN with other flags", "guard_drop_unvouched", func() error { return l.ui.sendRaw(tcpPacket(ui4, cat4, syn|0xe9)) }},
		{"SYN behind destination options", "guard_drop_unvouched", func() error { return l.ui.sendRaw(tcpPacket(ui6, cat6, syn, pad)) }},
		{"SYN behind three extension headers", "guard_drop_unvouched", func() error {
			return l.ui.sendRaw(tcpPacket(ui6, out6, syn, hop, pad, first))
		}},
		{"SYN behind too many extension headers", "guard_drop_malformed", func() error {
			return l.ui.sendRaw(tcpPacket(ui6, cat6, syn, pad, pad, pad, pad, pad, pad, pad))
		}},
		{"SYN in a fragment without its flags", "guard_drop_malformed", func() error { return l.ui.sendFrame(0x0800, tiny) }},
		{"second fragment over the flags", "guard_drop_malformed", func() error { return l.ui.sendFrame(0x0800, second) }},
		{"SYN by packet socket", "guard_drop_unvouched", func() error { return l.ui.sendFrame(0x0800, tcpPacket(ui4, cat4, syn)) }},
		{"SYN in a VLAN", "guard_drop_vlan", func() error {
			return l.ui.sendFrame(0x8100, append([]byte{0, 1, 8, 0}, tcpPacket(ui4, cat4, syn)...))
		}},
		{"the neighbour's address, IPv4", "guard_drop_source", func() error { return l.ui.sendRaw(tcpPacket(cat4, out4, syn)) }},
		{"the neighbour's address, IPv6", "guard_drop_source", func() error { return l.ui.sendRaw(tcpPacket(cat6, out6, syn)) }},
		{"an answer as the neighbour", "guard_drop_source", func() error { return l.ui.sendRaw(tcpPacket(cat4, out4, syn|ack)) }},
		{"ARP for the neighbour", "guard_drop_neighbour", func() error { return l.ui.sendFrame(0x0806, arpReply(l.cat.v4)) }},
		{"neighbour advertisement for the neighbour", "guard_drop_neighbour", func() error {
			return l.ui.sendFrame(0x86dd, neighbourAdvertisement(l.ui.v6, l.cat.v6))
		}},
	} {
		t.Run(p.name, func(t *testing.T) {
			l.in(t).counted(map[string]int{p.counter: 1}, func() { check(t, p.send()) })
		})
	}
	// Its own answers pass.
	l.counted(map[string]int{"guard_drop_neighbour": 0}, func() { check(t, l.ui.sendFrame(0x0806, arpReply(l.ui.v4))) })
}

// A pod with NET_ADMIN takes the capture apart. Nothing of a captured socket gets out, neither its SYN nor the
// data of a connection that is open; Audit puts it together again.
func TestGuardHoldsWithoutRuleOrRoute(t *testing.T) {
	for _, sabotage := range []struct {
		name    string
		problem string
		do      func(l *lab, family int) error
	}{
		{"rule deleted", "the rule for marked packets is missing", func(l *lab, family int) error {
			return netlink.RuleDel(markRule(family))
		}},
		{"route deleted", "the local route is missing", func(l *lab, family int) error {
			list, err := netlink.RouteListFiltered(family, &netlink.Route{Table: Table}, netlink.RT_FILTER_TABLE)
			for _, r := range list {
				err = errors.Join(err, netlink.RouteDel(&r))
			}
			return err
		}},
	} {
		t.Run(sabotage.name, func(t *testing.T) {
			l := enrolled(t)
			for i, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				dst := l.cat.addrs(appPort)[i]
				open, err := l.ui.dial(dst)
				check(t, err)
				defer open.Close()
				_, _, err = seen(open)
				check(t, err)
				check(t, l.ui.ns.Do(func() error { return sabotage.do(l, family) }))
				l.counted(map[string]int{"guard_drop_captured": -1}, func() { open.Write([]byte("secret")) })
				l.counted(map[string]int{"connect_captured": 1, "guard_drop_captured": -1}, func() {
					if c, err := l.ui.dialWithin(patience, dst); err == nil {
						c.Close()
						t.Error("connected")
					}
				})
				found, err := l.dp.Audit()
				check(t, err)
				problems := found[1].Problems
				if found[1].UID != "uid-ui" || len(problems) != 1 || problems[0] != sabotage.problem+" ("+familyName(family)+")" {
					t.Errorf("found %+v", found)
				}
				c, err := l.ui.dial(dst)
				check(t, err)
				c.Close()
			}
		})
	}
}

// The application changes its mark after connect: its packets take the ordinary route, into the guard.
func TestGuardHoldsWhenTheMarkIsChanged(t *testing.T) {
	l := enrolled(t)
	c, err := l.ui.dial(netip.AddrPortFrom(vip4, servicePort))
	check(t, err)
	defer c.Close()
	_, _, err = seen(c)
	check(t, err)
	raw, err := c.SyscallConn()
	check(t, err)
	check(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0) }))
	check(t, err)
	l.counted(map[string]int{"guard_drop_captured": -1}, func() { c.Write([]byte("secret")) })
}

// A destination becomes mesh between connect and SYN; DNAT in the pod looks the same to the guard.
func TestGuardHoldsWhenTheDestinationIsMesh(t *testing.T) {
	l := enrolled(t)
	dst := netip.AddrPortFrom(l.outside.v4, appPort)
	check(t, l.ui.as(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1); err != nil {
			return err
		}
		// The kernel defers the SYN only towards a server whose cookie it has, or when told not to ask for one.
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1); err != nil {
			return err
		}
		l.counted(map[string]int{"connect_vouched": 1, "guard_vouched": 0}, func() {
			if err := unix.Connect(fd, sockaddr(dst)); err != nil {
				t.Errorf("connect: %v", err)
			}
		})
		d := l.destinations()
		d.Addrs[dst.Addr()] = true
		if err := l.dp.SetDestinations(d); err != nil {
			return err
		}
		l.counted(map[string]int{"guard_drop_mesh": -1}, func() { unix.Write(fd, []byte("secret")) })
		return nil
	}))
}

// Sockets that no hook saw: made before enrolment, or by a process outside the pods' cgroup.
func TestGuardDropsSocketsTheHookHasNotSeen(t *testing.T) {
	l := enrolled(t)
	l.counted(map[string]int{"guard_drop_unvouched": -1, "connect_captured": 0}, func() {
		err := l.ui.ns.Do(func() error { // not in the pods' cgroup
			c, err := dialHere(patience, l.cat.addrs(appPort)[0])
			if err == nil {
				c.Close()
			}
			return err
		})
		if !timedOut(err) {
			t.Errorf("an unseen socket: %v, want a time-out", err)
		}
	})
}

package enroll

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// TCP states (include/net/tcp_states.h).
const (
	tcpEstablished = 1
	tcpSynSent     = 2
	tcpSynRecv     = 3
	tcpFinWait1    = 4
	tcpFinWait2    = 5
	tcpCloseWait   = 8
	tcpListen      = 10
)

// carrying are the states in which bytes may still pass.
const carrying = 1<<tcpEstablished | 1<<tcpSynSent | 1<<tcpSynRecv | 1<<tcpFinWait1 | 1<<tcpFinWait2 | 1<<tcpCloseWait

// Layouts of include/uapi/linux/{inet_diag,sock_diag}.h, in bytes.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	diagIDLen        = 48 // struct inet_diag_sockid
	diagReqLen       = 56 // struct inet_diag_req_v2
	diagMsgLen       = 72 // struct inet_diag_msg
	diagMark         = 15 // INET_DIAG_MARK
)

// tcpSocket is one TCP socket of a namespace as inet_diag lists it.
type tcpSocket struct {
	family        uint8
	state         uint8
	local, remote netip.AddrPort
	mark          uint32
	id            [diagIDLen]byte // with the socket's cookie: names it and no later one
}

func (s *tcpSocket) cookie() uint64 { return binary.NativeEndian.Uint64(s.id[40:]) }

// diag is a socket for questions about the TCP sockets of one namespace.
type diag struct {
	fd  int
	buf []byte
}

func openDiag(h *netns.Handle) (*diag, error) {
	fd, err := h.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("ask for the connections of %s: %w", h, err)
	}
	tv := unix.Timeval{Sec: 1}
	err = errors.Join(unix.SetNonblock(fd, false), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("ask for the connections of %s: %w", h, err)
	}
	return &diag{fd: fd, buf: make([]byte, 64<<10)}, nil
}

func (d *diag) close() { unix.Close(d.fd) }

// list returns the TCP sockets of both families in the given states.
func (d *diag) list(states uint32) ([]tcpSocket, error) {
	var out []tcpSocket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, diagReqLen)
		req[0], req[1] = family, unix.IPPROTO_TCP
		binary.NativeEndian.PutUint32(req[4:], states)
		err := d.ask(sockDiagByFamily, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, req, func(msg []byte) {
			if s, ok := parseSocket(msg); ok {
				out = append(out, s)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list connections: %w", err)
		}
	}
	return out, nil
}

// destroy resets the sockets and returns how many there still were. SOCK_DESTROY aborts a socket as the last
// close with unread data would: both ends get a reset.
func (d *diag) destroy(socks []tcpSocket) (int, error) {
	n := 0
	for i := range socks {
		req := make([]byte, diagReqLen)
		req[0], req[1] = socks[i].family, unix.IPPROTO_TCP
		binary.NativeEndian.PutUint32(req[4:], ^uint32(0))
		copy(req[8:], socks[i].id[:])
		err := d.ask(sockDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, req, nil)
		switch {
		case err == nil:
			n++
		case errors.Is(err, unix.ENOENT): // ended by itself
		case errors.Is(err, unix.EOPNOTSUPP):
			return n, fmt.Errorf("reset connections: this kernel lacks CONFIG_INET_DIAG_DESTROY: %w", err)
		default:
			return n, fmt.Errorf("reset the connection %v - %v: %w", socks[i].local, socks[i].remote, err)
		}
	}
	return n, nil
}

// ask sends one request and hands the payload of each answer to each.
func (d *diag) ask(typ uint16, flags uint16, payload []byte, each func([]byte)) error {
	msg := make([]byte, unix.NLMSG_HDRLEN, unix.NLMSG_HDRLEN+len(payload))
	binary.NativeEndian.PutUint32(msg[0:], uint32(unix.NLMSG_HDRLEN+len(payload)))
	binary.NativeEndian.PutUint16(msg[4:], typ)
	binary.NativeEndian.PutUint16(msg[6:], flags)
	if err := unix.Sendto(d.fd, append(msg, payload...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for b := d.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.NLMSG_HDRLEN || size > len(b) {
				return fmt.Errorf("netlink message of %d bytes in %d", size, len(b))
			}
			body := b[unix.NLMSG_HDRLEN:size]
			switch binary.NativeEndian.Uint16(b[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if len(body) < 4 {
					return fmt.Errorf("short netlink error")
				}
				if errno := int32(binary.NativeEndian.Uint32(body)); errno != 0 {
					return unix.Errno(-errno)
				}
				return nil
			default:
				if each != nil {
					each(body)
				}
			}
			b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
		}
	}
}

func parseSocket(b []byte) (tcpSocket, bool) {
	if len(b) < diagMsgLen {
		return tcpSocket{}, false
	}
	s := tcpSocket{family: b[0], state: b[1]}
	copy(s.id[:], b[4:4+diagIDLen])
	s.local = endpoint(s.family, s.id[4:20], s.id[0:2])
	s.remote = endpoint(s.family, s.id[20:36], s.id[2:4])
	for a := b[diagMsgLen:]; len(a) >= 4; {
		size := int(binary.NativeEndian.Uint16(a))
		if size < 4 || size > len(a) {
			break
		}
		if binary.NativeEndian.Uint16(a[2:]) == diagMark && size >= 8 {
			s.mark = binary.NativeEndian.Uint32(a[4:])
		}
		a = a[min(len(a), (size+3)&^3):]
	}
	return s, true
}

func endpoint(family uint8, addr, port []byte) netip.AddrPort {
	var a netip.Addr
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr[:4]))
	} else {
		a = netip.AddrFrom16([16]byte(addr)).Unmap()
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}

// uncaptured lists, when capture has just been switched on, the connections that it did not see, because it
// happens at connection set-up: inbound ones, and outbound ones to addresses that capture would take. Captured
// ones are told by the mark, which capture sets on a client's socket and the inbound leg hands to the server's,
// and the agent's own by their ports. Looking afterwards leaves no gap between look and switch.
func (d *diag) uncaptured(capture func(netip.Addr) bool) ([]tcpSocket, error) {
	listeners, err := d.list(1 << tcpListen)
	if err != nil {
		return nil, err
	}
	ports := map[uint16]bool{}
	for i := range listeners {
		ports[listeners[i].local.Port()] = true
	}
	open, err := d.list(carrying)
	if err != nil {
		return nil, err
	}
	var out []tcpSocket
	for i := range open {
		s := &open[i]
		switch {
		case s.mark == datapath.Mark, agentPort(s.local.Port()), s.remote.Port() == datapath.PortHBONE:
		case s.remote.Addr().IsLoopback(), s.remote.Addr() == s.local.Addr(): // within the pod
		case ports[s.local.Port()], capture != nil && capture(s.remote.Addr()):
			out = append(out, *s)
		}
	}
	return out, nil
}

// remaining lists those of the sockets that are still open, by their cookies.
func (d *diag) remaining(cookies map[uint64]bool) ([]tcpSocket, error) {
	open, err := d.list(carrying)
	return slices.DeleteFunc(open, func(s tcpSocket) bool { return !cookies[s.cookie()] }), err
}

func agentPort(p uint16) bool {
	return p == datapath.PortOutbound || p == datapath.PortInbound || p == datapath.PortHBONE
}

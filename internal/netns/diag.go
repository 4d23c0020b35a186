package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// TCP states (include/net/tcp_states.h).
const (
	TCPEstablished = 1
	TCPSynSent     = 2
	TCPSynRecv     = 3
	TCPFinWait1    = 4
	TCPFinWait2    = 5
	TCPCloseWait   = 8
	TCPLastAck     = 9
	TCPListen      = 10
	TCPClosing     = 11
	TCPNewSynRecv  = 12
)

// Carrying are the states in which bytes may still pass.
const Carrying = 1<<TCPEstablished | 1<<TCPSynSent | 1<<TCPSynRecv | 1<<TCPFinWait1 | 1<<TCPFinWait2 | 1<<TCPCloseWait

// Layouts of include/uapi/linux/{inet_diag,sock_diag}.h, in bytes.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	diagIDLen        = 48 // struct inet_diag_sockid
	diagReqLen       = 56 // struct inet_diag_req_v2
	diagMsgLen       = 72 // struct inet_diag_msg
	diagMark         = 15 // INET_DIAG_MARK
	diagInfo         = 2  // INET_DIAG_INFO: struct tcp_info
	infoAcked        = 120
	infoReceived     = 128
	infoLen          = 136 // as far as it is read
)

// TCPSocket is one TCP socket of a namespace as inet_diag lists it.
type TCPSocket struct {
	Family        uint8
	State         uint8
	Local, Remote netip.AddrPort
	Mark          uint32
	// Bytes that the peer has acknowledged and that have come from it, of [Diag.ListTraffic].
	Acked, Received uint64
	id              [diagIDLen]byte // with the socket's cookie: names it and no later one
}

// Cookie is the socket's own number, which no other socket gets.
func (s *TCPSocket) Cookie() uint64 { return binary.NativeEndian.Uint64(s.id[40:]) }

// Diag is a socket for questions about the TCP sockets of one namespace.
type Diag struct {
	fd  int
	buf []byte
}

// OpenDiag opens one for the namespace of h.
func OpenDiag(h *Handle) (*Diag, error) {
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
	return &Diag{fd: fd, buf: make([]byte, 64<<10)}, nil
}

// Close closes it.
func (d *Diag) Close() { unix.Close(d.fd) }

// List returns the TCP sockets of both families in the given states.
func (d *Diag) List(states uint32) ([]TCPSocket, error) { return d.list(states, 0) }

// ListTraffic is List with the bytes that passed.
func (d *Diag) ListTraffic(states uint32) ([]TCPSocket, error) {
	return d.list(states, 1<<(diagInfo-1))
}

func (d *Diag) list(states uint32, more uint8) ([]TCPSocket, error) {
	var out []TCPSocket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := make([]byte, diagReqLen)
		req[0], req[1], req[2] = family, unix.IPPROTO_TCP, more
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

// Destroy resets the sockets and returns how many there still were. SOCK_DESTROY aborts a socket as the last
// close with unread data would: both ends get a reset.
func (d *Diag) Destroy(socks []TCPSocket) (int, error) {
	n := 0
	for i := range socks {
		req := make([]byte, diagReqLen)
		req[0], req[1] = socks[i].Family, unix.IPPROTO_TCP
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
			return n, fmt.Errorf("reset the connection %v - %v: %w", socks[i].Local, socks[i].Remote, err)
		}
	}
	return n, nil
}

// TryDestroy asks for the end of a connection that does not exist. Where the kernel cannot end connections the error
// is EOPNOTSUPP; another one says that it can.
func (d *Diag) TryDestroy() error {
	req := make([]byte, diagReqLen)
	req[0], req[1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], ^uint32(0))
	return d.ask(sockDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, req, nil)
}

// ask sends one request and hands the payload of each answer to each.
func (d *Diag) ask(typ uint16, flags uint16, payload []byte, each func([]byte)) error {
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

func parseSocket(b []byte) (TCPSocket, bool) {
	if len(b) < diagMsgLen {
		return TCPSocket{}, false
	}
	s := TCPSocket{Family: b[0], State: b[1]}
	copy(s.id[:], b[4:4+diagIDLen])
	s.Local = endpoint(s.Family, s.id[4:20], s.id[0:2])
	s.Remote = endpoint(s.Family, s.id[20:36], s.id[2:4])
	for a := b[diagMsgLen:]; len(a) >= 4; {
		size := int(binary.NativeEndian.Uint16(a))
		if size < 4 || size > len(a) {
			break
		}
		switch kind := binary.NativeEndian.Uint16(a[2:]); {
		case kind == diagMark && size >= 8:
			s.Mark = binary.NativeEndian.Uint32(a[4:])
		case kind == diagInfo && size >= 4+infoLen:
			s.Acked, s.Received = binary.NativeEndian.Uint64(a[4+infoAcked:]), binary.NativeEndian.Uint64(a[4+infoReceived:])
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

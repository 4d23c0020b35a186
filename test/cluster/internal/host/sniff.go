package host

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxFrame   = 1 << 17  // a segmentation-offload frame and its headers
	bufferSize = 64 << 20 // enough for bursts on a busy machine
	idle       = 100 * time.Millisecond
)

// Sniffer receives copies of all frames that enter any interface of the network
// namespace it was made in.
type Sniffer struct {
	fd    int
	buf   []byte
	names map[int]string
}

// NewSniffer opens a packet socket in the calling thread's network namespace.
func NewSniffer() (*Sniffer, error) {
	proto := int(htons(unix.ETH_P_ALL))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, bufferSize); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("enlarge buffer of packet socket: %w", err)
	}
	tv := unix.NsecToTimeval(idle.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set timeout of packet socket: %w", err)
	}
	return &Sniffer{fd: fd, buf: make([]byte, maxFrame), names: map[int]string{}}, nil
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// Next returns the next frame that entered an interface, and the interface's
// name; an empty name when none came for a while.
func (s *Sniffer) Next() (iface string, data []byte, at time.Time, err error) {
	for {
		n, from, err := unix.Recvfrom(s.fd, s.buf, unix.MSG_TRUNC)
		switch err {
		case nil:
		case unix.EINTR, unix.ENETDOWN: // the latter: an interface went away
			continue
		case unix.EAGAIN:
			return "", nil, time.Time{}, nil
		default:
			return "", nil, time.Time{}, fmt.Errorf("receive frame: %w", err)
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok || ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if n > len(s.buf) {
			return "", nil, time.Time{}, fmt.Errorf("receive frame: %d bytes do not fit into %d", n, len(s.buf))
		}
		return s.name(ll.Ifindex), s.buf[:n], time.Now(), nil
	}
}

// name asks through the socket, which knows its network namespace. Indices are
// not used twice, so an answer stays true.
func (s *Sniffer) name(index int) string {
	if n, ok := s.names[index]; ok {
		return n
	}
	req, err := unix.NewIfreq("")
	if err != nil {
		return ""
	}
	req.SetUint32(uint32(index))
	if err := unix.IoctlIfreq(s.fd, unix.SIOCGIFNAME, req); err != nil {
		return ""
	}
	s.names[index] = req.Name()
	return req.Name()
}

// Dropped returns how many frames did not fit into the buffer since the last
// call.
func (s *Sniffer) Dropped() (uint64, error) {
	st, err := unix.GetsockoptTpacketStats(s.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, fmt.Errorf("read packet socket's counters: %w", err)
	}
	return uint64(st.Drops), nil
}

// Close closes the socket.
func (s *Sniffer) Close() error { return unix.Close(s.fd) }

package netns

import (
	"encoding/binary"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of a new connection, none of which blocks. Go's scheduler is told of none: what is in a system call that it
// knows of loses its processor as soon as the kernel takes the thread's, another thread is woken for that, and the thread
// that looks out for such calls does so every 20 µs. That was an eighth of the agents' CPU where connections come and go.

// SetOption sets a socket option that is an int.
func SetOption(fd, level, name, value int) error {
	v := int32(value)
	return setOption(fd, level, name, unsafe.Pointer(&v), unsafe.Sizeof(v))
}

// SetStringOption sets a socket option that is a string.
func SetStringOption(fd, level, name int, value string) error {
	return setOption(fd, level, name, unsafe.Pointer(unsafe.StringData(value)), uintptr(len(value)))
}

// SetHard says whether every close(2) of a socket is a RST, that by the end of the process included.
func SetHard(fd int, hard bool) error {
	l := unix.Linger{}
	if hard {
		l.Onoff = 1
	}
	return setOption(fd, unix.SOL_SOCKET, unix.SO_LINGER, unsafe.Pointer(&l), unsafe.Sizeof(l))
}

func setOption(fd, level, name int, value unsafe.Pointer, size uintptr) error {
	_, _, errno := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(value), size, 0)
	return failed("setsockopt", errno)
}

// Option returns a socket option that is an int.
func Option(fd, level, name int) (int, error) {
	var v int32
	err := option(fd, level, name, unsafe.Pointer(&v), unsafe.Sizeof(v))
	return int(v), err
}

// State is the state of a TCP socket, as unix.BPF_TCP_CLOSE is one.
func State(fd int) (int, error) {
	var state uint8 // the first of struct tcp_info
	err := option(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&state), unsafe.Sizeof(state))
	return int(state), err
}

// LastAck is how long ago the peer of a TCP socket has acknowledged anything, by its kernel's clock of milliseconds.
func LastAck(fd int) (time.Duration, error) {
	info, err := tcpInfo(fd)
	return time.Duration(info.Last_ack_recv) * time.Millisecond, err
}

// Taken is how many bytes the peer of a TCP socket has acknowledged, and whether there are more for it.
func Taken(fd int) (bytes uint64, more bool, err error) {
	info, err := tcpInfo(fd)
	return info.Bytes_acked, info.Unacked > 0 || info.Notsent_bytes > 0, err
}

func tcpInfo(fd int) (info unix.TCPInfo, err error) {
	err = option(fd, unix.IPPROTO_TCP, unix.TCP_INFO, unsafe.Pointer(&info), unsafe.Sizeof(info))
	return info, err
}

func option(fd, level, name int, value unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, errno := syscall.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(value), uintptr(unsafe.Pointer(&n)), 0)
	return failed("getsockopt", errno)
}

// Bind gives a socket its own address.
func Bind(fd int, a netip.AddrPort) error {
	t := newAddress(a)
	_, _, errno := syscall.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&t.raw)), uintptr(t.len))
	return failed("bind", errno)
}

// Close closes a descriptor.
func Close(fd int) { _, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func failed(call string, errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return os.NewSyscallError(call, errno)
}

// address is one as the kernel has it.
type address struct {
	raw    [unix.SizeofSockaddrInet6]byte
	len    uint32
	family int
}

func newAddress(a netip.AddrPort) *address {
	t := &address{family: unix.AF_INET6, len: unix.SizeofSockaddrInet6}
	if ip := a.Addr().Unmap(); ip.Is4() {
		t.family, t.len = unix.AF_INET, unix.SizeofSockaddrInet4
		b := ip.As4()
		copy(t.raw[4:], b[:])
	} else {
		b := ip.As16()
		copy(t.raw[8:], b[:])
	}
	binary.NativeEndian.PutUint16(t.raw[:], uint16(t.family))
	binary.BigEndian.PutUint16(t.raw[2:], a.Port())
	return t
}

// addrPort is what the kernel has written into t; an IPv4 address that an IPv6 socket has is an IPv4 address.
func (t *address) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16(t.raw[2:])
	switch binary.NativeEndian.Uint16(t.raw[:]) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(t.raw[4:])), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(t.raw[8:])).Unmap(), port)
	}
	return netip.AddrPort{}
}

func (t *address) connect(fd int) syscall.Errno {
	for {
		_, _, errno := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&t.raw)), uintptr(t.len))
		if errno != unix.EINTR {
			return errno
		}
	}
}

// accept takes a connection of a non-blocking listener and its peer's address.
func accept(listener int) (fd int, from netip.AddrPort, errno syscall.Errno) {
	for {
		t := address{len: unix.SizeofSockaddrInet6}
		n, _, errno := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(listener), uintptr(unsafe.Pointer(&t.raw)), uintptr(unsafe.Pointer(&t.len)),
			unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0, 0)
		switch errno {
		case 0:
			return int(n), t.addrPort(), 0
		case unix.EINTR, unix.ECONNABORTED:
		default:
			return -1, netip.AddrPort{}, errno
		}
	}
}

// nameOf is a socket's own address.
func nameOf(fd int) (netip.AddrPort, error) {
	t := address{len: unix.SizeofSockaddrInet6}
	_, _, errno := syscall.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(&t.raw)), uintptr(unsafe.Pointer(&t.len)))
	return t.addrPort(), failed("getsockname", errno)
}

// socket makes a socket that does not block, in the thread's namespace.
func socket(family, typ, proto int) (int, error) {
	fd, _, errno := syscall.RawSyscall(unix.SYS_SOCKET, uintptr(family), uintptr(typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK), uintptr(proto))
	if errno != 0 {
		return -1, failed("socket", errno)
	}
	return int(fd), nil
}

// enter takes the calling thread into a namespace.
func enter(ns int) error {
	_, _, errno := syscall.RawSyscall(unix.SYS_SETNS, uintptr(ns), unix.CLONE_NEWNET, 0)
	return failed("setns", errno)
}

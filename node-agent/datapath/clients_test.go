package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// client is a socket as an application may use one.
type client struct {
	name  string
	proto int
	flags int
	v6    bool // an AF_INET6 socket for whatever the destination is
	set   func(fd int, h *host, dst netip.AddrPort) error
	go_   func(fd int, dst unix.Sockaddr) error // default: connect
}

var clients = []client{
	{name: "blocking"},
	{name: "non-blocking", flags: unix.SOCK_NONBLOCK, go_: func(fd int, dst unix.Sockaddr) error {
		if err := connected(fd, unix.Connect(fd, dst)); err != nil {
			return err
		}
		return unix.SetNonblock(fd, false)
	}},
	{name: "TCP Fast Open by sendto", go_: func(fd int, dst unix.Sockaddr) error {
		return connected(fd, unix.Sendto(fd, []byte("x"), unix.MSG_FASTOPEN, dst))
	}},
	{name: "TCP Fast Open by sockopt", set: func(fd int, _ *host, _ netip.AddrPort) error {
		return unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1)
	}, go_: func(fd int, dst unix.Sockaddr) error {
		if err := unix.Connect(fd, dst); err != nil {
			return err
		}
		_, err := unix.Write(fd, []byte("x"))
		return connected(fd, err)
	}},
	{name: "bound to address and port", set: func(fd int, h *host, dst netip.AddrPort) error {
		src := h.v4
		if dst.Addr().Is6() {
			src = h.v6
		}
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 23456)))
	}},
	{name: "bound to a port", set: func(fd int, _ *host, dst netip.AddrPort) error {
		any := netip.IPv4Unspecified()
		if dst.Addr().Is6() {
			any = netip.IPv6Unspecified()
		}
		return unix.Bind(fd, sockaddr(netip.AddrPortFrom(any, 23457)))
	}},
	{name: "bound to a device", set: func(fd int, _ *host, _ netip.AddrPort) error {
		return unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0")
	}},
	{name: "with a mark of its own", set: func(fd int, _ *host, _ netip.AddrPort) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x77)
	}},
	{name: "with the capture mark forged", set: func(fd int, _ *host, _ netip.AddrPort) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, Mark)
	}},
	{name: "MPTCP", proto: unix.IPPROTO_MPTCP},
	{name: "IPv4-mapped or plain IPv6", v6: true},
}

// connected waits for a connection that is under way: a non-blocking one, or one that a signal of the Go runtime
// interrupted, which the kernel does not take up again.
func connected(fd int, err error) error {
	if err != unix.EINPROGRESS && err != unix.EINTR {
		return err
	}
	deadline := time.Now().Add(plenty)
	for time.Now().Before(deadline) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 1000)
		if err != nil && err != unix.EINTR {
			return err
		}
		if n > 0 {
			e, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			if e != 0 {
				err = unix.Errno(e)
			}
			return err
		}
	}
	return unix.ETIMEDOUT
}

// run makes the connection and returns the socket, or nothing where the kernel lacks the protocol.
func (c client) run(h *host, dst netip.AddrPort) (fd int, err error) {
	err = h.as(func() error {
		family := unix.AF_INET
		if c.v6 || dst.Addr().Is6() {
			family = unix.AF_INET6
		}
		if fd, err = unix.Socket(family, unix.SOCK_STREAM|c.flags|unix.SOCK_CLOEXEC, c.proto); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(int64(plenty))
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		if c.set != nil {
			if err := c.set(fd, h, dst); err != nil {
				return err
			}
		}
		to := sockaddr(dst)
		if family == unix.AF_INET6 {
			to = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
		}
		if c.go_ != nil {
			return c.go_(fd, to)
		}
		return connected(fd, unix.Connect(fd, to))
	})
	return fd, err
}

// told reads the server's line from a blocking socket.
func told(fd int) (local, remote netip.AddrPort, err error) {
	var line []byte
	b := make([]byte, 1)
	for !strings.HasSuffix(string(line), "\n") {
		n, err := unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		}
		if n != 1 || err != nil {
			return local, remote, fmt.Errorf("read: %d %w", n, err)
		}
		line = append(line, b...)
	}
	l, r, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	return netip.MustParseAddrPort(l), netip.MustParseAddrPort(r), nil
}

// Whatever way an application connects: a mesh destination is captured, any other is reached directly, and
// client and server see each other's true addresses.
func TestEveryKindOfClient(t *testing.T) {
	l := newLab(t)
	l.cat.serve(appPort)
	l.outside.serve(appPort)
	l.ui.enroll()
	l.cat.enroll()
	check(t, l.dp.SetDestinations(l.destinations()))

	for _, c := range clients {
		for _, d := range []struct {
			name        string
			dst, server netip.AddrPort
			counter     string
		}{
			{"pod IPv4", netip.AddrPortFrom(l.cat.v4, appPort), netip.AddrPortFrom(l.cat.v4, appPort), "connect_captured"},
			{"pod IPv6", netip.AddrPortFrom(l.cat.v6, appPort), netip.AddrPortFrom(l.cat.v6, appPort), "connect_captured"},
			{"service IPv4", netip.AddrPortFrom(vip4, servicePort), netip.AddrPortFrom(l.cat.v4, appPort), "connect_captured"},
			{"service IPv6", netip.AddrPortFrom(vip6, servicePort), netip.AddrPortFrom(l.cat.v6, appPort), "connect_captured"},
			{"outside IPv4", netip.AddrPortFrom(l.outside.v4, appPort), netip.AddrPortFrom(l.outside.v4, appPort), "connect_vouched"},
			{"outside IPv6", netip.AddrPortFrom(l.outside.v6, appPort), netip.AddrPortFrom(l.outside.v6, appPort), "connect_vouched"},
		} {
			t.Run(c.name+"/"+d.name, func(t *testing.T) {
				l := l.in(t)
				l.counted(map[string]int{d.counter: -1, "guard_drop_captured": 0, "guard_drop_unvouched": 0}, func() {
					fd, err := c.run(l.ui, d.dst)
					if fd > 0 {
						defer unix.Close(fd)
					}
					if errors.Is(err, unix.EPROTONOSUPPORT) {
						t.Skip("this kernel has no such protocol")
					}
					if err != nil {
						t.Fatalf("connect: %v", err)
					}
					local, remote, err := told(fd)
					if err != nil {
						t.Fatal(err)
					}
					me, _ := unix.Getsockname(fd)
					peer, _ := unix.Getpeername(fd)
					if fromSockaddr(peer) != d.dst {
						t.Errorf("getpeername says %s, want %s", fromSockaddr(peer), d.dst)
					}
					if remote != fromSockaddr(me) || local != d.server {
						// A forged mark takes a connection that is not captured to the agent, which carries
						// it on from a port of its own.
						if !(d.counter == "connect_vouched" && strings.Contains(c.name, "forged") && remote.Addr() == fromSockaddr(me).Addr()) {
							t.Errorf("server sees %s as the client and %s as itself, want %s and %s", remote, local, fromSockaddr(me), d.server)
						}
					}
					if strings.Contains(c.name, "device") { // the device it asked for is still the socket's
						if dev, _ := unix.GetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE); dev != "eth0" {
							t.Errorf("bound to %q, want eth0", dev)
						}
					}
				})
			})
		}
	}
}

// A socket that was captured and is then used for a destination outside has its own mark again.
func TestReusedSocketGetsItsMarkBack(t *testing.T) {
	l := newLab(t)
	l.cat.serve(appPort)
	l.outside.serve(appPort)
	l.ui.enroll()
	l.cat.enroll()
	check(t, l.dp.SetDestinations(l.destinations()))
	check(t, l.ui.as(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		mark := func() int {
			m, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
			return m
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x77); err != nil {
			return err
		}
		if err := connected(fd, unix.Connect(fd, sockaddr(netip.AddrPortFrom(l.cat.v4, appPort)))); err != nil || mark() != Mark {
			return fmt.Errorf("first: %v, mark %#x", err, mark())
		}
		if err := disconnect(fd); err != nil {
			return err
		}
		if err := connected(fd, unix.Connect(fd, sockaddr(netip.AddrPortFrom(l.outside.v4, appPort)))); err != nil || mark() != 0x77 {
			return fmt.Errorf("then: %v, mark %#x", err, mark())
		}
		return nil
	}))
}

// disconnect is connect() to AF_UNSPEC, which package unix has no address for.
func disconnect(fd int) error {
	var sa [16]byte
	_, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(ptr(&sa)), 16)
	if e != 0 {
		return os.NewSyscallError("connect", e)
	}
	return nil
}

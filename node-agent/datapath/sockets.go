package datapath

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// backlog of the agent's listeners; the kernel cuts it to the namespace's net.core.somaxconn, 4096 by default.
const backlog = 4096

// Listeners are the agent's three sockets in a pod's namespace: TCP (never MPTCP), transparent, dual-stack
// where the namespace has IPv6, non-blocking. net.FileListener makes a net.Listener of each.
type Listeners struct {
	Outbound *os.File // local address of what it accepts: the destination the application asked for
	Inbound  *os.File // local address: the pod's, remote: the plaintext client's
	HBONE    *os.File
}

// Listen makes the three listeners in a pod's namespace.
func Listen(ns *netns.Handle) (l Listeners, err error) {
	for _, x := range []struct {
		f    **os.File
		port uint16
	}{{&l.Outbound, PortOutbound}, {&l.Inbound, PortInbound}, {&l.HBONE, PortHBONE}} {
		if *x.f, err = ListenTransparent(ns, x.port); err != nil {
			l.Close()
			return Listeners{}, err
		}
	}
	return l, nil
}

// ListenTransparent makes one listener.
//
// Transparent, since it answers under addresses that are not local. Not MPTCP: a client would open further
// subflows, past the one that was captured. Never marked: with tcp_fwmark_accept off or on, what it accepts
// would inherit the mark, and answers to clients outside would come back to the pod.
func ListenTransparent(ns *netns.Handle, port uint16) (*os.File, error) {
	fd, err := ns.Socket(unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	dual := err == nil
	if errors.Is(err, unix.EAFNOSUPPORT) { // booted with ipv6.disable=1
		fd, err = ns.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), fmt.Sprintf("listener %d", port))
	set := []sockopt{{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}, {unix.SOL_IP, unix.IP_TRANSPARENT, 1}}
	var addr unix.Sockaddr = &unix.SockaddrInet4{Port: int(port)}
	if dual {
		set = append(set, sockopt{unix.SOL_IPV6, unix.IPV6_V6ONLY, 0}, sockopt{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1})
		addr = &unix.SockaddrInet6{Port: int(port)}
	}
	if port == PortOutbound {
		unpaced(fd)
	}
	if err = setAll(fd, set); err == nil {
		if err = unix.Bind(fd, addr); err == nil {
			err = unix.Listen(fd, backlog)
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("listen on port %d in network namespace %s (the pod itself must not use it): %w", port, ns, err)
	}
	return f, nil
}

// Close closes all three.
func (l Listeners) Close() error {
	var errs []error
	for _, f := range []*os.File{l.Outbound, l.Inbound, l.HBONE} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

type sockopt struct{ level, name, value int }

// unpaced is for a socket whose peer is an application in the same namespace, and for a listener of such. There is no
// network in between that a congestion control could spare, and one that paces, as BBR does, programs a timer for
// every 64 KiB. What the application sends does not pace either: see towards_agent in bpf/sockops.h.
func unpaced(fd int) {
	_ = netns.SetStringOption(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") // without it all works as well
}

func setAll(fd int, opts []sockopt) error {
	for _, o := range opts {
		if err := netns.SetOption(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set socket option %d/%d: %w", o.level, o.name, err)
		}
	}
	return nil
}

// Drawn returns one more than the number that the kernel has drawn for a connection to a Service that the outbound
// listener has accepted, 0 where it has drawn none. Resolve chooses the endpoint that the number stands for, if it is
// its pick.
func (d *Datapath) Drawn(s *netns.Sock) int {
	n := 0
	_ = s.Control(func(fd int) error { n = drawn(fd); return nil })
	return n
}

func drawn(fd int) int {
	mark, err := netns.Option(fd, unix.SOL_SOCKET, unix.SO_MARK)
	if err != nil || !Captured(uint32(mark)) {
		return 0
	}
	return int(uint32(mark) >> drawShift)
}

// Tag marks a socket as the agent's own: its connections are not captured, and where it dials the pod's
// own address it reaches the application. It is for sockets that are not connected yet.
func (d *Datapath) Tag(fd int) error {
	if errno := tag(d.kernel.AgentSockets.FD(), fd); errno != 0 {
		return fmt.Errorf("tag socket: %w", os.NewSyscallError("bpf", errno))
	}
	return d.schemas.tag(fd)
}

// tag is Map.Put of 1 for a socket, without telling Go's scheduler: see internal/netns. The fields are those of
// BPF_MAP_UPDATE_ELEM in union bpf_attr.
func tag(sockets, fd int) syscall.Errno {
	key, value := uint32(fd), uint32(1)
	attr := struct {
		fd, _      uint32
		key, value unsafe.Pointer
		flags      uint64
	}{fd: uint32(sockets), key: unsafe.Pointer(&key), value: unsafe.Pointer(&value)}
	_, _, errno := syscall.RawSyscall(unix.SYS_BPF, unix.BPF_MAP_UPDATE_ELEM, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	return errno
}

// Dial connects from inside a pod's namespace as the agent: to a peer's tunnel port or, on passthrough, to
// the application's destination.
func (d *Datapath) Dial(ctx context.Context, ns *netns.Handle, dst netip.AddrPort) (*net.TCPConn, error) {
	s, err := ns.Connect(ctx, dst, d.Tag)
	if err != nil {
		return nil, err
	}
	return s.TCPConn()
}

// Ports for DialInbound where the client's own cannot be used. Linux clients take theirs from 32768 on: a port
// below keeps clear of the client's other connections to the same pod, which may be in the same namespace.
const (
	firstSparePort = 16384
	endSparePorts  = 32768
	portTries      = 16
	// A connection under the very 4-tuple is one that the client has given up: of a tunnel that broke, or of an
	// attempt that is repeated. It is about to end.
	tupleWait  = 10 * time.Millisecond
	tupleTries = 30
)

// DialInbound connects to the application in a pod, dst being the pod's own address, and shows it src as
// the peer. Where src's port cannot be had, because the application itself listens on it, or src.Port() is
// 0, another one is taken. For a client that reached the pod in plaintext, src's port must be 0: its own
// connection to the same dst exists in the same namespace under that very 4-tuple. A client of the other
// address family cannot be shown; the application then sees the pod's own address.
func (d *Datapath) DialInbound(ctx context.Context, ns *netns.Handle, src, dst netip.AddrPort) (*netns.Sock, error) {
	from, to := src.Addr().Unmap(), netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if from.Is4() != to.Addr().Is4() {
		return ns.Connect(ctx, to, d.Tag)
	}
	port := src.Port()
	for try, again := 0, 0; ; try++ {
		if port == 0 {
			port = uint16(firstSparePort + rand.IntN(endSparePorts-firstSparePort))
		}
		as := netip.AddrPortFrom(from, port)
		c, err := ns.Connect(ctx, to, func(fd int) error { return d.prepareInbound(fd, as) })
		if err == nil || try == portTries || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return c, err
		}
		if port == src.Port() && errors.Is(err, unix.EADDRNOTAVAIL) && again < tupleTries {
			again++
			try--
			select {
			case <-time.After(tupleWait):
				continue
			case <-ctx.Done():
				return nil, err
			}
		}
		port = 0
	}
}

// prepareInbound binds a socket to a client's address, which is not local: the mark brings the answers back
// over the pod's local route, and the application's end inherits it from the SYN (tcp_fwmark_accept).
func (d *Datapath) prepareInbound(fd int, as netip.AddrPort) error {
	transparent := sockopt{unix.SOL_IP, unix.IP_TRANSPARENT, 1}
	if as.Addr().Is6() {
		transparent = sockopt{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1}
	}
	unpaced(fd)
	if err := setAll(fd, []sockopt{transparent, {unix.SOL_SOCKET, unix.SO_MARK, Mark},
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}, {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}}); err != nil {
		return err
	}
	if err := d.Tag(fd); err != nil {
		return err
	}
	if err := netns.Bind(fd, as); err != nil {
		return fmt.Errorf("bind to the client's address %s: %w", as, err)
	}
	return nil
}

package netns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Sock is a connected TCP socket, non-blocking, that Go's poller does not wait for. Whoever takes its descriptor waits for
// it in a way of his own; until then it can only be closed. It is safe for concurrent use.
type Sock struct {
	Local, Remote netip.AddrPort // an IPv4 address that an IPv6 socket has is an IPv4 address
	Hard          bool           // SO_LINGER makes every close(2) a RST, that by the end of the process included

	mu sync.Mutex
	fd int // -1 once it was closed or taken
}

// Control calls f with the descriptor, which stays open until f returns. It fails if the socket was closed or taken.
func (s *Sock) Control(f func(fd int) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	return f(s.fd)
}

// Take returns the descriptor, which is the caller's then.
func (s *Sock) Take() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return -1, net.ErrClosed
	}
	fd := s.fd
	s.fd = -1
	return fd, nil
}

// Abort closes with a RST, unless the descriptor was taken.
func (s *Sock) Abort() {
	if fd, err := s.Take(); err == nil {
		if !s.Hard {
			_ = SetHard(fd, true)
		}
		Close(fd)
	}
}

// TCPConn gives the socket to Go's poller.
func (s *Sock) TCPConn() (*net.TCPConn, error) {
	fd, err := s.Take()
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	if s.Hard {
		_ = SetHard(fd, false)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Accept takes the next connection of a non-blocking listener, or fails with EAGAIN. What the listener has for socket
// options, the connection has too.
func Accept(listener int) (*Sock, error) {
	fd, from, errno := accept(listener)
	if errno != 0 {
		return nil, errno
	}
	at, err := nameOf(fd)
	if err != nil {
		Close(fd)
		return nil, err
	}
	return &Sock{Local: at, Remote: from, fd: fd}, nil
}

// home is the namespace of the process: of every thread that no visit has locked.
var home = sync.OnceValues(openOwn)

// Connect connects from inside the namespace. prepare, if it is not nil, sees the socket before it is connected. Connect is
// not to be called from within a visit.
//
// Where client and server are in one namespace, the handshake is over when connect(2) returns, and nothing waits.
func (h *Handle) Connect(ctx context.Context, dst netip.AddrPort, prepare func(fd int) error) (*Sock, error) {
	s, err := h.tryConnect(ctx, dst, prepare)
	if err != nil {
		return nil, fmt.Errorf("connect to %s in network namespace %s: %w", dst, h.name, err)
	}
	return s, nil
}

func (h *Handle) tryConnect(ctx context.Context, dst netip.AddrPort, prepare func(fd int) error) (*Sock, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	to := newAddress(dst)
	own, err := home()
	if err != nil {
		return nil, err
	}
	fd, err := h.socketFrom(own, to.family, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return nil, err
	}
	if prepare != nil {
		err = prepare(fd)
	}
	if err == nil {
		errno := to.connect(fd)
		if errno == unix.EINPROGRESS {
			errno = to.connect(fd)
		}
		switch errno {
		case 0:
		case unix.EALREADY, unix.EINPROGRESS:
			err = os.NewSyscallError("connect", connected(ctx, fd, to))
		default:
			err = os.NewSyscallError("connect", errno)
		}
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Sock{Remote: dst, fd: fd}, nil
}

// connected waits for the end of a handshake, with Go's poller.
func connected(ctx context.Context, fd int, to *address) error {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(dup), "socket")
	defer f.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	var errno syscall.Errno
	err = rc.Write(func(fd uintptr) bool {
		errno = to.connect(int(fd))
		return errno != unix.EALREADY && errno != unix.EINPROGRESS
	})
	switch {
	case err == nil && (errno == 0 || errno == unix.EISCONN):
		return nil
	case err == nil:
		return errno
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", syscall.ETIMEDOUT, ctx.Err())
	}
	return err
}

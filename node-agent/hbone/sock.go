package hbone

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// sock is a TCP socket that a loop waits for, instead of Go's own poller. As a net.Conn it is written to, by one
// goroutine at a time, and closed; only its owner reads it, when the loop calls.
type sock struct {
	l             *loop
	owner         owner
	local, remote net.Addr // of a tunnel
	hard          bool     // it is reset when it is closed
	slot          int32    // guarded by l.mu; -1 while the loop does not wait for it
	posted        bool     // guarded by l.mu
	leaving       bool     // guarded by l.mu: closed, and the owner is still to be told
	tell          bool     // the owner is to learn that the socket was closed

	// The loop's.
	more bool // there may be something to read
	hup  bool // the peer has ended the connection, one way or another

	mu      sync.Mutex // held while fd is used; only l.mu is taken under it
	fd      int        // -1 once it is closed
	room    chan struct{}
	expiry  *time.Timer
	expired bool // the write deadline
}

// owner is what a socket is read for.
type owner interface {
	// ready is called by the loop when events have happened to the socket, or none and it was posted. It reports
	// whether there is more to do, which is done when other sockets have had their turn.
	ready(l *loop, events uint32) (again bool)
}

var errAgain error = syscall.EAGAIN

const (
	gone   = unix.EPOLLRDHUP | unix.EPOLLHUP | unix.EPOLLERR
	broken = unix.EPOLLHUP | unix.EPOLLERR
)

// newSock has a loop wait for fd, once start was called. The descriptor is the socket's, also where it fails.
func newSock(l *loop, fd int, o owner) (*sock, error) {
	if !l.retain() {
		unix.Close(fd)
		return nil, errLoopEnded
	}
	return &sock{l: l, owner: o, slot: -1, more: true, fd: fd}, nil
}

// leavePoller takes a connection away from Go's poller, which would wake up for it in vain; tcp is closed then.
func leavePoller(tcp *net.TCPConn) (fd int, err error) {
	rc, err := tcp.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := rc.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) })
	if cerr != nil {
		return -1, cerr
	}
	if err != nil {
		return -1, os.NewSyscallError("fcntl", err)
	}
	_ = tcp.Close()
	return fd, nil
}

// start has the loop wait for the socket, whatever is there already included.
func (s *sock) start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	return s.l.add(s, s.fd)
}

// happened takes note of events before the socket is used.
func (s *sock) happened(events uint32) {
	s.more = true
	s.hup = s.hup || events&gone != 0
	if events&(unix.EPOLLOUT|broken) != 0 {
		s.mu.Lock()
		s.wakeWriter()
		s.mu.Unlock()
	}
}

// receive reads what there is, or fails with errAgain. At the end it returns 0.
func (s *sock) receive(p []byte) (int, error) {
	if !s.more {
		return 0, errAgain
	}
	s.mu.Lock()
	n, errno := s.call(unix.SYS_READ, p)
	s.mu.Unlock()
	switch {
	case errno == 0:
		s.more = n == len(p) || s.hup
		return n, nil
	case errno == unix.EAGAIN:
		s.more = false
		return 0, errAgain
	case errno == unix.EBADF:
		return 0, net.ErrClosed
	default:
		return 0, os.NewSyscallError("read", errno)
	}
}

// send writes what the socket takes at once.
func (s *sock) send(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sendLocked(p)
}

func (s *sock) sendLocked(p []byte) (total int, err error) {
	for total < len(p) {
		n, errno := s.call(unix.SYS_WRITE, p[total:])
		switch {
		case errno == unix.EAGAIN:
			return total, nil
		case errno == unix.EBADF:
			return total, net.ErrClosed
		case errno != 0:
			return total, os.NewSyscallError("write", errno)
		}
		total += n
	}
	return total, nil
}

// call reads or writes. It tells Go's scheduler nothing of it: the socket does not block.
func (s *sock) call(what uintptr, p []byte) (int, syscall.Errno) {
	if len(p) == 0 {
		return 0, 0
	}
	for {
		n, _, errno := syscall.RawSyscall(what, uintptr(s.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}

// Write waits until the socket has taken all of p.
func (s *sock) Write(p []byte) (total int, err error) {
	for {
		s.mu.Lock()
		n, err := s.sendLocked(p)
		if total, p = total+n, p[n:]; err == nil && len(p) > 0 && s.expired {
			err = os.ErrDeadlineExceeded
		}
		if err != nil || len(p) == 0 {
			s.mu.Unlock()
			return total, err
		}
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room := s.room
		s.mu.Unlock()
		<-room
	}
}

// SetWriteDeadline bounds how long Write waits.
func (s *sock) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expiry != nil {
		s.expiry.Stop()
		s.expiry = nil
	}
	s.expired = false
	if !t.IsZero() {
		s.expiry = time.AfterFunc(time.Until(t), func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.expired = true
			s.wakeWriter()
		})
	}
	return nil
}

// wakeWriter has Write try again.
func (s *sock) wakeWriter() {
	if s.room != nil {
		close(s.room)
		s.room = nil
	}
}

// Close closes the socket.
func (s *sock) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	s.l.remove(s, s.tell)
	netns.Close(s.fd)
	s.fd = -1
	if s.expiry != nil {
		s.expiry.Stop()
	}
	s.wakeWriter()
	return nil
}

// end closes the socket: in order, or by a reset.
func (s *sock) end(orderly bool) {
	s.mu.Lock()
	s.harden(!orderly)
	s.mu.Unlock()
	_ = s.Close()
}

// harden says whether the socket is reset when it is closed, be it by the end of this process. Called under mu.
func (s *sock) harden(yes bool) {
	if s.hard == yes || s.fd < 0 {
		return
	}
	s.hard = yes
	_ = netns.SetHard(s.fd, yes)
}

// shut sends FIN.
func (s *sock) shut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _, _ = syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(s.fd), unix.SHUT_WR, 0) // fails only where the socket is broken, which its owner learns
}

// failure is the error that the socket has met, nil for none.
func (s *sock) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e, err := netns.Option(s.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && e != 0 {
		return os.NewSyscallError("read", syscall.Errno(e))
	}
	return nil
}

// over reports whether nothing is left of the connection.
func (s *sock) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return closed(s.fd)
}

var errLoopReads = errors.New("the socket is read by a loop")

// Read is not for anybody.
func (s *sock) Read([]byte) (int, error) { return 0, errLoopReads }

// LocalAddr is as it was when the connection was made.
func (s *sock) LocalAddr() net.Addr { return s.local }

// RemoteAddr is as it was when the connection was made.
func (s *sock) RemoteAddr() net.Addr { return s.remote }

// SetDeadline bounds Write; there is no Read.
func (s *sock) SetDeadline(t time.Time) error { return s.SetWriteDeadline(t) }

// SetReadDeadline has no effect.
func (s *sock) SetReadDeadline(time.Time) error { return nil }

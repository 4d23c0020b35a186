package proxy

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// accept is the accept loop of all three listeners: it takes connections until the listener is closed and
// serves each in a goroutine of its own, which the Proxy waits for. Go's poller waits for the listener only.
func (h *PodHandle) accept(l *listener) {
	var wait time.Duration
	for {
		c, err := l.accept()
		if err != nil {
			if errors.Is(err, os.ErrClosed) || h.accepting.Err() != nil {
				return
			}
			// Out of descriptors or memory: the kernel's queue holds the connection meanwhile.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			h.p.log.Error("accept failed", "pod", h.Pod().UID, "listener", l.name, "error", err, "retry_in", wait)
			select {
			case <-h.accepting.Done():
				return
			case <-time.After(wait):
			}
			continue
		}
		wait = 0
		fd := 0
		_ = c.Control(func(n int) error { fd = n; return nil })
		if err := h.overload(fd); err != nil {
			c.Abort()
			h.refuse(l.dir, c.Remote, c.Local, err)
			continue
		}
		h.open.Add(1)
		h.p.wg.Add(1)
		h.p.workers.Go(func() {
			l.serve(h, c)
		})
	}
}

// over takes a connection that was accepted out of account.
func (h *PodHandle) over() {
	h.open.Add(-1)
	h.p.wg.Done()
}

// listener is one of a pod's.
type listener struct {
	name  string
	dir   Direction
	serve func(*PodHandle, *netns.Sock) // calls over once, when the connection has ended
	hard  bool                          // what it accepts is reset when it is closed
	file  *os.File
	conn  syscall.RawConn
}

// newListener listens where ln does, which may be closed then.
func newListener(ln net.Listener, dir Direction, hard bool, serve func(*PodHandle, *netns.Sock)) (*listener, error) {
	l := &listener{name: ln.Addr().String(), dir: dir, serve: serve, hard: hard}
	t, ok := ln.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("listener %s is no TCP listener", l.name)
	}
	var err error
	if l.file, err = t.File(); err != nil {
		return nil, err
	}
	if l.conn, err = l.file.SyscallConn(); err == nil {
		var failed error
		err = l.conn.Control(func(fd uintptr) { failed = prepareListener(int(fd), hard) })
		err = cmp.Or(err, failed)
	}
	if err != nil {
		l.file.Close()
		return nil, fmt.Errorf("listener %s: %w", l.name, err)
	}
	return l, nil
}

// prepareListener sets what connections are to inherit.
func prepareListener(fd int, hard bool) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil || !hard {
		return os.NewSyscallError("setsockopt", err)
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
}

func (l *listener) accept() (s *netns.Sock, err error) {
	failed := l.conn.Read(func(fd uintptr) bool {
		s, err = netns.Accept(int(fd))
		return err != unix.EAGAIN
	})
	if failed != nil {
		return nil, failed
	}
	if err == nil {
		s.Hard = l.hard
	}
	return s, err
}

// polled serves a connection that Go's poller waits for.
func polled(serve func(*PodHandle, *net.TCPConn)) func(*PodHandle, *netns.Sock) {
	return func(h *PodHandle, s *netns.Sock) {
		defer h.over()
		if c, err := s.TCPConn(); err != nil {
			h.p.log.Error("accepted connection lost", "pod", h.Pod().UID, "peer", s.Remote, "error", err)
		} else {
			serve(h, c)
		}
	}
}

// abort closes with a RST, which tells the other side that its connection did not end in order.
func abort(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// keepAlive is what ztunnel has: first probe after 3 min, dead after 9 without an answer.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 180 * time.Second, Interval: 180 * time.Second, Count: 9}

// ends returns the addresses of an accepted connection as everybody else writes them: an IPv4 address that
// an IPv6 socket accepted is an IPv4 address.
func ends(c net.Conn) (local, remote netip.AddrPort) {
	return addrPort(c.LocalAddr()), addrPort(c.RemoteAddr())
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

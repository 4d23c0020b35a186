package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a blocking one: a thread waits in the kernel for its answer, and no event loop of this program is
// part of what is measured.
type socket struct{ fd int }

func dial(addr string, timeout time.Duration) (s socket, err error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return s, err
	}
	domain, sa := unix.AF_INET, unix.Sockaddr(nil)
	if ap.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	} else {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
	}
	if s.fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return s, fmt.Errorf("socket: %w", err)
	}
	limit := unix.NsecToTimeval(int64(timeout))
	err = errors.Join(unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit))
	if err == nil {
		err = retry(func() error { return unix.Connect(s.fd, sa) })
		if errors.Is(err, unix.EALREADY) || errors.Is(err, unix.EISCONN) { // a signal came in between
			err = nil
		}
	}
	if err != nil {
		s.close()
		return s, fmt.Errorf("connect: %w", err)
	}
	return s, nil
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (s socket) close() { unix.Close(s.fd) }

func (s socket) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(s.fd, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		b = b[n:]
	}
	return nil
}

// read returns at least one byte, or io.EOF.
func (s socket) read(b []byte) (int, error) {
	for {
		n, err := unix.Read(s.fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, fmt.Errorf("read: %w", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// answer reads one answer of HTTP/1.1 with a Content-Length.
func (s socket) answer(buf []byte) error {
	have := 0
	for {
		n, err := s.read(buf[have:])
		if err != nil {
			return err
		}
		have += n
		head, rest, ok := bytes.Cut(buf[:have], []byte("\r\n\r\n"))
		if !ok {
			if have == len(buf) {
				return errors.New("an answer without an end of its header")
			}
			continue
		}
		size, err := checkHead(head)
		if err != nil {
			return err
		}
		for left := size - len(rest); left > 0; left -= n {
			if n, err = s.read(buf[:min(left, len(buf))]); err != nil {
				return err
			}
		}
		return nil
	}
}

// checkHead returns how long the body is.
func checkHead(head []byte) (int, error) {
	status, fields, _ := bytes.Cut(head, []byte("\r\n"))
	if !bytes.HasPrefix(status, []byte("HTTP/1.1 200")) {
		return 0, fmt.Errorf("the answer is %q", status)
	}
	for line := range bytes.SplitSeq(fields, []byte("\r\n")) {
		if name, v, _ := bytes.Cut(line, []byte(":")); bytes.EqualFold(name, []byte("Content-Length")) {
			n, err := strconv.Atoi(string(bytes.TrimSpace(v)))
			if err != nil || n != bodySize {
				return 0, fmt.Errorf("the answer has %q bytes", v)
			}
			return n, nil
		}
	}
	return 0, errors.New("the answer has no Content-Length")
}

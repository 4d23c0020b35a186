package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// captureMark is what captures a packet, in the bits of captureMask.
const (
	captureMark = 0x539
	captureMask = 0xfff
)

// connecting are the ways of an ordinary process: sockets, with whatever options.
var connecting = map[string]way{
	"dial":   func(o options) (string, error) { return dial(o, socket{}) },
	"mapped": func(o options) (string, error) { return dial(o, socket{mapped: true}) },
	"mptcp":  func(o options) (string, error) { return dial(o, socket{proto: unix.IPPROTO_MPTCP}) },
	"device": func(o options) (string, error) {
		return dial(o, socket{set: func(fd int) error { return unix.BindToDevice(fd, "eth0") }})
	},
	"mark": func(o options) (string, error) {
		return dial(o, socket{set: func(fd int) error { return setMark(fd, captureMark) }})
	},
	"unmark": func(o options) (string, error) { // the mark is taken off between connect and the first byte
		return dial(o, socket{connected: func(fd int) error { return setMark(fd, 0) }})
	},
	"fastopen": func(o options) (string, error) {
		return dial(o, socket{connect: func(fd int, to unix.Sockaddr) error {
			return unix.Sendto(fd, []byte(o.token+"\n"), unix.MSG_FASTOPEN, to)
		}})
	},
	"fastopen-late": func(o options) (string, error) { // the SYN leaves with the first write, long after connect
		return dial(o, socket{set: func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1),
				unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_NO_COOKIE, 1))
		}})
	},
	"reconnect": func(o options) (string, error) { // vouched for one destination, then used for another
		return dial(o, socket{set: func(fd int) error {
			if err := unix.Connect(fd, sockaddr(o.via, false)); err != nil {
				return fmt.Errorf("connect to %s: %w", o.via, err)
			}
			var unspec [16]byte // connect to AF_UNSPEC ends a connection
			if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), 16); e != 0 {
				return fmt.Errorf("disconnect: %w", e)
			}
			return nil
		}})
	},
	"repair": func(o options) (string, error) { // a connection that exists without a SYN
		repair := func(on int) func(int) error {
			return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_REPAIR, on) }
		}
		return dial(o, socket{set: repair(1), connected: repair(0)})
	},
	"other-source": func(o options) (string, error) {
		return dial(o, socket{set: func(fd int) error {
			opt := []int{unix.SOL_IP, unix.IP_TRANSPARENT}
			if o.as.Is6() {
				opt = []int{unix.SOL_IPV6, unix.IPV6_TRANSPARENT}
			}
			if err := unix.SetsockoptInt(fd, opt[0], opt[1], 1); err != nil {
				return err
			}
			return unix.Bind(fd, sockaddr(netip.AddrPortFrom(o.as, 0), false))
		}})
	},
	"udp": func(o options) (string, error) {
		c, err := net.Dial("udp", o.to.String())
		if err != nil {
			return "", err
		}
		defer c.Close()
		_, err = c.Write([]byte(o.token + "\n"))
		return "sent", err
	},
	"tls": func(o options) (string, error) { // as a tunnel, without a certificate
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: o.wait}, "tcp", o.to.String(),
			&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13})
		if err != nil {
			return "", err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(o.wait))
		// TLS 1.3 tells a client that it was refused with the first read.
		if _, err := fmt.Fprintf(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00%s\n", o.token); err != nil {
			return "", err
		}
		b := make([]byte, 64)
		n, err := c.Read(b)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("answered: %q", b[:n]), nil
	},
	"bpf": func(o options) (string, error) { // take the programs off, or write into their maps
		attr := make([]byte, 128)
		for cmd := range 40 {
			if cmd == 38 { // BPF_TOKEN_CREATE and what follows fail for other reasons
				break
			}
			_, _, e := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
			if e == 0 {
				return "", fmt.Errorf("bpf command %d is allowed", cmd)
			}
		}
		if _, err := os.Stat("/sys/fs/bpf/warren"); err == nil {
			return "", errors.New("the pins can be seen")
		}
		return dial(o, socket{})
	},
	"setns": func(o options) (string, error) {
		runtime.LockOSThread() // never unlocked: the thread may be in another namespace
		mine, err := os.Readlink("/proc/self/ns/net")
		if err != nil {
			return "", err
		}
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			path := "/proc/" + e.Name() + "/ns/net"
			if ns, err := os.Readlink(path); err != nil || ns == mine || !strings.HasPrefix(ns, "net:") {
				continue
			}
			f, err := os.Open(path)
			if err != nil {
				continue
			}
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
			if err == nil {
				break
			}
		}
		return dial(o, socket{})
	},
	"namespace": func(o options) (string, error) { // a namespace of its own, without any hook
		cmd := exec.Command("/proc/self/exe", "dial", "-to", o.to.String(), "-token", o.token)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET}
		out, err := cmd.Output()
		if err != nil { // not allowed: the ordinary way is left
			return dial(o, socket{})
		}
		return strings.TrimSpace(string(out)), nil
	},
	"listen": func(o options) (string, error) { // on a port of the agent's, -to
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		defer unix.Close(fd)
		tv := unix.NsecToTimeval(o.wait.Nanoseconds())
		_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.Bind(fd, sockaddr(o.to, false)), unix.Listen(fd, 8))
		if err != nil {
			return "", fmt.Errorf("listen on %s: %w", o.to, err)
		}
		c, sa, err := unix.Accept(fd)
		if err != nil {
			return "", fmt.Errorf("nobody came: %w", err)
		}
		unix.Close(c)
		return fmt.Sprintf("answered: %v came", sa), nil
	},
}

// socket is how a connection is made.
type socket struct {
	mapped    bool // IPv4 by an IPv6 socket
	proto     int
	set       func(fd int) error
	connect   func(fd int, to unix.Sockaddr) error // sends the token itself
	connected func(fd int) error
}

// dial connects, says the token and returns the answer.
func dial(o options, s socket) (string, error) {
	family := unix.AF_INET
	if o.to.Addr().Is6() || s.mapped {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, s.proto)
	if err != nil {
		return "", fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(o.wait.Nanoseconds())
	if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)); err != nil {
		return "", err
	}
	if s.set != nil {
		if err := s.set(fd); err != nil {
			return "", fmt.Errorf("prepare the socket: %w", err)
		}
	}
	if o.from != 0 {
		if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.Bind(fd, &unix.SockaddrInet4{Port: int(o.from)})); err != nil {
			return "", fmt.Errorf("bind port %d: %w", o.from, err)
		}
	}
	if s.connect != nil {
		err = s.connect(fd, sockaddr(o.to, s.mapped))
	} else {
		err = unix.Connect(fd, sockaddr(o.to, s.mapped))
	}
	if err != nil {
		return "", fmt.Errorf("connect: %w", err)
	}
	if s.connected != nil {
		if err := s.connected(fd); err != nil {
			return "", fmt.Errorf("after connect: %w", err)
		}
	}
	if s.connect == nil {
		if _, err := unix.Write(fd, []byte(o.token+"\n")); err != nil {
			return "", fmt.Errorf("send: %w", err)
		}
	}
	b := make([]byte, 256)
	n, err := unix.Read(fd, b)
	if err != nil {
		return "", fmt.Errorf("receive: %w", err)
	}
	if n == 0 {
		return "", errors.New("receive: closed")
	}
	return "answered: " + strings.TrimSpace(string(b[:n])), nil
}

func setMark(fd, mark int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mark)
}

func sockaddr(a netip.AddrPort, mapped bool) unix.Sockaddr {
	if a.Addr().Is4() && !mapped {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

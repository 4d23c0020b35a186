package hbone

import (
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Wire wraps a TCP connection before it goes to tls.Client or tls.Server, so that the codec can send several
// TLS records in one write. The codec works without it, at one system call for each 16 KiB.
func Wire(c net.Conn) net.Conn { return &wire{Conn: c} }

type wire struct {
	net.Conn
	mu     sync.Mutex // guards what follows
	corked bool
	out    *outBuffer
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	if !w.corked {
		w.mu.Unlock()
		return w.Conn.Write(p)
	}
	w.out.b = append(w.out.b, p...)
	w.mu.Unlock()
	return len(p), nil
}

// NetConn returns what Wire wrapped.
func (w *wire) NetConn() net.Conn { return w.Conn }

func (w *wire) cork() {
	w.mu.Lock()
	w.corked = true
	w.out = outPool.Get().(*outBuffer)
	w.out.b = w.out.b[:0]
	w.mu.Unlock()
}

func (w *wire) uncork() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.Conn.Write(w.out.b)
	if cap(w.out.b) > outCeiling {
		w.out.b = nil
	}
	outPool.Put(w.out)
	w.corked, w.out = false, nil
	return err
}

// setUserTimeout makes the kernel give up on a peer that acknowledges nothing.
func setUserTimeout(c *net.TCPConn, d time.Duration) {
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
	})
}

package hbone

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// TLSServer is tls.Server for a connection that goes to [Serve]: after the handshake the codec protects records
// itself. The tls.Conn is then good for its ConnectionState and for being named, no more. cfg is copied.
func TLSServer(c net.Conn, cfg *tls.Config) *tls.Conn {
	w := &wire{Conn: c}
	return tls.Server(w, w.config(cfg))
}

// TLSClient is tls.Client for a connection that goes to [NewClient], as TLSServer is for one that goes to Serve.
func TLSClient(c net.Conn, cfg *tls.Config) *tls.Conn {
	w := &wire{Conn: c}
	return tls.Client(w, w.config(cfg))
}

// wire is what crypto/tls makes the handshake over. It hands out what it reads record by record: crypto/tls never
// has bytes of a record that it has not processed, and what came after the handshake is in buf, where the codec's
// record layer finds it. From the key log it learns the secrets that the first application data is under.
type wire struct {
	net.Conn
	buf    *chunk // read from Conn, not handed out; nil when there is nothing
	left   int    // of the record that is being handed out
	client []byte // traffic secrets
	server []byte

	mu    sync.Mutex // guards Conn once the handshake is done
	taken bool       // crypto/tls has no part in the connection any more
}

// config has the key log come here. A server's session ticket would be a record under the first application key,
// which nobody here has counted.
func (w *wire) config(cfg *tls.Config) *tls.Config {
	cfg = cfg.Clone()
	cfg.KeyLogWriter = keyLog{w}
	cfg.SessionTicketsDisabled = true
	return cfg
}

type keyLog struct{ w *wire }

// Write takes a line of the NSS key log format: label, client random, secret.
func (k keyLog) Write(line []byte) (int, error) {
	f := bytes.Fields(line)
	if len(f) != 3 {
		return len(line), nil
	}
	var to *[]byte
	switch string(f[0]) {
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &k.w.client
	case "SERVER_TRAFFIC_SECRET_0":
		to = &k.w.server
	default:
		return len(line), nil
	}
	secret, err := hex.AppendDecode(nil, f[2])
	*to = secret
	return len(line), err
}

// Read hands out at most what remains of one record.
func (w *wire) Read(p []byte) (int, error) {
	for w.buf == nil || w.left == 0 && w.buf.w-w.buf.r < recordHeaderLen {
		if w.buf == nil {
			w.buf = newChunk(mediumChunk)
		}
		b := w.buf
		if b.r > 0 {
			b.w = copy(b.buf, b.buf[b.r:b.w])
			b.r = 0
		}
		n, err := w.Conn.Read(b.buf[b.w:])
		b.w += n
		if n == 0 {
			rest := copy(p, b.buf[:b.w]) // an incomplete header
			b.free()
			w.buf = nil
			return rest, err
		}
	}
	b := w.buf
	if w.left == 0 {
		w.left = recordHeaderLen + int(b.buf[b.r+3])<<8 + int(b.buf[b.r+4])
	}
	n := copy(p, b.buf[b.r:min(b.w, b.r+w.left)])
	w.left -= n
	if b.r += n; b.r == b.w {
		b.free()
		w.buf = nil
	}
	return n, nil
}

// Write fails once the record layer has changed hands: crypto/tls does not know what was sent since.
func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	taken := w.taken
	w.mu.Unlock()
	if taken {
		return 0, net.ErrClosed
	}
	return w.Conn.Write(p)
}

// Close closes the connection below, whose record layer may be about to change hands.
func (w *wire) Close() error { return w.below().Close() }

func (w *wire) below() net.Conn {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.Conn
}

// NetConn returns the connection below.
func (w *wire) NetConn() net.Conn { return w.below() }

// ResetTLS ends a connection that TLSServer or TLSClient made, with all it carries, by a TCP reset.
func ResetTLS(t *tls.Conn) {
	c := carrier(t)
	if s, ok := c.(*sock); ok {
		s.end(false)
		return
	}
	resetConn(c)
}

// carrier is what is below TLS.
func carrier(c net.Conn) net.Conn {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if w, ok := c.(*wire); ok {
		c = w.below()
	}
	return c
}

// acknowledged reports whether the peer's kernel has acknowledged anything within a time: what carries the peer is there,
// whatever the peer does. It is false where that cannot be known.
func acknowledged(c net.Conn, within time.Duration) bool {
	ago, err := time.Duration(0), net.ErrClosed
	ofSocket(c, func(fd int) { ago, err = netns.LastAck(fd) })
	const tick = 10 * time.Millisecond // of the kernel's clock, at the longest
	return err == nil && ago <= within+tick
}

// ofSocket asks something of the socket that carries a connection, if there is one.
func ofSocket(c net.Conn, ask func(fd int)) {
	switch s := carrier(c).(type) {
	case *sock:
		s.mu.Lock()
		ask(s.fd)
		s.mu.Unlock()
	case *net.TCPConn:
		if rc, err := s.SyscallConn(); err == nil {
			_ = rc.Control(func(fd uintptr) { ask(int(fd)) })
		}
	}
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

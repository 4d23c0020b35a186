package hbone

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// RelayStats is what a Relay has delivered so far. It may be read while the Relay runs: connections last for
// days, and their metrics do not wait.
type RelayStats struct {
	AtoB, BtoA atomic.Int64 // bytes
}

// Relay copies between a and b, each a *net.TCPConn, a *Stream or another connection with CloseWrite, until
// both directions have ended or one failed. A FIN becomes END_STREAM and the reverse; a reset on one side
// resets the other. It closes both. The error is the first that is not an orderly end; one that comes from a
// reset is an ECONNRESET to errors.Is.
//
// To end a relay from outside, close or reset the stream; without one, either side.
func Relay(a, b net.Conn, stats *RelayStats) error {
	if st, ok := a.(*Stream); ok {
		if tcp, ok := b.(*net.TCPConn); ok && st.c.loop != nil {
			return relayConn(st, tcp, &stats.BtoA, &stats.AtoB)
		}
	}
	if tcp, ok := a.(*net.TCPConn); ok {
		if st, ok := b.(*Stream); ok && st.c.loop != nil {
			return relayConn(st, tcp, &stats.AtoB, &stats.BtoA)
		}
	}
	return relayAny(a, b, stats)
}

// RelaySocket is Relay between a stream and a socket that nobody waits for. It counts in up what the socket sends, and in
// down what it is sent. It returns at once, also to a ServerConfig.Handler, which may return then: connections that
// stand still hold no goroutine. ended is called with what Relay would return, once, when the stream and the socket
// have been closed; it must not block, for it may be a loop that calls it.
func RelaySocket(st *Stream, s *netns.Sock, up, down *atomic.Int64, ended func(error)) {
	if st.c.loop == nil { // the tunnel is no socket
		tcp, err := s.TCPConn()
		if err != nil {
			st.ResetCode(CodeConnect)
			ended(err)
			return
		}
		st.keep()
		go func() {
			var stats RelayStats
			err := relayAny(st, tcp, &stats)
			up.Add(stats.BtoA.Load())
			down.Add(stats.AtoB.Load())
			st.letGo()
			ended(err)
		}()
		return
	}
	fd, err := s.Take()
	if err != nil {
		st.ResetCode(CodeConnect)
		ended(err)
		return
	}
	relaySocket(st, fd, s.Hard, up, down, ended)
}

func relayConn(st *Stream, tcp *net.TCPConn, up, down *atomic.Int64) error {
	hardEnd(tcp)
	fd, err := leavePoller(tcp)
	if err != nil {
		resetConn(tcp)
		st.ResetCode(CodeConnect)
		return err
	}
	ended := make(chan error, 1)
	relaySocket(st, fd, true, up, down, func(err error) { ended <- err })
	return <-ended
}

// relaySocket has a loop copy between a stream and an application's socket.
func relaySocket(st *Stream, fd int, hard bool, up, down *atomic.Int64, ended func(error)) {
	k, err := newSink(st, fd, hard, up, down, ended)
	if err != nil {
		st.ResetCode(CodeConnect)
		ended(err)
		return
	}
	st.keep()
	if err = st.attach(k); err == nil {
		err = k.sock.start()
	}
	if err != nil {
		k.finish(err)
	}
}

// socketReader reads a socket with a buffer that is borrowed only once there is something to read: connections that
// stand still hold no buffers.
type socketReader struct {
	rc syscall.RawConn
	// shut says that FIN was sent, or is about to be. Until then a socket that is closed has been reset, also if it
	// reads as at its end: a write may have got the error instead.
	shut *atomic.Bool
	buf  *[relayBuffer]byte
	n    int
	err  error
	try  func(fd uintptr) bool
}

// read returns a buffer from relayPool with n bytes after the room for a frame header.
func (r *socketReader) read() (*[relayBuffer]byte, int, error) {
	r.buf, r.n, r.err = nil, 0, nil
	err := r.rc.Read(r.try)
	if err == nil {
		err = r.err
	}
	if err == nil && r.n == 0 {
		err = io.EOF
	}
	if err != nil {
		if r.buf != nil {
			relayPool.Put(r.buf)
		}
		return nil, 0, err
	}
	return r.buf, r.n, nil
}

func (r *socketReader) tryOnce(fd uintptr) bool {
	buf := relayPool.Get().(*[relayBuffer]byte)
	for {
		n, err := syscall.Read(int(fd), buf[frameHeaderLen:])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			relayPool.Put(buf)
			return false
		case err != nil:
			r.err = os.NewSyscallError("read", err)
			n = 0
		case n == 0 && closed(int(fd)) && !r.shut.Load(): // in this order
			r.err = os.NewSyscallError("read", syscall.ECONNRESET)
		}
		r.buf, r.n = buf, n
		return true
	}
}

// closed reports whether nothing is left of a connection.
func closed(fd int) bool {
	state, err := netns.State(fd)
	return err == nil && state == unix.BPF_TCP_CLOSE
}

// watchReset waits for the socket to be reset after its FIN, until its read deadline.
func watchReset(rc syscall.RawConn) error {
	var reset error
	err := rc.Read(func(fd uintptr) bool {
		if e, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR); err == nil && e != 0 {
			reset = os.NewSyscallError("read", syscall.Errno(e))
			return true
		}
		return false
	})
	if reset != nil {
		return reset
	}
	return err
}

// relayAny copies between two connections of any kind, one goroutine more than the caller's.
func relayAny(a, b net.Conn, stats *RelayStats) error {
	hardEnd(a)
	hardEnd(b)
	p := &pair{conns: [2]net.Conn{a, b}}
	other := make(chan struct{})
	go func() {
		defer close(other)
		p.run(1, &stats.BtoA)
	}()
	p.run(0, &stats.AtoB)
	<-other
	orderlyEnd(a)
	orderlyEnd(b)
	return p.err
}

// pair is the two ends of relayAny; direction i copies from conns[i] to the other.
type pair struct {
	conns [2]net.Conn
	mu    sync.Mutex
	ended [2]bool        // direction i has passed its FIN on
	shut  [2]atomic.Bool // FIN was sent to conns[i], or is about to be
	err   error          // the first
}

func (p *pair) run(i int, total *atomic.Int64) {
	src, dst := p.conns[i], p.conns[1-i]
	err := pump(dst, src, &p.shut[1-i], &p.shut[i], total)
	if err == nil && !p.end(i) {
		// Until the other direction ends too, a reset of this side is still to be passed on.
		if tcp, ok := src.(*net.TCPConn); ok {
			rc, e := tcp.SyscallConn()
			if e == nil {
				err = watchReset(rc)
			}
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
				err = nil
			}
		}
	}
	if err != nil {
		p.mu.Lock()
		if p.err == nil { // before the resets, which fail the other direction
			p.err = err
		}
		p.mu.Unlock()
		resetConn(src)
		resetConn(dst)
	}
}

// end marks direction i as ended and reports whether the other has; then it ends that one's watch.
func (p *pair) end(i int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended[i] = true
	if p.ended[1-i] {
		_ = p.conns[1-i].SetReadDeadline(time.Unix(1, 0))
	}
	return p.ended[1-i]
}

// pump copies src to dst up to src's end, which it passes on.
func pump(dst, src net.Conn, dstShut, srcShut *atomic.Bool, total *atomic.Int64) error {
	read := plainReader(src)
	if tcp, ok := src.(*net.TCPConn); ok {
		rc, err := tcp.SyscallConn()
		if err != nil {
			return err
		}
		r := &socketReader{rc: rc, shut: srcShut}
		r.try = r.tryOnce
		read = r.read
	}
	st, _ := dst.(*Stream)
	for {
		buf, n, err := read()
		if n > 0 {
			var wrote int
			var werr error
			if st != nil {
				wrote, werr = st.writeFramed(buf[:frameHeaderLen+n])
			} else {
				wrote, werr = dst.Write(buf[frameHeaderLen : frameHeaderLen+n])
			}
			total.Add(int64(wrote))
			if werr != nil {
				err = werr
			}
		}
		if buf != nil {
			relayPool.Put(buf)
		}
		switch {
		case err == io.EOF:
			if h, ok := dst.(interface{ CloseWrite() error }); ok {
				dstShut.Store(true)
				// A side that has gone after its own FIN is no failure of this direction.
				if err := h.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) && !errors.Is(err, net.ErrClosed) {
					return err
				}
				return nil
			}
			return dst.Close()
		case err != nil:
			return err
		}
	}
}

func plainReader(c net.Conn) func() (*[relayBuffer]byte, int, error) {
	return func() (*[relayBuffer]byte, int, error) {
		buf := relayPool.Get().(*[relayBuffer]byte)
		n, err := c.Read(buf[frameHeaderLen:])
		return buf, n, err
	}
}

// hardEnd makes the kernel reset a socket that is closed by the end of this process: the application must not
// take a connection that broke off for one that its peer has closed.
func hardEnd(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}

// orderlyEnd closes a connection both of whose directions have ended.
func orderlyEnd(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(-1)
	}
	_ = c.Close()
}

// resetConn ends a connection the hard way.
func resetConn(c net.Conn) {
	switch c := c.(type) {
	case *Stream:
		c.ResetCode(CodeConnect)
	case *net.TCPConn:
		_ = c.SetLinger(0)
		_ = c.Close()
	default:
		_ = c.Close()
	}
}

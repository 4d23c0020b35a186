package hbone

import (
	"crypto/tls"
	"io"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// link carries the bytes of a conn. One goroutine receives; send is exclusive among itself.
type link interface {
	// receive waits for more. It returns what was not used of the bytes it returned last, and what came, which
	// is valid until the next call. need is how many the caller can begin with.
	receive(used, need int) ([]byte, error)
	// send writes b as if it were one; a byte behind b in its array may change meanwhile.
	send(b []byte) error
	close() error
}

// newLink takes over the record layer of a connection that TLSClient or TLSServer made. Any other is used as it is.
// Where l is not nil, it waits for the connection if that is a socket, on behalf of o; then receive does not wait.
func newLink(nc net.Conn, client bool, l *loop, o owner) link {
	if t, ok := nc.(*tls.Conn); ok {
		if w, ok := t.NetConn().(*wire); ok {
			if r := takeOver(t, w, client, l, o); r != nil {
				return r
			}
		}
	}
	return &stdLink{nc: nc}
}

// takeOver returns nil where crypto/tls has to go on: another version or cipher, or FIPS 140.
func takeOver(t *tls.Conn, w *wire, client bool, l *loop, o owner) *records {
	cs := t.ConnectionState()
	if !cs.HandshakeComplete || cs.Version != tls.VersionTLS13 || w.left != 0 {
		return nil
	}
	send, recv := w.server, w.client
	if client {
		send, recv = recv, send
	}
	out, err := newHalf(cs.CipherSuite, send)
	if err != nil {
		return nil
	}
	in, err := newHalf(cs.CipherSuite, recv)
	if err != nil {
		return nil
	}
	r := &records{nc: w.Conn, in: opener{half: in, client: client}, out: out, limit: keyLimit}
	if tcp, ok := w.Conn.(*net.TCPConn); ok && l != nil {
		local, remote := tcp.LocalAddr(), tcp.RemoteAddr()
		fd, err := leavePoller(tcp)
		if err != nil {
			return nil
		}
		if r.sock, err = newSock(l, fd, o); err != nil {
			return nil
		}
		r.sock.local, r.sock.remote, r.sock.tell = local, remote, true
		r.nc = r.sock
	}
	w.mu.Lock()
	w.taken, w.Conn = true, r.nc
	w.mu.Unlock()
	w.client, w.server = nil, nil
	if b := w.buf; b != nil {
		r.cipher.w = copy(r.cipher.borrow()[:], b.buf[b.r:b.w])
		w.buf = nil
		b.free()
	}
	return r
}

// records is a link under TLS 1.3. It holds buffers only while something is in flight.
type records struct {
	nc   net.Conn // below TLS
	sock *sock    // nc, where a loop waits for it

	// The receiver's.
	in     opener
	cipher span  // received, not decrypted
	plain  span  // decrypted, not used
	err    error // why nothing more comes

	owed atomic.Bool // the peer wants new keys of us

	mu    sync.Mutex // serializes senders; guards what follows
	out   *half
	limit uint64 // records under one key
	rest  *outBuffer
	sent  int // of rest
}

func (r *records) receive(used, _ int) ([]byte, error) {
	r.plain.r += used
	for {
		p, err := r.decrypt()
		if len(p) > 0 {
			return p, nil
		}
		n := 0
		if err == nil {
			n, err = r.fill()
		}
		if n > 0 {
			continue
		}
		if err == errAgain {
			return nil, err
		}
		if err == nil || err == io.EOF { // without a close_notify, which crypto/tls lets pass between records
			if err = io.EOF; !r.cipher.empty() {
				err = io.ErrUnexpectedEOF
			}
		}
		r.cipher.drop()
		r.plain.drop()
		return nil, err
	}
}

// decrypt makes plaintext of every complete record that there is room for.
func (r *records) decrypt() ([]byte, error) {
	if r.cipher.empty() || r.err != nil {
		return nil, r.err
	}
	c := r.cipher.borrow()
	before := r.plain.w - r.plain.r
	for {
		n, err := recordLen(c[r.cipher.r:r.cipher.w])
		if err == nil {
			if n == 0 || n > r.cipher.w-r.cipher.r || !r.plain.room(n) {
				break
			}
			var out []byte
			out, err = r.in.take(r.plain.borrow()[:r.plain.w], c[r.cipher.r:r.cipher.r+n])
			r.plain.w = len(out)
			r.cipher.r += n
			if r.in.owed {
				r.in.owed = false
				r.owed.Store(true)
			}
		}
		if err != nil {
			r.err = r.refuse(err)
			break
		}
	}
	if r.plain.w-r.plain.r > before {
		return r.plain.borrow()[r.plain.r:r.plain.w], nil
	}
	return nil, r.err
}

// refuse answers what the peer did with an alert.
func (r *records) refuse(err error) error {
	a, ok := err.(tls.AlertError)
	if !ok {
		return err
	}
	if r.sock != nil { // the loop waits for nobody
		if r.mu.TryLock() {
			if r.rest == nil {
				_, _ = r.sock.send(r.out.appendAlert(nil, a))
			}
			r.mu.Unlock()
		}
		return &net.OpError{Op: "local error", Err: a}
	}
	_ = r.nc.SetWriteDeadline(time.Now().Add(closeGrace))
	r.mu.Lock()
	defer r.mu.Unlock()
	_, _ = r.nc.Write(r.out.appendAlert(nil, a))
	return &net.OpError{Op: "local error", Err: a}
}

// fill waits for something to decrypt, or fails with errAgain where a loop waits.
func (r *records) fill() (int, error) {
	read := r.nc.Read
	if r.sock != nil {
		if !r.sock.more {
			return 0, r.settle()
		}
		read = r.sock.receive
	}
	b := r.cipher.borrow()
	r.cipher.compact()
	n, err := read(b[r.cipher.w:])
	if err == errAgain {
		return 0, r.settle()
	}
	r.cipher.w += n
	return n, err
}

// settle gives buffers back until there is more.
func (r *records) settle() error {
	r.cipher.settle()
	r.plain.settle()
	return errAgain
}

func (r *records) send(b []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := outPool.Get().(*outBuffer)
	defer o.free()
	for len(b) > 0 {
		o.b = o.b[:0]
		var err error
		if b, err = r.seal(o, b, sealBatch); err == nil {
			_, err = r.nc.Write(o.b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// trySend is send for those who do not wait, where a loop waits for the socket. If the socket takes less than all, the
// rest is kept: sendRest is to be called before anything else is sent.
func (r *records) trySend(b []byte) (all bool, err error) {
	if !r.mu.TryLock() { // whoever says goodbye has the last word
		return false, net.ErrClosed
	}
	defer r.mu.Unlock()
	o := outPool.Get().(*outBuffer)
	for len(b) > 0 {
		o.b = o.b[:0]
		if b, err = r.seal(o, b, sealBatch); err != nil {
			break
		}
		var n int
		if n, err = r.sock.send(o.b); err != nil {
			break
		}
		if n < len(o.b) {
			if _, err = r.seal(o, b, math.MaxInt); err != nil {
				break
			}
			r.rest, r.sent = o, n
			return false, nil
		}
	}
	o.free()
	return err == nil, err
}

// sendRest waits until what trySend has left is sent.
func (r *records) sendRest() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	o := r.rest
	defer o.free()
	r.rest = nil
	_, err := r.nc.Write(o.b[r.sent:])
	return err
}

// seal adds records of what b begins with to o, until that holds enough, and returns the remainder.
func (r *records) seal(o *outBuffer, b []byte, enough int) ([]byte, error) {
	for len(b) > 0 && len(o.b) < enough {
		if r.out.seq >= r.limit || r.owed.Load() {
			r.owed.Store(false)
			var err error
			if o.b, err = r.out.appendKeyUpdate(o.b); err != nil {
				return b, err
			}
		}
		n := min(len(b), maxPlaintext)
		o.b = r.out.seal(o.b, b[:n], typeApplication)
		b = b[n:]
	}
	return b, nil
}

// close says goodbye if nobody is sending just now.
func (r *records) close() error {
	r.sayGoodbye()
	return r.nc.Close()
}

func (r *records) sayGoodbye() {
	if r.mu.TryLock() {
		defer r.mu.Unlock()
		if r.rest != nil { // part of a record has gone out
			return
		}
		_ = r.nc.SetWriteDeadline(time.Now().Add(closeGrace))
		_, _ = r.nc.Write(r.out.appendAlert(nil, alertCloseNotify))
	}
}

// stdLink is a link over a connection as it is.
type stdLink struct {
	nc    net.Conn
	small [smallRead]byte
	big   *[readBuffer]byte
	w     int // bytes in small or big
	quiet int // reads in a row for which big was not needed
}

func (l *stdLink) buf() []byte {
	if l.big != nil {
		return l.big[:]
	}
	return l.small[:]
}

func (l *stdLink) receive(used, need int) ([]byte, error) {
	b := l.buf()
	filled := l.w == len(b)
	l.w = copy(b, b[used:l.w])
	switch {
	case l.big == nil && (filled || need > smallRead):
		l.big, l.quiet = readPool.Get().(*[readBuffer]byte), 0
		copy(l.big[:], b[:l.w])
	case l.big != nil && l.w <= smallRead && need <= smallRead && l.quiet > quietReads:
		copy(l.small[:], b[:l.w])
		l.drop()
	}
	b = l.buf()
	n, err := l.nc.Read(b[l.w:])
	if l.quiet++; n >= smallRead {
		l.quiet = 0
	}
	if l.w += n; n > 0 {
		return b[:l.w], nil // an error comes again
	}
	l.drop()
	l.w = 0
	return nil, err
}

func (l *stdLink) drop() {
	if l.big != nil {
		readPool.Put(l.big)
		l.big = nil
	}
}

func (l *stdLink) send(b []byte) error {
	_, err := l.nc.Write(b)
	return err
}

func (l *stdLink) close() error { return l.nc.Close() }

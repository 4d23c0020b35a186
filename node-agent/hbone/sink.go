package hbone

import (
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// sink is the application's socket at the end of a stream. The read loop writes into it without blocking; a
// goroutine (Stream.drainQueue) exists only while the application takes less than arrives.
type sink struct {
	st  *Stream
	tcp *net.TCPConn
	rc  syscall.RawConn

	// One writer at a time: the read loop, or drainQueue while Stream.draining.
	p     []byte
	n     int
	werr  error
	try   func(fd uintptr) bool // s.tryOnce, bound once
	bytes *atomic.Int64         // delivered
	shut  atomic.Bool           // FIN was sent, or is about to be

	mu      sync.Mutex
	upEnded bool // nothing more is read from the socket
	ended   bool
	err     error
	done    chan struct{} // closed when nothing more is written to the socket
}

func newSink(st *Stream, tcp *net.TCPConn, bytes *atomic.Int64) (*sink, error) {
	rc, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	k := &sink{st: st, tcp: tcp, rc: rc, bytes: bytes, done: make(chan struct{})}
	k.try = k.tryOnce
	return k, nil
}

// tryWrite writes what the socket takes at once.
func (k *sink) tryWrite(p []byte) (int, error) {
	k.p, k.n, k.werr = p, 0, nil
	err := k.rc.Write(k.try)
	k.p = nil
	k.bytes.Add(int64(k.n))
	if err == nil {
		err = k.werr
	}
	return k.n, err
}

func (k *sink) tryOnce(fd uintptr) bool {
	for k.n < len(k.p) {
		n, err := syscall.Write(int(fd), k.p[k.n:])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			return true
		case err != nil:
			k.werr = os.NewSyscallError("write", err)
			return true
		}
		k.n += n
	}
	return true
}

// finish marks the direction towards the socket as ended. The first error counts, also one that comes after
// that: then it is the other direction's.
func (k *sink) finish(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err != nil && k.err == nil {
		k.err = err
		k.wake()
	}
	if !k.ended {
		k.ended = true
		if k.upEnded {
			k.wake()
		}
		close(k.done)
	}
}

func (k *sink) failure() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

// stopReading says that the socket is read no more, except for its errors.
func (k *sink) stopReading() (ended bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.upEnded = true
	return k.ended
}

// broken reports whether nothing is left of the socket's connection.
func (k *sink) broken() (is bool) {
	_ = k.rc.Control(func(fd uintptr) { is = closed(int(fd)) })
	return is
}

func (k *sink) wake() { _ = k.tcp.SetReadDeadline(time.Unix(1, 0)) }

// streamFailed is called under the connection's lock.
func (k *sink) streamFailed(err error) {
	if k.st.soft { // what was received is still delivered; what the application sends has nowhere to go
		k.wake()
		return
	}
	k.finish(err)
}

// attach makes k receive what arrives, beginning with what already has.
func (st *Stream) attach(k *sink) error {
	st.rmu.Lock()
	defer st.rmu.Unlock()
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	switch {
	case st.closed:
		return ErrClosed
	case st.err != nil && !st.soft:
		return st.err
	}
	if c := st.cur; c != nil { // partly read already
		st.cur = nil
		n := c.w - c.r
		c.next = st.q.head
		if st.q.head = c; st.q.tail == nil {
			st.q.tail = c
		}
		st.q.n += n
		st.c.hold(n)
		st.recvCredit -= n
	}
	st.sink = k
	if st.soft {
		k.wake()
	}
	switch {
	case st.q.head != nil:
		st.draining = true
		go st.drainQueue()
	case st.eof:
		st.sinkEnd()
	}
	return nil
}

// drainQueue moves what the application did not take at once, then hands the stream back to the read loop.
func (st *Stream) drainQueue() {
	c, k := st.c, st.sink
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		b := st.q.pop()
		if b == nil {
			st.drained()
			if st.eof && !st.closed {
				st.sinkEnd()
			}
			return
		}
		c.mu.Unlock()
		n, err := k.tcp.Write(b.buf[b.r:b.w])
		k.bytes.Add(int64(n))
		c.mu.Lock()
		st.consumed(b.w - b.r)
		b.free()
		if err != nil {
			st.drained()
			st.sinkFailed(os.NewSyscallError("write", err))
			return
		}
	}
}

func (st *Stream) drained() {
	st.draining = false
	st.rcond.Broadcast()
}

// sinkEnd passes END_STREAM on as FIN. Called under mu; shutdown(2) does not block.
func (st *Stream) sinkEnd() {
	st.sink.shut.Store(true)
	_ = st.sink.tcp.CloseWrite() // fails only where the socket is broken, which its reader learns
	st.sink.finish(nil)
}

// sinkFailed resets the stream because the application's socket took no more.
func (st *Stream) sinkFailed(err error) {
	st.sink.finish(err)
	if !st.gone {
		st.resetLocked(CodeConnect)
	}
	st.dropQueue()
	st.c.flush(false)
}

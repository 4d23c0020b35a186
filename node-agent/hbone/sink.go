package hbone

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
)

// sink is the application's socket at the end of a stream. Whoever reads the tunnel writes into it without blocking;
// the loop that waits for the socket moves what the application sends into the stream, and what it did not take at
// once out of the stream's queue.
type sink struct {
	st       *Stream
	sock     *sock
	up, down *atomic.Int64 // bytes that have passed
	shut     atomic.Bool   // FIN was sent, or is about to be
	backlog  atomic.Bool   // is Stream.draining

	mu      sync.Mutex
	upEnded bool // nothing more is read from the socket
	ended   bool // nothing more is written to it
	over    bool // both directions have ended, or one has failed; the loop calls end
	err     error
	report  func(error) // of relaySocket
}

// newSink takes over a socket, which is reset if nobody ends it in order.
func newSink(st *Stream, fd int, hard bool, up, down *atomic.Int64, report func(error)) (*sink, error) {
	k := &sink{st: st, up: up, down: down, report: report}
	var err error
	if k.sock, err = newSock(st.c.loop, fd, k); err == nil {
		k.sock.hard = hard
		k.sock.harden(true)
	}
	return k, err
}

// ready is called by the loop.
func (k *sink) ready(l *loop, events uint32) (again bool) {
	if k.backlog.Load() {
		again = k.drain(l)
	}
	k.mu.Lock()
	over, upEnded := k.over, k.upEnded
	k.mu.Unlock()
	switch {
	case over:
		return false
	case !upEnded:
		return k.pull(l, events) || again
	case events&broken != 0: // since its FIN
		if err := k.sock.failure(); err != nil {
			k.finish(err)
		}
	}
	return again
}

// end closes socket and stream, and says so. It is called by the loop.
func (k *sink) end(l *loop) {
	st, c := k.st, k.st.c
	k.mu.Lock()
	err := k.err
	k.mu.Unlock()
	k.sock.end(err == nil)
	c.mu.Lock()
	gone := st.gone
	c.mu.Unlock()
	if !gone || err != nil { // something is to be sent, and not from here, where that might take long
		c.beginBatch(l)
	}
	if err != nil {
		st.ResetCode(CodeConnect)
	} else {
		_ = st.Close()
	}
	st.letGo()
	k.report(err)
}

// pull moves what one read finds into the stream, as much as there is room for.
func (k *sink) pull(l *loop, events uint32) (again bool) {
	st := k.st
	c := st.c
	c.beginBatch(l)
	room := st.reserve()
	if room == 0 {
		if events&broken != 0 { // nobody reads the socket now to learn of a reset
			err := k.sock.failure()
			if err == nil {
				err = k.lost()
			}
			if err != nil {
				c.mu.Lock()
				st.sinkFailed(err)
				c.mu.Unlock()
			}
		}
		return false
	}
	buf := l.buf[:frameHeaderLen+room]
	n, err := k.sock.receive(buf[frameHeaderLen:])
	if err == nil && n == 0 {
		if err = k.lost(); err == nil {
			err = io.EOF
		}
	}
	werr := st.writeReserved(buf[:frameHeaderLen+n], room)
	switch {
	case err == errAgain:
		return false
	case err == nil && werr == nil:
		k.up.Add(int64(n))
		return k.sock.more
	case err == nil:
		err = werr
	case err == io.EOF:
		if err = st.CloseWrite(); err == nil {
			k.stopReading()
			return false
		}
	}
	c.mu.Lock()
	soft := st.soft
	c.mu.Unlock()
	if soft { // what was received is still delivered; what the application sends has nowhere to go
		k.stopReading()
	} else {
		k.finish(err)
	}
	return false
}

// lost is the error of a socket that was reset, also if a write has got it and a read finds the end: until FIN was sent, a
// socket that is closed has been reset.
func (k *sink) lost() error {
	if k.sock.over() && !k.shut.Load() { // in this order
		return os.NewSyscallError("read", syscall.ECONNRESET)
	}
	return nil
}

// finish marks the direction towards the socket as ended. The first error counts, also one that comes after
// that: then it is the other direction's.
func (k *sink) finish(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err == nil && !k.over {
		k.err = err
	}
	k.ended = true
	k.settle()
}

// stopReading says that the socket is read no more, except for its errors.
func (k *sink) stopReading() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.upEnded = true
	k.settle()
}

func (k *sink) settle() {
	if !k.over && k.ended && (k.upEnded || k.err != nil) {
		k.over = true
		k.st.c.loop.finish(k)
	}
}

// streamFailed is called under the connection's lock.
func (k *sink) streamFailed(err error) {
	if k.st.soft {
		k.stopReading()
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
		st.q.unpop(c)
		st.c.hold(n)
		st.recvCredit -= n
	}
	st.sink = k
	if st.soft {
		k.stopReading()
	}
	switch {
	case st.q.head != nil:
		st.drainLater(true)
	case st.eof:
		st.sinkEnd()
	}
	return nil
}

// drainLater says whether q is to be moved to the socket when that has room. Called under mu.
func (st *Stream) drainLater(yes bool) {
	st.draining = yes
	st.sink.backlog.Store(yes)
	if yes && st.c.tls == nil { // room may have come meanwhile, where it is not the loop that writes
		st.c.loop.post(st.sink.sock)
	}
}

// drain moves what the application did not take at once; afterwards the tunnel's reader writes to it again.
func (k *sink) drain(l *loop) (again bool) {
	st, c := k.st, k.st.c
	c.beginBatch(l)
	c.mu.Lock()
	defer c.mu.Unlock()
	for moved := 0; moved < readBuffer; {
		b := st.q.pop()
		if b == nil {
			st.drainLater(false)
			if st.eof && !st.closed {
				st.sinkEnd()
			}
			return false
		}
		c.mu.Unlock()
		n, err := k.sock.send(b.buf[b.r:b.w])
		k.down.Add(int64(n))
		c.mu.Lock()
		b.r += n
		moved += n
		left := b.w - b.r
		st.consumed(n)
		switch {
		case left == 0:
			b.free()
		case err != nil || st.closed || st.err != nil && !st.eof: // then q has been dropped, or is
			c.hold(-left)
			b.free()
		default:
			st.q.unpop(b)
			return false
		}
		if err != nil {
			st.drainLater(false)
			st.sinkFailed(err)
			return false
		}
	}
	return true
}

// sinkEnd passes END_STREAM on as FIN. Called under mu; shutdown(2) does not block. Where the application has sent its own
// FIN, the socket is closed next, which says it as well.
func (st *Stream) sinkEnd() {
	k := st.sink
	k.shut.Store(true)
	k.mu.Lock()
	last := k.upEnded && !st.soft
	k.mu.Unlock()
	if !last {
		k.sock.shut()
	}
	k.finish(nil)
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

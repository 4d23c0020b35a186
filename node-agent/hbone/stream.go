package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Stream is one tunnelled TCP connection: a net.Conn with TCP's half-close and reset.
type Stream struct {
	id uint32
	c  *conn

	wmu sync.Mutex // serializes Write
	rmu sync.Mutex // serializes Read; guards cur
	cur *chunk     // what Read is working off

	// Everything below is guarded by c.mu.

	sendWin    int64
	recvWin    int64
	recvCredit int   // consumed, not yet given back
	bodyLeft   int64 // content-length not yet received, -1 where there is none
	answered   bool  // response headers were received (client) or sent (server)
	remoteEnd  bool  // END_STREAM was received
	localEnd   bool  // END_STREAM was sent
	gone       bool  // no longer registered with the session
	begun      bool  // server: the handler was started
	orphan     bool  // server: the peer ended it by force, the handler may still run

	q        queue // received, not read
	eof      bool  // everything up to END_STREAM is in q
	soft     bool  // peer reset the stream after its complete reply: reads go on to EOF, writes fail
	closed   bool  // Close or Reset was called
	err      error // why the stream failed, nil while it has not
	waiting  bool  // a Write waits for room
	held     bool  // sink does, and is to be posted
	sink     *sink // attached by Relay: takes what arrives
	draining bool  // q goes to sink when that has room

	rcond, wcond sync.Cond
	rdead, wdead deadline

	resp   Response           // client: the answer
	cancel context.CancelFunc // server: ends the handler's context
	kept   bool               // a relay calls letGo
}

func newStream(c *conn, id uint32) *Stream {
	st := &Stream{id: id, c: c, sendWin: c.peerWindow, recvWin: c.granted, bodyLeft: -1}
	st.rcond.L, st.wcond.L = &c.mu, &c.mu
	return st
}

// deadline is one of a stream's two; guarded by conn.mu.
type deadline struct {
	timer   *time.Timer
	expired bool
	set     bool
	seq     int
}

func (st *Stream) setDeadline(d *deadline, cond *sync.Cond, t time.Time) {
	d.seq++
	seq := d.seq
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.expired, d.set = false, !t.IsZero()
	if !d.set {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.expired = true
		cond.Broadcast()
		return
	}
	d.timer = time.AfterFunc(wait, func() {
		st.c.mu.Lock()
		defer st.c.mu.Unlock()
		if d.seq == seq {
			d.expired = true
			cond.Broadcast()
		}
	})
}

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	return errors.Join(st.SetReadDeadline(t), st.SetWriteDeadline(t))
}

// SetReadDeadline bounds Read.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	if st.closed {
		return ErrClosed
	}
	st.setDeadline(&st.rdead, &st.rcond, t)
	return nil
}

// SetWriteDeadline bounds how long Write waits for the peer's window.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	if st.closed {
		return ErrClosed
	}
	st.setDeadline(&st.wdead, &st.wcond, t)
	return nil
}

// LocalAddr is the tunnel connection's.
func (st *Stream) LocalAddr() net.Addr { return st.c.nc.LocalAddr() }

// RemoteAddr is the tunnel connection's.
func (st *Stream) RemoteAddr() net.Addr { return st.c.nc.RemoteAddr() }

// Read returns io.EOF after the peer's END_STREAM and a *ResetError, which is an ECONNRESET, after a reset.
func (st *Stream) Read(p []byte) (int, error) {
	st.rmu.Lock()
	defer st.rmu.Unlock()
	if st.cur == nil {
		if len(p) == 0 {
			return 0, nil
		}
		c, err := st.take()
		if err != nil {
			return 0, err
		}
		st.cur = c
	}
	c := st.cur
	n := copy(p, c.buf[c.r:c.w])
	if c.r += n; c.r == c.w {
		st.cur = nil
		c.free()
	}
	return n, nil
}

// discard reads what the peer sends to its end, for a second and up to a limit.
func (st *Stream) discard(limit int) {
	if st.SetReadDeadline(time.Now().Add(time.Second)) != nil {
		return
	}
	buf := make([]byte, smallRead)
	for limit > 0 {
		n, err := st.Read(buf)
		if err != nil {
			return
		}
		limit -= n
	}
}

// take waits for a chunk.
func (st *Stream) take() (*chunk, error) {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	for {
		switch {
		case st.closed:
			return nil, ErrClosed
		case st.rdead.expired:
			return nil, os.ErrDeadlineExceeded
		}
		if c := st.q.pop(); c != nil {
			st.consumed(c.w - c.r)
			return c, nil
		}
		switch {
		case st.eof:
			return nil, io.EOF
		case st.err != nil:
			return nil, st.err
		}
		st.rcond.Wait()
	}
}

// consumed accounts for n bytes that left q.
func (st *Stream) consumed(n int) {
	c := st.c
	c.hold(-n)
	c.returnWindow(st, n)
	c.returnConnWindow()
	c.flush(false)
}

// writable returns why nothing can be written, nil if it can.
func (st *Stream) writable() error {
	switch {
	case st.closed || st.localEnd:
		return ErrClosed
	case st.err != nil:
		return st.err
	case st.wdead.expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}

// Write queues p as DATA and sends it, waiting for the peer's windows. It returns when the last byte is on
// its way or queued behind others.
func (st *Stream) Write(p []byte) (int, error) {
	st.wmu.Lock()
	defer st.wmu.Unlock()
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	return st.writeLocked(p)
}

func (st *Stream) writeLocked(p []byte) (int, error) {
	c := st.c
	total := 0
	for {
		if err := st.writable(); err != nil {
			return total, err
		}
		if len(p) == 0 {
			return total, nil
		}
		n := 0
		if len(c.out) < outLimit {
			n = c.room(st, min(len(p), outLimit/2))
		}
		if n == 0 {
			st.await()
			continue
		}
		c.borrowOut()
		c.appendData(st, p[:n], false)
		total += n
		p = p[n:]
		c.flush(!st.wdead.set)
	}
}

// reserve takes room for what is to be read, and for writeReserved, out of the peer's windows; 0 means that the sink will
// be posted when there is some. A stream that has failed has room: writing says why.
func (st *Stream) reserve() int {
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	n := st.roomLocked()
	if n == 0 {
		if !st.held {
			st.held = true
			c.waiters++
		}
		return 0
	}
	st.sendWin -= int64(n)
	c.sendWin -= int64(n)
	return n
}

// writeReserved queues buf[frameHeaderLen:], or sends it at once if it is much: it needs no copy then. It gives back what
// was reserved.
func (st *Stream) writeReserved(buf []byte, reserved int) error {
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	starved := c.sendWin == 0
	st.sendWin += int64(reserved)
	c.sendWin += int64(reserved)
	n := len(buf) - frameHeaderLen
	if starved && n < reserved {
		c.wakeWriters()
	}
	if n == 0 {
		return nil
	}
	if err := st.writable(); err != nil {
		return err
	}
	if n < muchData || n > c.peerMaxFrame || c.tls == nil || c.writing || len(c.out) > 0 {
		c.borrowOut()
		c.appendData(st, buf[frameHeaderLen:], false)
		return nil
	}
	st.sendWin -= int64(n)
	c.sendWin -= int64(n)
	c.dataSent(n, min(st.sendWin, c.sendWin))
	putFrameHeader(buf, n, frameData, 0, st.id)
	c.writing = true
	if c.try(buf) {
		c.writing = false
	}
	return nil
}

// roomLocked is how much could be written now. A stream that has failed has room.
func (st *Stream) roomLocked() int {
	switch {
	case st.writable() != nil:
		return largeChunk
	case len(st.c.out) >= outLimit:
		return 0
	}
	return st.c.room(st, largeChunk)
}

// wakeWriter has whoever waits for room look again.
func (st *Stream) wakeWriter() {
	if st.waiting {
		st.wcond.Broadcast()
	}
	if st.held && st.roomLocked() > 0 {
		st.held = false
		st.c.waiters--
		st.c.loop.post(st.sink.sock)
	}
}

// await waits for one of the reasons why a Write could not go on to change.
func (st *Stream) await() {
	st.waiting = true
	st.c.waiters++
	st.wcond.Wait()
	st.c.waiters--
	st.waiting = false
}

// writeFramed writes buf[frameHeaderLen:], whose first bytes are free for a frame header. When the
// connection is idle, header and data go out as they are, without a copy.
func (st *Stream) writeFramed(buf []byte) (int, error) {
	st.wmu.Lock()
	defer st.wmu.Unlock()
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(buf) - frameHeaderLen
	if c.writing || len(c.out) > 0 || n > c.peerMaxFrame || c.room(st, n) < n || st.writable() != nil {
		return st.writeLocked(buf[frameHeaderLen:])
	}
	st.sendWin -= int64(n)
	c.sendWin -= int64(n)
	c.dataSent(n, min(st.sendWin, c.sendWin))
	putFrameHeader(buf, n, frameData, 0, st.id)
	c.writing = true
	c.mu.Unlock()
	err := c.link.send(buf)
	c.mu.Lock()
	if !c.wrote(err) {
		return 0, err
	}
	c.writeQueued(inlineRounds)
	return n, nil
}

// CloseWrite sends END_STREAM, the tunnel's FIN.
func (st *Stream) CloseWrite() error {
	st.wmu.Lock()
	defer st.wmu.Unlock()
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	switch {
	case st.localEnd:
		return nil
	case st.closed:
		return ErrClosed
	case st.err != nil:
		return st.err
	}
	st.endLocked()
	if st.gone {
		st.c.flushSoon()
	} else {
		st.c.flush(true)
	}
	return nil
}

func (st *Stream) endLocked() {
	st.localEnd = true
	st.c.appendData(st, nil, true)
	st.maybeFinish()
}

// Close ends the stream as close(2) ends a TCP connection: in order if everything received was read, with
// a reset if not.
func (st *Stream) Close() error {
	c := st.c
	c.mu.Lock()
	if st.closed {
		c.mu.Unlock()
		return nil
	}
	unread := st.q.n > 0
	if !st.gone && !unread && !st.localEnd {
		st.endLocked()
	}
	inOrder := st.gone
	if !inOrder { // the peer may go on sending; nobody will read it
		code := CodeNo
		if c.client || unread {
			code = CodeCancel
		}
		st.resetLocked(code)
	}
	st.closeLocked()
	if inOrder {
		c.flushSoon()
	} else {
		c.flush(true)
	}
	c.mu.Unlock()
	st.release()
	return nil
}

// Reset ends the stream by RST_STREAM, the tunnel's RST.
func (st *Stream) Reset() { st.ResetCode(CodeCancel) }

// ResetCode is Reset with the code to send: CodeConnect where the application's socket failed.
func (st *Stream) ResetCode(code Code) {
	c := st.c
	c.mu.Lock()
	if st.closed {
		c.mu.Unlock()
		return
	}
	if !st.gone {
		st.resetLocked(code)
	}
	st.closeLocked()
	c.flush(true)
	c.mu.Unlock()
	st.release()
}

// closeLocked makes every operation fail from now on and wakes those that wait.
func (st *Stream) closeLocked() {
	st.closed = true
	st.rdead.stop()
	st.wdead.stop()
	st.dropQueue()
	st.rcond.Broadcast()
	st.wakeWriter()
	if st.sink != nil {
		st.sink.finish(ErrClosed)
	}
}

// keep says that the stream is in use until letGo is called, though the handler returns.
func (st *Stream) keep() {
	st.c.mu.Lock()
	defer st.c.mu.Unlock()
	st.kept = true
}

// letGo says that whoever kept the stream is through with it.
func (st *Stream) letGo() {
	if st.c.onDone != nil {
		st.c.onDone(st)
	}
}

// release gives back what Read holds, once no Read is running.
func (st *Stream) release() {
	if st.rmu.TryLock() {
		if st.cur != nil {
			st.cur.free()
			st.cur = nil
		}
		st.rmu.Unlock()
	}
}

func (st *Stream) dropQueue() {
	n := st.q.clear()
	st.c.hold(-n)
	st.c.returnConnWindow()
}

func (st *Stream) resetLocked(code Code) {
	st.c.out = appendRST(st.c.out, st.id, code)
	st.failLocked(&ResetError{Code: code}, true)
}

// failLocked ends the stream with err without telling the peer. ours: this side sent a RST_STREAM.
func (st *Stream) failLocked(err error, ours bool) {
	if st.gone {
		return
	}
	st.err = err
	st.leave(ours)
	if st.cancel != nil {
		st.cancel()
	}
	if !st.eof {
		st.dropQueue()
	}
	st.rcond.Broadcast()
	st.wakeWriter()
	if st.sink != nil {
		st.sink.streamFailed(err)
	}
}

// peerReset handles RST_STREAM. After a complete reply NO_ERROR and CANCEL only say that the peer reads no
// more, as Envoy does at the end of each stream: what was received stays readable up to EOF.
func (st *Stream) peerReset(code Code) {
	if st.remoteEnd && (code == CodeNo || code == CodeCancel) {
		st.soft = true
	}
	st.failLocked(&ResetError{Code: code, Remote: true}, false)
}

// maybeFinish unregisters the stream once both directions have ended.
func (st *Stream) maybeFinish() {
	if st.localEnd && st.remoteEnd && !st.gone {
		st.leave(false)
	}
}

func (st *Stream) leave(ours bool) {
	st.gone = true
	st.c.drop(st, ours)
	st.c.streamClosed()
}

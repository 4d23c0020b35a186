package hbone

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/netns"
)

const (
	outLimit          = 256 << 10 // data waits when more than this is queued
	outCeiling        = 1 << 20   // control frames beyond it mean that the peer does not read
	inlineRounds      = 4         // how often a sender writes for others before a goroutine takes over
	smallRead         = 512
	quietReads        = 32 // small reads after which the large read buffer is given back
	soonAfter         = time.Millisecond
	closeGrace        = 250 * time.Millisecond
	lingerWait        = 3 * time.Second
	discardMax        = 2 << 20  // read after a fatal error
	discardFlood      = 64 << 10 // after a flood
	handshakeWait     = 10 * time.Second
	defaultPingEvery  = 2500 * time.Millisecond
	defaultPingWait   = 4 * time.Second
	slowPeer          = 8 // times pingWait of silence, while the peer's kernel acknowledges
	defaultIdle       = 5 * time.Minute
	defaultMaxStreams = 100
	tcpUserTimeout    = 10 * time.Second
)

// conn drives a session over a net.Conn: a loop reads it if it is a socket, a goroutine if not; whoever has something to
// send writes, but only at the end of a loop's batch if there is one.
//
// Lock order: Stream.wmu or Stream.rmu, then conn.mu. Nothing is read, written or called back under mu.
type conn struct {
	mu sync.Mutex
	*session
	nc   net.Conn
	link link     // what carries the bytes of nc
	tls  *records // link, if the loop reads it
	loop *loop    // waits for the sockets of streams; nil if nc is no socket

	// The loop's.
	used    int // of what was read last
	discard int // how much more is read after a fatal error, 0 before
	readErr error
	ended   chan struct{} // the loop has read all, and why is in readErr

	batching  bool       // the loop writes what is queued when it is through with what it has read
	flusher   func()     // c.flushLoop
	holder    *outBuffer // what out was borrowed with, nil if it was not
	writing   bool       // somebody writes out, or a goroutine is about to
	stopped   error      // no more reading or writing; every stream has failed
	waiters   int        // streams that wait for room
	orphans   int        // server: handlers of streams that the peer ended by force
	drain     bool       // no new streams; ends after the last
	closing   bool       // GOAWAY with the reason is out; the reader only discards
	closeSent bool       // an orderly end: close as soon as everything is written
	soon      *time.Timer
	soonSet   bool // the timer is set

	reads      uint64 // by the read loop; tells that the peer is alive
	seenReads  uint64
	pingOut    bool
	pingAt     time.Time // of the last
	askedAt    time.Time // of the first that is not answered
	taken      uint64    // bytes that the peer's kernel has acknowledged
	takenAt    time.Time // when that was found to be more, or all
	pingEvery  time.Duration
	pingWait   time.Duration
	idleAfter  time.Duration // 0: stays open without streams
	idleSince  time.Time
	timer      *time.Timer
	sleeping   bool // the timer is set for the idle close, not for the next PING
	done       chan struct{}
	onStop     func()
	onReq      func(id uint32, end bool) *ConnError // server, under mu
	onBatch    func()                               // server, under mu: what has been read is dealt with
	onTooLarge func(id uint32, end bool)            // server, under mu
	onDone     func(*Stream)                        // server: the handler, or the relay that it left the stream to, is through with it
}

// newConn starts the timers of a connection; reading is up to the caller.
func newConn(nc net.Conn, s *session, loops *Loops, ping, wait, idle time.Duration) *conn {
	c := &conn{session: s, nc: nc, done: make(chan struct{}), ended: make(chan struct{}),
		pingEvery: ping, pingWait: wait, idleAfter: idle}
	c.flusher = c.flushLoop
	c.session.flood.init()
	if c.pingEvery == 0 {
		c.pingEvery = defaultPingEvery
	}
	if c.pingWait == 0 {
		c.pingWait = defaultPingWait
	}
	if t, ok := carrier(nc).(*net.TCPConn); ok {
		setUserTimeout(t, tcpUserTimeout)
		c.loop = loops.take()
	}
	c.link = newLink(nc, s.client, c.loop, c)
	if r, ok := c.link.(*records); ok && r.sock != nil {
		c.tls = r
	}
	c.memory.join(c)
	c.idleSince = time.Now()
	c.timer = time.AfterFunc(c.pingEvery, c.tick)
	return c
}

// fail ends the connection and every stream with err; the peer is told code where the reason is the peer's.
func (c *conn) fail(err error) {
	c.mu.Lock()
	c.failLocked(err)
	c.mu.Unlock()
}

func (c *conn) failLocked(err error) {
	if c.stopped != nil {
		return
	}
	var ce *ConnError
	if errors.As(err, &ce) && !ce.Remote {
		c.out = appendGoAway(c.out, c.lastID, ce.Code, ce.Reason)
		c.closing = true
	}
	c.stopped = err
	c.timer.Stop()
	go c.memory.leave(c) // whoever holds its lock takes ours
	for _, st := range c.streams {
		st.failLocked(err, false)
	}
	close(c.done)
	if c.loop != nil {
		c.loop.release()
	}
	if c.onStop != nil {
		go c.onStop()
	}
	if !c.closing {
		go c.link.close()
		return
	}
	// What is queued, the GOAWAY last, goes out; then the peer gets a moment to read it.
	grace := closeGrace
	if c.closeSent = ce.Code == CodeNo; c.closeSent {
		grace = lingerWait
	}
	_ = c.nc.SetWriteDeadline(time.Now().Add(grace))
	if !c.closeSent || c.writing {
		time.AfterFunc(2*grace, func() { _ = c.link.close() })
	}
	c.flush(false)
}

// flush sees to it that what is queued gets written: by this goroutine if inline (then mu is released
// meanwhile), else by another. The read loop and timers never write themselves, since a write may block.
func (c *conn) flush(inline bool) {
	if c.batching || c.writing || len(c.out) == 0 {
		return
	}
	c.writing = true
	if !inline {
		go c.flusher()
		return
	}
	c.writeQueued(inlineRounds)
}

// flushNext is flush(true) after whatever else can run has run: who opens or answers a stream next sends with it.
func (c *conn) flushNext() {
	if c.batching || c.writing || len(c.out) == 0 {
		return
	}
	c.writing = true
	c.mu.Unlock()
	runtime.Gosched()
	c.mu.Lock()
	c.writeQueued(inlineRounds)
}

// flushSoon is flush for what nobody waits for: the end of a stream that the peer has ended already. As a rule something
// else is sent before a millisecond has passed, and takes it along.
func (c *conn) flushSoon() {
	if c.writing || len(c.out) == 0 || c.soonSet {
		return
	}
	c.soonSet = true
	if c.soon == nil {
		c.soon = time.AfterFunc(soonAfter, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.soonSet = false
			c.flush(false)
		})
	} else {
		c.soon.Reset(soonAfter)
	}
}

func (c *conn) flushLoop() {
	c.mu.Lock()
	c.writeQueued(-1)
	c.mu.Unlock()
}

// writeQueued writes until nothing is queued, or for as many rounds, after which another goroutine goes on.
// It is called with mu held and writing set; mu is released while it writes.
func (c *conn) writeQueued(rounds int) {
	for c.queued() {
		if rounds == 0 {
			go c.flusher()
			return
		}
		rounds--
		batch, h := c.takeOut()
		c.mu.Unlock()
		err := c.link.send(batch)
		h.giveBack(batch)
		c.mu.Lock()
		if !c.wrote(err) {
			return
		}
	}
	c.writtenOut()
}

// queued reports whether there is something to write.
func (c *conn) queued() bool { return len(c.out) > 0 && (c.stopped == nil || c.closing) }

// takeOut returns what is queued and what it was borrowed with.
func (c *conn) takeOut() ([]byte, *outBuffer) {
	batch, h := c.out, c.holder
	c.out, c.holder = nil, nil
	return batch, h
}

// giveBack returns what was borrowed for a batch that has been written; o may be nil.
func (o *outBuffer) giveBack(batch []byte) {
	if o == nil {
		return
	}
	if cap(batch) <= outCeiling {
		o.b = batch[:0]
	}
	o.free()
}

// writtenOut follows when nothing is queued any more.
func (c *conn) writtenOut() {
	c.writing = false
	switch {
	case !c.closeSent:
	case c.tls == nil:
		go c.link.close()
	default:
		c.closeSent = false
		go c.leave()
	}
}

// wrote follows each write; it reports whether to go on.
func (c *conn) wrote(err error) bool {
	if err != nil {
		c.writing = false
		c.failLocked(err)
		return false
	}
	c.wakeWriters()
	return true
}

// borrowOut makes sure that out has a pooled buffer behind it.
func (c *conn) borrowOut() {
	if c.holder == nil {
		c.holder = outPool.Get().(*outBuffer)
		c.out = append(c.holder.b[:0], c.out...)
	}
}

func (c *conn) wakeWriters() {
	if c.waiters == 0 {
		return
	}
	for _, st := range c.streams {
		st.wakeWriter()
	}
}

// readLoop reads until the connection ends and returns why.
func (c *conn) readLoop() error {
	used, need := 0, 1
	for {
		p, err := c.link.receive(used, need)
		if err != nil {
			return c.readEnded(err)
		}
		var e *ConnError
		if used, need, e = c.process(p); e != nil {
			c.fail(e)
			c.discardRest(len(p))
			return e
		}
	}
}

func (c *conn) readEnded(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped != nil {
		return c.stopped
	}
	if errors.Is(err, io.EOF) {
		if len(c.streams) == 0 {
			err = io.EOF
		} else {
			err = io.ErrUnexpectedEOF
		}
	}
	c.failLocked(err)
	return err
}

// discardRest reads on after a fatal error, so that the kernel does not answer what is unread with a RST that
// would overtake our GOAWAY. The timer in failLocked closes the connection; a peer that floods on is not worth
// waiting for.
func (c *conn) discardRest(n int) {
	for left := discardMax; left > 0; {
		p, err := c.link.receive(n, 1)
		if err != nil {
			return
		}
		n = len(p)
		left -= n
	}
	_ = c.link.close()
}

// process handles the frames in p; it returns how much it used and how much it needs to go on.
func (c *conn) process(p []byte) (used, need int, _ *ConnError) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	for {
		if c.stopped != nil {
			return len(p), 1, nil
		}
		n, ev, err := c.next(p[used:])
		used += n
		if ev.kind == evBroken {
			c.orphaned(ev.st)
			ev.st.failLocked(&ResetError{Code: ev.code}, true)
		}
		if err != nil {
			return used, 0, err
		}
		switch ev.kind {
		case evMore:
			if c.onBatch != nil {
				c.onBatch()
			}
			c.returnConnWindow()
			if len(c.out) > outCeiling {
				return used, 0, &ConnError{Code: CodeEnhanceYourCalm, Reason: "peer does not read"}
			}
			c.flush(false)
			return used, c.need, nil
		case evData:
			c.deliver(ev.st, ev.data, ev.end)
			c.returnConnWindow()
		case evRequest:
			if err := c.onReq(ev.id, ev.end); err != nil {
				return used, 0, err
			}
		case evTooLarge:
			c.onTooLarge(ev.id, ev.end)
		case evResponse:
			ev.st.resp = c.resp
			ev.st.rcond.Broadcast()
			if ev.end {
				c.deliver(ev.st, nil, true)
			}
		case evEnd:
			c.deliver(ev.st, nil, true)
		case evReset:
			c.orphaned(ev.st)
			ev.st.peerReset(ev.code)
		case evWritable:
			if ev.st == nil {
				c.wakeWriters()
			} else {
				ev.st.wakeWriter()
			}
		case evPong:
			c.pingOut = false
		case evGoAway:
			c.goAwayReceived(ev.id)
		}
	}
}

// orphaned counts a stream that the peer ends by force while its handler runs.
func (c *conn) orphaned(st *Stream) {
	if !c.client && st.begun && !st.orphan {
		st.orphan = true
		c.orphans++
	}
}

// deliver passes received bytes on: straight into the application's socket where a Relay has attached one
// and nothing waits before them, else into the stream's queue. Called with mu held, which is released
// while the socket is written.
func (c *conn) deliver(st *Stream, p []byte, end bool) {
	if k := st.sink; k != nil && st.q.head == nil && !st.draining && len(p) > 0 {
		c.mu.Unlock()
		n, err := k.sock.send(p)
		k.down.Add(int64(n))
		c.mu.Lock()
		if st.gone && st.err != nil {
			return
		}
		if err != nil {
			st.sinkFailed(err)
			return
		}
		c.returnWindow(st, n)
		p = p[n:]
	}
	if len(p) > 0 {
		c.hold(len(p))
		st.q.push(p)
	}
	st.eof = st.eof || end
	if st.sink == nil {
		if len(p) > 0 || end {
			st.rcond.Broadcast()
		}
	} else if !st.draining {
		switch {
		case st.q.head != nil:
			st.drainLater(true)
		case end:
			st.sinkEnd()
		}
	}
	if end {
		st.maybeFinish()
	}
}

// goAwayReceived: a server that goes away takes no streams after last and finishes the others. A client's
// GOAWAY forbids only pushes, which there are none of.
func (c *conn) goAwayReceived(last uint32) {
	if !c.client {
		return
	}
	c.drain = true
	for _, st := range c.streams {
		if st.id > last {
			st.failLocked(&ResetError{Code: CodeRefusedStream, Remote: true}, false)
		}
	}
	c.finishIfDrained()
}

// finishIfDrained closes a draining connection that has no streams left.
func (c *conn) finishIfDrained() {
	if c.drain && len(c.streams) == 0 && c.client && c.stopped == nil {
		c.failLocked(&ConnError{Code: CodeNo, Reason: "drained"})
	}
}

// streamOpened keeps the timer at PING pace while there are streams.
func (c *conn) streamOpened() {
	if c.sleeping {
		c.sleeping = false
		c.timer.Reset(c.pingEvery)
	}
}

// streamClosed follows the removal of a stream.
func (c *conn) streamClosed() {
	if len(c.streams) == 0 {
		c.idleSince = time.Now()
		c.finishIfDrained()
	}
}

// tick sends PINGs while there are streams and the peer is silent, and notices a dead peer; without streams
// it waits for the idle close.
func (c *conn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped != nil {
		return
	}
	if c.takesNothing() {
		c.failLocked(ErrPeerDead)
		return
	}
	next := c.pingEvery
	alive := c.reads != c.seenReads
	c.seenReads = c.reads
	switch {
	case alive:
		c.pingOut = false
	case c.pingOut:
		left := c.pingWait - time.Since(c.pingAt)
		if left <= 0 {
			// A peer that has no processor time is not dead: to end all that it carries would have all of it come
			// again, to a peer that has less time then.
			if time.Since(c.askedAt) >= slowPeer*c.pingWait || !acknowledged(c.nc, time.Since(c.pingAt)) {
				c.failLocked(ErrPeerDead)
				return
			}
			c.ping()
			left = c.pingWait
		}
		next = min(next, left)
	case len(c.streams) > 0:
		c.ping()
		next = min(next, c.pingWait)
	case c.idleAfter > 0:
		left := c.idleAfter - time.Since(c.idleSince)
		if left <= 0 {
			c.drain = true
			c.finishIfDrained()
			return
		}
		c.sleeping = true
		next = left
	default:
		c.sleeping = true
		return
	}
	c.timer.Reset(next)
}

// takesNothing reports whether the peer's kernel has acknowledged nothing of what there is for it for as long as
// [setUserTimeout] tells ours to wait: a peer that read nothing was seen to outlast that. Whoever does not read holds memory,
// whatever signs of life it gives.
func (c *conn) takesNothing() (stuck bool) {
	now := time.Now()
	ofSocket(c.nc, func(fd int) {
		taken, more, err := netns.Taken(fd)
		if err != nil || !more || taken != c.taken || c.takenAt.IsZero() {
			c.taken, c.takenAt = taken, now
			return
		}
		stuck = now.Sub(c.takenAt) >= tcpUserTimeout
	})
	return stuck
}

// ping asks the peer for a sign of life.
func (c *conn) ping() {
	now := time.Now()
	if !c.pingOut {
		c.askedAt = now
	}
	c.pingOut, c.pingAt = true, now
	c.out = appendPing(c.out, false, [8]byte{'w', 'a', 'r', 'r', 'e', 'n'})
	c.flush(false)
}

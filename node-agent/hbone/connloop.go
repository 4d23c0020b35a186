package hbone

import "time"

// What a loop does for a connection.

// readRounds is how often a connection is read before others have their turn.
const readRounds = 2

// read reads until the connection ends and returns why.
func (c *conn) read() error {
	if c.tls == nil {
		return c.readLoop()
	}
	c.startLoop()
	<-c.ended
	return c.readErr
}

// startLoop has the loop read the connection, beginning with what came with the handshake.
func (c *conn) startLoop() {
	if err := c.tls.sock.start(); err != nil {
		c.readErr = c.readEnded(err)
		close(c.ended)
		return
	}
	c.loop.post(c.tls.sock)
}

// ready reads what has come.
func (c *conn) ready(l *loop, _ uint32) (again bool) {
	if c.readErr != nil {
		return false
	}
	c.beginBatch(l)
	for range readRounds {
		p, err := c.tls.receive(c.used, 1)
		c.used = 0
		switch {
		case err == errAgain:
			return false
		case err != nil && c.discard > 0:
			c.loopEnds(c.stopReason())
			return false
		case err != nil:
			c.loopEnds(c.readEnded(err))
			return false
		case c.discard > 0:
			c.used = len(p)
			if c.discard -= len(p); c.discard <= 0 {
				c.loopEnds(c.stopReason())
				return false
			}
			continue
		}
		var e *ConnError
		if c.used, _, e = c.process(p); e != nil {
			c.fail(e)
			c.discard = discardMax
			if e.Code == CodeEnhanceYourCalm {
				c.discard = discardFlood
			}
			c.used = len(p)
		}
	}
	return true
}

func (c *conn) loopEnds(err error) {
	c.readErr = err
	close(c.ended)
	go c.link.close()
}

// leave closes the connection when the peer has: it may have much to read still, and if what it sends meanwhile were
// answered by a reset, that would be lost.
func (c *conn) leave() {
	c.tls.sayGoodbye()
	c.tls.sock.shut()
	time.AfterFunc(lingerWait, func() { _ = c.tls.sock.Close() })
}

// stopReason is why the connection has failed.
func (c *conn) stopReason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// beginBatch leaves it to the loop to write what is queued from now on.
func (c *conn) beginBatch(l *loop) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.batching {
		c.batching = true
		l.sends = append(l.sends, c)
	}
}

// endBatch writes what has been queued, as far as the socket takes it at once.
func (c *conn) endBatch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.batching = false
	if c.tls == nil {
		c.flush(false)
		return
	}
	if c.writing {
		return
	}
	for c.queued() {
		c.writing = true
		batch, h := c.takeOut()
		ok := c.try(batch)
		h.giveBack(batch)
		if !ok {
			return
		}
	}
	c.writtenOut()
}

// try writes frames that are none of out, with writing set; mu is released meanwhile. It reports whether writing may
// go on at once.
func (c *conn) try(frames []byte) bool {
	c.mu.Unlock()
	all, err := c.tls.trySend(frames)
	c.mu.Lock()
	if err == nil && !all {
		go c.writeRest()
		return false
	}
	return c.wrote(err)
}

// writeRest waits for what the socket did not take at once, and for what was queued since.
func (c *conn) writeRest() {
	err := c.tls.sendRest()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrote(err) {
		c.writeQueued(-1)
	}
}

package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"time"
)

// ClientConfig configures one outbound tunnel connection. Zero values take defaults.
type ClientConfig struct {
	MaxStreams          int           // 100, or fewer if the peer says so
	MaxFrame            int           // longest DATA frame that the peer is told to send: 1 MiB, which is the most
	Idle                time.Duration // without streams the connection closes after it: 5 min
	PingEvery, PingWait time.Duration // as in ServerConfig
	Memory              *Memory       // as in ServerConfig
	Loops               *Loops        // as in ServerConfig
	// Probe is how long Open on a connection that has been silent for as long waits for a sign of life before
	// it gives up: 1 s. The peer's answer to the CONNECT itself may take any time.
	Probe time.Duration

	onStop func()
}

const defaultProbe = time.Second

// Client is one outbound tunnel connection.
type Client struct {
	*conn
	cfg      ClientConfig
	reserved int  // streams about to be opened
	suspect  bool // did not answer a probe; takes no streams until it shows a sign of life
}

// errProbe: the connection was silent when a stream was to be opened, and stayed so.
var errProbe = errors.New("hbone: no sign of life from a connection that was idle")

// NewClient starts HTTP/2 on nc, whose TLS handshake is done. It does not wait for the peer.
func NewClient(nc net.Conn, cfg ClientConfig) *Client {
	if cfg.MaxStreams == 0 {
		cfg.MaxStreams = defaultMaxStreams
	}
	if cfg.Idle == 0 {
		cfg.Idle = defaultIdle
	}
	if cfg.Probe == 0 {
		cfg.Probe = defaultProbe
	}
	c := &Client{conn: newConn(nc, newSession(true, cfg.MaxFrame, cfg.Memory), cfg.Loops, cfg.PingEvery, cfg.PingWait, cfg.Idle), cfg: cfg}
	c.onStop = cfg.onStop
	if c.tls == nil {
		go func() { _ = c.readLoop() }() // ends with the connection; Done and Err tell
	} else {
		c.startLoop()
	}
	return c
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended, nil while it has not and after an orderly end.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return orderly(c.stopped)
}

// Streams is the number of open streams.
func (c *Client) Streams() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}

// Drain stops new streams; the connection closes after the last one.
func (c *Client) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain = true
	if c.reserved == 0 {
		c.finishIfDrained()
	}
}

// Close resets all streams and closes the connection.
func (c *Client) Close() error {
	c.fail(&ConnError{Code: CodeNo, Reason: "closed"})
	return nil
}

// reserve takes one of the connection's stream slots for an open that follows.
func (c *Client) reserve() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.suspect && c.reads != c.seenReads {
		c.suspect = false
	}
	limit := min(c.cfg.MaxStreams, int(min(c.peerMaxStreams, 1<<30)))
	if c.stopped != nil || c.drain || c.suspect || len(c.streams)+c.reserved >= limit || c.nextID > maxStreamID-2 {
		return false
	}
	c.reserved++
	return true
}

// Open opens a stream and waits for the peer's answer. Its error is an *OpenError, and ErrDraining inside it
// means that the connection takes no more streams.
func (c *Client) Open(ctx context.Context, r Request) (*Stream, *Response, error) {
	if !c.reserve() {
		return nil, nil, &OpenError{Err: ErrDraining}
	}
	return c.open(ctx, r)
}

// open uses up a reservation.
func (c *Client) open(ctx context.Context, r Request) (*Stream, *Response, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reserved--
	if c.stopped != nil {
		return nil, nil, &OpenError{Err: c.stopped}
	}
	if c.drain && c.reserved == 0 && len(c.streams) == 0 {
		c.finishIfDrained()
		return nil, nil, &OpenError{Err: ErrDraining}
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, &OpenError{Err: err}
	}
	fresh := c.nextID == 1
	silent := !fresh && len(c.streams) == 0 && time.Since(c.idleSince) >= c.cfg.Probe
	st := newStream(c.conn, c.nextID)
	c.nextID += 2
	c.add(st)
	c.streamOpened()
	c.borrowOut()
	c.appendRequest(st.id, &r)
	if silent {
		reads := c.reads
		c.ping()
		probe := time.AfterFunc(c.cfg.Probe, func() { c.probed(st, reads) })
		defer probe.Stop()
	}
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !st.gone && !st.answered {
			st.resetLocked(CodeCancel)
			st.err = ctx.Err()
			c.flush(false)
		}
	})
	defer stop()
	c.flushNext()
	for st.resp.Status == 0 && st.err == nil {
		st.rcond.Wait()
	}
	switch {
	case st.resp.Status == 0:
		var reset *ResetError
		refused := errors.As(st.err, &reset) && reset.Code == CodeRefusedStream
		return nil, nil, &OpenError{Sent: !refused, Err: st.err}
	case st.resp.Status != 200:
		if !st.gone {
			st.resetLocked(CodeCancel)
		}
		st.closeLocked()
		c.flush(true)
		return nil, nil, &OpenError{Sent: true, Status: st.resp.Status, Header: st.resp.Header}
	}
	resp := st.resp
	return st, &resp, nil
}

// probed gives up on st if nothing was received since.
func (c *Client) probed(st *Stream, reads uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reads != reads || st.gone || c.stopped != nil {
		return
	}
	c.suspect = true
	c.seenReads = c.reads
	st.resetLocked(CodeCancel)
	st.err = errProbe
	c.flush(false)
	if len(c.streams) == 0 {
		c.failLocked(ErrPeerDead)
	}
}

func isOrderly(err error) bool {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
		return true
	}
	var ce *ConnError
	return errors.As(err, &ce) && ce.Code == CodeNo
}

package hbone

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Key says which tunnel connections are interchangeable.
type Key struct {
	Src   mesh.Identity  // identity this side presents
	Want  string         // identities of which the peer must present one, as WantKey joins them
	Addr  netip.AddrPort // peer's HBONE listener
	SrcIP netip.Addr     // address the connection comes from
	Pod   string         // uid of the source pod: its successor may have its address
}

// WantKey joins identities (mesh.Route.Want) for Key.Want.
func WantKey(ids []string) string { return strings.Join(ids, " ") }

// Wanted is the reverse of WantKey.
func (k Key) Wanted() []string { return strings.Fields(k.Want) }

// PoolConfig configures a Pool. Zero durations and sizes take defaults.
type PoolConfig struct {
	// Dial makes a tunnel connection, TCP (in Wire) and TLS. Its ctx ends after DialTimeout or with the pool, not
	// with the caller that happened to be first.
	Dial        func(ctx context.Context, k Key) (net.Conn, error)
	DialTimeout time.Duration // 10 s
	// Ended is told of each connection that Dial made when it has ended. It must not block. Nil: nobody is.
	Ended func(net.Conn)
	ClientConfig
}

const defaultDialTimeout = 10 * time.Second

// Pool keeps tunnel connections and opens streams on them. Connections that have ended, drain, or are of a
// drained key are never handed out.
type Pool struct {
	cfg    PoolConfig
	ctx    context.Context
	cancel context.CancelFunc
	dials  sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	entries map[Key]*poolEntry
}

type poolEntry struct {
	conns []*Client
	dial  *dialing // under way, nil if none
	gen   int      // counts drains: a connection dialled before one is used by nobody who comes after
}

// dialing is shared by all that wait for one connection.
type dialing struct {
	done    chan struct{}
	waiters int
	client  *Client
	err     error
}

// NewPool returns an empty pool.
func NewPool(cfg PoolConfig) *Pool {
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = defaultDialTimeout
	}
	p := &Pool{cfg: cfg, entries: map[Key]*poolEntry{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// Open opens a stream to k's peer over a pooled connection or a new one. Its error is an *OpenError.
func (p *Pool) Open(ctx context.Context, k Key, r Request) (*Stream, *Response, error) {
	for attempt := 0; ; attempt++ {
		c, fresh, err := p.client(ctx, k)
		if err != nil {
			return nil, nil, &OpenError{Err: err}
		}
		st, resp, err := c.open(ctx, r)
		if err == nil || ctx.Err() != nil {
			return st, resp, err
		}
		// A peer that is behind with ending streams refuses new ones for a moment, on every connection alike.
		if refused(err) && attempt < refusedTries {
			select {
			case <-time.After(refusedWait << attempt):
				continue
			case <-ctx.Done():
				return st, resp, err
			}
		}
		if fresh || attempt >= 3 || !stale(err) {
			return st, resp, err
		}
		// A connection that ended while it was being used for the first time in a while: no answer came from the
		// application, so that a new connection is as good.
	}
}

// stale reports that an open failed because of the pooled connection, not because of the request.
func stale(err error) bool {
	var oe *OpenError
	if !errors.As(err, &oe) || oe.Status != 0 {
		return false
	}
	var reset *ResetError
	return !errors.As(err, &reset)
}

// refusedWait is the first pause after a REFUSED_STREAM; it doubles up to half a second in all.
const (
	refusedWait  = 2 * time.Millisecond
	refusedTries = 8
)

// refused reports that the peer did not even look at the request.
func refused(err error) bool {
	var reset *ResetError
	return errors.As(err, &reset) && reset.Remote && reset.Code == CodeRefusedStream
}

// client returns a connection with a slot reserved; fresh says that it was made for this call.
func (p *Pool) client(ctx context.Context, k Key) (c *Client, fresh bool, err error) {
	for {
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, false, ErrClosed
		}
		e := p.entries[k]
		if e == nil {
			e = &poolEntry{}
			p.entries[k] = e
		}
		for _, c := range e.conns {
			if c.reserve() {
				p.mu.Unlock()
				return c, false, nil
			}
		}
		d := e.dial
		if d == nil || d.waiters >= p.maxStreams() {
			d = &dialing{done: make(chan struct{})}
			e.dial = d
			p.dials.Add(1)
			go p.dial(k, e, d, e.gen)
		}
		d.waiters++
		p.mu.Unlock()

		select {
		case <-d.done:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
		if d.err != nil {
			return nil, false, d.err
		}
		if d.client.reserve() {
			return d.client, true, nil
		}
		// Drained or filled meanwhile.
	}
}

func (p *Pool) maxStreams() int {
	if p.cfg.MaxStreams == 0 {
		return defaultMaxStreams
	}
	return p.cfg.MaxStreams
}

func (p *Pool) dial(k Key, e *poolEntry, d *dialing, gen int) {
	defer p.dials.Done()
	ctx, cancel := context.WithTimeout(p.ctx, p.cfg.DialTimeout)
	defer cancel()
	nc, err := p.cfg.Dial(ctx, k)

	p.mu.Lock()
	defer p.mu.Unlock()
	defer close(d.done)
	if e.dial == d {
		e.dial = nil
	}
	if err == nil && p.closed {
		err = ErrClosed
		_ = nc.Close()
	}
	if err != nil {
		d.err = err
		p.dropEmpty(k, e)
		return
	}
	var c *Client
	ready := make(chan struct{})
	cfg := p.cfg.ClientConfig
	cfg.onStop = func() {
		<-ready
		p.remove(k, e, c)
		if p.cfg.Ended != nil {
			p.cfg.Ended(nc)
		}
	}
	c = NewClient(nc, cfg)
	close(ready)
	d.client = c
	e.conns = append(e.conns, c)
	if gen != e.gen { // its certificate or peer is of before a drain
		c.Drain()
	}
}

func (p *Pool) remove(k Key, e *poolEntry, c *Client) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(e.conns, c); i >= 0 {
		e.conns = slices.Delete(e.conns, i, i+1)
	}
	p.dropEmpty(k, e)
}

func (p *Pool) dropEmpty(k Key, e *poolEntry) {
	if len(e.conns) == 0 && e.dial == nil && p.entries[k] == e {
		delete(p.entries, k)
	}
}

// Drain stops new streams on the connections whose key matches, e.g. those of a rotated certificate, a
// deleted pod or a vanished endpoint. They close after their last stream. It returns how many there were.
func (p *Pool) Drain(match func(Key) bool) int {
	p.mu.Lock()
	var drained []*Client
	for k, e := range p.entries {
		if match(k) {
			e.gen++
			e.dial = nil // who comes from now on dials anew
			drained = append(drained, e.conns...)
		}
	}
	p.mu.Unlock()
	for _, c := range drained {
		c.Drain()
	}
	return len(drained)
}

// Stats returns how many connections and streams are open.
func (p *Pool) Stats() (conns, streams int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.entries {
		conns += len(e.conns)
		for _, c := range e.conns {
			streams += c.Streams()
		}
	}
	return conns, streams
}

// Close resets all streams and closes all connections. It returns after dials under way have ended.
func (p *Pool) Close() error {
	p.mu.Lock()
	p.closed = true
	var all []*Client
	for _, e := range p.entries {
		all = append(all, e.conns...)
	}
	p.mu.Unlock()
	p.cancel()
	for _, c := range all {
		_ = c.Close()
	}
	p.dials.Wait()
	return nil
}

package hbone

import (
	"context"
	"net"
)

// Transport is the connection that carries the stream, as it was given to NewClient or Serve: streams of one
// tunnel have the same.
func (st *Stream) Transport() net.Conn { return st.c.nc }

// Warm returns when there is a connection for k that takes streams. It opens none. After a Drain that is a new
// connection: both ends prove themselves again, and what the drained ones still carry goes on.
func (p *Pool) Warm(ctx context.Context, k Key) error {
	c, _, err := p.client(ctx, k)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reserved--
	if c.reserved == 0 {
		c.finishIfDrained()
	}
	return nil
}

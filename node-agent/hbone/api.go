package hbone

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Stream is one tunnelled TCP connection. It is a net.Conn with TCP's half-close and reset.
type Stream struct{}

func (s *Stream) Read(p []byte) (int, error)         { return 0, errors.ErrUnsupported }
func (s *Stream) Write(p []byte) (int, error)        { return 0, errors.ErrUnsupported }
func (s *Stream) Close() error                       { return errors.ErrUnsupported }
func (s *Stream) CloseWrite() error                  { return errors.ErrUnsupported }
func (s *Stream) Reset()                             {}
func (s *Stream) LocalAddr() net.Addr                { return nil }
func (s *Stream) RemoteAddr() net.Addr               { return nil }
func (s *Stream) SetDeadline(t time.Time) error      { return errors.ErrUnsupported }
func (s *Stream) SetReadDeadline(t time.Time) error  { return errors.ErrUnsupported }
func (s *Stream) SetWriteDeadline(t time.Time) error { return errors.ErrUnsupported }

// ServerStream is a request that awaits the handler's answer.
type ServerStream struct{ Request Request }

// Accept answers 200 and returns the stream.
func (s *ServerStream) Accept(extra ...Field) (*Stream, error) { return nil, errors.ErrUnsupported }

// Reject answers with status and ends the stream.
func (s *ServerStream) Reject(status int, extra ...Field) error { return errors.ErrUnsupported }

// ServerConfig is how one inbound tunnel connection is served. Zero durations and sizes take defaults.
type ServerConfig struct {
	// Handler is called in a goroutine of its own for each request. It must Accept or Reject, and returns when
	// it is done with the stream; a stream that is neither answered nor finished then is reset.
	// ctx ends with the stream or the connection.
	Handler      func(ctx context.Context, s *ServerStream)
	DrainTimeout time.Duration
}

// Serve serves conn, whose TLS handshake is done, until it ends. When ctx ends it drains: GOAWAY, no new
// streams, and the connection closes after the last one or after DrainTimeout.
func Serve(ctx context.Context, conn net.Conn, cfg ServerConfig) error { return errors.ErrUnsupported }

// Key says which tunnel connections are interchangeable.
type Key struct {
	Src   mesh.Identity  // identity this side presents
	Want  string         // identities of which the peer must present one, as WantKey joins them
	Addr  netip.AddrPort // peer's HBONE listener
	SrcIP netip.Addr     // address the connection comes from
	Pod   string         // uid of the source pod: its successor may have its address
}

// WantKey joins identities (Route.Want) for Key.Want.
func WantKey(ids []string) string { return strings.Join(ids, " ") }

// Wanted is the reverse of WantKey.
func (k Key) Wanted() []string { return strings.Fields(k.Want) }

// PoolConfig configures a Pool. Zero durations and sizes take defaults.
type PoolConfig struct {
	// Dial makes a tunnel connection with its TLS handshake done (see Wire).
	Dial func(ctx context.Context, k Key) (net.Conn, error)
	// MaxStreams per connection: 100.
	MaxStreams int
	// Idle closes a connection without streams: 5 min.
	Idle time.Duration
}

// Pool keeps tunnel connections and opens streams on them.
type Pool struct{}

// NewPool returns an empty pool.
func NewPool(cfg PoolConfig) *Pool { return &Pool{} }

// Open opens a stream to k's peer, over a pooled connection or a new one. Its error is an *OpenError.
func (p *Pool) Open(ctx context.Context, k Key, r Request) (*Stream, *Response, error) {
	return nil, nil, errors.ErrUnsupported
}

// Drain stops new streams on the connections whose key matches, e.g. those of a rotated certificate, a
// deleted pod, or a vanished endpoint. They close after their last stream. It returns how many there were.
func (p *Pool) Drain(match func(Key) bool) int { return 0 }

// Close resets all streams and closes all connections.
func (p *Pool) Close() error { return nil }

// Wire wraps a TCP connection before it goes to tls.Client or tls.Server: large reads, and one write for
// several TLS records. The codec works without it, at more system calls a byte.
func Wire(c net.Conn) net.Conn { return c }

// RelayStats is what a Relay has delivered so far. It is read while the Relay runs, for the metrics of
// connections that last for days.
type RelayStats struct {
	AtoB, BtoA atomic.Int64 // bytes
}

// Relay copies between a and b, each a TCP connection or a *Stream, until both directions have ended or one
// failed. A FIN becomes END_STREAM and the reverse; a reset on one side resets the other. It closes both.
// The error is the first that is not an orderly end.
func Relay(a, b net.Conn, st *RelayStats) error { return errors.ErrUnsupported }

package hbone

import (
	"context"
	"net"
	"strconv"
	"sync"
	"time"
)

// ServerConfig is how one inbound tunnel connection is served. Zero durations take defaults.
type ServerConfig struct {
	// Handler is called in a goroutine of its own for each request. It must Accept or Reject and returns when it
	// is done with the stream or has left it to RelaySocket; one that it leaves unanswered or unfinished is reset. ctx
	// ends when the stream fails, when the connection does, and when the handler or the relay is through with the stream.
	// A panic is not recovered.
	Handler func(ctx context.Context, s *ServerStream)
	// DrainTimeout is how long streams may go on once ctx of Serve has ended: 5 s. Then they are reset.
	DrainTimeout time.Duration
	// PingEvery and PingWait: a PING after a silence of the first (2.5 s) while there are streams, and the peer is
	// dead if nothing comes within the second (4 s). Together they notice a dead peer within 10 s. One whose kernel
	// acknowledges what it is sent is only slow, up to eight times as long.
	PingEvery, PingWait time.Duration
	// MaxFrame is the longest DATA frame that the client is told to send: 1 MiB, which is the most.
	MaxFrame int
	// Memory bounds what this connection and those that share it hold for applications that do not read. Nil: 256
	// MiB of its own.
	Memory *Memory
	// Workers run the handlers. Nil: goroutines of their own.
	Workers *Workers
	// Loops wait for this connection's sockets and those of its streams. Nil: one of its own.
	Loops *Loops
}

const defaultDrainTimeout = 5 * time.Second

// ServerStream is a request that awaits the handler's answer.
type ServerStream struct {
	Request Request
	st      *Stream
}

// Accept answers 200 and returns the stream. It fails when the client has gone meanwhile.
func (s *ServerStream) Accept(extra ...Field) (*Stream, error) {
	return s.st, s.respond(200, extra, false)
}

// Reject answers with status and ends the stream.
func (s *ServerStream) Reject(status int, extra ...Field) error {
	return s.respond(status, extra, true)
}

// Reply answers a request other than CONNECT with a complete response, after the request's body, of which it waits
// for a second and for 2 MiB.
func (s *ServerStream) Reply(status int, body []byte, extra ...Field) error {
	s.st.discard(discardMax)
	if err := s.respond(status, append(extra, Field{"content-length", strconv.Itoa(len(body))}), len(body) == 0); err != nil || len(body) == 0 {
		return err
	}
	_, err := s.st.Write(body)
	if err == nil {
		err = s.st.CloseWrite()
	}
	_ = s.st.Close()
	return err
}

func (s *ServerStream) respond(status int, extra []Field, end bool) error {
	st := s.st
	c := st.c
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case st.err != nil:
		return st.err
	case st.closed || st.answered:
		return ErrClosed
	}
	st.answered = true
	c.borrowOut()
	c.appendResponse(st.id, status, extra, end)
	if end {
		st.localEnd = true
		st.maybeFinish()
		if !st.gone {
			st.resetLocked(CodeNo)
		}
		st.closeLocked()
	}
	c.flushNext()
	return nil
}

type server struct {
	*conn
	cfg      ServerConfig
	ctx      context.Context
	handlers sync.WaitGroup
	requests []*ServerStream // whose handlers start when what has been read is dealt with
}

// Serve serves nc, whose TLS handshake is done, until it ends, and returns after the last handler has. When ctx
// ends it drains: GOAWAY, no new streams, and the connection closes after the last stream or DrainTimeout. The
// error says why the connection ended; it is nil after an orderly end.
func Serve(ctx context.Context, nc net.Conn, cfg ServerConfig) error {
	if cfg.DrainTimeout == 0 {
		cfg.DrainTimeout = defaultDrainTimeout
	}
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	s := &server{conn: newConn(nc, newSession(false, cfg.MaxFrame, cfg.Memory), cfg.Loops, cfg.PingEvery, cfg.PingWait, 0), cfg: cfg, ctx: streamCtx}
	s.onReq = s.request
	s.onBatch = s.begin
	s.onTooLarge = s.tooLarge
	s.onDone = s.streamDone
	defer s.handlers.Wait()

	s.mu.Lock()
	s.flush(false)
	s.mu.Unlock()
	hello := time.AfterFunc(handshakeWait, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.settings {
			s.failLocked(&ConnError{Code: CodeSettingsTimeout, Reason: "no preface"})
		}
	})
	defer hello.Stop()
	stop := context.AfterFunc(ctx, func() { s.shutdown(cfg.DrainTimeout) })
	defer stop()

	err := s.read()
	cancel()
	return orderly(err)
}

// shutdown drains in the two steps of RFC 9113, section 6.8: first a GOAWAY that refuses nothing, then, when
// requests under way have arrived, one that names the last stream.
func (s *server) shutdown(limit time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped != nil {
		return
	}
	s.drain = true
	s.out = appendGoAway(s.out, maxStreamID, CodeNo, "")
	s.flush(false)
	grace := min(closeGrace, limit)
	deadline := time.Now().Add(limit)
	time.AfterFunc(grace, func() { s.lastCall(deadline) })
}

func (s *server) lastCall(deadline time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped != nil {
		return
	}
	if s.accept == maxStreamID {
		s.accept = s.lastID
		s.out = appendGoAway(s.out, s.lastID, CodeNo, "")
		s.flush(false)
	}
	left := time.Until(deadline)
	if len(s.streams) == 0 || left <= 0 {
		s.failLocked(&ConnError{Code: CodeNo, Reason: "drained"})
		return
	}
	time.AfterFunc(min(left, closeGrace), func() { s.lastCall(deadline) })
}

// request registers a stream and starts its handler. An error ends the connection. Called under mu.
func (s *server) request(id uint32, end bool) *ConnError {
	// A stream that the peer ended by force counts until its handler has returned: to reset must not be a way to
	// more handlers than streams are allowed. One that ended in order does not: its handler has done its work.
	if len(s.streams) >= ownMaxStreams || len(s.streams)+s.orphans >= 2*ownMaxStreams || s.memory.Full() {
		s.out = appendRST(s.out, id, CodeRefusedStream)
		return s.glitch(costRefused)
	}
	st := newStream(s.conn, id)
	req := s.req
	if req.Method != "CONNECT" {
		n, ok := contentLength(req.Header)
		if !ok || end && n > 0 {
			s.out = appendRST(s.out, id, CodeProtocol)
			return nil
		}
		st.bodyLeft = n
	}
	st.remoteEnd, st.eof = end, end
	s.add(st)
	s.streamOpened()
	s.requests = append(s.requests, &ServerStream{Request: req, st: st})
	return nil
}

// begin starts the handlers of new requests, but not of those that were reset in the same breath: who opens streams
// only to reset them is to have no work done. Called under mu.
func (s *server) begin() {
	for i, ss := range s.requests {
		s.requests[i] = nil
		if ss.st.gone {
			continue
		}
		ss.st.begun = true
		ctx, cancel := context.WithCancel(s.ctx)
		ss.st.cancel = cancel
		s.handlers.Add(1)
		s.cfg.Workers.Go(func() { s.handle(ctx, ss) })
	}
	s.requests = s.requests[:0]
}

func (s *server) handle(ctx context.Context, ss *ServerStream) {
	s.cfg.Handler(ctx, ss)
	s.mu.Lock()
	kept := ss.st.kept
	s.mu.Unlock()
	if !kept {
		s.streamDone(ss.st)
	}
}

func (s *server) streamDone(st *Stream) {
	defer s.handlers.Done()
	st.cancel()
	st.ResetCode(CodeInternal) // no effect on a stream that has ended
	s.mu.Lock()
	if st.orphan {
		s.orphans--
	}
	s.mu.Unlock()
}

// tooLarge answers a request whose header list exceeds the limit. Called under mu.
func (s *server) tooLarge(id uint32, end bool) {
	s.appendResponse(id, 431, nil, true)
	if !end {
		s.out = appendRST(s.out, id, CodeNo)
	}
}

// contentLength is -1 where there is none; ok is false if it is malformed or contradictory.
func contentLength(h Header) (n int64, ok bool) {
	n = -1
	for _, v := range h.Values("content-length") {
		l, err := strconv.ParseUint(v, 10, 62)
		if err != nil || n >= 0 && n != int64(l) {
			return 0, false
		}
		n = int64(l)
	}
	return n, true
}

// orderly is nil for ends that are nobody's fault.
func orderly(err error) error {
	if isOrderly(err) {
		return nil
	}
	return err
}

package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawClient speaks frames to a server by hand.
type rawClient struct {
	net.Conn
	*http2.Framer
	enc  *hpack.Encoder
	buf  bytes.Buffer
	next uint32
	end  chan error // what Serve returned
}

func newRawClient(t *testing.T, handler func(context.Context, *ServerStream)) *rawClient {
	t.Helper()
	a, b := tcpPair(t)
	c := &rawClient{Conn: a, Framer: http2.NewFramer(a, nil), next: 1, end: make(chan error, 1)}
	c.AllowIllegalWrites = true
	c.enc = hpack.NewEncoder(&c.buf)
	go func() { c.end <- Serve(context.Background(), b, ServerConfig{Handler: handler}) }()
	go io.Copy(io.Discard, a) // an attacker does not read; the kernel's buffer would only slow it down
	io.WriteString(a, clientPreface)
	c.WriteSettings()
	return c
}

func (c *rawClient) block(fields ...string) []byte {
	c.buf.Reset()
	for i := 0; i < len(fields); i += 2 {
		c.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(c.buf.Bytes())
}

func (c *rawClient) connect() uint32 {
	id := c.next
	c.next += 2
	c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: c.block(":method", "CONNECT", ":authority", "10.0.0.1:80")})
	return id
}

func refuseAll(_ context.Context, s *ServerStream) { s.Reject(503) }

func TestFloodsAreCut(t *testing.T) {
	hold := func(ctx context.Context, s *ServerStream) {
		if _, err := s.Accept(); err == nil {
			<-ctx.Done()
		}
	}
	slow := func(ctx context.Context, s *ServerStream) { <-ctx.Done(); s.Reject(503) }
	for name, f := range map[string]struct {
		handler func(context.Context, *ServerStream)
		setup   func(*rawClient)
		attack  func(*rawClient) error
	}{
		"rapid reset":     {handler: slow, attack: func(c *rawClient) error { return c.WriteRSTStream(c.connect(), http2.ErrCodeCancel) }},
		"ping":            {attack: func(c *rawClient) error { return c.WritePing(false, [8]byte{}) }},
		"settings":        {attack: func(c *rawClient) error { return c.WriteSettings(http2.Setting{ID: 4, Val: 1 << 20}) }},
		"priority":        {attack: func(c *rawClient) error { return c.WritePriority(1, http2.PriorityParam{StreamDep: 3}) }},
		"unknown frames":  {attack: func(c *rawClient) error { return c.WriteRawFrame(0xbe, 0, 0, nil) }},
		"empty data":      {handler: hold, setup: func(c *rawClient) { c.connect() }, attack: func(c *rawClient) error { return c.WriteData(1, false, nil) }},
		"padding only":    {handler: hold, setup: func(c *rawClient) { c.connect() }, attack: func(c *rawClient) error { return c.WriteDataPadded(1, false, nil, []byte{0}) }},
		"window update":   {handler: hold, setup: func(c *rawClient) { c.connect() }, attack: func(c *rawClient) error { return c.WriteWindowUpdate(1, 1) }},
		"window overflow": {attack: func(c *rawClient) error { return c.WriteWindowUpdate(0, maxWindow) }},
		"made you reset": {handler: slow, attack: func(c *rawClient) error {
			return c.WriteWindowUpdate(c.connect(), 0) // a stream error that the server has to answer
		}},
		"too many streams": {handler: hold, attack: func(c *rawClient) error { c.connect(); return c.WriteRSTStream(1, 0) }},
		"continuation": {setup: func(c *rawClient) {
			c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.block(":method", "CONNECT")})
		}, attack: func(c *rawClient) error { return c.WriteContinuation(1, false, nil) }},
		"hpack bomb": {attack: func(c *rawClient) error {
			big := strings.Repeat("x", 4000)
			f := []string{":method", "CONNECT", ":authority", "a:1"}
			for range 1000 {
				f = append(f, "cookie", big) // one byte each from the second on
			}
			id := c.next
			c.next += 2
			return c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: c.block(f...)})
		}},
		"malformed": {attack: func(c *rawClient) error {
			id := c.next
			c.next += 2
			return c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: c.block(":method", "CONNECT")})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if f.handler == nil {
				f.handler = refuseAll
			}
			c := newRawClient(t, f.handler)
			if f.setup != nil {
				f.setup(c)
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			stop := time.Now().Add(15 * time.Second)
			n := 0
			for time.Now().Before(stop) && f.attack(c) == nil {
				n++
			}
			runtime.ReadMemStats(&after)
			select {
			case err := <-c.end:
				var ce *ConnError
				if !errors.As(err, &ce) || ce.Code != CodeEnhanceYourCalm && ce.Code != CodeFlowControl {
					t.Errorf("ended with %v", err)
				}
				t.Logf("cut after %d frames: %v", n, err)
			case <-time.After(5 * time.Second):
				t.Errorf("%d frames and still connected", n)
				c.Close()
				<-c.end
			}
			if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
				t.Errorf("heap grew by %d MiB", grown>>20)
			}
		})
	}
}

// TestNotReadingPeer: PINGs to answer, and nobody takes the answers.
func TestNotReadingPeer(t *testing.T) {
	a, b := net.Pipe()
	end := make(chan error, 1)
	go func() { end <- Serve(context.Background(), b, ServerConfig{Handler: refuseAll}) }()
	io.WriteString(a, clientPreface)
	f := http2.NewFramer(a, nil)
	f.WriteSettings()
	for f.WritePing(false, [8]byte{}) == nil {
	}
	if err := <-end; err == nil {
		t.Error("no error")
	}
	a.Close()
}

func TestSilentClientIsCut(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: waits ten seconds")
	}
	a, b := tcpPair(t)
	start := time.Now()
	if err := Serve(context.Background(), b, ServerConfig{Handler: refuseAll}); err == nil {
		t.Error("no error")
	}
	if d := time.Since(start); d > handshakeWait+2*time.Second {
		t.Errorf("after %v", d)
	}
	a.Close()
}

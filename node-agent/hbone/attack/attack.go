// Package attack is HTTP/2 clients that mean harm to the server they speak with, for the tests that bound what
// such a client can do. It knows frames, and nothing of the node agent; no product code imports it.
package attack

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/warrenmesh/warren/internal/netns"
)

// Kind is one way to do harm.
type Kind struct {
	Name string
	// Held marks what could also be a slow network or application: it must cost the server little, and need not
	// end the connection.
	Held bool

	settings []http2.Setting
	deaf     bool                    // nothing that comes is read
	trickle  time.Duration           // as little as trickleBytes is read, once in so long
	begin    func(*client) error     // once
	step     func(*client) error     // until the connection ends; nil: nothing more is sent
	target   func(*Addresses) string // Echo when nil
}

// Addresses are the authorities that CONNECT asks for.
type Addresses struct {
	Echo   string // answers what it gets
	Source string // sends without end
	Deaf   string // never reads
}

// Report is what became of one connection.
type Report struct {
	Frames int
	Took   time.Duration // from the first byte to the end of the connection
	Ended  bool          // by the server
	GoAway bool
	Code   http2.ErrCode // of the GOAWAY
	Debug  string        // that came with it
}

const (
	streams = 100        // what a Held kind opens on a connection
	block   = 16<<10 - 1 // payload of a frame that any server takes

	trickleBytes = 128
)

var (
	bigValue = strings.Repeat("x", 4000)
	zeros    = make([]byte, block)
	widest   = []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}}
)

// Kinds returns every way, those that the server has to cut first.
func Kinds() []Kind {
	first := func(c *client) error { c.connect(); return nil }
	crowd := func(c *client) error {
		for range streams {
			c.connect()
		}
		return nil
	}
	wide := func(c *client) error { // the connection's window too
		_ = crowd(c)
		return c.WriteWindowUpdate(0, 1<<30)
	}
	source := func(a *Addresses) string { return a.Source }
	deaf := func(a *Addresses) string { return a.Deaf }
	return []Kind{
		{Name: "rapid reset", step: func(c *client) error { return c.WriteRSTStream(c.connect(), http2.ErrCodeCancel) }},
		{Name: "made you reset", step: func(c *client) error { return c.WriteWindowUpdate(c.connect(), 0) }},
		{Name: "CONTINUATION", begin: func(c *client) error {
			return c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.fields(":method", "CONNECT")})
		}, step: func(c *client) error { return c.WriteContinuation(1, false, nil) }},
		{Name: "PING", step: func(c *client) error { return c.WritePing(false, [8]byte{}) }},
		{Name: "answers to no PING", step: func(c *client) error { return c.WritePing(true, [8]byte{}) }},
		{Name: "PING, answers not read", deaf: true, step: func(c *client) error { return c.WritePing(false, [8]byte{}) }},
		{Name: "SETTINGS", step: func(c *client) error {
			return c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		}},
		{Name: "PRIORITY", step: func(c *client) error { return c.WritePriority(1, http2.PriorityParam{StreamDep: 3}) }},
		{Name: "unknown frames", step: func(c *client) error { return c.WriteRawFrame(0xbe, 0, 0, nil) }},
		{Name: "empty DATA", begin: first, step: func(c *client) error { return c.WriteData(1, false, nil) }},
		{Name: "DATA of padding", begin: first, step: func(c *client) error { return c.WriteDataPadded(1, false, nil, []byte{0}) }},
		{Name: "WINDOW_UPDATE", begin: first, step: func(c *client) error { return c.WriteWindowUpdate(1, 1) }},
		{Name: "windows of one byte", target: source, settings: []http2.Setting{{ID: http2.SettingInitialWindowSize}}, begin: wide, step: func(c *client) error {
			c.turn = (c.turn + 1) % streams
			return c.WriteWindowUpdate(uint32(2*c.turn+1), 1)
		}},
		{Name: "window overflow", step: func(c *client) error { return c.WriteWindowUpdate(0, 1<<31-1) }},
		{Name: "too many streams", step: func(c *client) error { c.connect(); return c.WriteRSTStream(1, http2.ErrCodeCancel) }},
		{Name: "HPACK bomb", step: func(c *client) error { return c.bomb("x", bigValue, 1000) }},
		{Name: "cookie bomb", step: func(c *client) error { return c.bomb("cookie", "a=b", 8000) }},
		{Name: "malformed requests", step: func(c *client) error {
			return c.WriteHeaders(http2.HeadersFrameParam{StreamID: c.id(), EndHeaders: true, BlockFragment: c.fields(":method", "CONNECT")})
		}},

		{Name: "windows of zero", Held: true, target: source, begin: crowd, settings: []http2.Setting{{ID: http2.SettingInitialWindowSize}}},
		{Name: "windows that are never used", Held: true, target: source, begin: wide, deaf: true, settings: widest},
		{Name: "windows that are never used, with signs of life", Held: true, target: source, begin: wide, deaf: true, settings: widest, step: func(c *client) error {
			time.Sleep(100 * time.Millisecond)
			return errors.Join(c.WritePing(true, [8]byte{}), c.w.Flush())
		}},
		{Name: "reading in drops", Held: true, target: source, begin: wide, trickle: 50 * time.Millisecond, settings: widest},
		{Name: "applications that do not read", Held: true, target: deaf, begin: func(c *client) error {
			_ = crowd(c)
			for range 256 << 10 / block { // within what a new stream may send
				for id := uint32(1); id < c.next; id += 2 {
					if err := c.WriteData(id, false, zeros); err != nil {
						return err
					}
				}
			}
			return nil
		}},
		{Name: "long requests", Held: true, begin: func(c *client) error {
			f := make([]string, 0, 400)
			for i := range 200 {
				f = append(f, "x"+strconv.Itoa(i), bigValue[:200])
			}
			for range streams {
				if err := c.request(f...); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "silence", Held: true},
	}
}

// client writes frames by hand. What is written is buffered, so that frames come as fast as can be.
type client struct {
	*http2.Framer
	w         *bufio.Writer
	authority string
	hpack     *hpack.Encoder
	buf       bytes.Buffer
	next      uint32
	turn      int    // the stream that is next
	block     []byte // of a bomb
	bombs     int
}

func (c *client) id() uint32 {
	c.next += 2
	return c.next - 2
}

func (c *client) fields(f ...string) []byte {
	c.buf.Reset()
	for i := 0; i < len(f); i += 2 {
		_ = c.hpack.WriteField(hpack.HeaderField{Name: f[i], Value: f[i+1]}) // to a bytes.Buffer
	}
	return bytes.Clone(c.buf.Bytes())
}

// connect opens a stream; an error shows with the next frame.
func (c *client) connect() uint32 {
	_ = c.request()
	return c.next - 2
}

// bomb is a request with a field many times over, of which each takes a byte from the second on.
func (c *client) bomb(name, value string, times int) error {
	f := []string{":method", "CONNECT", ":authority", c.authority}
	for range times {
		f = append(f, name, value)
	}
	for range 2 { // the second has all of it in the table
		if c.bombs < 2 {
			c.block = c.fields(f...)
			c.bombs++
			if err := c.headers(c.block); err != nil {
				return err
			}
		}
	}
	return c.headers(c.block)
}

// request is a CONNECT with more fields.
func (c *client) request(more ...string) error {
	return c.headers(c.fields(append([]string{":method", "CONNECT", ":authority", c.authority}, more...)...))
}

// headers opens a stream with a block, in as many frames as it takes.
func (c *client) headers(b []byte) error {
	id := c.id()
	n := min(len(b), block)
	if err := c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: n == len(b), BlockFragment: b[:n]}); err != nil {
		return err
	}
	for b = b[n:]; len(b) > 0; b = b[n:] {
		n = min(len(b), block)
		if err := c.WriteContinuation(id, n == len(b), b[:n]); err != nil {
			return err
		}
	}
	return nil
}

// Run attacks over conn, whose TLS handshake is done, until the server ends the connection or stop is closed.
// It closes conn.
func (k Kind) Run(conn net.Conn, to Addresses, stop <-chan struct{}) (r Report) {
	began := time.Now()
	defer conn.Close()
	c := &client{w: bufio.NewWriterSize(conn, 16<<10), authority: to.Echo, next: 1}
	if k.target != nil {
		c.authority = k.target(&to)
	}
	c.Framer = http2.NewFramer(c.w, nil)
	c.AllowIllegalWrites = true
	c.hpack = hpack.NewEncoder(&c.buf)

	ended := make(chan struct{}) // by the server, or by stop
	var mu sync.Mutex            // guards r's GOAWAY
	var reader sync.WaitGroup
	end := sync.OnceFunc(func() { close(ended); conn.Close() })
	switch {
	case k.deaf: // who reads nothing does not hear that it was cut, either, unless it writes
		reader.Go(func() {
			defer end()
			for !hungUp(conn) {
				select {
				case <-ended:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
	case k.trickle > 0:
		reader.Go(func() {
			defer end()
			for b := make([]byte, trickleBytes); ; time.Sleep(k.trickle) {
				if _, err := conn.Read(b); err != nil {
					return
				}
			}
		})
	default:
		reader.Go(func() {
			defer end()
			in := http2.NewFramer(io.Discard, bufio.NewReaderSize(conn, 16<<10))
			in.SetMaxReadFrameSize(1<<24 - 1)
			in.SetReuseFrames()
			for {
				f, err := in.ReadFrame()
				if g, ok := f.(*http2.GoAwayFrame); ok {
					mu.Lock()
					r.GoAway, r.Code, r.Debug = true, g.ErrCode, string(g.DebugData())
					mu.Unlock()
				}
				if se := (http2.StreamError{}); err != nil && !errors.As(err, &se) {
					return
				}
			}
		})
	}
	reader.Go(func() {
		select {
		case <-stop:
			end()
		case <-ended:
		}
	})
	_, err := io.WriteString(c.w, http2.ClientPreface)
	if err == nil {
		err = c.WriteSettings(k.settings...)
	}
	if err == nil && k.begin != nil {
		err = k.begin(c)
	}
	for err == nil && k.step != nil {
		if err = k.step(c); err == nil {
			mu.Lock()
			r.Frames++
			mu.Unlock()
		}
	}
	if err == nil {
		err = c.w.Flush()
	}
	if err == nil {
		<-ended
	}
	if !k.deaf && k.step != nil { // what the server said last may be still to be read
		select {
		case <-ended:
		case <-time.After(time.Second):
		}
	}
	select {
	case <-stop:
	default:
		r.Ended = true
	}
	r.Took = time.Since(began)
	end()
	reader.Wait()
	return r
}

// hungUp reports whether the server has ended a connection that nothing is read from: its kernel or ours says so.
func hungUp(conn net.Conn) bool {
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok { // TLS
		conn = t.NetConn()
	}
	c, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	ended := true
	_ = raw.Control(func(fd uintptr) {
		state, err := netns.State(int(fd))
		ended = err != nil || state != netns.TCPEstablished
	})
	return ended
}

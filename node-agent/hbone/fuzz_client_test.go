package hbone

import (
	"bytes"
	"testing"

	"golang.org/x/net/http2"
)

// answers returns a server's opening bytes with what write adds.
func answers(write func(*http2.Framer)) []byte {
	var b bytes.Buffer
	f := http2.NewFramer(&b, nil)
	f.AllowIllegalWrites = true
	f.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 100})
	write(f)
	return b.Bytes()
}

// FuzzClientSession is FuzzSession for what a server answers to a client with two open streams. No request comes
// of it, no stream is answered twice, and nobody is handed data before a 200.
func FuzzClientSession(f *testing.F) {
	ok := block(":status", "200", HeaderBaggage, "k8s.namespace.name=shop")
	f.Add(answers(func(w *http2.Framer) {
		w.WriteSettingsAck()
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: ok})
		w.WriteData(1, false, []byte("hello"))
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, EndHeaders: true, EndStream: true, BlockFragment: block(":status", "503")})
		w.WriteData(1, true, nil)
	}), uint8(2))
	f.Add(answers(func(w *http2.Framer) {
		w.WriteData(1, false, []byte("before the answer"))
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(":status", "100")})
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(":status", "2000")})
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 2, EndHeaders: true, BlockFragment: ok})
		w.WritePushPromise(http2.PushPromiseParam{StreamID: 1, PromiseID: 2, BlockFragment: block(":method", "GET"), EndHeaders: true})
	}), uint8(9))
	f.Add(answers(func(w *http2.Framer) {
		w.WriteGoAway(1, http2.ErrCodeNo, []byte("later"))
		w.WriteRSTStream(3, http2.ErrCodeRefusedStream)
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: ok[:1]})
		w.WriteContinuation(1, true, ok[1:])
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, EndStream: true, BlockFragment: block("x", "trailer")})
		w.WriteWindowUpdate(1, maxWindow)
	}), uint8(30))
	fuzzPieces(f, driveClient)
}

// driveClient runs a client's session over in and returns what it sent, what it got and why it stopped.
func driveClient(t *testing.T, in []byte, piece int) string {
	c := still(true)
	s := c.session
	for range 2 {
		s.add(newStream(c, s.nextID))
		s.nextID += 2
	}
	answered := map[*Stream]bool{}
	var got, held []byte
	for len(in) > 0 {
		n := min(piece, len(in))
		held = append(held, in[:n]...)
		in = in[n:]
		for {
			used, ev, err := s.next(held)
			if used > len(held) {
				t.Fatalf("used %d of %d bytes", used, len(held))
			}
			if ev.kind == evData {
				if !answered[ev.st] {
					t.Error("data before an answer")
				}
				got = append(got, ev.data...)
				s.returnWindow(ev.st, len(ev.data))
			}
			held = held[used:]
			if err != nil {
				return string(s.out) + string(got) + err.Error()
			}
			switch ev.kind {
			case evRequest, evTooLarge, evMalformed:
				t.Fatal("a request to a client")
			case evResponse:
				if answered[ev.st] || s.resp.Status < 200 || s.resp.Status > 999 {
					t.Errorf("answered before: %v, now with %d", answered[ev.st], s.resp.Status)
				}
				answered[ev.st] = true
			case evReset:
				s.drop(ev.st, false)
			case evBroken:
				s.drop(ev.st, true)
			case evMore:
				s.returnConnWindow()
				if s.need <= len(held) {
					t.Fatalf("has %d bytes and asks for %d", len(held), s.need)
				}
			}
			if ev.kind == evMore {
				break
			}
		}
	}
	return string(s.out) + string(got)
}

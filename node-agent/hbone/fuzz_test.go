package hbone

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// frames returns a client's opening bytes with what write adds.
func frames(write func(*http2.Framer)) []byte {
	var b bytes.Buffer
	b.WriteString(clientPreface)
	f := http2.NewFramer(&b, nil)
	f.WriteSettings()
	write(f)
	return b.Bytes()
}

func block(fields ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(fields); i += 2 {
		e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return b.Bytes()
}

// FuzzSession feeds the state machine; whatever comes, it must neither panic nor stand still, and must say
// the same however the bytes are cut.
func FuzzSession(f *testing.F) {
	f.Add(frames(func(*http2.Framer) {}), uint8(1))
	f.Add(frames(func(w *http2.Framer) {
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(":method", "CONNECT", ":authority", "10.0.0.1:80")})
		w.WriteDataPadded(1, false, []byte("hello"), make([]byte, 7))
		w.WriteData(1, true, nil)
		w.WriteRSTStream(1, 0)
		w.WriteWindowUpdate(0, 100)
		w.WritePing(false, [8]byte{1})
		w.WriteGoAway(0, 0, []byte("bye"))
	}), uint8(3))
	f.Add(frames(func(w *http2.Framer) {
		b := block(":method", "GET", ":scheme", "http", ":path", "/", "content-length", "3")
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: b[:2], PadLength: 3, Priority: http2.PriorityParam{StreamDep: 1}})
		w.WriteContinuation(3, true, b[2:])
	}), uint8(200))
	fuzzPieces(f, drive)
}

// fuzzPieces holds that a session does the same with what arrives at once and in pieces.
func fuzzPieces(f *testing.F, drive func(t *testing.T, in []byte, piece int) string) {
	f.Fuzz(func(t *testing.T, in []byte, cut uint8) {
		whole := drive(t, in, len(in)+1)
		pieces := drive(t, in, int(cut)+1)
		if whole != pieces {
			t.Errorf("at once: %q\nin pieces of %d: %q", whole, int(cut)+1, pieces)
		}
	})
}

// still is a session's connection for which no time passes.
func still(client bool) *conn {
	c := &conn{session: newSession(client, 0, nil), done: make(chan struct{})}
	c.session.flood.init()
	c.session.flood.now = func() int64 { return 0 }
	return c
}

// drive runs a server's session over in and returns what it sent and why it stopped.
func drive(t *testing.T, in []byte, piece int) string {
	c := still(false)
	s := c.session
	body := 0
	var held []byte
	for len(in) > 0 {
		n := min(piece, len(in))
		held = append(held, in[:n]...)
		in = in[n:]
		for {
			used, ev, err := s.next(held)
			if used > len(held) {
				t.Fatalf("used %d of %d bytes", used, len(held))
			}
			held = held[used:]
			if err != nil {
				return string(s.out) + err.Error()
			}
			switch ev.kind {
			case evRequest:
				st := newStream(c, ev.id)
				st.remoteEnd = ev.end
				s.add(st)
			case evData:
				body += len(ev.data)
				s.returnWindow(ev.st, 0)
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
	return string(s.out) + string(rune(body))
}

// FuzzRequestHeaders decodes header blocks and holds what is accepted against the rules.
func FuzzRequestHeaders(f *testing.F) {
	f.Add(block(":method", "CONNECT", ":authority", "10.0.0.1:80", HeaderForwarded, `for="10.0.0.2:41000"`))
	f.Add(block(":method", "CONNECT", ":authority", "10.0.0.1:80", ":path", "/"))
	f.Add(block(":method", "CONNECT", ":authority", "a\x00b"))
	f.Add(block(":method", "CONNECT", ":authority", strings.Repeat("a", 300)))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := newFieldDecoder(ownServerHeaderList)
		if d.decode(b) != nil {
			return
		}
		r, bad := d.request()
		if bad != "" {
			return
		}
		if r.Method == "CONNECT" && (r.Authority == "" || len(r.Authority) > maxAuthority || r.Scheme != "" || r.Path != "") {
			t.Errorf("accepted %+v", r)
		}
		for _, h := range append(r.Header, Field{"authority", r.Authority}, Field{"path", r.Path}) {
			if bytes.ContainsAny([]byte(h.Value+h.Name), "\x00\r\n") || h.Name == "" || h.Name[0] == ':' {
				t.Errorf("accepted field %q: %q", h.Name, h.Value)
			}
		}
	})
}

func FuzzBaggage(f *testing.F) {
	f.Add("k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=ui,service.name=ui,service.version=v1")
	f.Add("a=b;prop=1, service.name=%C3%A9 ,x=%")
	f.Add("service.name=%FF,service.version=%C3")
	f.Add("service.name=" + strings.Repeat("a", 300))
	f.Fuzz(func(t *testing.T, s string) {
		b, err := ParseBaggage(s)
		if err != nil {
			if b != (Baggage{}) {
				t.Errorf("an error, and %+v", b)
			}
			return
		}
		for _, v := range []string{b.Cluster, b.Namespace, b.Workload, b.Service, b.Version, b.Region, b.Zone} {
			if !utf8.ValidString(v) || len(v) > maxMember {
				t.Errorf("the value %q is no label", v)
			}
		}
		if b.Workload == "" {
			b.WorkloadKind = ""
		}
		again, err := ParseBaggage(b.String())
		if err != nil && len(b.String()) <= maxMetadata || err == nil && again.String() != b.String() {
			t.Errorf("%q is read as %+v, that as %+v, %v", s, b, again, err)
		}
	})
}

func FuzzForwarded(f *testing.F) {
	f.Add(`for="10.0.0.1:80"`)
	f.Add(`For="[fd00::1]:443";proto=https;host=catalog.shop.svc.cluster.local`)
	f.Add(`for=10.0.0.1:80, for=10.0.0.2:80`)
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseForwarded(s)
		if err != nil {
			if v != (Forwarded{}) {
				t.Errorf("an error, and %+v", v)
			}
			return
		}
		again, err := ParseForwarded(v.String())
		if err != nil || again != v {
			t.Errorf("%q is read as %+v, that as %+v, %v", s, v, again, err)
		}
	})
}

// FuzzServe throws bytes at a whole server; it must end without help once the client has gone.
func FuzzServe(f *testing.F) {
	f.Add(frames(func(w *http2.Framer) {
		w.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: block(":method", "CONNECT", ":authority", "10.0.0.1:80")})
		w.WriteData(1, true, []byte("x"))
	}))
	f.Fuzz(func(t *testing.T, in []byte) {
		a, b := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = Serve(context.Background(), b, ServerConfig{Handler: echo})
		}()
		go io.Copy(io.Discard, a)
		a.SetWriteDeadline(time.Now().Add(20 * time.Second))
		a.Write(in)
		a.Close()
		<-done
	})
}

func TestBaggage(t *testing.T) {
	b := Baggage{Cluster: "Kubernetes", Namespace: "shop", WorkloadKind: "deployment", Workload: "ui", Service: "ui, or \"so\"", Version: "v1"}
	want := "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=ui,service.name=ui%2C%20or%20%22so%22,service.version=v1"
	if b.String() != want {
		t.Errorf("got %s", b)
	}
	if got, err := ParseBaggage(want); err != nil || got != b {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{"x", "=x", "service.name=a,service.name=b", "service.name=%0a", "service.name=a b", "service.name=%FF", "service.name=" + strings.Repeat("a", 254), "k8s.pod.name=a,k8s.job.name=b", string(make([]byte, maxMetadata+1))} {
		if got, err := ParseBaggage(bad); err == nil {
			t.Errorf("%.40q is read as %+v", bad, got)
		}
	}
	if got, err := ParseBaggage(" userId=alice;p=1 , service.name = cart "); err != nil || got.Service != "cart" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestForwarded(t *testing.T) {
	for text, want := range map[string]Forwarded{
		`for="10.0.0.1:4321"`:                        {For: netip.MustParseAddrPort("10.0.0.1:4321")},
		`for="[fd00::1]:80";host=catalog.shop.svc`:   {For: netip.MustParseAddrPort("[fd00::1]:80"), Host: "catalog.shop.svc"},
		`for="10.0.0.1:1";host="[fd00::2]:8080"`:     {For: netip.MustParseAddrPort("10.0.0.1:1"), Host: "[fd00::2]:8080"},
		`proto=http; FOR="10.0.0.1:4321" ;by=unused`: {For: netip.MustParseAddrPort("10.0.0.1:4321")},
	} {
		if got, err := ParseForwarded(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, bad := range []string{"", "for=", `for="10.0.0.1"`, `for=unknown`, `for=_hidden:1`, `for="10.0.0.1:1",for="10.0.0.2:1"`, `for="10.0.0.1:1";for="10.0.0.2:1"`,
		`for="10.0.0.1:1`, `for="fe80::1%eth0"`, `host=a`, `for="10.0.0.1:1";host="a b"`} {
		if got, err := ParseForwarded(bad); err == nil {
			t.Errorf("%q is read as %+v", bad, got)
		}
	}
}

package hbone

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
)

// crypto/tls as the peer of a record layer that was taken over, each side as client and as server.

func testTLS() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{testCert()}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"}, CurvePreferences: []tls.CurveID{tls.X25519}}
}

// takenOver is a record layer of ours, and its peer.
func takenOver(t testing.TB, client bool) (*records, *tls.Conn) {
	t.Helper()
	a, b := tcpPair(t)
	mine, peer := TLSServer(a, testTLS()), tls.Client(b, testTLS())
	if client {
		mine, peer = TLSClient(a, testTLS()), tls.Server(b, testTLS())
	}
	done := make(chan error, 1)
	go func() { done <- peer.Handshake() }()
	if err := errors.Join(mine.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return taken(t, mine, client), peer
}

func taken(t testing.TB, c *tls.Conn, client bool) *records {
	t.Helper()
	r, ok := newLink(c, client, nil, nil).(*records)
	if !ok {
		t.Fatal("the record layer was not taken over")
	}
	return r
}

// linkReader reads a link as an io.Reader. Of what it gets before more is to come, it leaves a third for later.
type linkReader struct {
	l     link
	p     []byte // received, not read
	later int    // behind p
	more  int    // is to come
	got   int    // with what was received last
}

func (r *linkReader) Read(p []byte) (int, error) {
	for len(r.p) == 0 {
		had := r.later
		b, err := r.l.receive(r.got-had, 1)
		if err != nil {
			return 0, err
		}
		r.more -= len(b) - had
		if r.later = 0; r.more > 0 {
			r.later = len(b) / 3
		}
		r.p, r.got = b[:len(b)-r.later], len(b)
	}
	n := copy(p, r.p)
	r.p = r.p[n:]
	return n, nil
}

// linkWriter sends in pieces whose arrays end with them.
type linkWriter struct{ l link }

func (w linkWriter) Write(p []byte) (int, error) {
	p = bytes.Clone(p)
	return len(p), w.l.send(p[:len(p):len(p)])
}

func noise(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.Read(p)
	return p
}

// copyOdd writes p in pieces of all sizes.
func copyOdd(w io.Writer, p []byte) error {
	for n := 1; len(p) > 0; n = n*3%99991 + 1 {
		n = min(n, len(p))
		if _, err := w.Write(p[:n]); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

func TestTheRecordLayerTakenOverTalksToCryptoTLS(t *testing.T) {
	for _, client := range []bool{true, false} {
		for _, limit := range []uint64{keyLimit, 1, 5} {
			t.Run(fmt.Sprintf("client %v, %d records a key", client, limit), func(t *testing.T) {
				r, peer := takenOver(t, client)
				r.limit = limit
				data := noise(4<<20 + 17)
				var wg sync.WaitGroup
				wg.Go(func() {
					if err := copyOdd(linkWriter{r}, data); err != nil {
						t.Error(err)
					}
				})
				wg.Go(func() {
					if err := copyOdd(peer, data); err != nil {
						t.Error(err)
					}
				})
				same := func(who string, from io.Reader) {
					got := make([]byte, len(data))
					if _, err := io.ReadFull(from, got); err != nil || !bytes.Equal(got, data) {
						t.Errorf("%s received something else: %v", who, err)
					}
				}
				wg.Go(func() { same("the peer", peer) })
				mine := &linkReader{l: r, more: len(data)}
				same("this side", mine)
				wg.Wait()

				if err := peer.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if _, err := mine.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("after the peer's close_notify: %v, want EOF", err)
				}
				if r.cipher.buf != nil || r.plain.buf != nil {
					t.Error("a buffer is held after the end")
				}
				r.close()
				if _, err := peer.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("after this side's close_notify: %v, want EOF", err)
				}
			})
		}
	}
}

// What the peer sends right behind its Finished has been read by then.
func TestNothingThatFollowsTheHandshakeIsLost(t *testing.T) {
	for _, size := range []int{1, 100, 5000, 16 << 10, 300 << 10} {
		a, b := tcpPair(t)
		mine, peer := TLSServer(a, testTLS()), tls.Client(&delayed{Conn: b}, testTLS())
		data := noise(size)
		go func() {
			if err := peer.Handshake(); err != nil {
				t.Error(err)
			}
			_, _ = peer.Write(data)
			_ = peer.NetConn().(*delayed).flush()
		}()
		if err := mine.Handshake(); err != nil {
			t.Fatal(err)
		}
		r := taken(t, mine, false)
		if r.cipher.empty() {
			t.Error("nothing came with the handshake; the test tests nothing")
		}
		got := make([]byte, size)
		if _, err := io.ReadFull(&linkReader{l: r}, got); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes behind the handshake: something else came: %v", size, err)
		}
	}
}

// delayed keeps what is written after the first write, the ClientHello, until flush.
type delayed struct {
	net.Conn
	n   int
	buf []byte
}

func (d *delayed) Write(p []byte) (int, error) {
	if d.n++; d.n == 1 {
		return d.Conn.Write(p)
	}
	d.buf = append(d.buf, p...)
	return len(p), nil
}

func (d *delayed) flush() error {
	_, err := d.Conn.Write(d.buf)
	return err
}

func TestAnIdleRecordLayerHoldsNoBuffer(t *testing.T) {
	mine, peer := tlsPair(t)
	l, err := newLoop()
	if err != nil {
		t.Fatal(err)
	}
	r := newLink(mine, true, l, nil).(*records)
	t.Cleanup(func() { r.sock.Close(); l.release() })
	idle := func(when string, few bool) {
		t.Helper()
		r.sock.more = true
		for used := 0; ; {
			p, err := r.receive(used, 1)
			if err == errAgain {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			used = len(p)
		}
		if r.cipher.buf != nil || r.plain.buf != nil || r.plain.few != nil || (r.cipher.few != nil) != few {
			t.Errorf("%s: holds %v %v %v %v", when, r.cipher.buf != nil, r.cipher.few != nil, r.plain.buf != nil, r.plain.few != nil)
		}
	}
	idle("from the beginning", false)
	if _, err := peer.Write(noise(100000)); err != nil {
		t.Fatal(err)
	}
	idle("after data", false)
	if _, err := peer.(*tls.Conn).NetConn().Write([]byte{typeApplication, 3, 3}); err != nil {
		t.Fatal(err)
	}
	idle("with a part of a header", true)
}

// crafted are both ends of ours, so that one can send what nobody sends.
func crafted(t testing.TB, client bool) (r, by *records) {
	t.Helper()
	a, b := tcpPair(t)
	mine, peer := TLSServer(a, testTLS()), TLSClient(b, testTLS())
	if client {
		mine, peer = TLSClient(a, testTLS()), TLSServer(b, testTLS())
	}
	done := make(chan error, 1)
	go func() { done <- peer.Handshake() }()
	if err := errors.Join(mine.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return taken(t, mine, client), taken(t, peer, !client)
}

func TestWhatNoPeerMaySendIsAnsweredWithAnAlert(t *testing.T) {
	seal := func(typ byte, p ...byte) func(*half) []byte {
		return func(h *half) []byte { return h.seal(nil, p[:len(p):len(p)], typ) }
	}
	many := func(f func(*half) []byte, n int) func(*half) []byte {
		return func(h *half) (out []byte) {
			for range n {
				out = append(out, f(h)...)
			}
			return out
		}
	}
	update := func(h *half) []byte { out, _ := h.appendKeyUpdate(nil); return out }
	raw := func(p ...byte) func(*half) []byte { return func(*half) []byte { return p } }
	long := make([]byte, maxPlaintext+1)
	for _, tc := range []struct {
		name   string
		client bool // the one that receives
		send   func(*half) []byte
		alert  tls.AlertError
	}{
		{"damaged", true, func(h *half) []byte { r := h.seal(nil, []byte("x"), typeApplication); r[7] ^= 1; return r }, alertBadRecordMAC},
		{"replayed", true, func(h *half) []byte { r := h.seal(nil, []byte("x"), typeApplication); return append(r, r...) }, alertBadRecordMAC},
		{"other header", true, func(h *half) []byte { r := h.seal(nil, []byte("x"), typeApplication); r[2] = 4; return r }, alertBadRecordMAC},
		{"shorter than a tag", true, raw(typeApplication, 3, 3, 0, 16, 0), alertBadRecordMAC},
		{"longer than allowed", true, raw(typeApplication, 3, 3, 0x41, 1), alertRecordOverflow},
		{"more content than allowed", true, seal(typeApplication, long...), alertRecordOverflow},
		{"alert without encryption", true, raw(typeAlert, 3, 3, 0, 2, 2, 0), alertUnexpectedMessage},
		{"change_cipher_spec", true, raw(20, 3, 3, 0, 1, 1), alertUnexpectedMessage},
		{"HTTP", false, raw([]byte("GET / HTTP/1.1")...), alertUnexpectedMessage},
		{"nothing but padding", true, seal(0, 0, 0, 0), alertUnexpectedMessage},
		{"unknown type", true, seal(99, 1), alertUnexpectedMessage},
		{"long alert", true, seal(typeAlert, 2, 40, 0), alertUnexpectedMessage},
		{"empty handshake record", true, seal(typeHandshake), alertUnexpectedMessage},
		{"ticket from a client", false, seal(typeHandshake, messageNewSessionTicket, 0, 0, 1, 0), alertUnexpectedMessage},
		{"certificate request", true, seal(typeHandshake, 13, 0, 0, 1, 0), alertUnexpectedMessage},
		{"client hello", false, seal(typeHandshake, 1, 0, 0, 0), alertUnexpectedMessage},
		{"huge ticket", true, seal(typeHandshake, messageNewSessionTicket, 1, 0, 1), alertDecodeError},
		{"long key update", true, seal(typeHandshake, messageKeyUpdate, 0, 0, 2, 0, 0), alertDecodeError},
		{"strange key update", true, seal(typeHandshake, messageKeyUpdate, 0, 0, 1, 2), alertIllegalParameter},
		{"key update with more behind it", true, seal(typeHandshake, messageKeyUpdate, 0, 0, 1, 0, 24), alertUnexpectedMessage},
		{"data within a message", true, func(h *half) []byte {
			return append(seal(typeHandshake, messageKeyUpdate, 0)(h), seal(typeApplication, 'x')(h)...)
		}, alertUnexpectedMessage},
		{"key updates without end", true, many(update, 17), alertUnexpectedMessage},
		{"empty records without end", false, many(seal(typeApplication), 17), alertUnexpectedMessage},
		{"tickets without end", true, many(seal(typeHandshake, messageNewSessionTicket, 0, 0, 1, 0), 17), alertUnexpectedMessage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, by := crafted(t, tc.client)
			if _, err := by.nc.Write(tc.send(by.out)); err != nil {
				t.Fatal(err)
			}
			_, err := io.Copy(io.Discard, &linkReader{l: r})
			var op *net.OpError
			if !errors.As(err, &op) || op.Err != tc.alert {
				t.Errorf("%v, want %v", err, tc.alert)
			}
			_, err = by.receive(0, 1)
			if !errors.As(err, &op) || op.Op != "remote error" || op.Err != tc.alert {
				t.Errorf("the peer got %v, want %v", err, tc.alert)
			}
		})
	}
	for _, tc := range []struct {
		name string
		send func(*half) []byte
		want error
	}{
		{"the end of the connection between records", many(seal(typeApplication, 'x'), 3), io.EOF},
		{"the end of the connection within a record", func(h *half) []byte { return h.seal(nil, []byte("xyz"), typeApplication)[:20] }, io.ErrUnexpectedEOF},
		{"close_notify", seal(typeAlert, 1, 0), io.EOF},
		{"key updates between data", many(func(h *half) []byte { return append(update(h), seal(typeApplication, 'x')(h)...) }, 100), io.EOF},
		{"sixteen empty records", many(seal(typeApplication), 16), io.EOF},
		{"padding", func(h *half) []byte {
			return h.seal(nil, append([]byte{'x', typeApplication}, make([]byte, 5000)...), 0)
		}, io.EOF},
		{"tickets in pieces", func(h *half) []byte {
			return append(seal(typeHandshake, messageNewSessionTicket, 0, 0)(h), seal(typeHandshake, 2, 7, 7, messageNewSessionTicket, 0, 0, 0)(h)...)
		}, io.EOF},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r, by := crafted(t, true)
			if _, err := by.nc.Write(tc.send(by.out)); err != nil {
				t.Fatal(err)
			}
			_ = by.nc.(*net.TCPConn).CloseWrite()
			if _, err := io.ReadAll(&linkReader{l: r}); err != tc.want && !(err == nil && tc.want == io.EOF) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

// Who is asked for new keys makes them before it sends anything more.
func TestRequestedKeysAreMade(t *testing.T) {
	r, by := crafted(t, true)
	got := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(&linkReader{l: r}, make([]byte, 1))
		got <- err
	}()
	out := by.out.seal(nil, []byte{messageKeyUpdate, 0, 0, 1, 1}, typeHandshake)
	if err := by.out.update(); err != nil {
		t.Fatal(err)
	}
	if _, err := by.nc.Write(by.out.seal(out, []byte("x"), typeApplication)); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(r.out.secret)
	if err := r.send([]byte("y")); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(before, r.out.secret) {
		t.Error("the key is the old one")
	}
	if p, err := by.receive(0, 1); err != nil || string(p) != "y" {
		t.Errorf("%q, %v", p, err)
	}
}

// FuzzRecordLayer lets crypto/tls and the record layer receive the same: records of any type, with any content,
// damaged or not. They have to deliver the same data.
func FuzzRecordLayer(f *testing.F) {
	f.Add([]byte{0, 3, 'a', 'b', 'c', 1, 0, 2, 5, 24, 0, 0, 1, 0})
	f.Add([]byte{3, 2, 1, 0, 0, 1, 'x'})
	f.Add([]byte{2, 2, 24, 0, 2, 3, 0, 1, 1, 0, 1, 'x'})
	f.Add([]byte{4, 9, 0, 1, 'x'})
	f.Fuzz(func(t *testing.T, script []byte) {
		receive := func(r io.Reader, by *records) []byte {
			got := make(chan []byte, 1)
			go func() {
				p, _ := io.ReadAll(r)
				got <- p
			}()
			_, _ = by.nc.Write(craft(by.out, script))
			_ = by.nc.(*net.TCPConn).CloseWrite()
			p := <-got
			by.close()
			return p
		}
		mine, by := crafted(t, false)
		a := receive(&linkReader{l: mine}, by)
		mine.close()
		x, y := tcpPair(t)
		std, peer := tls.Server(x, testTLS()), TLSClient(y, testTLS())
		done := make(chan error, 1)
		go func() { done <- std.Handshake() }()
		if err := errors.Join(peer.Handshake(), <-done); err != nil {
			t.Fatal(err)
		}
		b := receive(std, taken(t, peer, true))
		std.Close()
		if !bytes.Equal(a, b) {
			t.Errorf("%x: delivers %q, crypto/tls %q", script, a, b)
		}
	})
}

// craft turns a script into records.
func craft(h *half, script []byte) (out []byte) {
	for len(script) >= 2 {
		op, n := script[0], min(int(script[1]), len(script)-2)
		p := bytes.Clone(script[2 : 2+n])
		script = script[2+n:]
		switch op % 6 {
		case 0:
			out = h.seal(out, p, typeApplication)
		case 1:
			out, _ = h.appendKeyUpdate(out)
		case 2:
			out = h.seal(out, p, typeHandshake)
		case 3:
			out = h.seal(out, p, typeAlert)
		case 4:
			out = h.seal(out, p, byte(len(script)))
		case 5:
			out = h.seal(out, append(p, 23, 0, 0), 0)
			if n > 0 {
				out[len(out)-n%20-1] ^= p[0] & 1
			}
		}
	}
	return out
}

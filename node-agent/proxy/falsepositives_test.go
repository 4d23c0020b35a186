package proxy

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/node-agent/hbone"
	"github.com/warrenmesh/warren/results"
)

// The ports of catalog-1 here. Echoes have many: each has source ports of its own, of which a closed connection keeps
// one for a minute.
const (
	echoPorts   = 64 // from appPort on
	endlessPort = appPort + echoPorts
)

// What clients do that are in order, only many of it, must not be taken for an attack: no GOAWAY, and nothing is
// left over.
func TestWhatIsNoAttack(t *testing.T) {
	crumbs, streams, aborts, slowly := 100_000, 5_000, 1_000, 1<<20
	switch {
	case *long:
		crumbs, streams, aborts, slowly = 10_000_000, 1_000_000, 10_000, 16<<20 // the last takes a minute
	case raceEnabled:
		crumbs, streams, aborts = 30_000, 1_000, 300
	}
	l := newLab(t)
	cat := l.pods["catalog-1"]
	for i := range echoPorts {
		cat.listen(appPort+i, echo)
	}
	cat.listen(endlessPort, func(c *net.TCPConn) { io.Copy(c, zeros{}) })
	for _, tc := range []struct {
		name string
		n    int
		run  func(*testing.T, *lab, int) (goAways, broken int)
	}{
		{"DATA frames of one byte", crumbs, oneByteFrames},
		{"short streams", streams, shortStreams},
		{"clients that go away in the middle", aborts, abortedClients},
		{"bytes that are read slowly", slowly, slowReader},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// What the first connection of a kind brings with it stays.
			tc.run(t, l, 10)
			l.calm(t)
			before := leftover()
			began := time.Now()
			goAways, broken := tc.run(t, l, tc.n)
			took := time.Since(began)
			l.calm(t)
			eventually(t, "the tunnels are gone", func() bool { return cat.handle.Open() == 0 })
			var after holdings
			eventually(t, "what was used is given back", func() bool {
				after = leftover()
				return after.goroutines <= before.goroutines && after.files <= before.files
			})
			if goAways > 0 {
				t.Errorf("%d GOAWAYs", goAways)
			}
			leaks := max(after.goroutines-before.goroutines, 0) + max(after.files-before.files, 0)
			if leaks > 0 {
				t.Errorf("before %+v, after %+v; descriptors: %v", before, after, descriptorsOf())
			}
			check(t, results.Record("h2-false-positives",
				results.Row{Name: tc.name + ": GOAWAYs", Inputs: tc.n, Failures: goAways, Figure: float64(tc.n) / took.Seconds(), Unit: "a second"},
				results.Row{Name: tc.name + ": not as they have to be", Inputs: tc.n, Failures: broken, Figure: float64(broken), Unit: ""},
				results.Row{Name: tc.name + ": streams, goroutines and descriptors that are left", Inputs: tc.n, Failures: leaks, Figure: float64(leaks), Unit: ""}))
		})
	}
}

// holdings is what a leak would show in.
type holdings struct{ goroutines, files int }

func leftover() holdings {
	files, _ := os.ReadDir("/proc/self/fd")
	return holdings{runtime.NumGoroutine(), len(files)}
}

// descriptorsOf says what descriptors are open, by kind.
func descriptorsOf() map[string]int {
	kinds := map[string]int{}
	files, _ := os.ReadDir("/proc/self/fd")
	for _, f := range files {
		what, _ := os.Readlink("/proc/self/fd/" + f.Name())
		kind, _, _ := strings.Cut(what, "[")
		kinds[kind]++
	}
	return kinds
}

// byHand is a tunnel of one stream, 1, whose frames a test writes and reads itself.
type byHand struct {
	io.Closer
	w       *bufio.Writer
	out, in *http2.Framer
}

// byHand makes one to an application of catalog-1; the server may send so many bytes on it.
func (l *lab) byHand(t *testing.T, port uint16, window uint32) byHand {
	tc, err := l.strangerTLS(l.pods["catalog-1"])
	check(t, err)
	w := bufio.NewWriterSize(tc, 16<<10)
	out, in := http2.NewFramer(w, nil), http2.NewFramer(nil, bufio.NewReaderSize(tc, 64<<10))
	in.SetMaxReadFrameSize(1<<24 - 1)
	in.SetReuseFrames()
	var head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for _, f := range [][2]string{{":method", "CONNECT"}, {":authority", netip.AddrPortFrom(l.pods["catalog-1"].v4, port).String()}} {
		check(t, enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}))
	}
	_, err = io.WriteString(w, http2.ClientPreface)
	check(t, errors.Join(err, out.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}), out.WriteWindowUpdate(0, 1<<31-1-65535),
		out.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, EndHeaders: true, BlockFragment: head.Bytes()}), w.Flush()))
	return byHand{tc, w, out, in}
}

// oneByteFrames writes n DATA frames of one byte, and wants the bytes back.
func oneByteFrames(t *testing.T, l *lab, n int) (goAways, broken int) {
	h := l.byHand(t, appPort, 1<<31-1)
	defer h.Close()
	w, out, in := h.w, h.out, h.in
	windows := make(chan int, 1000)
	echoed := make(chan int, 1)
	var acks sync.Mutex // w
	go func() {
		defer close(windows)
		got := 0
		defer func() { echoed <- got }()
		for got < n {
			f, err := in.ReadFrame()
			switch f := f.(type) {
			case *http2.DataFrame:
				got += len(f.Data())
			case *http2.GoAwayFrame:
				goAways++
			case *http2.WindowUpdateFrame:
				if f.StreamID == 1 {
					windows <- int(f.Increment)
				}
			case *http2.SettingsFrame:
				f.ForeachSetting(func(s http2.Setting) error {
					if s.ID == http2.SettingInitialWindowSize {
						windows <- int(s.Val)
					}
					return nil
				})
				if !f.IsAck() {
					acks.Lock()
					_ = errors.Join(out.WriteSettingsAck(), w.Flush())
					acks.Unlock()
				}
			}
			if err != nil {
				t.Errorf("after %d of %d bytes: %v", got, n, err)
				return
			}
		}
	}()
	left := 0
	for sent := 0; sent < n; sent++ {
		for left == 0 {
			more, ok := <-windows
			if !ok {
				t.Fatalf("the connection ended after %d frames", sent)
			}
			left += more
		}
		left--
		acks.Lock()
		err := out.WriteData(1, false, []byte{byte(sent)})
		acks.Unlock()
		check(t, err)
		if sent%1000 == 0 || sent == n-1 {
			acks.Lock()
			check(t, w.Flush())
			acks.Unlock()
		}
	}
	go func() {
		for range windows { // what is still coming
		}
	}()
	if got := <-echoed; got != n {
		broken = n - got
		t.Errorf("%d of %d bytes came back", got, n)
	}
	return goAways, broken
}

// slowReader takes n bytes of an application that sends without end, as a peer does that is in order and slow: it reads
// what comes, and lets more come, a few KiB at a time, when it has dealt with that.
func slowReader(t *testing.T, l *lab, n int) (goAways, broken int) {
	const window, portion = 16 << 10, 4 << 10
	h := l.byHand(t, endlessPort, window)
	defer h.Close()
	got, due := 0, 0
	for got < n {
		f, err := h.in.ReadFrame()
		if err != nil {
			t.Errorf("after %d of %d bytes: %v", got, n, err)
			return goAways, n - got
		}
		switch f := f.(type) {
		case *http2.DataFrame:
			got += len(f.Data())
			due += len(f.Data())
		case *http2.GoAwayFrame:
			goAways++
		case *http2.RSTStreamFrame:
			t.Errorf("reset after %d of %d bytes: %s", got, n, f.ErrCode)
			return goAways, n - got
		case *http2.PingFrame:
			if !f.IsAck() {
				err = h.out.WritePing(true, f.Data)
			}
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = h.out.WriteSettingsAck()
			}
		}
		for ; due >= portion && err == nil; due -= portion {
			time.Sleep(10 * time.Millisecond)
			err = errors.Join(h.out.WriteWindowUpdate(1, portion), h.out.WriteWindowUpdate(0, portion), h.w.Flush())
		}
		check(t, errors.Join(err, h.w.Flush()))
	}
	return goAways, 0
}

// manyStreams opens n streams on a few tunnels, some at a time, and counts the tunnels that ended by the server.
func manyStreams(t *testing.T, l *lab, n int, each func(i int, st *hbone.Stream) error) (goAways, broken int) {
	const tunnels, parallel = 4, 8
	b := l.ca.sign(stranger, time.Now().Add(-time.Minute), time.Now().Add(time.Hour), nil)
	var next, failed atomic.Int64
	var wg sync.WaitGroup
	var clients []*hbone.Client
	for range tunnels {
		c := l.strangerClient(t, b)
		defer c.Close()
		clients = append(clients, c)
		for range parallel {
			wg.Go(func() {
				for i := next.Add(1); i <= int64(n) && failed.Load() < 100; i = next.Add(1) {
					ctx, cancel := context.WithTimeout(t.Context(), plenty)
					port := appPort + uint16(i%echoPorts)
					st, _, err := c.Open(ctx, hbone.Request{Authority: netip.AddrPortFrom(l.pods["catalog-1"].v4, port).String()})
					cancel()
					if err == nil {
						err = each(int(i), st)
					}
					if err != nil {
						t.Errorf("stream %d: %v", i, err)
						failed.Add(1)
					}
				}
			})
		}
	}
	wg.Wait()
	broken = int(failed.Load())
	for _, c := range clients {
		select {
		case <-c.Done():
			goAways++
			t.Errorf("a tunnel ended: %v", c.Err())
		default:
		}
	}
	return goAways, broken
}

// strangerClient is a tunnel to catalog-1 from the machine outside.
func (l *lab) strangerClient(t *testing.T, b *identity.Bundle) *hbone.Client {
	c, err := l.pods["outside"].dial(netip.AddrPortFrom(l.pods["catalog-1"].v4, HBONEPort))
	check(t, err)
	tc := hbone.TLSClient(c, b.ClientTLS([]string{l.pods["catalog-1"].id.String()}))
	check(t, tc.Handshake())
	return hbone.NewClient(tc, hbone.ClientConfig{})
}

func shortStreams(t *testing.T, l *lab, n int) (goAways, broken int) {
	return manyStreams(t, l, n, func(i int, st *hbone.Stream) error {
		defer st.Close()
		var said, heard [8]byte
		binary.BigEndian.PutUint64(said[:], uint64(i))
		if _, err := st.Write(said[:]); err != nil {
			return err
		}
		if err := st.CloseWrite(); err != nil {
			return err
		}
		if _, err := io.ReadFull(st, heard[:]); err != nil || said != heard {
			return fmt.Errorf("said %x, heard %x: %w", said, heard, err)
		}
		if _, err := st.Read(heard[:]); err != io.EOF {
			return fmt.Errorf("no end after the answer: %w", err)
		}
		return nil
	})
}

func abortedClients(t *testing.T, l *lab, n int) (goAways, broken int) {
	said := make([]byte, 64<<10)
	return manyStreams(t, l, n, func(i int, st *hbone.Stream) error {
		defer st.Reset()
		if i%3 > 0 { // at once, or with an echo under way
			if _, err := st.Write(said); err != nil {
				return err
			}
		}
		if i%3 == 2 {
			_, err := io.ReadFull(st, make([]byte, 1000))
			return err
		}
		return nil
	})
}

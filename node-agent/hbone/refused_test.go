package hbone

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestFinishedStreamsDoNotCount: handlers that are slow to return after their stream has ended in order take
// no place from new streams; those of streams that the client reset do.
func TestFinishedStreamsDoNotCount(t *testing.T) {
	for name, tc := range map[string]struct {
		reset   bool
		refused bool
	}{"ended in order": {}, "reset": {reset: true, refused: true}} {
		t.Run(name, func(t *testing.T) {
			linger := make(chan struct{})
			var answered sync.WaitGroup
			c := tunnel(t, func(_ context.Context, s *ServerStream) {
				if st, err := s.Accept(); err == nil && !tc.reset {
					_ = st.CloseWrite()
					_, _ = io.ReadAll(st)
				}
				answered.Done()
				<-linger
			})
			defer close(linger)
			c.cfg.MaxStreams = 10 * ownMaxStreams
			n, refused := 0, false
			for ; n < 4*ownMaxStreams && !refused; n++ {
				answered.Add(1)
				st, _, err := c.Open(t.Context(), Request{Authority: "10.0.0.1:80"})
				var reset *ResetError
				if errors.As(err, &reset) && reset.Code == CodeRefusedStream {
					refused = true
					answered.Done()
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if tc.reset {
					st.Reset()
				} else {
					st.CloseWrite()
					if _, err := io.ReadAll(st); err != nil {
						t.Fatal(err)
					}
					st.Close()
				}
			}
			answered.Wait()
			if refused != tc.refused {
				t.Errorf("refused: %v, after %d streams", refused, n)
			}
			if refused && n > 2*ownMaxStreams {
				t.Errorf("%d handlers before the first refusal, at most %d may run", n, 2*ownMaxStreams)
			}
		})
	}
}

// refuser is a server that refuses the first streams of its connection and accepts the rest.
func refuser(nc net.Conn, refuse *atomic.Int32, at func()) {
	defer nc.Close()
	if _, err := io.ReadFull(nc, make([]byte, len(clientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(nc, nc)
	f.WriteSettings()
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	for {
		fr, err := f.ReadFrame()
		if err != nil {
			return
		}
		h, ok := fr.(*http2.HeadersFrame)
		if !ok {
			continue
		}
		at()
		if refuse.Add(-1) >= 0 {
			err = f.WriteRSTStream(h.StreamID, http2.ErrCodeRefusedStream)
		} else {
			buf.Reset()
			enc.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
			err = f.WriteHeaders(http2.HeadersFrameParam{StreamID: h.StreamID, EndHeaders: true, BlockFragment: buf.Bytes()})
		}
		if err != nil {
			return
		}
	}
}

// TestPoolPausesWhenStreamsAreRefused: the client asks again after 2 ms, 4 ms, 8 ms and so on, on the same
// connection, and gives up after refusedTries; another endpoint may then be tried.
func TestPoolPausesWhenStreamsAreRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		refuse int32
		open   bool
	}{"for a moment": {5, true}, "for good": {1000, false}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var refuse, dials atomic.Int32
				refuse.Store(tc.refuse)
				var mu sync.Mutex
				var asked []time.Time
				var wg sync.WaitGroup
				pool := NewPool(PoolConfig{Dial: func(context.Context, Key) (net.Conn, error) {
					dials.Add(1)
					a, b := net.Pipe()
					wg.Go(func() {
						refuser(b, &refuse, func() { mu.Lock(); asked = append(asked, time.Now()); mu.Unlock() })
					})
					return a, nil
				}})
				st, _, err := pool.Open(t.Context(), testKey, Request{Authority: "10.0.0.1:80"})
				if (err == nil) != tc.open {
					t.Errorf("opened: %v", err)
				}
				var oe *OpenError
				if err != nil && (!errors.As(err, &oe) || oe.Sent || !oe.Retryable()) {
					t.Errorf("%v does not say that another endpoint may be tried", err)
				}
				if want := min(int(tc.refuse), refusedTries) + 1; len(asked) != want {
					t.Errorf("asked %d times, want %d", len(asked), want)
				}
				for i := 1; i < len(asked); i++ {
					if pause := asked[i].Sub(asked[i-1]); pause != refusedWait<<(i-1) {
						t.Errorf("pause %d is %v, want %v", i, pause, refusedWait<<(i-1))
					}
				}
				if n := dials.Load(); n != 1 {
					t.Errorf("dialled %d times", n)
				}
				if st != nil {
					st.Close()
				}
				pool.Close()
				wg.Wait()
			})
		})
	}
}

// TestPauseEndsWithItsCaller: who is not there any more is not waited for.
func TestPauseEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refuse atomic.Int32
		refuse.Store(1000)
		var wg sync.WaitGroup
		pool := NewPool(PoolConfig{Dial: func(context.Context, Key) (net.Conn, error) {
			a, b := net.Pipe()
			wg.Go(func() { refuser(b, &refuse, func() {}) })
			return a, nil
		}})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		start := time.Now()
		if _, _, err := pool.Open(ctx, testKey, Request{Authority: "10.0.0.1:80"}); err == nil {
			t.Error("opened")
		}
		if d := time.Since(start); d != 20*time.Millisecond {
			t.Errorf("returned after %v", d)
		}
		pool.Close()
		wg.Wait()
	})
}

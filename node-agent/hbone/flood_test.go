package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/warrenmesh/warren/node-agent/hbone/attack"
)

func refuseAll(_ context.Context, s *ServerStream) { s.Reject(503) }

// source sends without end.
func source(_ context.Context, s *ServerStream) {
	st, err := s.Accept()
	for p := make([]byte, 1<<10); err == nil; {
		_, err = st.Write(p)
	}
}

func TestFloodsAreCut(t *testing.T) {
	hold := func(ctx context.Context, s *ServerStream) {
		if _, err := s.Accept(); err == nil {
			<-ctx.Done()
		}
	}
	slow := func(ctx context.Context, s *ServerStream) { <-ctx.Done(); s.Reject(503) }
	for _, k := range attack.Kinds() {
		if k.Held {
			continue
		}
		t.Run(k.Name, func(t *testing.T) {
			handler := hold
			switch k.Name {
			case "rapid reset", "made you reset":
				handler = slow
			case "windows of one byte":
				handler = source
			}
			a, b := tcpPair(t)
			end := make(chan error, 1)
			read := &counted{Conn: b}
			go func() { end <- Serve(context.Background(), read, ServerConfig{Handler: handler}) }()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			stop := make(chan struct{})
			defer time.AfterFunc(time.Minute, func() { close(stop) }).Stop()
			r := k.Run(a, attack.Addresses{Echo: "10.0.0.1:80"}, stop)
			runtime.ReadMemStats(&after)
			if !r.Ended {
				t.Errorf("%d frames and still connected", r.Frames)
			}
			err := <-end
			var ce *ConnError
			if !errors.As(err, &ce) || ce.Code != CodeEnhanceYourCalm && ce.Code != CodeFlowControl {
				t.Errorf("ended with %v", err)
			}
			t.Logf("cut after %d frames, %d KiB and %v: %v", r.Frames, read.n.Load()>>10, r.Took, err)
			if n := read.n.Load(); n > 2*discardMax { // whatever the attacker goes on to send
				t.Errorf("%d MiB were read of a peer that is to be cut", n>>20)
			}
			if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
				t.Errorf("heap grew by %d MiB", grown>>20)
			}
		})
	}
}

// counted is a connection that counts what is read.
type counted struct {
	net.Conn
	n atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n.Add(int64(n))
	return n, err
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

// A peer that opens its windows and takes nothing of what comes is given up, whatever signs of life it sends.
func TestPeerThatReadsNothingIsCut(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: waits ten seconds")
	}
	kinds := attack.Kinds()
	i := slices.IndexFunc(kinds, func(k attack.Kind) bool { return k.Name == "windows that are never used, with signs of life" })
	if i < 0 {
		t.Fatal("no such attack")
	}
	for name, byKernel := range map[string]bool{"by the kernel": true, "without it": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := tcpPair(t)
			handler := source
			if !byKernel {
				handler = func(ctx context.Context, s *ServerStream) {
					setUserTimeout(b, 0)
					source(ctx, s)
				}
			}
			end := make(chan error, 1)
			go func() { end <- Serve(context.Background(), b, ServerConfig{Handler: handler}) }()
			stop := make(chan struct{})
			defer time.AfterFunc(time.Minute, func() { close(stop) }).Stop()
			r := kinds[i].Run(a, attack.Addresses{Source: "10.0.0.1:80"}, stop)
			if err := <-end; !r.Ended || err == nil {
				t.Errorf("after %s: %v", r.Took, err)
			} else {
				t.Logf("cut after %s: %v", r.Took, err)
			}
		})
	}
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
	if d := time.Since(start); d > 3*handshakeWait {
		t.Errorf("after %v", d)
	}
	a.Close()
}

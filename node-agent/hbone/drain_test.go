package hbone

import (
	"context"
	"crypto/tls"
	"io"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// What a peer still says when a drained tunnel's GOAWAY has been sent is not answered by a reset, which would take what
// the peer has not read yet: it is read until the peer has closed.
func TestADrainedTunnelHearsThePeerOut(t *testing.T) {
	cfg := &tls.Config{Certificates: []tls.Certificate{testCert()}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
	for _, client := range []bool{true, false} {
		name := map[bool]string{true: "client", false: "server"}[client]
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			ours, peer := TLSServer(a, cfg), tls.Client(b, cfg)
			if client {
				ours, peer = TLSClient(a, cfg), tls.Server(b, cfg)
			}
			go peer.Handshake()
			if err := ours.Handshake(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if client {
				c := NewClient(ours, ClientConfig{})
				io.ReadFull(peer, make([]byte, len(clientPreface)))
				c.Drain()
				close(ended)
			} else {
				go func() {
					defer close(ended)
					if err := Serve(ctx, ours, ServerConfig{Handler: echo}); err != nil {
						t.Error(err)
					}
				}()
				io.WriteString(peer, clientPreface)
				cancel()
			}
			f := http2.NewFramer(peer, peer)
			if err := f.WriteSettings(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * closeGrace) // by then all has been sent
			for range 3 {
				if err := f.WritePing(false, [8]byte{}); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Millisecond)
			}
			away := false
			for {
				h, err := f.ReadFrame()
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				_, is := h.(*http2.GoAwayFrame)
				away = away || is
			}
			if !away {
				t.Error("no GOAWAY")
			}
			peer.Close()
			<-ended
		})
	}
}

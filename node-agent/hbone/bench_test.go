package hbone

import (
	"crypto/tls"
	"io"
	"net"
	"testing"
)

// The benchmarks run client ↔ agent ↔ agent ↔ server in one process over loopback, so that their figures are
// the CPU of all four; "direct" is client ↔ server alone.

func benchPairs(b *testing.B) map[string]func(b *testing.B) (net.Conn, net.Conn) {
	return map[string]func(b *testing.B) (net.Conn, net.Conn){
		"direct": func(b *testing.B) (net.Conn, net.Conn) { return tcpPair(b) },
		"tls": func(b *testing.B) (net.Conn, net.Conn) { // the same hops with one TLS connection a stream
			app1, in := tcpPair(b)
			out, app2 := tcpPair(b)
			x, y := tlsPair(b)
			go relayAny(in, struct{ net.Conn }{x}, new(RelayStats))
			go relayAny(struct{ net.Conn }{y}, out, new(RelayStats))
			b.Cleanup(func() { x.(*tls.Conn).Close(); y.(*tls.Conn).Close() })
			return app1, app2
		},
		"hbone": func(b *testing.B) (net.Conn, net.Conn) {
			accepted := make(chan *net.TCPConn, 1)
			results := make(chan error, 2)
			c := tunnel(b, relayServer(b, accepted, results))
			app1, app2 := relayed(b, c, accepted, results)
			return app1, app2
		},
	}
}

func BenchmarkRR(b *testing.B) {
	for name, pair := range benchPairs(b) {
		b.Run(name, func(b *testing.B) {
			x, y := pair(b)
			go func() {
				p := make([]byte, 1)
				for {
					if _, err := y.Read(p); err != nil {
						return
					}
					if _, err := y.Write(p); err != nil {
						return
					}
				}
			}()
			p := make([]byte, 1)
			b.ReportAllocs()
			for b.Loop() {
				x.Write(p)
				if _, err := x.Read(p); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			x.Close()
			y.Close()
		})
	}
}

func BenchmarkBulk(b *testing.B) {
	for name, pair := range benchPairs(b) {
		b.Run(name, func(b *testing.B) {
			x, y := pair(b)
			done := make(chan struct{})
			go func() {
				defer close(done)
				p := make([]byte, 256<<10)
				n := 0
				for n < b.N<<20 {
					k, err := y.Read(p)
					if err != nil {
						b.Error(err)
						return
					}
					n += k
				}
			}()
			p := make([]byte, 1<<20)
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if _, err := x.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			<-done
			b.StopTimer()
			x.Close()
			y.Close()
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	c := tunnel(b, echo)
	b.ReportAllocs()
	for b.Loop() {
		st, _, err := c.Open(b.Context(), Request{Authority: "10.0.0.1:80", Header: Header{{HeaderForwarded, `for="10.0.0.2:41000"`}}})
		if err != nil {
			b.Fatal(err)
		}
		st.CloseWrite()
		io.Copy(io.Discard, struct{ io.Reader }{st})
		st.Close()
	}
}

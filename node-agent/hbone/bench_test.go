package hbone

import (
	"crypto/tls"
	"io"
	"net"
	"syscall"
	"testing"
)

// The benchmarks run client ↔ agent ↔ agent ↔ server in one process over loopback, so that their figures are
// the CPU of all four; "direct" is client ↔ server alone.

func benchPairs(b *testing.B) map[string]func(b *testing.B) (net.Conn, net.Conn) {
	return map[string]func(b *testing.B) (net.Conn, net.Conn){
		"direct": func(b *testing.B) (net.Conn, net.Conn) { return tcpPair(b) },
		"splice": func(b *testing.B) (net.Conn, net.Conn) { // two hops that copy in the kernel and encrypt nothing
			app1, in := tcpPair(b)
			x, y := tcpPair(b)
			out, app2 := tcpPair(b)
			for _, c := range [][2]*net.TCPConn{{in, x}, {x, in}, {y, out}, {out, y}} {
				go func() { // ends with its connections
					_, _ = io.Copy(c[1], c[0])
					_ = c[1].CloseWrite()
				}()
			}
			return app1, app2
		},
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
			began := cpuSeconds(b)
			b.ResetTimer()
			for range b.N {
				if _, err := x.Write(p); err != nil {
					b.Fatal(err)
				}
			}
			<-done
			b.StopTimer()
			reportCPU(b, began, 1<<20)
			x.Close()
			y.Close()
		})
	}
}

// BenchmarkCipher encrypts and decrypts: what the bytes of bulk cost by themselves.
func BenchmarkCipher(b *testing.B) {
	secret := make([]byte, 32)
	out, err := newHalf(tls.TLS_AES_128_GCM_SHA256, secret)
	if err != nil {
		b.Fatal(err)
	}
	in, err := newHalf(tls.TLS_AES_128_GCM_SHA256, secret)
	if err != nil {
		b.Fatal(err)
	}
	p := make([]byte, maxPlaintext+1)
	var sealed, opened []byte
	b.SetBytes(maxPlaintext)
	began := cpuSeconds(b)
	for b.Loop() {
		sealed = out.seal(sealed[:0], p[:maxPlaintext], typeApplication)
		if opened, _, err = in.open(opened[:0], sealed); err != nil {
			b.Fatal(err)
		}
	}
	reportCPU(b, began, maxPlaintext)
}

// cpuSeconds is what this process has used.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// reportCPU holds on a busy machine, where the rate does not.
func reportCPU(b *testing.B, began float64, size int) {
	b.ReportMetric(1e12*(cpuSeconds(b)-began)/(float64(b.N)*float64(size)), "cpu-ms/GB")
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

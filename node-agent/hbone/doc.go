// Package hbone is the tunnel between node agents: TCP connections as HTTP/2 CONNECT streams over mutual
// TLS, as Istio's ztunnel and Envoy speak it.
//
// It owns the HTTP/2 codec ([Serve], [NewClient]), the pool of outbound tunnel connections ([Pool]), the
// copying between a stream and an application's socket ([Relay]) and the headers that travel with a CONNECT
// ([Baggage], [Forwarded]). It works on connections whose TLS handshake the caller has done; it must not
// know certificates, policies, workloads or where a connection ought to go.
//
// A few threads ([Loops]) wait for the sockets, a tunnel's and those of the applications behind it on the same one:
//
//	app sockets ──read──▶ frames ──▶ out buffer ──▶ TLS ──▶ peer              (one write for all that was ready)
//	peer ──▶ TLS ──▶ frames ──▶ non-blocking write ──▶ app sockets             (only what an app does not
//	                                                                            take at once is buffered)
//
// Go's own poller would wake up for each socket a goroutine, and often a thread to look for more work. A connection
// that is no socket is read by a goroutine; who writes to a stream otherwise than through Relay sends in his own.
//
// After the handshake, which stays crypto/tls's, the codec protects records itself ([TLSClient], [TLSServer]): payload
// is encrypted out of the buffer that it was read into and decrypted into the one that it is written from, many records
// to a system call. Where that cannot be (FIPS 140, ChaCha20) crypto/tls goes on.
//
// A stream that [RelaySocket] has costs no goroutine, and no buffer while nothing is in flight. A loop never waits for anything
// but sockets, and no socket keeps it for more than a buffer's worth: what a slow application leaves behind is bounded by
// its stream's window, and the connection's window is returned on receipt, so that one stalled stream does not stall its
// neighbours.
package hbone

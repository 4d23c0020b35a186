// Package hbone is the tunnel between node agents: TCP connections as HTTP/2 CONNECT streams over mutual
// TLS, as Istio's ztunnel and Envoy speak it.
//
// It owns the HTTP/2 codec ([Serve], [NewClient]), the pool of outbound tunnel connections ([Pool]), the
// copying between a stream and an application's socket ([Relay]) and the headers that travel with a CONNECT
// ([Baggage], [Forwarded]). It works on connections whose TLS handshake the caller has done; it must not
// know certificates, policies, workloads or where a connection ought to go.
//
// One tunnel connection is read by one goroutine and written by whichever goroutine has something to send:
//
//	app socket ──read──▶ Relay ──Stream.Write──▶ out buffer ──▶ TLS ──▶ peer   (the writer that finds the
//	                                                                            connection idle sends inline)
//	peer ──▶ TLS ──▶ read loop ──▶ frames ──▶ non-blocking write ──▶ app socket (only what the app does not
//	                                                                            take at once is buffered)
//
// After the handshake, which stays crypto/tls's, the codec protects records itself ([TLSClient], [TLSServer]): payload
// is encrypted out of the buffer that it was read into and decrypted into the one that it is written from, many records
// to a system call. Where that cannot be (FIPS 140, ChaCha20) crypto/tls goes on.
//
// A stream costs one goroutine, the caller's, and no buffer while nothing is in flight. The read loop never
// blocks: what a slow application leaves behind is bounded by its stream's window, and the connection's
// window is returned on receipt, so that one stalled stream does not stall its neighbours.
package hbone

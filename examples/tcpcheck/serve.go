package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// ends remembers how connections ended, by the id that their client gave.
type ends struct {
	mu sync.Mutex
	by map[string]string
}

func serve(ctx context.Context, _ []string) error {
	e := &ends{by: map[string]string{}}
	failed := make(chan error, 16)
	for port, handle := range map[int]func(*net.TCPConn){
		portEcho: echo, portGreet: greet, portReset: reset, portDigest: digest, portSource: source,
		portEnds: e.serve, portStall: func(c *net.TCPConn) { time.Sleep(2 * time.Second); digest(c) },
	} {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, handle) }()
	}
	datagrams, err := net.ListenUDP("udp", &net.UDPAddr{Port: portEcho})
	if err != nil {
		return err
	}
	go func() { failed <- answer(datagrams) }()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /ends", func(w http.ResponseWriter, _ *http.Request) {
		e.mu.Lock()
		defer e.mu.Unlock()
		_ = json.NewEncoder(w).Encode(e.by) // the client went away
	})
	mux.HandleFunc("GET /headers", func(w http.ResponseWriter, r *http.Request) { _ = r.Header.Write(w) })
	go func() { failed <- http.ListenAndServe(fmt.Sprintf(":%d", portHTTP), mux) }()
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", portGRPC))
	if err != nil {
		return err
	}
	g := grpc.NewServer()
	healthpb.RegisterHealthServer(g, health.NewServer())
	go func() { failed <- g.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// Endpoints are taken out of Services while this runs; who was told late still finds a server.
	select {
	case err := <-failed:
		return err
	case <-time.After(linger()):
		return nil
	}
}

// linger is how long to serve on after SIGTERM: LINGER, or one second.
func linger() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("LINGER")); err == nil {
		return d
	}
	return time.Second
}

func accept(l net.Listener, handle func(*net.TCPConn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			handle(c.(*net.TCPConn))
		}()
	}
}

func hostname() string {
	h, err := os.Hostname()
	if err != nil {
		return "?"
	}
	return h
}

func echo(c *net.TCPConn) {
	var one [1]byte
	if _, err := io.ReadFull(c, one[:]); err != nil {
		return
	}
	if _, err := fmt.Fprintf(c, "peer=%s local=%s name=%s marker=%s\n", c.RemoteAddr(), c.LocalAddr(), hostname(), marker); err != nil {
		return
	}
	if _, err := c.Write(one[:]); err != nil {
		return
	}
	// Between two sockets io.Copy has a pipe, which is two descriptors more for each connection.
	if _, err := io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 4<<10)); err == nil {
		c.CloseWrite()
	}
}

func greet(c *net.TCPConn) {
	if _, err := fmt.Fprintf(c, "220 hello peer=%s\r\n", c.RemoteAddr()); err != nil {
		return
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	fmt.Fprintf(c, "250 %s\r\n", strings.TrimSpace(line))
}

func reset(c *net.TCPConn) {
	var one [1]byte
	if _, err := io.ReadFull(c, one[:]); err != nil {
		return
	}
	c.SetLinger(0)
}

func digest(c *net.TCPConn) {
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err != nil {
		return
	}
	fmt.Fprintf(c, "%d %x\n", n, h.Sum(nil))
}

func source(c *net.TCPConn) {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	n, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		return
	}
	h := sha256.New()
	if _, err := io.Copy(c, io.TeeReader(random(n), h)); err != nil {
		return
	}
	c.Write(h.Sum(nil))
}

// random is n bytes that no compression or zeroed buffer explains.
func random(n int64) io.Reader {
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(rand.Uint32())
	}
	return io.LimitReader(rand.NewChaCha8(seed), n)
}

func (e *ends) serve(c *net.TCPConn) {
	r := bufio.NewReader(c)
	id, err := r.ReadString('\n')
	if err != nil {
		return
	}
	if _, err := io.WriteString(c, "noted\n"); err != nil {
		return
	}
	how := "fin"
	if _, err := io.Copy(io.Discard, r); errors.Is(err, syscall.ECONNRESET) {
		how = "reset"
	} else if err != nil {
		how = err.Error()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.by[strings.TrimSpace(id)] = how
}

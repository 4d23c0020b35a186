package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// bodySize is what an HTTP answer holds.
const bodySize = 1024

// The first byte of a connection to the TCP port says what it is for.
const (
	kindEcho   = 'e' // every byte comes back, this one too
	kindSink   = 's' // takes bytes until the client has no more, then says how many in 8 bytes
	kindSource = 'f' // 8 bytes say for how many ns it gives bytes
)

const chunk = 128 << 10

// serve runs both servers until ctx ends.
func serve(ctx context.Context, httpAddr, tcpAddr string) error {
	web, err := net.Listen("tcp", httpAddr)
	if err != nil {
		return err
	}
	raw, err := net.Listen("tcp", tcpAddr)
	if err != nil {
		web.Close()
		return err
	}
	body := []byte(strings.Repeat("w", bodySize))
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = []string{"text/plain"}
		_, _ = w.Write(body) // fails when the client has gone
	})}
	var wg sync.WaitGroup
	defer wg.Wait()
	failed := make(chan error, 2)
	wg.Go(func() { failed <- s.Serve(web) })
	wg.Go(func() { failed <- serveTCP(raw) })
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	return errors.Join(err, s.Close(), raw.Close())
}

func serveTCP(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil { // no descriptor left
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go func() { // ends with its client: a process of this kind ends without waiting
			defer c.Close()
			first := make([]byte, 1)
			if _, err := io.ReadFull(c, first); err != nil {
				return
			}
			switch first[0] {
			case kindEcho:
				echo(c)
			case kindSink:
				sink(c)
			case kindSource:
				source(c)
			}
		}()
	}
}

// echo gives bytes back. A connection that goes on after a second byte gets a thread that waits in the kernel, as
// its client does; the many that do nothing stay with the runtime.
func echo(c net.Conn) {
	b := []byte{kindEcho}
	for range 2 {
		if _, err := c.Write(b); err != nil {
			return
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
	}
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		return
	}
	defer f.Close()
	fd := int(f.Fd())
	if unix.SetNonblock(fd, false) != nil {
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s := socket{fd}
	for s.write(b) == nil {
		if _, err := s.read(b); err != nil {
			return
		}
	}
}

func sink(c net.Conn) {
	var n uint64
	b := make([]byte, chunk)
	for {
		m, err := c.Read(b)
		n += uint64(m)
		if err == io.EOF {
			break
		}
		if err != nil {
			return
		}
	}
	_, _ = c.Write(binary.BigEndian.AppendUint64(nil, n))
}

func source(c net.Conn) {
	var d [8]byte
	if _, err := io.ReadFull(c, d[:]); err != nil {
		return
	}
	b := make([]byte, chunk)
	for end := time.Now().Add(time.Duration(binary.BigEndian.Uint64(d[:]))); time.Now().Before(end); {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// dialTCP opens a connection of a kind.
func dialTCP(j job, first ...byte) (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", j.addr, j.timeout)
	if err != nil {
		return nil, err
	}
	if _, err := c.Write(first); err != nil {
		c.Close()
		return nil, err
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("%s is not TCP", j.addr)
	}
	return t, nil
}

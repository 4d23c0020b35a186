package datapath

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/results"
)

var long = flag.Bool("long", false, "the semantics suite at its full size")

// sides are the two sockets of a direct connection, as an application has them: blocking descriptors.
type sides struct{ client, server int }

// sides makes one. first does what a client may have to do before it connects.
func (l *lab) sides(dst netip.AddrPort, ln int) sides {
	l.t.Helper()
	var s sides
	check(l.t, l.ui.as(func() (err error) {
		family := unix.AF_INET
		if dst.Addr().Is6() {
			family = unix.AF_INET6
		}
		if s.client, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(s.client, sockaddr(dst))
	}))
	var err error
	s.server, _, err = unix.Accept4(ln, unix.SOCK_CLOEXEC)
	check(l.t, err)
	for _, fd := range []int{s.client, s.server} {
		tv := unix.NsecToTimeval(int64(plenty))
		check(l.t, errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)))
	}
	return s
}

func (s sides) close() { unix.Close(s.client); unix.Close(s.server) }

// listener listens in the catalog, for both families.
func (l *lab) listener(port int) int {
	l.t.Helper()
	var ln int
	check(l.t, l.cat.as(func() (err error) {
		if ln, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return errors.Join(unix.SetsockoptInt(ln, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0), unix.Bind(ln, &unix.SockaddrInet6{Port: port}), unix.Listen(ln, 4096))
	}))
	l.t.Cleanup(func() { unix.Close(ln) })
	return ln
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

func readAll(fd int) ([]byte, error) {
	var out []byte
	b := make([]byte, 1<<16)
	for {
		n, err := unix.Read(fd, b)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return out, err
		case n == 0:
			return out, nil
		default:
			out = append(out, b[:n]...)
		}
	}
}

// readFull reads len(b) bytes with MSG_WAITALL: in one call, or in more where a signal of the Go runtime ends one, which
// the kernel does not take up again on a socket with a timeout (signal(7)).
func readFull(fd int, b []byte) error {
	for have := 0; have < len(b); {
		n, _, err := unix.Recvfrom(fd, b[have:], unix.MSG_WAITALL)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		default:
			have += n
		}
	}
	return nil
}

// hangUp closes a socket but not its descriptor, which somebody else would get.
func hangUp(fd int) error {
	nul, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	return errors.Join(err, unix.Dup3(nul, fd, unix.O_CLOEXEC), unix.Close(nul))
}

// abort makes a reset of the next close.
func abort(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

func want(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{7}).Read(b)
	return b
}

// semantics are what applications rely on between two ends of a TCP connection.
var semantics = []struct {
	name  string
	times int
	check func(s sides) error
}{
	{"half-close", 100, func(s sides) error {
		data := random(200_000)
		done := make(chan error, 1)
		go func() {
			got, err := readAll(s.server)
			if err == nil && !bytes.Equal(got, data) {
				err = fmt.Errorf("the server has %d other bytes", len(got))
			}
			done <- errors.Join(err, writeAll(s.server, data), unix.Shutdown(s.server, unix.SHUT_WR))
		}()
		if err := errors.Join(writeAll(s.client, data), unix.Shutdown(s.client, unix.SHUT_WR)); err != nil {
			return err
		}
		got, err := readAll(s.client)
		return errors.Join(err, <-done, want(bytes.Equal(got, data), "after its half-close the client has %d other bytes", len(got)))
	}},
	{"RST by the client", 50, func(s sides) error {
		if err := errors.Join(abort(s.client), hangUp(s.client)); err != nil {
			return err
		}
		_, err := readAll(s.server)
		return want(errors.Is(err, unix.ECONNRESET), "the server reads %v, not a reset", err)
	}},
	{"unread data at close is a reset", 50, func(s sides) error {
		if err := writeAll(s.client, random(10_000)); err != nil {
			return err
		}
		if err := await(s.server, unix.POLLIN); err != nil {
			return err
		}
		if err := hangUp(s.server); err != nil {
			return err
		}
		_, err := readAll(s.client)
		return want(errors.Is(err, unix.ECONNRESET), "the client reads %v, not a reset", err)
	}},
	{"sendfile", 10, func(s sides) error {
		data := random(4 << 20)
		f, err := unix.MemfdCreate("file", unix.MFD_CLOEXEC)
		if err != nil {
			return err
		}
		defer unix.Close(f)
		if err := writeAll(f, data); err != nil {
			return err
		}
		done := make(chan error, 1)
		go func() {
			got, err := readAll(s.server)
			done <- errors.Join(err, want(bytes.Equal(got, data), "%d other bytes", len(got)))
		}()
		for off := int64(0); off < int64(len(data)); {
			if _, err := unix.Sendfile(s.client, f, &off, len(data)-int(off)); err != nil && err != unix.EINTR {
				return err
			}
		}
		return errors.Join(unix.Shutdown(s.client, unix.SHUT_WR), <-done)
	}},
	{"splice", 10, func(s sides) error {
		data := random(4 << 20)
		sent := make(chan error, 1)
		go func() { sent <- errors.Join(writeAll(s.client, data), unix.Shutdown(s.client, unix.SHUT_WR)) }()
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return err
		}
		defer unix.Close(p[0])
		defer unix.Close(p[1])
		var got []byte
		for calls := 0; ; calls++ {
			n, err := unix.Splice(s.server, nil, p[1], nil, 1<<16, unix.SPLICE_F_MOVE)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return err
			}
			if n == 0 {
				break
			}
			b := make([]byte, n)
			if err := want(calls < len(data), "splice makes no headway"); err != nil {
				return err
			}
			for have := 0; have < len(b); {
				k, err := unix.Read(p[0], b[have:])
				if err != nil {
					return err
				}
				have += k
			}
			got = append(got, b...)
		}
		return errors.Join(<-sent, want(bytes.Equal(got, data), "%d other bytes", len(got)))
	}},
	{"MSG_PEEK", 50, func(s sides) error {
		data := random(100)
		if err := errors.Join(writeAll(s.client, data), await(s.server, unix.POLLIN)); err != nil {
			return err
		}
		peeked, read := make([]byte, 200), make([]byte, 200)
		n, _, e1 := unix.Recvfrom(s.server, peeked, unix.MSG_PEEK)
		m, _, e2 := unix.Recvfrom(s.server, read, 0)
		return errors.Join(e1, e2, want(bytes.Equal(peeked[:n], data) && bytes.Equal(read[:m], data), "peeked %d bytes, then read %d", n, m))
	}},
	{"MSG_WAITALL", 20, func(s sides) error {
		data := random(50_000)
		sent := make(chan error, 1)
		go func() {
			var err error
			for part := range 50 {
				err = errors.Join(err, writeAll(s.client, data[part*1000:part*1000+1000]))
			}
			sent <- err
		}()
		got := make([]byte, len(data))
		err := readFull(s.server, got)
		return errors.Join(err, <-sent, want(bytes.Equal(got, data), "other bytes"))
	}},
	{"SO_RCVLOWAT", 10, func(s sides) error {
		if err := errors.Join(unix.SetsockoptInt(s.server, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 100), writeAll(s.client, random(50))); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
		early, err := unix.Poll([]unix.PollFd{{Fd: int32(s.server), Events: unix.POLLIN}}, 0)
		if err := errors.Join(err, want(early == 0, "readable with half of SO_RCVLOWAT"), writeAll(s.client, random(50))); err != nil {
			return err
		}
		return await(s.server, unix.POLLIN)
	}},
	{"back-pressure of a stalled reader", 5, func(s sides) error {
		if err := unix.SetNonblock(s.client, true); err != nil {
			return err
		}
		data, sent := random(1<<16), sha256.New()
		n := 0
		for idle := 0; idle < 20; { // until nothing is taken for 200 ms
			k, err := unix.Write(s.client, data)
			switch {
			case err == unix.EAGAIN:
				idle++
				time.Sleep(10 * time.Millisecond)
			case err != nil:
				return err
			default:
				sent.Write(data[:k])
				n += k
				idle = 0
			}
			if n > 256<<20 {
				return errors.New("256 MiB were taken that nobody has read")
			}
		}
		if err := errors.Join(unix.SetNonblock(s.client, false), unix.Shutdown(s.client, unix.SHUT_WR)); err != nil {
			return err
		}
		got, err := readAll(s.server)
		sum := sha256.Sum256(got)
		return errors.Join(err, want(len(got) == n && bytes.Equal(sum[:], sent.Sum(nil)), "%d bytes of %d, or others", len(got), n))
	}},
}

func await(fd int, events int16) error {
	p := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Poll(p, int(plenty.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		return errors.Join(err, want(n == 1, "not readable in %v", plenty))
	}
}

// What passes between two pods by the short way is TCP, in all that an application can notice.
func TestSemanticsOfTheShortWay(t *testing.T) {
	l := near(t)
	ln := l.listener(7100)
	for _, c := range semantics {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			times := c.times
			if !*long {
				times = max(1, times/10)
			}
			failed := 0
			l.counted(map[string]int{"near_redirected": 2 * times}, func() {
				for _, dst := range l.cat.addrs(7100) {
					for range times {
						s := l.sides(dst, ln)
						if err := c.check(s); err != nil {
							failed++
							t.Errorf("%s: %v", dst.Addr(), err)
						}
						s.close()
					}
				}
			})
			l.recordSemantics(c.name, 2*times, failed, float64(2*times-failed), "connections as they should be")
		})
	}
}

func (l *lab) recordSemantics(name string, inputs, failures int, figure float64, unit string) {
	l.t.Helper()
	if !*long {
		return
	}
	check(l.t, results.Record("tcp-semantics", results.Row{Name: "same node, redirected: " + name, Inputs: inputs, Failures: failures, Figure: figure, Unit: unit}))
}

// A lot of data, both ways at once, is the same at the other end; meanwhile the node's stack sees nothing.
func TestBulkByTheShortWay(t *testing.T) {
	l := near(t)
	size := int64(32 << 20)
	if *long {
		size = 1 << 30
	} else if testing.Short() {
		size = 1 << 20
	}
	var ln net.Listener
	check(t, l.cat.as(func() (err error) { ln, err = net.Listen("tcp", ":7200"); return err }))
	defer ln.Close()
	l.whole(l.cat.addrs(appPort)[0])
	c, err := l.ui.dial(l.cat.addrs(7200)[0])
	check(t, err)
	defer c.Close()
	s, err := ln.Accept()
	check(t, err)
	defer s.Close()
	before := l.forwarded()
	start := time.Now()
	type sum struct {
		hash []byte
		n    int64
		err  error
	}
	sums := make(chan sum, 4)
	for i, pair := range [][2]net.Conn{{c, s}, {s, c}} {
		seed := [32]byte{byte(i)}
		go func() {
			h := sha256.New()
			n, err := io.Copy(io.MultiWriter(h, pair[0]), io.LimitReader(rand.NewChaCha8(seed), size))
			pair[0].(*net.TCPConn).CloseWrite()
			sums <- sum{h.Sum(nil), n, err}
		}()
		go func() {
			h := sha256.New()
			n, err := io.Copy(h, pair[1])
			sums <- sum{h.Sum(nil), n, err}
		}()
	}
	seen := map[string]int{}
	for range 4 {
		x := <-sums
		if x.err != nil || x.n != size {
			t.Errorf("%d of %d bytes: %v", x.n, size, x.err)
		}
		seen[string(x.hash)]++
	}
	failed := 0
	if len(seen) != 2 {
		t.Errorf("%d different sums of two streams", len(seen))
		failed = 1
	}
	if n := l.forwarded() - before; n != 0 {
		t.Errorf("the node's stack passed on %d packets", n)
	}
	l.recordSemantics(fmt.Sprintf("%d MiB each way at once, SHA-256", size>>20), 2, failed, float64(2*size)*8/1e9/time.Since(start).Seconds(), "Gbit/s with the checksums")
}

// track has the node track connections, as kube-proxy's rules do.
func (l *lab) track() bool {
	l.t.Helper()
	return l.node.Do(func() error {
		return nft("table inet kube-proxy { chain f { type filter hook forward priority 0; ct state invalid counter drop; }; chain n { type nat hook prerouting priority dstnat; }; }")
	}) == nil
}

func (l *lab) tracked() (n int) {
	l.t.Helper()
	check(l.t, l.node.Do(func() error {
		b, err := os.ReadFile(filepath.Join("/proc/sys/net/netfilter/nf_conntrack_count"))
		if err != nil {
			return err
		}
		n, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err
	}))
	return n
}

// The node's connection tracker holds nothing of connections that it sees nothing of.
func TestShortConnectionsLeaveNoTrace(t *testing.T) {
	l := near(t)
	if !l.track() {
		t.Skip("the node's connections cannot be tracked")
	}
	count := 1000
	if *long {
		count = 10_000
	} else if testing.Short() {
		count = 100
	}
	ln := l.listener(7300)
	go func() {
		for {
			fd, _, err := unix.Accept4(ln, unix.SOCK_CLOEXEC)
			if err != nil {
				return
			}
			b := make([]byte, 1)
			unix.Read(fd, b)
			unix.Write(fd, b)
			unix.Close(fd)
		}
	}()
	defer unix.Shutdown(ln, unix.SHUT_RD)
	failed, before := 0, l.tracked()
	start := time.Now()
	l.counted(map[string]int{"near_redirected": count, "ticket_used": count}, func() {
		check(t, l.ui.as(func() error {
			for range count {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				if err = unix.Connect(fd, sockaddr(l.cat.addrs(7300)[0])); err == nil {
					err = writeAll(fd, []byte{7})
				}
				got, e := readAll(fd)
				if err := errors.Join(err, e, want(len(got) == 1, "%d bytes", len(got))); err != nil {
					failed++
					t.Log(err)
				}
				unix.Close(fd)
			}
			return nil
		}))
	})
	took := time.Since(start)
	eventually(t, "all is closed", func() bool { return len(must(l.dp.directs())) == 0 })
	left := l.tracked() - before
	if left != 0 {
		t.Errorf("the connection tracker holds %d entries more than before", left)
	}
	if failed > 0 {
		t.Errorf("%d connections failed", failed)
	}
	l.recordSemantics("short connections", count, failed, float64(count)/took.Seconds(), "connections/s")
	l.recordSemantics("entries left in the connection tracker after them", count, left, float64(left), "entries")
}

// Bytes are counted to the last one, whatever end a connection comes to.
func TestBytesAreExact(t *testing.T) {
	l := near(t)
	ln := l.listener(7400)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan Event, 1000)
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for e, err := range l.dp.Events(ctx) {
			if err == nil && e.Kind == Closed {
				ended <- e
			}
		}
	}()
	defer func() { cancel(); <-stopped }()
	shut := func(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) }
	for _, c := range []struct {
		name string
		end  func(s sides) error // what comes before both are closed, the client first
	}{
		{"the client closes", func(s sides) error {
			hangUp(s.client)
			_, err := readAll(s.server)
			return err
		}},
		{"the server closes, the client later", func(s sides) error {
			hangUp(s.server)
			_, err := readAll(s.client)
			time.Sleep(20 * time.Millisecond)
			return err
		}},
		{"half-close by the client", func(s sides) error {
			err := shut(s.client)
			_, e := readAll(s.server)
			return errors.Join(err, e, shut(s.server))
		}},
		{"half-close by the server", func(s sides) error {
			err := shut(s.server)
			_, e := readAll(s.client)
			return errors.Join(err, e, shut(s.client))
		}},
		{"both at once", func(s sides) error { return errors.Join(shut(s.client), shut(s.server)) }},
		{"reset by the client", func(s sides) error {
			err := abort(s.client)
			hangUp(s.client)
			readAll(s.server)
			return err
		}},
		{"reset by the server", func(s sides) error {
			err := abort(s.server)
			hangUp(s.server)
			readAll(s.client)
			return err
		}},
		{"half-close by the client, then reset by the server", func(s sides) error {
			err := shut(s.client)
			_, e := readAll(s.server)
			return errors.Join(err, e, abort(s.server))
		}},
		{"half-close by the server, then reset by the client", func(s sides) error {
			err := shut(s.server)
			_, e := readAll(s.client)
			err = errors.Join(err, e, abort(s.client))
			hangUp(s.client)
			return err
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			failed, tried := 0, 0
			for _, n := range [][2]int{{0, 0}, {1, 0}, {0, 1}, {3, 5}, {1000, 70_000}, {300_000, 1}} {
				tried++
				s := l.sides(l.cat.addrs(7400)[tried%2], ln)
				moved := make(chan error, 2)
				for i, pair := range [][2]int{{s.client, s.server}, {s.server, s.client}} {
					go func() { // sent, read, and acknowledged
						err := writeAll(pair[0], make([]byte, n[i]))
						for err == nil {
							var left int
							if left, err = unix.IoctlGetInt(pair[0], unix.SIOCOUTQ); left == 0 {
								break
							}
							time.Sleep(time.Millisecond)
						}
						moved <- err
					}()
				}
				for i, fd := range []int{s.server, s.client} {
					check(t, readFull(fd, make([]byte, n[i])))
				}
				check(t, errors.Join(<-moved, <-moved))
				if err := c.end(s); err != nil {
					t.Error(err)
				}
				s.close()
				select {
				case e := <-ended:
					if e.Sent != uint64(n[0]) || e.Received != uint64(n[1]) {
						failed++
						t.Errorf("%d bytes sent and %d received are told as %d and %d", n[0], n[1], e.Sent, e.Received)
					}
				case <-time.After(plenty):
					t.Fatal("no end is told")
				}
			}
			l.recordSemantics("bytes told, "+c.name, tried, failed, float64(tried-failed), "connections counted to the byte")
		})
	}
}

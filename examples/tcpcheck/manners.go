package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// finding is one check's outcome. Saw is what the client noticed, in words that can be compared between runs.
type finding struct {
	Name string
	OK   bool
	Saw  string
	MS   int64
}

// peer is the host whose servers are checked.
type peer struct {
	host string
	size int64 // of the big transfers
}

func (p peer) at(port int) string { return net.JoinHostPort(p.host, strconv.Itoa(port)) }

func manners(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("manners", flag.ContinueOnError)
	size := fs.Int64("bytes", 32<<20, "size of the big transfers")
	if err := fs.Parse(args); err != nil {
		return err
	}
	p := peer{fs.Arg(0), *size}
	var all []finding
	for _, c := range []struct {
		name string
		run  func(peer, context.Context) (string, error)
	}{
		{"plain exchange", dialled(nil)},
		{"server speaks first", peer.greeted},
		{"client closes its half", peer.halfClosed},
		{"server closes its half", peer.sourced},
		{"server resets", peer.wasReset},
		{"client resets", func(p peer, ctx context.Context) (string, error) { return p.ended(ctx, "reset") }},
		{"client closes", func(p peer, ctx context.Context) (string, error) { return p.ended(ctx, "fin") }},
		{"port without a listener", peer.refused},
		{"keepalive on an idle connection", peer.idle},
		{"big transfer up", func(p peer, ctx context.Context) (string, error) { return p.digested(ctx, portDigest) }},
		{"big transfer to a reader that stalls", func(p peer, ctx context.Context) (string, error) { return p.digested(ctx, portStall) }},
		{"bound to address and port", peer.bound},
		{"bound to a device", dialled(func(d *net.Dialer) { d.Control = sockopt(unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0") })},
		{"multipath TCP", dialled(func(d *net.Dialer) { d.SetMultipathTCP(true) })},
		{"fast open by connect", dialled(func(d *net.Dialer) { d.Control = sockopt(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1) })},
		{"fast open by sendto", peer.fastOpen},
		{"blocking connect", func(p peer, _ context.Context) (string, error) { return p.raw(false, false) }},
		{"IPv4 mapped into IPv6", func(p peer, _ context.Context) (string, error) { return p.raw(true, false) }},
		{"no delay and no port until connect", dialled(func(d *net.Dialer) { d.Control = sockopt(unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1) })},
	} {
		if c.name == "IPv4 mapped into IPv6" && strings.Contains(p.host, ":") {
			continue
		}
		one, cancel := context.WithTimeout(ctx, 30*time.Second)
		start := time.Now()
		saw, err := c.run(p, one)
		cancel()
		f := finding{Name: c.name, OK: err == nil, Saw: saw, MS: time.Since(start).Milliseconds()}
		if err != nil {
			f.Saw = strings.TrimSpace(saw + " " + err.Error())
		}
		all = append(all, f)
	}
	return report(all)
}

// sockopt is a dialer's Control that sets one option, with an int or a string.
func sockopt(level, option int, value any) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		e := c.Control(func(fd uintptr) {
			switch v := value.(type) {
			case int:
				err = unix.SetsockoptInt(int(fd), level, option, v)
			case string:
				err = unix.SetsockoptString(int(fd), level, option, v)
			}
		})
		return errors.Join(e, err)
	}
}

// dial opens a connection that obeys ctx's deadline.
func (p peer) dial(ctx context.Context, port int) (*net.TCPConn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", p.at(port))
	if err != nil {
		return nil, err
	}
	if t, ok := ctx.Deadline(); ok {
		c.SetDeadline(t)
	}
	return c.(*net.TCPConn), nil
}

// verify holds what both ends saw against each other.
func (p peer) verify(x exchange, port int) (string, error) {
	if x.Local != x.ServerSaw {
		return "", fmt.Errorf("this is %s, the server saw %s", x.Local, x.ServerSaw)
	}
	if x.Peer != p.at(port) {
		return "", fmt.Errorf("dialled %s, getpeername says %s", p.at(port), x.Peer)
	}
	return "both ends agree", nil
}

// dialled is an exchange by a dialer that change has prepared.
func dialled(change func(*net.Dialer)) func(peer, context.Context) (string, error) {
	return func(p peer, ctx context.Context) (string, error) {
		var d net.Dialer
		if change != nil {
			change(&d)
		}
		c, err := d.DialContext(ctx, "tcp", p.at(portEcho))
		if err != nil {
			return "", err
		}
		defer c.Close()
		if t, ok := ctx.Deadline(); ok {
			c.SetDeadline(t)
		}
		var x exchange
		if err := x.speak(c); err != nil {
			return "", err
		}
		// Fast open connects with the first data: only now are the addresses known for sure.
		x.Local, x.Peer = c.LocalAddr().String(), c.RemoteAddr().String()
		return p.verify(x, portEcho)
	}
}

func (p peer) greeted(ctx context.Context) (string, error) {
	c, err := p.dial(ctx, portGreet)
	if err != nil {
		return "", err
	}
	defer c.Close()
	r := bufio.NewReader(c)
	hello, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	if !strings.Contains(hello, "peer="+c.LocalAddr().String()) {
		return hello, errors.New("the server greets somebody else")
	}
	fmt.Fprintf(c, "HELO %s\r\n", marker)
	answer, err := r.ReadString('\n')
	if err == nil && !strings.HasPrefix(answer, "250 HELO "+marker) {
		err = fmt.Errorf("answer %q", answer)
	}
	return "greeting and answer", err
}

// halfClosed sends, shuts down, and reads all of it back and the end after that.
func (p peer) halfClosed(ctx context.Context) (string, error) {
	c, err := p.dial(ctx, portEcho)
	if err != nil {
		return "", err
	}
	defer c.Close()
	const n = 1 << 20
	sent, h := make(chan error, 1), sha256.New()
	go func() {
		_, err := io.Copy(c, io.TeeReader(random(n), h))
		sent <- errors.Join(err, c.CloseWrite())
	}()
	r := bufio.NewReader(c)
	if _, err := r.ReadString('\n'); err != nil {
		return "", err
	}
	back := sha256.New()
	got, err := io.Copy(back, r)
	if err := errors.Join(err, <-sent); err != nil {
		return fmt.Sprintf("%d bytes", got), err
	}
	if string(back.Sum(nil)) != string(h.Sum(nil)) {
		return "", fmt.Errorf("%d bytes came back and they differ", got)
	}
	return "all back, then the end", nil
}

// sourced reads a big transfer down to the server's end, its digest last.
func (p peer) sourced(ctx context.Context) (string, error) {
	c, err := p.dial(ctx, portSource)
	if err != nil {
		return "", err
	}
	defer c.Close()
	fmt.Fprintf(c, "%d\n", p.size)
	h := sha256.New()
	n, err := io.CopyN(h, c, p.size)
	if err != nil {
		return fmt.Sprintf("%d bytes", n), err
	}
	sum, err := io.ReadAll(c)
	if err != nil {
		return "", err
	}
	if string(sum) != string(h.Sum(nil)) {
		return "", errors.New("the digests differ")
	}
	return "digests agree, then the end", nil
}

func (p peer) digested(ctx context.Context, port int) (string, error) {
	c, err := p.dial(ctx, port)
	if err != nil {
		return "", err
	}
	defer c.Close()
	h := sha256.New()
	if _, err := io.Copy(c, io.TeeReader(random(p.size), h)); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(c)
	if err != nil {
		return "", err
	}
	if want := fmt.Sprintf("%d %x\n", p.size, h.Sum(nil)); string(answer) != want {
		return "", fmt.Errorf("the server got %q, sent was %q", answer, want)
	}
	return "digests agree", nil
}

func (p peer) wasReset(ctx context.Context) (string, error) {
	c, err := p.dial(ctx, portReset)
	if err != nil {
		return "", err
	}
	defer c.Close()
	fmt.Fprintln(c, marker)
	_, err = c.Read(make([]byte, 1))
	if errors.Is(err, syscall.ECONNRESET) {
		return "reset", nil
	}
	return "", fmt.Errorf("the server reset the connection, this side saw %v", err)
}

// ended closes a connection one way or the other and asks the server how it ended.
func (p peer) ended(ctx context.Context, how string) (string, error) {
	c, err := p.dial(ctx, portEnds)
	if err != nil {
		return "", err
	}
	defer c.Close()
	id := c.LocalAddr().String() + "-" + how
	fmt.Fprintln(c, id)
	if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		return "", err
	}
	if how == "reset" {
		c.SetLinger(0)
	}
	c.Close()
	for {
		saw, err := p.asked(ctx, id)
		switch {
		case err != nil:
			return "", err
		case saw == how:
			return how, nil
		case saw != "":
			return "", fmt.Errorf("the server saw %s", saw)
		}
		select {
		case <-ctx.Done():
			return "", errors.New("the server never saw an end")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (p peer) asked(ctx context.Context, id string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.at(portHTTP)+"/ends", nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var ends map[string]string
	err = json.NewDecoder(resp.Body).Decode(&ends)
	return ends[id], err
}

// refused connects where nobody listens. Without a mesh connect() says so; with one the connection may be
// accepted first and reset at once. Both are a refusal; silence is not.
func (p peer) refused(ctx context.Context) (string, error) {
	c, err := p.dial(ctx, portNobody)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) {
		return "refused by connect", nil
	}
	if err != nil {
		return "", err
	}
	defer c.Close()
	_, err = c.Read(make([]byte, 1))
	if errors.Is(err, syscall.ECONNRESET) {
		return "reset after connect", nil
	}
	return "", fmt.Errorf("connected, then %v", err)
}

func (p peer) idle(ctx context.Context) (string, error) {
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 2}}
	c, err := d.DialContext(ctx, "tcp", p.at(portEcho))
	if err != nil {
		return "", err
	}
	defer c.Close()
	time.Sleep(4 * time.Second)
	c.SetDeadline(time.Now().Add(5 * time.Second))
	var x exchange
	if err := x.speak(c); err != nil {
		return "", err
	}
	return p.verify(x, portEcho)
}

// bound connects from a port that it chose itself.
func (p peer) bound(ctx context.Context) (string, error) {
	probe, err := p.dial(ctx, portEcho)
	if err != nil {
		return "", err
	}
	own := probe.LocalAddr().(*net.TCPAddr)
	probe.Close()
	own.Port = 20000 + rand.N(8000)
	d := net.Dialer{LocalAddr: own}
	c, err := d.DialContext(ctx, "tcp", p.at(portEcho))
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	var x exchange
	if err := x.speak(c); err != nil {
		return "", err
	}
	if x.Local != own.String() {
		return "", fmt.Errorf("bound to %s, getsockname says %s", own, x.Local)
	}
	return p.verify(x, portEcho)
}

func (p peer) fastOpen(context.Context) (string, error) { return p.raw(false, true) }

// raw makes the system calls itself, on a blocking socket: connect and write, or sendto with MSG_FASTOPEN.
func (p peer) raw(mapped, fast bool) (string, error) {
	addr, err := net.ResolveTCPAddr("tcp", p.at(portEcho))
	if err != nil {
		return "", err
	}
	var sa unix.Sockaddr
	family := unix.AF_INET
	if v4 := addr.IP.To4(); v4 != nil && !mapped {
		sa = &unix.SockaddrInet4{Port: addr.Port, Addr: [4]byte(v4)}
	} else {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: addr.Port, Addr: [16]byte(addr.IP.To16())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	limit := unix.Timeval{Sec: 10}
	if err := errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit)); err != nil {
		return "", err
	}
	if fast {
		err = unix.Sendto(fd, []byte(marker+"\n"), unix.MSG_FASTOPEN, sa)
	} else if err = unix.Connect(fd, sa); err == nil {
		_, err = unix.Write(fd, []byte(marker+"\n"))
	}
	if err != nil {
		return "", os.NewSyscallError("connect or sendto", err)
	}
	var x exchange
	if err := x.listen(bufio.NewReader(reader(fd))); err != nil {
		return "", err
	}
	local, err := unix.Getsockname(fd)
	if err != nil {
		return "", err
	}
	remote, err := unix.Getpeername(fd)
	if err != nil {
		return "", err
	}
	if got, want := fmt.Sprintf("%+v", remote), fmt.Sprintf("%+v", sa); text(remote) != text(sa) {
		return "", fmt.Errorf("connected to %s, getpeername says %s", want, got)
	}
	x.Local, x.Peer = text(local), p.at(portEcho)
	return p.verify(x, portEcho)
}

// reader reads a blocking socket.
type reader int

func (r reader) Read(b []byte) (int, error) {
	n, err := unix.Read(int(r), b)
	if err == nil && n == 0 {
		err = io.EOF
	}
	return max(n, 0), err
}

// text prints an address as Go's net package does, an IPv4-mapped one as IPv4.
func text(sa unix.Sockaddr) string {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return (&net.TCPAddr{IP: a.Addr[:], Port: a.Port}).String()
	case *unix.SockaddrInet6:
		return (&net.TCPAddr{IP: a.Addr[:], Port: a.Port}).String()
	}
	return fmt.Sprintf("%T", sa)
}

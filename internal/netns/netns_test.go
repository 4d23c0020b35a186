package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func newNS(t testing.TB) *Handle {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	h, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	err = h.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func cookieOf(t testing.TB, fd int) uint64 {
	t.Helper()
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A socket belongs to the namespace of its handle, and nothing else ever does.
func TestSocketsAreInTheirNamespace(t *testing.T) {
	a, b := newNS(t), newNS(t)
	home, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	if a.Cookie() == b.Cookie() || a.Cookie() == home.Cookie() {
		t.Fatal("two namespaces have one cookie")
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			ns := []*Handle{a, b}[i%2]
			for range 200 {
				fd, err := ns.Socket(unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP)
				if err != nil {
					t.Error(err)
					return
				}
				if c := cookieOf(t, fd); c != ns.Cookie() {
					t.Errorf("socket in namespace %d, want %d", c, ns.Cookie())
				}
				unix.Close(fd)
				own, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					t.Error(err)
					return
				}
				if c := cookieOf(t, own); c != home.Cookie() {
					t.Errorf("a thread of ours is in namespace %d", c)
				}
				unix.Close(own)
			}
		})
	}
	wg.Wait()
}

func TestOpenRefusesWhatIsNoNetworkNamespace(t *testing.T) {
	for _, path := range []string{"/proc/self/ns/mnt", "/proc/self/status", t.TempDir()} {
		if h, err := Open(path); err == nil {
			h.Close()
			t.Errorf("%s was opened", path)
		}
	}
	if _, err := Open("/no/such/file"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestHandlesOfOneNamespace(t *testing.T) {
	a := newNS(t)
	f, err := a.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := FromFD(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if a.Cookie() != b.Cookie() {
		t.Error("a duplicate has another cookie")
	}
	self, err := FromPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	home, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	defer home.Close()
	if self.Cookie() != home.Cookie() {
		t.Error("our process is in another namespace than this thread")
	}
}

func TestClosedHandle(t *testing.T) {
	a := newNS(t)
	for range 2 {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
	_, sock := a.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	_, file := a.File()
	for _, err := range []error{sock, file, a.Do(func() error { return nil }), a.WithFD(func(int) error { return nil })} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%v, want %v", err, ErrClosed)
		}
	}
}

func TestConnect(t *testing.T) {
	a := newNS(t)
	var ln net.Listener
	if err := a.Do(func() (err error) { ln, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.Copy(c, c)
	}()
	prepared := uint64(0)
	s, err := a.Connect(context.Background(), ln.Addr().(*net.TCPAddr).AddrPort(), func(fd int) error {
		prepared = cookieOf(t, fd)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.TCPConn()
	if err != nil {
		t.Fatal(err)
	}
	if prepared != a.Cookie() {
		t.Errorf("prepared a socket of namespace %d, want %d", prepared, a.Cookie())
	}
	// Deadlines, half-close and the poller are the runtime's.
	c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	c.SetReadDeadline(time.Time{})
	fmt.Fprint(c, "ping")
	c.CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "ping" || err != nil {
		t.Errorf("%q %v", b, err)
	}
	c.Close()
	<-done
}

var closedPort = netip.MustParseAddrPort("127.0.0.1:1")

func TestConnectErrors(t *testing.T) {
	a := newNS(t)
	if _, err := a.Connect(context.Background(), closedPort, nil); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("closed port: %v", err)
	}
	if _, err := a.Connect(context.Background(), netip.MustParseAddrPort("10.9.9.9:1"), nil); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("no route: %v", err)
	}
	no := errors.New("no")
	if _, err := a.Connect(context.Background(), closedPort, func(int) error { return no }); !errors.Is(err, no) {
		t.Errorf("prepare: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := a.Connect(ctx, closedPort, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// No descriptor is left behind by dials, whichever way they end.
func TestConnectLeaksNothing(t *testing.T) {
	a := newNS(t)
	count := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	a.Connect(context.Background(), closedPort, nil) // what the runtime opens once
	before := count()
	for range 100 {
		a.Connect(context.Background(), closedPort, nil)
		a.Connect(context.Background(), closedPort, func(int) error { return errors.New("no") })
	}
	if after := count(); after > before+2 {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func BenchmarkSocket(b *testing.B) {
	ns := newNS(b)
	for b.Loop() {
		fd, err := ns.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
		if err != nil {
			b.Fatal(err)
		}
		unix.Close(fd)
	}
}

// BenchmarkSocketHere is what a socket costs without another namespace.
func BenchmarkSocketHere(b *testing.B) {
	for b.Loop() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		if err != nil {
			b.Fatal(err)
		}
		unix.Close(fd)
	}
}

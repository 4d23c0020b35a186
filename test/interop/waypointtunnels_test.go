package interop

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// waypointTunnels asks a pod that has a tunnel, and that nothing was sent to before, many things at once: they come by one
// tunnel, however many begin before it is made.
func waypointTunnels(t *testing.T, istio *istiofake.Clientset, as *identity.Bundle, get func(authority, path string, headers ...string) (int, string, error)) {
	const requests = 64
	// Envoy listens on the port at all addresses.
	shared := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
			return e
		}
		return err
	}}
	l, err := shared.Listen(t.Context(), "tcp", "127.0.1.5:15008")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var asked atomic.Int32
	together := make(chan struct{})
	var authorities, told sync.Map
	answer := func(_ context.Context, s *hbone.ServerStream) {
		st, err := s.Accept()
		if err != nil {
			return
		}
		defer st.Close()
		authorities.Store(s.Request.Authority, true)
		in := bufio.NewReader(st)
		if b, err := in.Peek(1); err == nil && strings.Contains("P\r", string(b)) {
			client, err := proxyHeader(in)
			told.Store(fmt.Sprint(client, " ", err), true)
		}
		for { // Envoy keeps the connection for the next request
			if _, err := http.ReadRequest(in); err != nil {
				return
			}
			if asked.Add(1) == requests {
				close(together)
			}
			select {
			case <-together:
			case <-ctx.Done():
				return
			}
			if _, err := fmt.Fprint(st, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"); err != nil {
				return
			}
		}
	}
	accepted := serveTunnels(ctx, t, l, as, answer)
	var asking sync.WaitGroup
	for range requests {
		asking.Go(func() {
			if code, body, err := get("10.96.0.12:80", "/"); err != nil || code != 200 || body != "ok" {
				t.Errorf("%d %q %v", code, body, err)
			}
		})
	}
	done := make(chan struct{})
	go func() { asking.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%d of %d requests have come", asked.Load(), requests)
	}
	if n := accepted.Load(); n != 1 {
		t.Errorf("%d requests came by %d tunnels", requests, n)
	}
	// What is told of the client goes by the tunnel, too, before the request.
	rule := &networkingv1.DestinationRule{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "stock", UID: "uid-stock"}}
	if err := yaml.Unmarshal([]byte(`{host: stock, trafficPolicy: {proxyProtocol: {version: V2}}}`), &rule.Spec); err != nil {
		t.Fatal(err)
	}
	api := istio.NetworkingV1().DestinationRules("shop")
	if _, err := api.Create(t.Context(), rule, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the client's address in the tunnel", 30*time.Second, func() error {
		if code, body, err := get("10.96.0.12:80", "/"); err != nil || code != 200 {
			return fmt.Errorf("%d %q %v", code, body, err)
		}
		if _, ok := told.Load("V2 127.0.0.1 <nil>"); !ok {
			return fmt.Errorf("told %v", slices.Collect(maps.Keys(maps.Collect(told.Range))))
		}
		return nil
	})
	if err := api.Delete(t.Context(), "stock", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if ms := userTimeouts(t, 15008); len(ms) != 1 || ms[0] != 10_000 {
		t.Errorf("a tunnel whose peer is silent ends after %v ms, want 10000", ms)
	}
	if _, ok := authorities.Load("127.0.1.5:8080"); !ok {
		t.Error("no CONNECT was for the pod's port")
	}
}

// userTimeouts are the TCP_USER_TIMEOUTs of the connections to a port that processes of this one's have, in milliseconds.
func userTimeouts(t *testing.T, port int) (all []int) {
	t.Helper()
	sockets, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	mine := fmt.Sprintf("\nPPid:\t%d\n", os.Getpid())
	for _, path := range sockets {
		process, n := filepath.Dir(filepath.Dir(path)), filepath.Base(path)
		if status, err := os.ReadFile(filepath.Join(process, "status")); err != nil || !strings.Contains(string(status), mine) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(process))
		if err != nil {
			t.Fatal(err)
		}
		if ms, ok := userTimeout(t, pid, n, port); ok {
			all = append(all, ms)
		}
	}
	return all
}

// userTimeout is that of a process's descriptor, if that is a connection to a port.
func userTimeout(t *testing.T, pid int, descriptor string, port int) (ms int, ok bool) {
	t.Helper()
	n, err := strconv.Atoi(descriptor)
	if err != nil {
		t.Fatal(err)
	}
	of, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, false // ended meanwhile
	}
	defer unix.Close(of)
	fd, err := unix.PidfdGetfd(of, n, 0)
	if err != nil {
		return 0, false // closed meanwhile
	}
	defer unix.Close(fd)
	peer, err := unix.Getpeername(fd)
	to, is := peer.(*unix.SockaddrInet4)
	if err != nil || !is || to.Port != port {
		return 0, false
	}
	if ms, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); err != nil {
		t.Fatal(err)
	}
	return ms, true
}

// serveTunnels is a pod whose tunnels end here; it counts them.
func serveTunnels(ctx context.Context, t testing.TB, l net.Listener, as *identity.Bundle, handle func(context.Context, *hbone.ServerStream)) *atomic.Int32 {
	ctx, cancel := context.WithCancel(ctx)
	accepted := &atomic.Int32{}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); cancel(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			wg.Go(func() {
				defer c.Close()
				tc := hbone.TLSServer(c, as.ServerTLS(identity.Peers{}))
				if err := tc.HandshakeContext(ctx); err != nil {
					t.Error(err)
					return
				}
				_ = hbone.Serve(ctx, tc, hbone.ServerConfig{Handler: handle})
			})
		}
	})
	return accepted
}

package interop

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
	"github.com/warrenmesh/warren/waypoint"
)

// BenchmarkWaypoint is what a request of 1 KiB costs a waypoint's Envoy, of 16 clients with a connection each: the processor time
// of its process alone, since client and application run on the same processors. The tunnels end here, on both sides.
func BenchmarkWaypoint(b *testing.B) {
	for _, c := range []struct {
		name string
		keep func(string) bool
	}{
		{"as it is", func(string) bool { return true }},
		{"without metrics", func(l string) bool { return l != "envoy.access_loggers.stats" }},
		{"without logs and metrics", noLogs},
	} {
		b.Run(c.name, func(b *testing.B) { costOfWaypoint(b, c.keep) })
	}
}

func costOfWaypoint(b *testing.B, keep func(logger string) bool) {
	x, err := index.New(index.Config{ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", RootNamespace: "istio-system"})
	if err != nil {
		b.Fatal(err)
	}
	ready, http80, tcp := true, "http", corev1.ProtocolTCP
	number := int32(8080)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory-1", UID: "u1", Labels: map[string]string{"app": "inventory"},
		Annotations: map[string]string{index.AnnotationRedirection: index.RedirectionEnabled}},
		Spec:   corev1.PodSpec{NodeName: "n1", ServiceAccountName: "inventory"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "127.0.1.5", PodIPs: []corev1.PodIP{{IP: "127.0.1.5"}}, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: "True"}}}}
	for _, o := range []any{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/use-waypoint": "way", "istio.io/dataplane-mode": "ambient"}}},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory"}, Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.9", Selector: map[string]string{"app": "inventory"},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}}}},
		pod,
		&discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory-1", Labels: map[string]string{discoveryv1.LabelServiceName: "inventory"}}, AddressType: discoveryv1.AddressTypeIPv4,
			Ports:     []discoveryv1.EndpointPort{{Name: &http80, Port: &number, Protocol: &tcp}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"127.0.1.5"}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}, TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "inventory-1", UID: "u1"}}}},
	} {
		x.Set(o)
	}
	config, err := waypoint.Build(x.Commit().Snapshot, mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"})
	if err != nil {
		b.Fatal(err)
	}
	ca := newAuthority(b)
	way := ca.issue(b, "way")
	client, app := ca.issue(b, "client"), ca.issue(b, "inventory")
	tunnelled(b, app, 1024)
	at, pid := runWaypoint(b, envoyBinary(b), config, ca, keep)
	pool := hbone.NewPool(hbone.PoolConfig{Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", k.Addr.String())
		if err != nil {
			return nil, err
		}
		tc := hbone.TLSClient(c, client.ClientTLS(k.Wanted()))
		return tc, tc.HandshakeContext(ctx)
	}})
	defer pool.Close()
	key := hbone.Key{Src: client.ID, Want: hbone.WantKey([]string{way.ID.String()}), Addr: at}
	request := hbone.Request{Authority: "10.96.0.9:80", Header: hbone.Header{{Name: hbone.HeaderBaggage,
		Value: "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=client-v7,service.name=client,service.version=v7"}}}
	var left atomic.Int64
	run := func(n int) {
		left.Store(int64(n))
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				st, _, err := pool.Open(b.Context(), key, request)
				if err != nil {
					b.Error(err)
					return
				}
				defer st.Close()
				in := bufio.NewReader(st)
				for left.Add(-1) >= 0 {
					if _, err := io.WriteString(st, "GET /stock HTTP/1.1\r\nhost: inventory\r\nuser-agent: fortio.org/fortio-1.66.3\r\n\r\n"); err != nil {
						b.Error(err)
						return
					}
					res, err := http.ReadResponse(in, nil)
					if err != nil {
						b.Error(err)
						return
					}
					if n, err := io.Copy(io.Discard, res.Body); err != nil || n != 1024 || res.StatusCode != 200 {
						b.Errorf("%s, %d bytes, %v", res.Status, n, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
	run(2000)
	before := cpuTime(b, pid)
	b.ResetTimer()
	run(b.N)
	b.StopTimer()
	b.ReportMetric(float64((cpuTime(b, pid)-before).Nanoseconds())/1e3/float64(b.N), "envoy-µs/op")
}

// cpuTime is the processor time of a process so far, by the clock that the kernel has of it (clock_getcpuclockid(3)).
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|2), &t); err != nil {
		b.Fatal(err)
	}
	return time.Duration(t.Nano())
}

// tunnelled is a pod at 127.0.1.5 that answers requests which come by a tunnel.
func tunnelled(b *testing.B, as *identity.Bundle, size int) {
	b.Helper()
	l, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.1.5"), mesh.HBONEPort).String())
	if err != nil {
		b.Fatal(err)
	}
	answer := []byte(fmt.Sprintf("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%s", size, strings.Repeat("x", size)))
	handle := func(_ context.Context, s *hbone.ServerStream) {
		st, err := s.Accept()
		if err != nil {
			return
		}
		defer st.Close()
		in := bufio.NewReader(st)
		for {
			if _, err := http.ReadRequest(in); err != nil {
				return
			}
			if _, err := st.Write(answer); err != nil {
				return
			}
		}
	}
	serveTunnels(context.Background(), b, l, as, handle)
}

package interop

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	goruntime "runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	k8stesting "k8s.io/client-go/testing"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/results"
)

// Sizes of TestWaypointScale; an application of so many services is behind one waypoint.
const (
	scaleServices = 1000
	scaleRoutes   = 2 // of each service
	scaleChanges  = 200
)

// TestWaypointScale has a control plane tell a waypoint about a thousand services with two routes each, and counts what it
// sends when one of them changes. The figures have the fake API server's memory and time in them.
func TestWaypointScale(t *testing.T) {
	const own = "WARREN_TEST_OWN_PROCESS" // for its memory, and because the fakes cannot do what clients do by default
	if os.Getenv(own) == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestWaypointScale$", "-test.v", "-test.timeout", "5m")
		cmd.Env = append(os.Environ(), own+"=1", "KUBE_FEATURE_WatchListClient=false")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	kube, istio, gateways := waypointCluster(t)
	kube.Resources = append(kube.Resources[:2:2], &metav1.APIResourceList{
		GroupVersion: "gateway.networking.k8s.io/v1", APIResources: []metav1.APIResource{{Name: "gateways"}, {Name: "httproutes"}},
	})
	// What is written back does not matter here, and takes the fake more time than all the rest.
	kube.PrependReactor("patch", "services", func(k8stesting.Action) (bool, runtime.Object, error) { return true, &corev1.Service{}, nil })
	add := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/use-waypoint": "way", "istio.io/dataplane-mode": "ambient"}}}
	_, err := kube.CoreV1().Namespaces().Update(ctx, ns, metav1.UpdateOptions{})
	add(err)
	for i := range scaleServices {
		ip := netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}).String()
		vip := netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}).String()
		name := "s" + strconv.Itoa(i)
		add(kube.Tracker().Add(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.ServiceSpec{
			ClusterIP: vip, ClusterIPs: []string{vip}, Selector: map[string]string{"app": name},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP}},
		}}))
		add(kube.Tracker().Add(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name + "-1", UID: types.UID("uid-" + name), Labels: map[string]string{"app": name}},
			Spec:       corev1.PodSpec{NodeName: "n1", ServiceAccountName: name},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}},
				Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		}))
		for r := range scaleRoutes {
			add(gateways.Tracker().Add(scaleRoute(i, r, "/")))
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	add(err)
	addr := l.Addr().String()
	l.Close()
	began := time.Now()
	done := make(chan error, 1)
	go func() {
		done <- controlplane.Run(ctx, controlplane.Config{XDSAddr: addr, Log: slog.New(slog.DiscardHandler)}, controlplane.Clients{Kube: kube, Istio: istio, Gateways: gateways})
	}()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("the control plane ended: %v", err)
		}
	}()
	dir := t.TempDir()
	var root []byte
	eventually(t, "the mesh's root", time.Minute, func() error {
		cm, err := kube.CoreV1().ConfigMaps("shop").Get(ctx, "istio-ca-root-cert", metav1.GetOptions{})
		if err == nil {
			root = []byte(cm.Data["root-cert.pem"])
		}
		return err
	})
	for name, b := range map[string][]byte{"root": root, "token": []byte("way")} {
		add(os.WriteFile(dir+"/"+name, b, 0o600))
	}
	conn, err := identity.DialControlPlane(addr, "istiod.istio-system.svc", identity.ControlPlaneRoots{File: dir + "/root"}, dir+"/token", "Kubernetes")
	add(err)
	defer conn.Close()
	kinds := []string{resource.ClusterType, resource.EndpointType, resource.ListenerType, resource.RouteType, resource.ExtensionConfigType}
	var w *scaleWatch
	eventually(t, "a stream", time.Minute, func() error {
		w = &scaleWatch{T: t, have: map[string]int{}}
		if w.stream, err = discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(1<<30)); err != nil {
			return err
		}
		for _, kind := range kinds {
			if err := w.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: kind, Node: &corev3.Node{Id: "x"}}); err != nil {
				return err
			}
		}
		return w.receive()
	})
	for !slices.EqualFunc(kinds, []int{scaleServices + 4, scaleServices + 1, 3, scaleServices + 1, scaleServices + 1}, func(kind string, n int) bool { return w.have[kind] >= n }) {
		add(w.receive())
	}
	full := time.Since(began)
	t.Logf("everything sent after %s: %v, %d bytes", full, w.have, w.bytes)

	var took []time.Duration
	resources := 0
	for i := range scaleChanges {
		w.have, w.bytes = map[string]int{}, 0
		changed := time.Now()
		_, err := gateways.GatewayV1().HTTPRoutes("shop").Update(ctx, scaleRoute(i*7%scaleServices, 0, "/"+strconv.Itoa(i)), metav1.UpdateOptions{})
		add(err)
		for w.have[resource.RouteType] == 0 {
			add(w.receive())
		}
		took = append(took, time.Since(changed))
		for _, n := range w.have {
			resources += n
		}
	}
	if resources != scaleChanges {
		t.Errorf("%d changes of a route had %d resources sent", scaleChanges, resources)
	}
	slices.Sort(took)
	p99 := took[len(took)*99/100]
	goruntime.GC()
	mb := residentMB(t)
	t.Logf("one change: median %s, p99 %s; %d resources for %d changes; %d MB resident", took[len(took)/2], p99, resources, scaleChanges, mb)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	row := func(name string, figure float64, unit string) results.Row {
		return results.Row{Name: name, Inputs: scaleServices * scaleRoutes, Figure: figure, Unit: unit}
	}
	changes := results.Row{Name: "envoy-config-scale", Inputs: scaleChanges, Failures: resources - scaleChanges, Figure: ms(took[len(took)/2]), Unit: "ms from a changed route to what is sent of it, median"}
	if err := results.Record("envoy-config-scale", changes,
		results.Row{Name: "the same, p99", Inputs: scaleChanges, Failures: resources - scaleChanges, Figure: ms(p99), Unit: "ms"},
		row("from the control plane's start to all routes sent", ms(full)/1000, "s"),
		row("memory of the control plane, the fake API server in it", float64(mb), "MB")); err != nil {
		t.Error(err)
	}
}

// scaleRoute is a route of a service.
func scaleRoute(service, nth int, path string) *gatewayv1.HTTPRoute {
	name := gatewayv1.ObjectName("s" + strconv.Itoa(service))
	group, kind := gatewayv1.Group(""), gatewayv1.Kind("Service")
	port := gatewayv1.PortNumber(80)
	match := gatewayv1.PathMatchPathPrefix
	path = fmt.Sprintf("%s%c", path, 'a'+nth)
	return &gatewayv1.HTTPRoute{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("%s-%d", name, nth), UID: types.UID(fmt.Sprintf("r-%d-%d", service, nth))},
		Spec: gatewayv1.HTTPRouteSpec{
			CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{{Group: &group, Kind: &kind, Name: name}}},
			Rules: []gatewayv1.HTTPRouteRule{{
				Matches:     []gatewayv1.HTTPRouteMatch{{Path: &gatewayv1.HTTPPathMatch{Type: &match, Value: &path}}},
				BackendRefs: []gatewayv1.HTTPBackendRef{{BackendRef: gatewayv1.BackendRef{BackendObjectReference: gatewayv1.BackendObjectReference{Name: name, Port: &port}}}},
			}},
		},
	}
}

// scaleWatch counts what an Envoy gets.
type scaleWatch struct {
	*testing.T
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	have   map[string]int // resources by type
	bytes  int
}

func (w *scaleWatch) receive() error {
	res, err := w.stream.Recv()
	if err != nil {
		return err
	}
	w.have[res.TypeUrl] += len(res.Resources)
	for _, r := range res.Resources {
		w.bytes += len(r.Resource.Value)
	}
	return w.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: res.TypeUrl, ResponseNonce: res.Nonce})
}

// residentMB is the memory of this process at its highest.
func residentMB(t *testing.T) int {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmHWM:")); ok {
			kb, err := strconv.Atoi(string(bytes.Fields(rest)[0]))
			if err != nil {
				t.Fatal(err)
			}
			return kb >> 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

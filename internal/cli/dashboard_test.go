package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/warrenmesh/warren/results"
)

// Every page is found by its pod's labels, on its own port or on another where that is taken, and what is not there says how
// to get it.
func TestDashboard(t *testing.T) {
	starting := func(p *corev1.Pod) *corev1.Pod {
		p.Status.Conditions = nil
		return p
	}
	objects := append(installed(),
		pod("istio-system", "prometheus-1", "node1", map[string]string{"app": "prometheus"}, nil),
		pod("istio-system", "grafana-1", "node1", map[string]string{"app.kubernetes.io/name": "grafana"}, nil),
		starting(pod("istio-system", "kiali-1", "node1", map[string]string{"app": "kiali"}, nil)),
		pod("istio-system", "warren-control-1", "node1", map[string]string{"app": "istiod"}, nil),
		pod("tracing", "zipkin-1", "node1", map[string]string{"app": "zipkin"}, nil),
		pod("shop", "way-1", "node1", map[string]string{gatewayLabel: "way"}, nil),
	)
	taken := map[int]bool{3000: true}
	for _, tt := range []struct {
		args string
		code int
		says string // what the output or the error begins with, or has in it
		at   string // which pod and port
	}{
		{"prometheus", ExitOK, "http://127.0.0.1:9090/\n", "istio-system/prometheus-1:9090"},
		{"prometheus --port 7000", ExitOK, "http://127.0.0.1:7000/\n", "istio-system/prometheus-1:9090"},
		{"prometheus -o json", ExitOK, `{"url":"http://127.0.0.1:9090/","pod":"istio-system/prometheus-1"}` + "\n", "istio-system/prometheus-1:9090"},
		{"grafana", ExitOK, "http://127.0.0.1:40000/dashboards\n", "istio-system/grafana-1:3000"},
		{"grafana --port 3000", ExitError, "address already in use", ""},
		{"zipkin -n tracing", ExitOK, "http://127.0.0.1:9411/zipkin/\n", "tracing/zipkin-1:9411"},
		{"zipkin", ExitError, "kubectl apply -f samples/addons/zipkin.yaml", ""},
		{"kiali", ExitError, "none of its pods is ready", ""},
		{"jaeger", ExitError, "no pod of Jaeger (app=jaeger or app.kubernetes.io/name=jaeger) is in istio-system", ""},
		{"envoy shop/way", ExitOK, "http://127.0.0.1:15000/\n", "shop/way-1:15000"},
		{"envoy shop/other", ExitError, "neither a waypoint with a pod nor a pod of one", ""},
		{"agent node2", ExitOK, "http://127.0.0.1:15000/\n", "istio-system/warren-node-b:15000"},
		{"agent node9", ExitError, "neither a node with an agent", ""},
		{"control", ExitOK, "http://127.0.0.1:15014/debug/syncz\n", "istio-system/warren-control-1:15014"},
		{"control -n other", ExitError, "is ready in other (0 pods)", ""},
		{"prometheus --port 70000", ExitUsage, "--port 70000 is no port", ""},
		{"prometheus --browser", ExitUsage, "--browser needs a terminal", ""},
		{"envoy", ExitUsage, "accepts 1 arg(s)", ""},
	} {
		t.Run(tt.args, func(t *testing.T) {
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			at := ""
			var out, errs bytes.Buffer
			a := &app{env: Env{Program: "warren", Args: append([]string{"dashboard"}, strings.Fields(tt.args)...), Out: &out, Err: &errs}}
			a.connect = func(*app) (*conn, error) {
				return &conn{Interface: fake.NewClientset(objects...), tunnel: func(_ context.Context, p *corev1.Pod, local, port int) (*portForward, error) {
					if taken[local] {
						return nil, errors.New("address already in use")
					}
					if local == 0 {
						local = 40000
					}
					at = fmt.Sprintf("%s/%s:%d", p.Namespace, p.Name, port)
					f := &portForward{port: local, ended: make(chan struct{}), stop: make(chan struct{})}
					go func() { <-f.stop; close(f.ended) }()
					interrupt()
					return f, nil
				}}, nil
			}
			code := a.main(ctx)
			said := out.String()
			if code != ExitOK {
				said = errs.String()
			}
			if code != tt.code || at != tt.at || code == ExitOK && said != tt.says || !strings.Contains(said, tt.says) {
				t.Errorf("code %d at %q says\n%s%s\nwant code %d at %q and %q", code, at, out.String(), errs.String(), tt.code, tt.at, tt.says)
			}
		})
	}
}

func TestDashboardEndsWithItsPod(t *testing.T) {
	objects := []runtime.Object{pod("istio-system", "prometheus-1", "node1", map[string]string{"app": "prometheus"}, nil)}
	var out, errs bytes.Buffer
	a := &app{env: Env{Program: "warren", Args: []string{"dashboard", "prometheus"}, Out: &out, Err: &errs}}
	a.connect = func(*app) (*conn, error) {
		return &conn{Interface: fake.NewClientset(objects...), tunnel: func(_ context.Context, _ *corev1.Pod, local, _ int) (*portForward, error) {
			f := &portForward{port: local, ended: make(chan struct{}), stop: make(chan struct{}), err: errors.New("lost connection to pod")}
			close(f.ended)
			return f, nil
		}}, nil
	}
	if code := a.main(t.Context()); code != ExitError || !strings.Contains(errs.String(), "istio-system/prometheus-1 has ended: lost connection to pod") {
		t.Errorf("code %d: %s", code, errs.String())
	}
}

// What the errors say installs an add-on is there.
func TestAddonsAreThere(t *testing.T) {
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range addons {
		b, err := os.ReadFile(filepath.Join(root, "samples", "addons", x.name+".yaml"))
		if err != nil {
			t.Error(err)
		} else if !strings.Contains(string(b), "{app: "+x.name) || !strings.Contains(string(b), fmt.Sprintf("containerPort: %d}", x.port)) {
			t.Errorf("%s: its pods have not the label app=%s or the port %d", x.name, x.name, x.port)
		}
	}
}

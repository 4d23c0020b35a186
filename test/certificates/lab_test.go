package certificates

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	caapi "github.com/warrenmesh/warren/api/ca"
	nodeapi "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/ca"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/status"
	cpxds "github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
	"github.com/warrenmesh/warren/node-agent/xds"
)

var long = flag.Bool("long", false, "the numbers of a soak instead of those of a check")

var (
	ui      = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	catalog = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "catalog"}
)

const system = "istio-system"

// placement is where the pods of this world run: ui and an agent on n1, catalog and an agent on n2.
type placement struct{}

func (placement) PodByName(_, name string) (ca.PlacedPod, bool) {
	node, ok := map[string]string{"agent-1": "n1", "agent-2": "n2"}[name]
	return ca.PlacedPod{UID: "uid-" + name, ServiceAccount: "warren-node", Node: node}, ok
}

func (placement) Runs(node, _, account string) bool {
	return node == map[string]string{"ui": "n1", "catalog": "n2"}[account]
}

type noPods struct{}

func (noPods) PodByName(string, string) (index.Placed, bool) { return index.Placed{}, false }
func (noPods) PodsOn(string) []index.Placed                  { return nil }

type silent struct{}

func (silent) Event(corev1.ObjectReference, string, string, string) {}

// world is a control plane and two nodes.
type world struct {
	*testing.T
	kube      *fake.Clientset
	authority *ca.Authority
	server    *ca.Server
	serving   *ca.Serving
	addr      string
	away      atomic.Bool
	nodes     [2]*node
}

// node is what of an agent has to do with certificates.
type node struct {
	manager *identity.Manager
	trust   atomic.Pointer[identity.Trust]
	pool    atomic.Pointer[hbone.Pool]
}

func newWorld(t *testing.T, life time.Duration) *world {
	t.Helper()
	w := &world{T: t, kube: fake.NewClientset()}
	w.kube.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		r := a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		pod := r.Spec.Token
		r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"istio-ca"}, User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + system + ":warren-node",
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {pod}, "authentication.kubernetes.io/pod-uid": {"uid-" + pod},
			},
		}}
		return true, r, nil
	})
	for i, name := range []string{"agent-1", "agent-2"} {
		if _, err := w.kube.CoreV1().Pods(system).Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: system, Name: name, UID: types.UID("uid-" + name)},
			Spec:       corev1.PodSpec{ServiceAccountName: "warren-node", NodeName: fmt.Sprint("n", i+1)},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	w.controlPlane(life)
	dir := t.TempDir()
	for i := range w.nodes {
		w.nodes[i] = w.newNode(filepath.Join(dir, fmt.Sprint(i)), fmt.Sprint("agent-", i+1), fmt.Sprint("n", i+1), life)
	}
	return w
}

func (w *world) controlPlane(life time.Duration) {
	quiet := slog.New(slog.DiscardHandler)
	callers := auth.New(w.kube, "cluster.local")
	z := &ca.Authorizer{TrustDomain: "cluster.local", Nodes: map[string]bool{system + "/warren-node": true}, Pods: placement{}}
	w.server = ca.NewServer(ca.Config{Callers: callers, Authorizer: z, DefaultTTL: life, MaxTTL: life, Log: quiet})
	cache := cpxds.NewCache()
	if err := cache.Update(&index.Update{Snapshot: mesh.NewBuilder(nil).Commit(1)}); err != nil {
		w.Fatal(err)
	}
	w.authority = &ca.Authority{
		Keys: &ca.Keys{Client: w.kube, Namespace: system, TrustDomain: "cluster.local"}, Life: life,
		Agents: func(ctx context.Context) ([]ca.Agent, error) {
			pods, err := w.kube.CoreV1().Pods(system).List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, err
			}
			var out []ca.Agent
			for _, p := range pods.Items {
				out = append(out, ca.Agent{Node: p.Spec.NodeName, Trusts: p.Annotations[ca.AnnotationTrusts]})
			}
			return out, nil
		},
		OnChange: func(s *ca.Standing) {
			if err := cache.SetTrust(s.DERs, s.Lists); err != nil {
				w.Error(err)
			}
			w.server.Set(s)
		},
		Log: quiet, Every: 50 * time.Millisecond,
	}
	if err := w.authority.Begin(w.Context()); err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.authority.Lead(ctx)
	var running sync.WaitGroup
	running.Go(func() { w.authority.Follow(ctx) })
	w.serving = &ca.Serving{Names: []string{"istiod.istio-system.svc"}, Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: system, ServiceAccount: "warren-control"}, Standing: w.server.Standing}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(w.serving.TLS())),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if w.away.Load() {
				return nil, errors.New("the CA is away")
			}
			return h(ctx, req)
		}))
	discovery.RegisterAggregatedDiscoveryServiceServer(g, cpxds.NewServer(cpxds.Config{Callers: callers, NodeOf: z.NodeOf, Log: quiet}, cache))
	caapi.RegisterIstioCertificateServiceServer(g, w.server)
	nodeapi.RegisterNodeStatusServer(g, status.NewNodes(status.Config{Kube: w.kube, Callers: callers, NodeOf: z.NodeOf, Pods: noPods{}, Events: silent{}, Log: quiet}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.Fatal(err)
	}
	w.addr = l.Addr().String()
	running.Go(func() { _ = g.Serve(l) })
	w.Cleanup(func() { cancel(); g.Stop(); running.Wait() })
}

func (w *world) newNode(dir, pod, name string, life time.Duration) *node {
	write := func(file string, text []byte) string {
		file = filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(file, text, 0o600)); err != nil {
			w.Fatal(err)
		}
		return file
	}
	// The file is as it was when the agent's pod started: the kubelet is late.
	root, token := write("root.pem", w.server.Standing().Roots), write("token", []byte(pod))
	n := &node{}
	signer, err := identity.NewCA(identity.CAConfig{Address: w.addr, ServerName: "istiod.istio-system.svc", TokenFile: token,
		Roots: identity.ControlPlaneRoots{File: root, More: n.trust.Load}})
	if err != nil {
		w.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	n.manager = identity.NewManager(identity.Config{Signer: signer, RootFile: root, TTL: life, Log: quiet,
		OnRotate: func(b *identity.Bundle) {
			if p := n.pool.Load(); p != nil {
				p.Drain(func(k hbone.Key) bool { return k.Src == b.ID })
			}
		}})
	client, err := xds.New(xds.Config{
		Address: w.addr, ServerName: "istiod.istio-system.svc", RootFile: root, Roots: n.trust.Load, TokenFile: token,
		Node: xds.Node{Name: name, Pod: pod, Namespace: system, ServiceAccount: "warren-node"}, Store: &mesh.Store{},
		Base: mesh.Config{TrustDomain: "cluster.local"}, Log: quiet,
		OnTrust: func(roots, lists [][]byte) error {
			t, err := identity.NewTrust(roots, lists)
			if err == nil {
				n.trust.Store(t)
				n.manager.SetTrust(t)
			}
			return err
		},
	})
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = n.manager.Run(ctx) })
	running.Go(func() { _ = client.Run(ctx) })
	w.Cleanup(func() { cancel(); running.Wait(); signer.Close() })
	return n
}

// manage runs a node's manager until the test ends.
func (w *world) manage(n *node, signer io.Closer) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = n.manager.Run(ctx) }()
	w.Cleanup(func() { cancel(); <-done; signer.Close() })
}

// serve is catalog's end of the tunnels: what comes in goes back.
func (w *world) serve() netip.AddrPort {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				b, err := w.nodes[1].manager.Bundle(ctx, catalog)
				if err != nil {
					return
				}
				tc := hbone.TLSServer(c, b.ServerTLS(identity.Peers{}))
				if tc.HandshakeContext(ctx) != nil {
					return
				}
				_ = hbone.Serve(ctx, tc, hbone.ServerConfig{Handler: func(_ context.Context, s *hbone.ServerStream) {
					if st, err := s.Accept(); err == nil {
						_, _ = io.Copy(st, st)
						st.Close()
					}
				}})
			})
		}
	})
	w.Cleanup(func() { cancel(); l.Close(); conns.Wait() })
	return netip.MustParseAddrPort(l.Addr().String())
}

// load is requests from ui to catalog.
type load struct {
	done, failed atomic.Int64
	mu           sync.Mutex
	examples     []string
	stop         func()
}

// run begins to send requests at a rate and goes on until stop.
func (w *world) run(to netip.AddrPort, perSecond int) *load {
	n := w.nodes[0]
	p := hbone.NewPool(hbone.PoolConfig{Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
		b, err := n.manager.Bundle(ctx, k.Src)
		if err != nil {
			return nil, err
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", k.Addr.String())
		if err != nil {
			return nil, err
		}
		tc := hbone.TLSClient(c, b.ClientTLS(k.Wanted()))
		if err := tc.HandshakeContext(ctx); err != nil {
			c.Close()
			return nil, err
		}
		return tc, nil
	}})
	n.pool.Store(p)
	l := &load{}
	ctx, cancel := context.WithCancel(context.Background())
	var requests sync.WaitGroup
	requests.Go(func() {
		limit := make(chan struct{}, 256)
		begun := time.Now()
		for n := 0; ; n++ { // each at its time, and what is late at once
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(begun.Add(time.Duration(n) * time.Second / time.Duration(perSecond)))):
			}
			limit <- struct{}{}
			requests.Go(func() {
				defer func() { <-limit }()
				if err := request(p, to); err != nil {
					l.failed.Add(1)
					l.mu.Lock()
					if len(l.examples) < 5 {
						l.examples = append(l.examples, err.Error())
					}
					l.mu.Unlock()
				}
				l.done.Add(1)
			})
		}
	})
	l.stop = sync.OnceFunc(func() { cancel(); requests.Wait() })
	w.Cleanup(func() { l.stop(); p.Close() })
	return l
}

func request(p *hbone.Pool, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	k := hbone.Key{Src: ui, Want: hbone.WantKey([]string{catalog.String()}), Addr: to}
	st, _, err := p.Open(ctx, k, hbone.Request{Authority: "10.0.0.2:80"})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer st.Close()
	if _, err := st.Write([]byte("ping")); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	var back [4]byte
	if _, err := io.ReadFull(st, back[:]); err != nil || string(back[:]) != "ping" {
		return fmt.Errorf("read: %q, %w", back, err)
	}
	return nil
}

// eventually bounds what a busy machine may take; nothing here measures time.
func (w *world) eventually(what string, limit time.Duration, ok func() bool) {
	w.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	w.Fatalf("not within %s: %s", limit, what)
}

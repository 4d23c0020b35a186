package xds

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// control is a control plane under the test's hand: every stream and every request comes out of a channel.
type control struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	node.UnimplementedNodeStatusServer

	t        *testing.T
	listener *bufconn.Listener
	server   *grpc.Server
	dir      string
	streams  chan *adsStream
	reports  chan *node.StatusReport
	tokens   chan string
	noReport bool
}

type adsStream struct {
	t     *testing.T
	send  func(*discovery.DeltaDiscoveryResponse) error
	reqs  chan *discovery.DeltaDiscoveryRequest
	end   chan error
	nonce int
}

func newControl(t *testing.T) *control {
	t.Helper()
	c := &control{
		t: t, listener: bufconn.Listen(1 << 20), dir: t.TempDir(),
		streams: make(chan *adsStream, 10), reports: make(chan *node.StatusReport, 1000), tokens: make(chan string, 100),
	}
	cert := c.certificate()
	c.write("token", "secret\n")
	c.server = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{cert}})))
	discovery.RegisterAggregatedDiscoveryServiceServer(c.server, c)
	node.RegisterNodeStatusServer(c.server, c)
	var served sync.WaitGroup
	served.Go(func() { _ = c.server.Serve(c.listener) })
	t.Cleanup(func() { c.server.Stop(); served.Wait() })
	return c
}

func (c *control) write(name, text string) string {
	file := filepath.Join(c.dir, name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return file
}

// certificate makes one for the name "control" and writes it as root.
func (c *control) certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"control"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		c.t.Fatal(err)
	}
	c.write("root", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (c *control) DeltaAggregatedResources(s discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	c.tokens <- strings.Join(md.Get("authorization"), ",") + " " + strings.Join(md.Get("clusterid"), ",")
	st := &adsStream{t: c.t, send: s.Send, reqs: make(chan *discovery.DeltaDiscoveryRequest, 100), end: make(chan error, 1)}
	go func() {
		defer close(st.reqs)
		for {
			req, err := s.Recv()
			if err != nil {
				return
			}
			st.reqs <- req
		}
	}()
	c.streams <- st
	select {
	case err := <-st.end:
		return err
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

func (c *control) Report(s grpc.ClientStreamingServer[node.StatusReport, node.StatusSummary]) error {
	if c.noReport {
		return c.UnimplementedNodeStatusServer.Report(s)
	}
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.SendAndClose(&node.StatusSummary{})
		}
		if err != nil {
			return err
		}
		c.reports <- r
	}
}

// start runs a client against the control plane until the test ends or stop is called.
func (c *control) start(f func(*Config)) (cl *Client, stop func()) {
	c.t.Helper()
	cfg := Config{
		Address: "passthrough:///control:15012", ServerName: "control",
		RootFile: filepath.Join(c.dir, "root"), TokenFile: filepath.Join(c.dir, "token"),
		Node:  Node{Name: "n1", Pod: "warren-node-x", Namespace: "istio-system", IP: netip.MustParseAddr("192.168.0.1"), Cluster: "c1", Version: "v"},
		Store: &mesh.Store{}, Log: slog.New(slog.DiscardHandler), SaveInterval: 10 * time.Millisecond, DeriveAfter: time.Hour,
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return c.listener.DialContext(ctx)
		})},
	}
	if f != nil {
		f(&cfg)
	}
	cl, err := New(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- cl.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				c.t.Error(err)
			}
		})
	}
	c.t.Cleanup(stop)
	return cl, stop
}

func receive[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v, ok := <-ch:
		if !ok {
			t.Fatalf("%s: it ended", what)
		}
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing came", what)
		panic("not reached")
	}
}

// subscribed takes the first requests of a stream, one a type.
func (c *control) subscribed() (*adsStream, map[string]*discovery.DeltaDiscoveryRequest) {
	c.t.Helper()
	st := receive(c.t, "a stream", c.streams)
	first := map[string]*discovery.DeltaDiscoveryRequest{}
	for range types {
		req := receive(c.t, "a subscription", st.reqs)
		first[req.TypeUrl] = req
	}
	return st, first
}

// answer sends one response and returns the request that acknowledges it.
func (st *adsStream) answer(typeURL, version string, removed []string, parts ...any) *discovery.DeltaDiscoveryRequest {
	st.t.Helper()
	nonce := st.put(typeURL, version, removed, parts...)
	for {
		req := receive(st.t, "an acknowledgement of "+typeURL, st.reqs)
		if req.ResponseNonce == nonce {
			return req
		}
	}
}

func (st *adsStream) put(typeURL, version string, removed []string, parts ...any) string {
	st.t.Helper()
	st.nonce++
	resp := &discovery.DeltaDiscoveryResponse{
		TypeUrl: typeURL, SystemVersionInfo: version, Nonce: string(rune('a' + st.nonce)), RemovedResources: removed,
	}
	for _, p := range parts {
		name, m := encode(st.t, p)
		data, err := proto.Marshal(m)
		if err != nil {
			st.t.Fatal(err)
		}
		resp.Resources = append(resp.Resources, &discovery.Resource{Name: name, Version: version, Resource: &anypb.Any{TypeUrl: typeURL, Value: data}})
	}
	if err := st.send(resp); err != nil {
		st.t.Fatal(err)
	}
	return resp.Nonce
}

// named is a message under a name of the test's choice.
type named struct {
	name string
	m    proto.Message
}

type namespace struct {
	name     string
	enrolled bool
}

func encode(t *testing.T, p any) (string, proto.Message) {
	switch p := p.(type) {
	case *mesh.Workload:
		return p.UID, wds.EncodeWorkload(p)
	case *mesh.Service:
		return p.Name.String(), wds.EncodeService(p)
	case *mesh.Policy:
		if p.Action == mesh.Audit {
			m, err := wds.EncodeAudit(p)
			if err != nil {
				t.Fatal(err)
			}
			return p.Name.String(), m
		}
		m, err := wds.EncodePolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		return p.Name.String(), m
	case wds.LocalPod:
		return p.UID, wds.EncodeLocalPod(p)
	case namespace:
		return p.name, wds.EncodeNamespace(p.name, p.enrolled)
	case mesh.Config:
		return wds.MeshConfigName, wds.EncodeConfig(p)
	case named:
		return p.name, p.m
	default:
		t.Fatalf("a %T is no resource", p)
		return "", nil
	}
}

func captured(name, addr string) *mesh.Workload {
	return &mesh.Workload{
		UID: "c1//Pod/shop/" + name, Name: name, Namespace: "shop", Node: "n1", Healthy: true, Tunnel: mesh.TunnelHBONE,
		Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: name},
		Addrs:    []netip.Addr{netip.MustParseAddr(addr)},
	}
}

func pod(name string, enrolled bool) wds.LocalPod {
	return wds.LocalPod{UID: "uid-" + name, Namespace: "shop", Name: name, ServiceAccount: name, Node: "n1", Enrolled: enrolled, State: wds.PodRunning}
}

func denyAll(name string) *mesh.Policy {
	return &mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: name}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{}}}
}

package interop

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/xds"
)

var withIstiod = flag.String("istiod", "", "program of Istio's control plane to test against, or build")

// istiodBinary returns Istio's control plane: the program that was named, or one built into the user's cache, which the first time takes
// minutes of both cores.
func istiodBinary(t *testing.T) string {
	t.Helper()
	switch *withIstiod {
	case "":
		t.Skip("boots a Kubernetes and Istio's control plane: give -istiod=build (go run ./test/run e2e does)")
	case "build":
		return filepath.Join(istioBuilt(t), "istiod")
	}
	return *withIstiod
}

// istioBuilt returns the directory of the programs that are built of Istio's modules: istiod, and validate.
func istioBuilt(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("go", "run", "./cmd/peers", "istiod")
	cmd.Dir = filepath.Join("..", "e2e")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("building Istio's programs: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// kube is a Kubernetes of this test's own, of one node.
type kube struct {
	dir     string // the cluster's
	program string
}

func newKube(t *testing.T) *kube {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a cluster needs root")
	}
	dir, err := os.MkdirTemp("", "warren-istiod-")
	if err != nil {
		t.Fatal(err)
	}
	k := &kube{dir: filepath.Join(dir, "c"), program: filepath.Join(dir, "cluster")}
	build := exec.Command("go", "build", "-o", k.program, "./cmd/cluster")
	build.Dir = filepath.Join("..", "cluster")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the cluster's launcher: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if out, err := k.command("down").CombinedOutput(); err != nil {
			t.Errorf("cluster down: %v\n%s", err, out)
		}
		_ = os.RemoveAll(dir)
	})
	if out, err := k.command("up", "--nodes", "1").CombinedOutput(); err != nil {
		t.Fatalf("cluster up: %v\n%s", err, out)
	}
	return k
}

func (k *kube) command(args ...string) *exec.Cmd {
	cmd := exec.Command(k.program, args...)
	cmd.Dir = filepath.Join("..", "cluster")
	cmd.Env = append(os.Environ(), "WARREN_CLUSTER_DIR="+k.dir)
	return cmd
}

func (k *kube) ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := k.try(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (k *kube) try(args ...string) (string, error) {
	cmd := k.command(append([]string{"kubectl"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.TrimSpace(stdout.String()), nil
}

func eventually(t testing.TB, what string, within time.Duration, ok func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestIstiodDrivesOurAgent runs Istio's own control plane on a real Kubernetes, and our node agent's xDS client
// and certificate manager against it, with nothing that only our control plane has.
func TestIstiodDrivesOurAgent(t *testing.T) {
	bin := istiodBinary(t)
	k := newKube(t)
	for _, f := range []string{"istio.yaml", "gateway-api.yaml"} {
		k.ctl(t, "apply", "--server-side", "-f", filepath.Join("..", "..", "charts", "warren", "files", "crds", f))
	}
	k.ctl(t, "apply", "-f", filepath.Join("..", "interop", "testdata", "istiod.yaml"))
	k.ctl(t, "wait", "--for=condition=Ready", "pod", "--all", "-n", "shop", "--timeout=120s")
	k.ctl(t, "wait", "--for=condition=Ready", "pod/agent", "-n", "istio-system", "--timeout=120s")

	addr := freeAddr(t)
	startIstiod(t, bin, k, addr)
	dir := t.TempDir()
	root, token := filepath.Join(dir, "root.pem"), filepath.Join(dir, "token")
	eventually(t, "istiod's root certificate", time.Minute, func() error {
		pem, err := k.try("get", "configmap", "istio-ca-root-cert", "-n", "shop", "-o", `jsonpath={.data.root-cert\.pem}`)
		if err == nil {
			err = os.WriteFile(root, []byte(pem+"\n"), 0o600)
		}
		return err
	})
	// The agent's token is bound to its pod: that is how istiod knows the node.
	uid := k.ctl(t, "get", "pod", "agent", "-n", "istio-system", "-o", "jsonpath={.metadata.uid}")
	if err := os.WriteFile(token, []byte(k.ctl(t, "create", "token", "warren-node", "-n", "istio-system", "--audience", "istio-ca",
		"--bound-object-kind", "Pod", "--bound-object-name", "agent", "--bound-object-uid", uid)), 0o600); err != nil {
		t.Fatal(err)
	}
	node := k.ctl(t, "get", "pod", "agent", "-n", "istio-system", "-o", "jsonpath={.spec.nodeName}")

	ctx, stop := context.WithCancel(context.Background())
	running := make(chan struct{}, 2)
	defer func() {
		stop()
		<-running
		<-running
	}()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	store := new(mesh.Store)
	pods := make(chan xds.LocalPods, 100)
	client, err := xds.New(xds.Config{
		Address: addr, ServerName: "istiod.istio-system.svc", RootFile: root, TokenFile: token, Store: store, Log: log,
		Node:        xds.Node{Name: node, Pod: "agent", Namespace: "istio-system", ServiceAccount: "warren-node", IP: netip.MustParseAddr("172.30.0.11"), Cluster: "Kubernetes"},
		Base:        mesh.Config{TrustDomain: "cluster.local"},
		DeriveAfter: time.Second,
		OnLocalPods: func(p xds.LocalPods) { pods <- p },
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = client.Run(ctx); running <- struct{}{} }()
	ca, err := identity.NewCA(identity.CAConfig{Address: addr, ServerName: "istiod.istio-system.svc", Roots: identity.ControlPlaneRoots{File: root}, TokenFile: token, Cluster: "Kubernetes"})
	if err != nil {
		t.Fatal(err)
	}
	defer ca.Close()
	certs := identity.NewManager(identity.Config{Signer: ca, RootFile: root, Log: log})
	go func() { _ = certs.Run(ctx); running <- struct{}{} }()

	select {
	case <-client.Synced():
	case <-time.After(time.Minute):
		t.Fatalf("not in sync with istiod: %+v", client.Status())
	}

	ui := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}
	t.Run("workload", func(t *testing.T) {
		ip := netip.MustParseAddr(k.ctl(t, "get", "pod", "ui", "-n", "shop", "-o", "jsonpath={.status.podIP}"))
		eventually(t, "the workload", 30*time.Second, func() error {
			w := store.Load().WorkloadAt(mesh.NetAddr{Addr: ip})
			if w == nil {
				return fmt.Errorf("nothing at %s", ip)
			}
			if w.Identity != ui || w.Tunnel != mesh.TunnelHBONE || w.Node != node || w.CanonicalName != "ui" {
				return fmt.Errorf("%+v", w)
			}
			return nil
		})
	})
	t.Run("service resolves to its endpoint", func(t *testing.T) {
		vip := netip.MustParseAddr(k.ctl(t, "get", "service", "ui", "-n", "shop", "-o", "jsonpath={.spec.clusterIP}"))
		eventually(t, "the route", 30*time.Second, func() error {
			s := store.Load()
			if s.ServiceAt(mesh.NetAddr{Addr: vip}) == nil {
				return fmt.Errorf("no service at %s", vip)
			}
			r := s.Resolve(nil, netip.AddrPortFrom(vip, 80), nil)
			if r.Kind != mesh.RouteHBONE || r.Authority.Port() != 8080 || !slices.Contains(r.Want, ui.String()) {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
	})
	t.Run("policy", func(t *testing.T) {
		name := mesh.PolicyName{Namespace: "shop", Name: "only-catalog"}
		conn := mesh.Conn{Source: ui, Dst: netip.AddrPortFrom(netip.MustParseAddr(k.ctl(t, "get", "pod", "ui", "-n", "shop", "-o", "jsonpath={.status.podIP}")), 8080)}
		verdict := func() mesh.Verdict {
			s := store.Load()
			conn.DstWorkload = s.WorkloadAt(mesh.NetAddr{Addr: conn.Dst.Addr()})
			return s.Authorize(conn)
		}
		eventually(t, "the policy", 30*time.Second, func() error {
			if v := verdict(); v.Allow {
				return fmt.Errorf("%+v", v)
			}
			return nil
		})
		conn.Source.ServiceAccount = "catalog"
		if v := verdict(); !v.Allow || v.By != name {
			t.Errorf("catalog: %+v", v)
		}
		conn.Source.ServiceAccount = "ui"
		k.ctl(t, "delete", "authorizationpolicy", "only-catalog", "-n", "shop")
		eventually(t, "the policy's removal", 30*time.Second, func() error {
			if v := verdict(); !v.Allow {
				return fmt.Errorf("%+v", v)
			}
			return nil
		})
	})
	t.Run("local pods are derived", func(t *testing.T) {
		deadline := time.After(30 * time.Second)
		for {
			select {
			case p := <-pods:
				for _, x := range p.Pods {
					if x.Name == "ui" && x.Enrolled && p.Derived {
						return
					}
				}
			case <-deadline:
				t.Fatalf("ui never became a local pod")
			}
		}
	})
	t.Run("certificates", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		b, err := certs.Bundle(ctx, ui)
		if err != nil {
			t.Fatal(err)
		}
		if b.ID != ui || !b.Valid(time.Now()) {
			t.Errorf("%v", b)
		}
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		nobody := mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "nobody"}
		if b, err := certs.Bundle(short, nobody); err == nil {
			t.Errorf("istiod signed for a service account without a pod here: %v", b)
		}
	})
	t.Run("a pod goes", func(t *testing.T) {
		ip := netip.MustParseAddr(k.ctl(t, "get", "pod", "ui", "-n", "shop", "-o", "jsonpath={.status.podIP}"))
		k.ctl(t, "delete", "pod", "ui", "-n", "shop", "--grace-period=1")
		eventually(t, "its removal", 30*time.Second, func() error {
			if w := store.Load().WorkloadAt(mesh.NetAddr{Addr: ip}); w != nil && w.Name == "ui" {
				return fmt.Errorf("%+v", w)
			}
			return nil
		})
	})
	for typ, s := range client.Status().Types {
		if s.NACKs > 0 {
			t.Errorf("%s was rejected: %s", typ, s.NACK)
		}
	}
}

// startIstiod runs istiod outside the cluster against its API server until the test ends.
func startIstiod(t *testing.T, bin string, k *kube, grpc string) {
	t.Helper()
	kubeconfig, err := k.command("kubeconfig").Output()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(bin, "discovery", "--kubeconfig", strings.TrimSpace(string(kubeconfig)), "--domain", "cluster.local",
		"--secureGRPCAddr", grpc, "--grpcAddr", "", "--httpAddr", freeAddr(t), "--httpsAddr", "", "--monitoringAddr", freeAddr(t),
		"--ctrlz_port", "0", "--keepaliveMaxServerConnectionAge", "30m", "--shutdownDuration", "1s")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "POD_NAME=istiod-0", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=istiod", "CLUSTER_ID=Kubernetes", "REVISION=default",
		"PILOT_ENABLE_AMBIENT=true", "CA_TRUSTED_NODE_ACCOUNTS=istio-system/warren-node", "PILOT_CERT_PROVIDER=istiod", "JWT_POLICY=third-party-jwt",
		"ENABLE_LEADER_ELECTION=false", "INJECT_ENABLED=false")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		timer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
		if t.Failed() {
			b := log.Bytes()
			t.Logf("istiod: %s", b[max(0, len(b)-20_000):])
		}
	})
}

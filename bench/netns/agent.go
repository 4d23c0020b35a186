package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/proxy"
)

// agentConfig is what an agent reads on its standard input; the end of that input is its end.
type agentConfig struct {
	Node       string   `json:"node"`
	CgroupRoot string   `json:"cgroupRoot"`
	BPFDir     string   `json:"bpfDir"`
	Encrypt    bool     `json:"encrypt"` // on the node too
	CAKey      []byte   `json:"caKey"`   // DER
	CACert     []byte   `json:"caCert"`  // DER
	Pods       []podRef `json:"pods"`    // of all nodes
}

// podRef is a captured pod.
type podRef struct {
	Name  string     `json:"name"`
	Node  string     `json:"node"`
	Addr  netip.Addr `json:"addr"`
	NetNS string     `json:"netns"` // path
}

func (p podRef) identity() mesh.Identity {
	return mesh.Identity{TrustDomain: "cluster.local", Namespace: "bench", ServiceAccount: p.Name}
}

func (p podRef) workload() string { return "bench//Pod/bench/" + p.Name }

// runAgent is a node agent without what it does not need where nothing changes: its kernel side, its proxy with the
// access log and the metrics, and a state of the mesh that it is told once.
func runAgent(ctx context.Context, in io.Reader, out io.Writer) (err error) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	var cfg agentConfig
	dec := json.NewDecoder(in)
	if err := dec.Decode(&cfg); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	certs, err := newAuthority(cfg.CAKey, cfg.CACert)
	if err != nil {
		return err
	}
	store := &mesh.Store{}
	store.Swap(cfg.snapshot())
	where := datapath.Config{Dir: cfg.BPFDir, CgroupRoot: cfg.CgroupRoot}
	dp, err := datapath.Open(ctx, where)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, dp.Close(), datapath.Uninstall(context.WithoutCancel(ctx), where))
	}()
	if err := errors.Join(dp.SetDestinations(datapath.Desired(store.Load(), "")), dp.SetPolicies(store.Load())); err != nil {
		return err
	}
	p, err := proxy.New(proxy.Config{Store: store, Certs: certs, Sockets: dp,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Access: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return err
	}
	defer func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 100*time.Millisecond)
		defer cancel()
		err = errors.Join(err, p.Close(grace))
	}()
	for _, pod := range cfg.Pods {
		if pod.Node != cfg.Node {
			continue
		}
		end, err := capture(dp, p, pod)
		if err != nil {
			return fmt.Errorf("pod %s: %w", pod.Name, err)
		}
		defer end()
	}
	unselected := map[string]bool{} // there are no NetworkPolicies
	for _, pod := range cfg.Pods {
		unselected["uid-"+pod.Name] = false
	}
	if err := errors.Join(dp.SetPolicies(store.Load()), dp.SetSelected(unselected)); err != nil {
		return err
	}
	for pod, why := range dp.Detours() {
		if why != datapath.NoDetour {
			fmt.Fprintf(os.Stderr, "direct connections of %s go through the node's stack: %s\n", pod, why)
		}
	}
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	running.Go(func() { // somebody has to read what the kernel reports
		for _, err := range dp.Events(ctx) {
			if err != nil {
				return
			}
		}
	})
	fmt.Fprintln(out, "ready")
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, io.MultiReader(dec.Buffered(), in))
		stop()
	}()
	<-ctx.Done()
	return nil
}

// snapshot is the state of the mesh.
func (c *agentConfig) snapshot() *mesh.Snapshot {
	b := mesh.NewBuilder(nil)
	same := mesh.SameNodeKernel
	if c.Encrypt {
		same = mesh.SameNodeEncrypt
	}
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local", Cluster: "bench", SameNode: same})
	for _, p := range c.Pods {
		b.PutWorkload(&mesh.Workload{UID: p.workload(), Name: p.Name, Namespace: "bench", Cluster: "bench", Node: p.Node, Addrs: []netip.Addr{p.Addr},
			Identity: p.identity(), Tunnel: mesh.TunnelHBONE, Healthy: true, WorkloadName: p.Name, CanonicalName: p.Name, Kind: mesh.KindDeployment})
	}
	return b.Commit(1)
}

// capture puts a pod into the mesh.
func capture(dp *datapath.Datapath, p *proxy.Proxy, pod podRef) (end func(), err error) {
	ns, err := netns.Open(pod.NetNS)
	if err != nil {
		return nil, err
	}
	listeners, err := datapath.Listen(ns)
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	end = func() {
		listeners.Close()
		ns.Close()
	}
	var serve proxy.Listeners
	for _, l := range []struct {
		f  *os.File
		to *[]net.Listener
	}{{listeners.Outbound, &serve.Outbound}, {listeners.Inbound, &serve.Inbound}, {listeners.HBONE, &serve.HBONE}} {
		x, err := net.FileListener(l.f)
		if err != nil {
			end()
			return nil, err
		}
		*l.to = []net.Listener{x}
	}
	uid := "uid-" + pod.Name
	if _, err := p.AddPod(proxy.Pod{UID: uid, WorkloadUID: pod.workload(), Identity: pod.identity(), Addrs: []netip.Addr{pod.Addr}, NetNS: ns}, serve); err != nil {
		end()
		return nil, err
	}
	err = dp.Enroll(datapath.Pod{UID: uid, Workload: pod.workload(), Identity: pod.identity(), NetNS: ns, Addrs: []netip.Addr{pod.Addr}, Listeners: listeners})
	if err != nil {
		end()
		return nil, err
	}
	return end, nil
}

// authority signs for every identity that it is asked for: the agents of a run share its key.
type authority struct {
	key  crypto.Signer
	cert *x509.Certificate
	root []byte // PEM

	mu      sync.Mutex
	bundles map[mesh.Identity]*identity.Bundle
}

// newRoot makes the key and the certificate of an authority, in DER.
func newRoot() (key, cert []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if cert, err = x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k); err != nil {
		return nil, nil, err
	}
	key, err = x509.MarshalECPrivateKey(k)
	return key, cert, err
}

func newAuthority(key, cert []byte) (*authority, error) {
	k, err := x509.ParseECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(cert)
	if err != nil {
		return nil, err
	}
	return &authority{key: k, cert: c, root: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), bundles: map[mesh.Identity]*identity.Bundle{}}, nil
}

// Bundle implements identity.Source.
func (a *authority) Bundle(_ context.Context, id mesh.Identity) (*identity.Bundle, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if b := a.bundles[id]; b != nil {
		return b, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter, URIs: []*url.URL{uri},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	b, err := identity.NewBundle(id, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), a.root)
	if err == nil {
		a.bundles[id] = b
	}
	return b, err
}

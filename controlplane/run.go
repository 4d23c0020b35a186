package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	istio "istio.io/client-go/pkg/clientset/versioned"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	gatewayclient "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	caapi "github.com/warrenmesh/warren/api/ca"
	nodeapi "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/controlplane/admission"
	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/ca"
	"github.com/warrenmesh/warren/controlplane/fetch"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/jwks"
	"github.com/warrenmesh/warren/controlplane/modules"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/status"
	"github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Clients are the ways to the API server.
type Clients struct {
	Kube  kubernetes.Interface
	Istio istio.Interface
	// Dynamic reads RateLimits, APIServices and CustomResourceDefinitions; nil leaves requests without limits, and the calls of
	// the others without exemption from STRICT.
	Dynamic dynamic.Interface
	// Gateways reads the Gateway API; without it there are no waypoints.
	Gateways gatewayclient.Interface
}

// placement shows the index's view of pods to the CA.
type placement struct{ *index.Source }

func (p placement) PodByName(namespace, name string) (ca.PlacedPod, bool) {
	f, ok := p.Source.PodByName(namespace, name)
	return ca.PlacedPod{
		UID: f.UID, ServiceAccount: f.ServiceAccount, Node: f.Node, Finished: f.Phase == index.PodFinished,
	}, ok
}

// controlPlane is one running replica.
type controlPlane struct {
	cfg     Config
	clients Clients
	metrics *prometheus.Registry

	store      mesh.Store
	source     *index.Source
	cache      *xds.Cache
	xds        *xds.Server
	envoys     *xds.Waypoints
	keys       *fetch.Keeper[policy.KeySource, string]
	modules    *fetch.Keeper[policy.ModuleSource, *mesh.Module]
	ca         *ca.Server
	authority  *ca.Authority
	authorizer *ca.Authorizer
	copies     []*ca.Copies // of what every namespace has
	events     *status.Events
	notices    *status.Notices
	nodes      *status.Nodes
	policies   *status.Policies
	routes     *status.Routes // nil without the Gateway API
	gateways   gatewayStates
	secrets    *followed[index.SecretKey, index.SecretState]
	roots      *followed[index.RootsKey, index.RootsState]
	parameters *parameters
	revisions  *revisions
	grpc       *grpc.Server
	serving    *ca.Serving
	admission  *admission.Server
	bundle     *admission.Bundle
	apiServer  atomic.Pointer[[]netip.Prefix] // from where the API server calls

	services prometheus.Gauge
	ready    atomic.Bool // everything that exists has been read, and there is a key
}

func newControlPlane(ctx context.Context, cfg Config, clients Clients) (*controlPlane, error) {
	cfg = cfg.Defaults()
	cfg, err := cfg.withConfigMap(ctx, clients.Kube)
	if err != nil {
		return nil, err
	}
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	log := cfg.Log
	cp := &controlPlane{cfg: cfg, clients: clients, metrics: newRegistry(cfg)}
	cp.services = prometheus.NewGauge(prometheus.GaugeOpts{Name: "pilot_services", Help: "Services of the mesh."})
	cp.metrics.MustRegister(cp.services)

	if cp.source, err = index.NewSource(clients.Kube, clients.Istio, cfg.Mesh, log.With("scope", "index")); err != nil {
		return nil, err
	}
	cp.source.Dynamic, cp.source.Gateways = clients.Dynamic, clients.Gateways
	cp.keys = jwks.New(cfg.KeysByHTTP, nil, func(from policy.KeySource, keys, problem string) {
		cp.source.SetKeys(from, index.KeyState{Keys: keys, Problem: problem})
	}, log.With("scope", "jwks"))
	cp.modules = modules.New(nil, func(ctx context.Context, name string) (map[string][]byte, error) {
		namespace, name, _ := strings.Cut(name, "/")
		s, err := clients.Kube.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return s.Data, nil
	}, func(from policy.ModuleSource, m *mesh.Module, problem string) {
		cp.source.SetModule(from, index.ModuleState{Module: m, Problem: problem})
	}, log.With("scope", "modules"))
	cp.secrets = newSecrets(clients.Kube, cp.source.SetSecret, log.With("scope", "secrets"))
	cp.roots = newRoots(clients.Kube, cp.source.SetRoots, log.With("scope", "secrets"))
	cp.parameters = newParameters(clients.Kube, cfg.Mesh.RootNamespace, log.With("scope", "deploy"))
	cp.revisions = &revisions{kube: clients.Kube, namespace: cfg.Namespace, log: log.With("scope", "deploy")}
	trusted := map[string]bool{}
	for _, a := range cfg.TrustedNodes {
		trusted[a] = true
	}
	callers := auth.New(clients.Kube, cfg.Mesh.TrustDomain)
	authorizer := &ca.Authorizer{
		TrustDomain: cfg.Mesh.TrustDomain, Nodes: trusted, Pods: placement{cp.source}, Grace: 300 * time.Millisecond,
	}
	cp.authorizer = authorizer
	cp.cache = xds.NewCache()
	cp.envoys = xds.NewWaypoints(log.With("scope", "xds"), cp.metrics)
	cp.xds = xds.NewServer(xds.Config{
		Callers: callers, NodeOf: authorizer.NodeOf, WaypointOf: cp.waypointOf, Waypoints: cp.envoys, Log: log.With("scope", "xds"), Metrics: cp.metrics,
		OnProgress: func() { cp.policies.Progress() },
		Replica:    xds.Replica{Namespace: cfg.Namespace, Pod: cfg.PodName, Version: cfg.Version},
	}, cp.cache)
	cp.policies = cp.newPolicies()
	if clients.Gateways != nil {
		cp.routes = status.NewRoutes(status.RoutesConfig{
			Object: status.RouteObjects(cp.source), Write: status.WriteRouteStatus(clients.Gateways), Ours: cp.saysOfRoutes, Log: log.With("scope", "status"), Metrics: cp.metrics,
		})
	}
	cp.envoys.OnProgress = cp.policies.Progress
	cp.ca = ca.NewServer(ca.Config{
		Callers: callers, Authorizer: authorizer, DefaultTTL: cfg.DefaultCertTTL, MaxTTL: cfg.MaxCertTTL, External: cfg.ExternalCA,
		Log: log.With("scope", "ca"), Metrics: cp.metrics,
	})
	cp.copies = []*ca.Copies{
		ca.NewRoots(clients.Kube, cp.ca.Standing, log.With("scope", "ca")), ca.NewLists(clients.Kube, cp.ca.Standing, log.With("scope", "ca")),
	}
	cp.events = status.NewEvents(clients.Kube)
	cp.authority = cp.newAuthority()
	cp.notices = status.NewNotices(cp.events)
	cp.nodes = status.NewNodes(status.Config{
		Kube: clients.Kube, Callers: callers, NodeOf: authorizer.NodeOf, Pods: cp.source, Events: cp.events,
		Log: log.With("scope", "status"), Metrics: cp.metrics,
	})
	cp.admission = cp.newAdmission()
	cp.bundle = &admission.Bundle{Client: clients.Kube, Root: cp.root, Log: log.With("scope", "admission")}
	cp.serving = &ca.Serving{
		Names:    cfg.dnsNames(),
		Identity: mesh.Identity{TrustDomain: cfg.Mesh.TrustDomain, Namespace: cfg.Namespace, ServiceAccount: cfg.ServiceAccount},
		Standing: cp.ca.Standing,
	}
	cp.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(cp.serving.TLS())),
		grpc.MaxConcurrentStreams(100_000),
		grpc.MaxRecvMsgSize(16<<20), // a reconnecting node lists what it has
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second,
			// Connections are renewed so that a replica which comes gets its share, and a token that was taken
			// back does not serve for ever.
			MaxConnectionAge: 30 * time.Minute, MaxConnectionAgeGrace: 10 * time.Second,
		}),
	)
	discovery.RegisterAggregatedDiscoveryServiceServer(cp.grpc, cp.xds)
	caapi.RegisterIstioCertificateServiceServer(cp.grpc, cp.ca)
	nodeapi.RegisterNodeStatusServer(cp.grpc, cp.nodes)
	return cp, nil
}

func (cp *controlPlane) run(ctx context.Context) error {
	defer cp.events.Close()
	if err := cp.authority.Begin(ctx); err != nil {
		return err
	}
	var lc net.ListenConfig
	var listeners []net.Listener
	for _, addr := range []string{cp.cfg.XDSAddr, cp.cfg.MonitoringAddr, cp.cfg.ReadyAddr, cp.cfg.AdmissionAddr} {
		if addr == "" {
			listeners = append(listeners, nil)
			continue
		}
		l, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			for _, l := range listeners {
				if l != nil {
					l.Close()
				}
			}
			return fmt.Errorf("listen on %s: %w", addr, err)
		}
		listeners = append(listeners, l)
	}
	g, ctx := errgroup.WithContext(ctx)
	synced := make(chan struct{})
	g.Go(func() error {
		err := cp.source.Run(ctx, func(u *index.Update) {
			cp.publish(u)
			if !cp.ready.Swap(true) {
				close(synced)
				workloads, services, policies := u.Snapshot.Len()
				cp.cfg.Log.Info("state of the cluster read", "workloads", workloads, "services", services, "policies", policies)
			}
		})
		return ended(ctx, err)
	})
	g.Go(func() error { cp.authority.Follow(ctx); return nil })
	g.Go(func() error { cp.keys.Run(ctx); return nil })
	g.Go(func() error { cp.modules.Run(ctx); return nil })
	g.Go(func() error { cp.secrets.run(ctx); return nil })
	g.Go(func() error { cp.roots.run(ctx); return nil })
	g.Go(func() error { cp.parameters.run(ctx); return nil })
	g.Go(func() error { cp.revisions.run(ctx); return nil })
	if l := listeners[0]; l != nil {
		g.Go(func() error { // only what has been read is served, and only then are pods known to the CA
			select {
			case <-ctx.Done():
				return l.Close()
			case <-synced:
			}
			cp.cfg.Log.Info("serving xDS and certificates", "address", l.Addr().String())
			return ended(ctx, cp.grpc.Serve(l))
		})
		g.Go(func() error { <-ctx.Done(); cp.grpc.Stop(); return nil })
	}
	if l := listeners[3]; l != nil {
		g.Go(func() error {
			select { // a webhook that does not answer yet is gone without
			case <-ctx.Done():
				return l.Close()
			case <-synced:
			}
			cp.cfg.Log.Info("serving admission reviews", "address", l.Addr().String())
			return ended(ctx, cp.admission.Serve(ctx, l, admission.HTTP1(cp.serving.TLS())))
		})
	}
	for i, h := range []http.Handler{cp.monitoring(), cp.readiness()} {
		if l := listeners[i+1]; l != nil {
			srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
			g.Go(func() error { return ended(ctx, srv.Serve(l)) })
			g.Go(func() error { <-ctx.Done(); return srv.Close() })
		}
	}
	g.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case <-synced:
		}
		return cp.lead(ctx)
	})
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// ended drops the error with which a server says that it was told to end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

// publish hands one Update to everybody who lives on it.
func (cp *controlPlane) publish(u *index.Update) {
	if err := cp.cache.Update(u); err != nil {
		cp.cfg.Log.Error("objects not published", "error", err)
	}
	cp.envoys.Update(u.Snapshot, cp.cache.Revision()) // before policies ask which pods do all that they are told
	cp.policies.Take(u, cp.cache.Revision())
	cp.store.Swap(u.Snapshot)
	_, services, _ := u.Snapshot.Len()
	cp.services.Set(float64(services))
	cp.apiServer.Store(&u.APIServer)
	cp.keys.Want(u.Keys)
	cp.modules.Want(u.Modules)
	cp.secrets.want(u.Secrets)
	cp.roots.want(u.Roots)
	cp.gateways.take(u.Gateways)
	cp.notices.Take(u.Notices)
	if cp.routes != nil {
		cp.routes.Take(u.Routes)
	}
	for name, ns := range u.Namespaces {
		for _, c := range cp.copies {
			if ns == nil {
				c.Forget(name)
			} else {
				c.Check(name)
			}
		}
	}
}

package controlplane

import (
	"net"
	"slices"
	"sync"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/deploy"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/status"
	"github.com/warrenmesh/warren/internal/mesh"
)

// WaypointConfig is what the pods of waypoints are made with.
type WaypointConfig struct {
	Image       string // "" makes none
	PullPolicy  string
	PullSecrets []string
}

// waypointOf returns the waypoint, or the gateway, that a caller is: a pod that runs under the service account that was made
// for a Gateway.
func (cp *controlPlane) waypointOf(c *auth.Caller) (mesh.ServiceName, bool) {
	id := c.Identity
	if !cp.source.IsWaypoint(id.Namespace, id.ServiceAccount) && cp.store.Load().Ingress(cp.cfg.Mesh.ServiceName(id.Namespace, id.ServiceAccount)) == nil {
		return mesh.ServiceName{}, false
	}
	if _, err := cp.authorizer.Own(c); err != nil {
		return mesh.ServiceName{}, false
	}
	return cp.cfg.Mesh.ServiceName(id.Namespace, id.ServiceAccount), true
}

// waypointState is what the mesh has of a waypoint.
func (cp *controlPlane) waypointState(namespace, name string) (addresses []string, ready int) {
	s := cp.store.Load()
	svc := s.Service(cp.cfg.Mesh.ServiceName(namespace, name))
	if svc == nil {
		return nil, 0
	}
	for _, vip := range svc.VIPs {
		addresses = append(addresses, vip.Addr.String())
	}
	slices.Sort(addresses)
	for w := range s.Endpoints(svc.Name) {
		if w.Healthy && (w.Tunnel == mesh.TunnelHBONE || s.Ingress(svc.Name) != nil) {
			ready++
		}
	}
	return addresses, ready
}

// gatewayStates is what the index makes of gateways.
type gatewayStates struct {
	mu  sync.Mutex
	all map[index.GatewayKey]*index.GatewayState
}

func (g *gatewayStates) take(changed map[index.GatewayKey]*index.GatewayState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for k, s := range changed {
		if s == nil {
			delete(g.all, k)
			continue
		}
		if g.all == nil {
			g.all = map[index.GatewayKey]*index.GatewayState{}
		}
		g.all[k] = s
	}
}

func (g *gatewayStates) get(namespace, name string) *index.GatewayState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all[index.GatewayKey{Namespace: namespace, Name: name}]
}

// deployer makes the pods of waypoints and gateways; nil where there is nothing to make them of.
func (cp *controlPlane) deployer() *deploy.Deployer {
	if cp.clients.Gateways == nil || cp.cfg.Waypoints.Image == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(cp.cfg.XDSAddr)
	if err != nil {
		port = "15012"
	}
	return &deploy.Deployer{
		Settings: deploy.Settings{
			Image: cp.cfg.Waypoints.Image, PullPolicy: cp.cfg.Waypoints.PullPolicy, PullSecrets: cp.cfg.Waypoints.PullSecrets,
			Service:   net.JoinHostPort(cp.cfg.ServiceNames[0]+"."+cp.cfg.Namespace+".svc", port),
			ClusterID: cp.cfg.Mesh.ClusterID, TrustDomain: cp.cfg.Mesh.TrustDomain, Revision: cp.cfg.Revision,
		},
		Kube: cp.clients.Kube, Gateways: cp.clients.Gateways,
		List:    func() ([]*gatewayv1.Gateway, bool) { return cp.source.OurGateways() },
		Classes: cp.source.Classes, Ingress: cp.gateways.get, Balanced: cp.source.Balanced, Sets: cp.source.ListenerSets,
		Exists: func(namespace, name string) bool {
			_, ok := cp.source.Object(index.Gateway, namespace, name)
			return ok
		},
		Claim: cp.claim, Secondary: cp.cfg.secondary(),
		State: cp.waypointState, Parameters: cp.parameters, Log: cp.cfg.Log.With("scope", "deploy"),
	}
}

// waypoints tells Services about the waypoints that they ask for.
func (cp *controlPlane) waypoints() *status.Waypoints {
	return &status.Waypoints{
		Kube: cp.clients.Kube, Wishes: cp.source.WaypointWishes, Log: cp.cfg.Log.With("scope", "status"),
		Ready: func(namespace, name string) bool {
			_, ready := cp.waypointState(namespace, name)
			return ready > 0
		},
	}
}

// addresses gives hosts of ServiceEntries addresses.
func (cp *controlPlane) addresses() *status.Addresses {
	return &status.Addresses{Istio: cp.clients.Istio, Entries: cp.source.ServiceEntries, Log: cp.cfg.Log.With("scope", "status")}
}

package controlplane

import (
	"net"
	"slices"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/deploy"
	"github.com/warrenmesh/warren/controlplane/status"
	"github.com/warrenmesh/warren/internal/mesh"
)

// WaypointConfig is what the pods of waypoints are made with.
type WaypointConfig struct {
	Image       string // "" makes none
	PullPolicy  string
	PullSecrets []string
}

// waypointName is the service that a Gateway's pods are behind.
func (cp *controlPlane) waypointName(namespace, name string) mesh.ServiceName {
	return mesh.ServiceName{Namespace: namespace, Hostname: name + "." + namespace + ".svc." + cp.cfg.Mesh.ClusterDomain}
}

// waypointOf returns the waypoint that a caller is: a pod that runs under the service account of a Gateway's name.
func (cp *controlPlane) waypointOf(c *auth.Caller) (mesh.ServiceName, bool) {
	id := c.Identity
	if !cp.source.IsWaypoint(id.Namespace, id.ServiceAccount) {
		return mesh.ServiceName{}, false
	}
	if _, err := cp.authorizer.Own(c); err != nil {
		return mesh.ServiceName{}, false
	}
	return cp.waypointName(id.Namespace, id.ServiceAccount), true
}

// waypointState is what the mesh has of a waypoint.
func (cp *controlPlane) waypointState(namespace, name string) (addresses []string, ready int) {
	s := cp.store.Load()
	svc := s.Service(cp.waypointName(namespace, name))
	if svc == nil {
		return nil, 0
	}
	for _, vip := range svc.VIPs {
		addresses = append(addresses, vip.Addr.String())
	}
	slices.Sort(addresses)
	for w := range s.Endpoints(svc.Name) {
		if w.Healthy && w.Tunnel == mesh.TunnelHBONE {
			ready++
		}
	}
	return addresses, ready
}

// deployer makes the pods of waypoints; nil where there is nothing to make them of.
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
		List:  func() ([]*gatewayv1.Gateway, bool) { return cp.source.Waypoints() },
		State: cp.waypointState, Log: cp.cfg.Log.With("scope", "deploy"),
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

package xds

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warrenmesh/warren/internal/mesh"
)

func TestSynced(t *testing.T) {
	now := time.Now()
	s := &Server{streams: map[*Stream]struct{}{
		{Node: "node2", Connected: now, self: described{version: "v1"}, types: map[string]TypeState{TypeAddress: {Sent: "7", Acked: "6"}, TypeAuthorization: {}}}:         {},
		{Node: "node1", Connected: now, types: map[string]TypeState{TypeAddress: {Sent: "7", Acked: "7"}, TypeAuthorization: {Sent: "7", Acked: "5", Nack: "too large"}}}: {},
	}, cfg: Config{Waypoints: &Waypoints{open: map[mesh.ServiceName]*told{
		{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}: {
			versions: map[string]string{"listener/a": "1", "listener/b": "2", "route/a": "3"},
			pods: map[*envoyPod]struct{}{
				{name: "way-1", active: map[string]string{"listener/a": "1", "listener/b": "1", "route/a": "3"}}: {},
			},
		},
	}}}}
	want := []Synced{
		{Proxy: "node1", Type: "node", ProxyType: "ztunnel", Connected: &now, States: map[string]string{"Address": "SYNCED", "Authorization": "REFUSED"}, Trouble: "too large"},
		{Proxy: "node2", Type: "node", ProxyType: "ztunnel", IstioVersion: "v1", Connected: &now, States: map[string]string{"Address": "STALE", "Authorization": "NOT SENT"}},
		{Proxy: "way-1", Namespace: "shop", Waypoint: "way", Type: "waypoint", ProxyType: "waypoint", States: map[string]string{"listener": "STALE", "route": "SYNCED"}},
	}
	if d := cmp.Diff(want, s.Synced()); d != "" {
		t.Error(d)
	}
}

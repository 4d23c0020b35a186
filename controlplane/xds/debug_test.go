package xds

import (
	"testing"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	statusv3 "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// What a waypoint acknowledged and does not do is stale, what it rejected is an error, and its dump has what it was sent.
func TestDebugOfAWaypoint(t *testing.T) {
	name := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	r, err := waypoint.NewWriter(name).Write(&mesh.Snapshot{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	active := map[string]string{}
	for n, version := range r.Versions(envoyresource.ListenerType) {
		active[waypoint.ActiveKey(envoyresource.ListenerType, n)] = version
	}
	if len(active) == 0 {
		t.Fatal("a waypoint without listeners proves nothing")
	}
	told1 := map[string]TypeState{envoyresource.ListenerType: {Sent: "1", Acked: "1"}, envoyresource.ClusterType: {Sent: "2", Acked: "1"}, envoyresource.RouteType: {}}
	way := &told{pods: map[*envoyPod]struct{}{
		{name: "way-1", self: described{proxy: "way-1.shop", namespace: "elsewhere", version: "v1"}, active: active, told: told1}: {},
		{name: "way-2", told: told1, nack: map[string]string{envoyresource.ClusterType: "too many"}}:                              {},
	}}
	way.sent(r)
	w := &Waypoints{open: map[mesh.ServiceName]*told{name: way}}
	s := &Server{cfg: Config{Waypoints: w}, streams: map[*Stream]struct{}{}}
	want := map[string]map[string]statusv3.ConfigStatus{
		"way-1.shop": {envoyresource.ListenerType: statusv3.ConfigStatus_SYNCED, envoyresource.ClusterType: statusv3.ConfigStatus_STALE, envoyresource.RouteType: statusv3.ConfigStatus_NOT_SENT},
		"way-2.shop": {envoyresource.ListenerType: statusv3.ConfigStatus_STALE, envoyresource.ClusterType: statusv3.ConfigStatus_ERROR, envoyresource.RouteType: statusv3.ConfigStatus_NOT_SENT},
	}
	all := s.clients()
	if len(all) != len(want) {
		t.Fatalf("clients %v", all)
	}
	for _, c := range all {
		if ns := c.Node.Metadata.Fields["NAMESPACE"].GetStringValue(); ns != "shop" {
			t.Errorf("%s is in %s, which it only says", c.Node.Id, ns)
		}
		if len(c.GenericXdsConfigs) != len(want[c.Node.Id]) {
			t.Errorf("%s: %v", c.Node.Id, c.GenericXdsConfigs)
		}
		for _, g := range c.GenericXdsConfigs {
			if g.ConfigStatus != want[c.Node.Id][g.TypeUrl] {
				t.Errorf("%s, %s: %s, want %s", c.Node.Id, g.TypeUrl, g.ConfigStatus, want[c.Node.Id][g.TypeUrl])
			}
			if g.ConfigStatus == statusv3.ConfigStatus_ERROR && g.ErrorState.GetDetails() != "too many" {
				t.Errorf("%s does not say why: %v", c.Node.Id, g.ErrorState)
			}
		}
	}

	if w.resources("way-3.shop") != nil || w.resources("way-1.other") != nil {
		t.Error("pods that are not there have resources")
	}
	dump, err := configDump(w.resources("way-1.shop"))
	if err != nil {
		t.Fatal(err)
	}
	var listeners adminv3.ListenersConfigDump
	if len(dump) != 4 || dump[2].UnmarshalTo(&listeners) != nil || len(listeners.DynamicListeners) != len(active) {
		t.Errorf("the dump is %v", dump)
	}
}

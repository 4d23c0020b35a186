package controlplane

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/warrenmesh/warren/controlplane/xds"
)

// ask makes one request of the state-of-the-world variant, as istioctl does, and acknowledges the answer.
func (c *cluster) ask(token string, req *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	c.Helper()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(c.dial()).StreamAggregatedResources(as(c.Context(), token))
	if err != nil {
		c.Fatal(err)
	}
	if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) { // the stream has ended already: Recv says why
		c.Fatal(err)
	}
	res, err := stream.Recv()
	if err == nil {
		_ = stream.Send(&discovery.DiscoveryRequest{TypeUrl: req.TypeUrl, ResponseNonce: res.Nonce})
		_ = stream.CloseSend()
		if more, err := stream.Recv(); err == nil {
			c.Errorf("an acknowledgement is answered: %v", more)
		}
	}
	return res, err
}

// istioctl learns of every client how far it is, with a token that only who may make one has.
func TestIstioctlAsks(t *testing.T) {
	c := start(t)
	sync := &discovery.DiscoveryRequest{TypeUrl: "istio.io/debug/syncz", Node: &core.Node{Id: "sidecar~10.0.0.9~test-1.default~default.svc.cluster.local"},
		ResponseNonce: "2026-11-22 15:30:00 +0000 UTC"}
	w := c.watch("node-1")
	if err := w.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: xds.TypeAddress, Node: &core.Node{
		Id: "ztunnel~10.0.0.1~warren-node-a.istio-system~istio-system.svc.cluster.local",
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"NAMESPACE": structpb.NewStringValue("istio-system"), "CLUSTER_ID": structpb.NewStringValue("Kubernetes"), "WARREN_VERSION": structpb.NewStringValue("1.2.3")}},
	}}); err != nil {
		t.Fatal(err)
	}
	w.have[xds.TypeAddress] = map[string]*discovery.Resource{}
	w.next()
	type client struct { // envoy.service.status.v3.ClientConfig
		Node struct {
			ID       string
			Metadata map[string]string
		}
		GenericXdsConfigs []struct{ TypeURL, ConfigStatus, LastUpdated string }
	}
	var res *discovery.DiscoveryResponse
	var got client
	c.eventually("the node is synced", func() bool {
		var err error
		if res, err = c.ask("istioctl", sync); err != nil {
			t.Fatal(err)
		}
		if len(res.Resources) != 1 {
			t.Fatalf("of one node it says %v", res.Resources)
		}
		m, err := res.Resources[0].UnmarshalNew()
		if err != nil {
			t.Fatal(err)
		}
		b, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		got = client{}
		if err := json.Unmarshal(b, &got); err != nil {
			t.Fatal(err)
		}
		return len(got.GenericXdsConfigs) == 1 && got.GenericXdsConfigs[0].ConfigStatus == "SYNCED"
	})
	if g := got.GenericXdsConfigs[0]; g.TypeURL != xds.TypeAddress || g.LastUpdated == "" {
		t.Errorf("of the type: %v", g)
	}
	if n := got.Node; n.ID != "warren-node-a.istio-system" || n.Metadata["ISTIO_VERSION"] != "1.2.3" || n.Metadata["CLUSTER_ID"] != "Kubernetes" || n.Metadata["NAMESPACE"] != "istio-system" {
		t.Errorf("the node is %v", n)
	}
	if id := res.ControlPlane.GetIdentifier(); !strings.Contains(id, `"ID":"warren-control"`) || !strings.Contains(id, `"version":"1.2.3"`) {
		t.Errorf("the control plane is %s", id)
	}

	// Where the pod is not connected to this replica, istioctl is told to ask the next one.
	res, err := c.ask("istioctl", &discovery.DiscoveryRequest{TypeUrl: "istio.io/debug/config_dump", ResourceNames: []string{"way-1.shop"}})
	if err != nil || len(res.Resources) != 1 || !strings.Contains(string(res.Resources[0].Value), "not connected to this Pilot instance") {
		t.Errorf("a pod that is not there: %v, %v", res, err)
	}

	for _, tt := range []struct {
		name, token string
		req         *discovery.DiscoveryRequest
		code        codes.Code
	}{
		{"a node agent", "node-1", sync, codes.PermissionDenied},
		{"an application", "app", sync, codes.PermissionDenied},
		{"a pod under istioctl's account", "istioctl-in-a-pod", sync, codes.PermissionDenied},
		{"istioctl's account of another namespace", "istioctl-of-shop", sync, codes.PermissionDenied},
		{"another audience", "foreign", sync, codes.Unauthenticated},
		{"nobody", "nobody", sync, codes.Unauthenticated},
		{"what Envoys ask for", "istioctl", &discovery.DiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster"}, codes.InvalidArgument},
		{"a dump of nobody", "istioctl", &discovery.DiscoveryRequest{TypeUrl: "istio.io/debug/config_dump"}, codes.InvalidArgument},
	} {
		if res, err := c.ask(tt.token, tt.req); status.Code(err) != tt.code {
			t.Errorf("%s gets %v, %v; want %s", tt.name, res, err, tt.code)
		}
	}
}

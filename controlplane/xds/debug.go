package xds

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"strings"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statusv3 "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/waypoint"
)

// What istioctl asks istiod for, by type (pilot/pkg/xds/statusgen.go of istio/istio).
const (
	typeDebugSync       = "istio.io/debug/syncz"       // of every client how far it is, as envoy.service.status.v3.ClientConfig
	typeDebugConfigDump = "istio.io/debug/config_dump" // of the pod that is named, pod.namespace, what it was sent, as parts of envoy.admin.v3.ConfigDump
)

// istioctlAccount is the service account of the control plane's namespace that istioctl makes tokens of. Nothing runs under
// it: who can make one has the rights to in the Kubernetes API.
const istioctlAccount = "default"

// notHere is how istioctl knows that it has to ask another replica.
const notHere = "Proxy not connected to this Pilot instance. It may be connected to another instance."

// Replica is who answers istioctl.
type Replica struct {
	Namespace, Pod, Version string
}

// identifier is the control plane of a response as istioctl reads it.
func (r Replica) identifier() (string, error) {
	type build struct {
		Version       string `json:"version"`
		GolangVersion string `json:"golang_version"`
		Status        string `json:"status"`
		Tag           string `json:"tag"`
	}
	b, err := json.Marshal(struct {
		Component, ID string
		Info          build
	}{"istiod", r.Pod, build{r.Version, runtime.Version(), "Clean", r.Version}})
	return string(b), err
}

// described is what a client says of itself. Nothing is decided by it.
type described struct {
	proxy                       string // pod.namespace
	namespace, cluster, version string
}

// describe reads what nodes and waypoints say: KIND~ADDRESS~POD.NAMESPACE, and for nodes ~DOMAIN.
func describe(n *core.Node) described {
	parts := strings.Split(n.GetId(), "~")
	if len(parts) < 3 || len(n.GetId()) > 512 {
		return described{}
	}
	field := func(name string) string { return clip(n.GetMetadata().GetFields()[name].GetStringValue()) }
	return described{
		proxy: parts[2], namespace: field("NAMESPACE"), cluster: field("CLUSTER_ID"),
		version: cmp.Or(field("WARREN_VERSION"), field("ISTIO_VERSION")), // the latter is a ztunnel's
	}
}

func (s *Stream) described() described {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.self
}

// StreamAggregatedResources answers istioctl, which asks for one of its debug types. Clients of the mesh use the delta
// variant.
func (s *Server) StreamAggregatedResources(stream grpc.BidiStreamingServer[discovery.DiscoveryRequest, discovery.DiscoveryResponse]) error {
	ctx := stream.Context()
	caller, err := s.cfg.Callers.Authenticate(ctx)
	if err == nil {
		err = s.mayDebug(caller)
	}
	if err != nil {
		s.m.refused.Inc()
		s.cfg.Log.Warn("debugging by xDS refused", "peer", auth.PeerAddr(ctx), "error", err)
		return err
	}
	identifier, err := s.cfg.Replica.identifier()
	if err != nil {
		return err
	}
	nonce := ""
	for n := 1; ; n++ {
		req, err := stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if nonce != "" && req.ResponseNonce == nonce { // it has the answer; in a question istioctl has a nonce of its own
			continue
		}
		resources, err := s.debug(req)
		if err != nil {
			return err
		}
		nonce = strconv.Itoa(n)
		if err := stream.Send(&discovery.DiscoveryResponse{
			TypeUrl: req.TypeUrl, Nonce: nonce, VersionInfo: strconv.FormatUint(s.cache.Revision(), 10),
			Resources: resources, ControlPlane: &core.ControlPlane{Identifier: identifier},
		}); err != nil {
			return err
		}
	}
}

// mayDebug refuses whoever did not get a token of istioctl's account from the API server. A token that is bound to a pod
// came from that pod.
func (s *Server) mayDebug(c *auth.Caller) error {
	if c.ByToken && c.PodName == "" && c.Identity.Namespace == s.cfg.Replica.Namespace && c.Identity.ServiceAccount == istioctlAccount {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "xDS refused: %s is not istioctl, which asks with a token made for the service account %s/%s; "+
		"clients of the mesh use the delta protocol", c.ServiceAccount(), s.cfg.Replica.Namespace, istioctlAccount)
}

func (s *Server) debug(req *discovery.DiscoveryRequest) ([]*anypb.Any, error) {
	switch req.TypeUrl {
	case typeDebugSync:
		return packed(s.clients())
	case typeDebugConfigDump:
		if len(req.ResourceNames) != 1 {
			return nil, status.Errorf(codes.InvalidArgument, "%s is asked for by one name, POD.NAMESPACE, not by %d", req.TypeUrl, len(req.ResourceNames))
		}
		if s.cfg.Waypoints != nil {
			if r := s.cfg.Waypoints.resources(req.ResourceNames[0]); r != nil {
				return configDump(r)
			}
		}
		return []*anypb.Any{{Value: []byte(notHere)}}, nil
	}
	return nil, status.Errorf(codes.InvalidArgument, "type %q is not served here: %s and %s are", req.TypeUrl, typeDebugSync, typeDebugConfigDump)
}

// clients are the nodes and waypoints that are connected, by name.
func (s *Server) clients() []*statusv3.ClientConfig {
	var out []*statusv3.ClientConfig
	for _, st := range s.Streams() {
		d := st.described()
		d.proxy = cmp.Or(d.proxy, st.Node)
		out = append(out, d.config(st.Types(), nil))
	}
	if s.cfg.Waypoints != nil {
		out = append(out, s.cfg.Waypoints.clients()...)
	}
	slices.SortFunc(out, func(a, b *statusv3.ClientConfig) int { return cmp.Compare(a.Node.Id, b.Node.Id) })
	return out
}

func (w *Waypoints) clients() []*statusv3.ClientConfig {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []*statusv3.ClientConfig
	for name, t := range w.open {
		for p := range t.pods {
			d := p.self
			d.proxy, d.namespace = cmp.Or(d.proxy, p.name+"."+name.Namespace), name.Namespace
			types := maps.Clone(p.told)
			stale, kinds := map[string]bool{}, t.stale(p) // acknowledged, and not what Envoy does
			for _, url := range waypoint.ActiveTypes {
				stale[url] = kinds[activeKind(waypoint.ActiveKey(url, ""))]
			}
			for url, why := range p.nack {
				x := types[url]
				x.Nack = why
				types[url] = x
			}
			out = append(out, d.config(types, stale))
		}
	}
	return out
}

var debugStates = map[string]statusv3.ConfigStatus{
	stateSynced: statusv3.ConfigStatus_SYNCED, stateStale: statusv3.ConfigStatus_STALE,
	stateNotSent: statusv3.ConfigStatus_NOT_SENT, stateRefused: statusv3.ConfigStatus_ERROR,
}

func (d described) config(types map[string]TypeState, stale map[string]bool) *statusv3.ClientConfig {
	c := &statusv3.ClientConfig{Node: &core.Node{Id: d.proxy, Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
		"CLUSTER_ID": structpb.NewStringValue(d.cluster), "NAMESPACE": structpb.NewStringValue(d.namespace), "ISTIO_VERSION": structpb.NewStringValue(d.version),
	}}}}
	for _, url := range slices.Sorted(maps.Keys(types)) {
		t := types[url]
		state := t.state()
		if state == stateSynced && stale[url] {
			state = stateStale
		}
		g := &statusv3.ClientConfig_GenericXdsConfig{TypeUrl: url, ConfigStatus: debugStates[state]}
		if !t.At.IsZero() {
			g.LastUpdated = timestamppb.New(t.At)
		}
		if t.Nack != "" {
			g.ErrorState = &adminv3.UpdateFailureState{Details: t.Nack, LastUpdateAttempt: g.LastUpdated}
		}
		c.GenericXdsConfigs = append(c.GenericXdsConfigs, g)
	}
	return c
}

// resources are what a waypoint's or a gateway's pod that is connected here was sent; nil for others.
func (w *Waypoints) resources(proxy string) *waypoint.Resources {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, t := range w.open {
		for p := range t.pods {
			if p.name+"."+name.Namespace == proxy {
				return t.resources
			}
		}
	}
	return nil
}

// configDump is what istioctl compares with Envoy's own /config_dump. Keys are not part of it.
func configDump(r *waypoint.Resources) ([]*anypb.Any, error) {
	clusters, listeners, routes := &adminv3.ClustersConfigDump{}, &adminv3.ListenersConfigDump{}, &adminv3.RoutesConfigDump{}
	for url, add := range map[string]func(name string, r *anypb.Any){
		envoyresource.ClusterType: func(_ string, r *anypb.Any) {
			clusters.DynamicActiveClusters = append(clusters.DynamicActiveClusters, &adminv3.ClustersConfigDump_DynamicCluster{Cluster: r})
		},
		envoyresource.ListenerType: func(name string, r *anypb.Any) {
			listeners.DynamicListeners = append(listeners.DynamicListeners, &adminv3.ListenersConfigDump_DynamicListener{
				Name: name, ActiveState: &adminv3.ListenersConfigDump_DynamicListenerState{Listener: r}})
		},
		envoyresource.RouteType: func(_ string, r *anypb.Any) {
			routes.DynamicRouteConfigs = append(routes.DynamicRouteConfigs, &adminv3.RoutesConfigDump_DynamicRouteConfig{RouteConfig: r})
		},
	} {
		all := r.ByName(url)
		for _, name := range slices.Sorted(maps.Keys(all)) {
			b, err := anypb.New(all[name])
			if err != nil {
				return nil, err
			}
			add(name, b)
		}
	}
	return packed([]proto.Message{&adminv3.BootstrapConfigDump{}, clusters, listeners, routes})
}

func packed[M proto.Message](all []M) ([]*anypb.Any, error) {
	out := make([]*anypb.Any, 0, len(all))
	for _, m := range all {
		b, err := anypb.New(m)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

package xds

import (
	"strings"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoytypes "github.com/envoyproxy/go-control-plane/pkg/cache/types"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/waypoint"
)

// lateNames are endpoints that an Envoy asks for of a cluster which has changed since it was told of it, and who asks. As long as it has
// none of them it says nothing of clusters either, and so is not told of the one that there is instead: it would wait for ever. It
// is given those of the cluster as it is now.
type lateNames map[string]map[*envoyPod]struct{}

// lateVersion is the version of all of them: one that was given is not given again, since its cluster goes.
const lateVersion = "late"

// forget drops what a pod has asked for.
func (l lateNames) forget(p *envoyPod) {
	for name, pods := range l {
		if delete(pods, p); len(pods) == 0 {
			delete(l, name)
		}
	}
}

// endpoints are what is given for the names.
func (l lateNames) endpoints(r *waypoint.Resources) map[string]envoytypes.Resource {
	if len(l) == 0 {
		return nil
	}
	have, now := r.ByName(envoyresource.EndpointType), map[string]*endpointv3.ClusterLoadAssignment{}
	for name, res := range have {
		if e, ok := res.(*endpointv3.ClusterLoadAssignment); ok {
			now[clusterOf(name)] = e
		}
	}
	out := map[string]envoytypes.Resource{}
	for name := range l {
		if have[name] != nil {
			continue
		}
		e := &endpointv3.ClusterLoadAssignment{}
		if is := now[clusterOf(name)]; is != nil {
			e = proto.Clone(is).(*endpointv3.ClusterLoadAssignment)
		}
		e.ClusterName = name
		out[name] = e
	}
	return out
}

// clusterOf is the cluster that endpoints are of, in whatever state.
func clusterOf(name string) string {
	if i := strings.LastIndexByte(name, '@'); i >= 0 {
		return name[:i]
	}
	return name
}

// asked notes which endpoints an Envoy wants, before the library answers.
func (h heard) asked(req *discovery.DeltaDiscoveryRequest) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	late := h.told.late
	for _, name := range req.ResourceNamesUnsubscribe {
		if delete(late[name], h.pod); len(late[name]) == 0 {
			delete(late, name)
		}
	}
	r, news := h.told.resources, false
	if r == nil {
		return // nothing has been told of any cluster
	}
	for _, name := range req.ResourceNamesSubscribe {
		if name == "*" || r.ByName(envoyresource.EndpointType)[name] != nil {
			continue
		}
		if late[name] == nil {
			late[name], news = map[*envoyPod]struct{}{}, true
		}
		late[name][h.pod] = struct{}{}
	}
	if !news {
		return
	}
	if err := h.w.send(h.told, r); err != nil {
		h.log.Error("endpoints of a cluster that has changed are not sent", "error", err)
	}
}

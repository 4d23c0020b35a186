package controlplane

import (
	"context"
	"log/slog"
	"maps"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/deploy"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

// ownersEvery is how often it is looked whether Gateways went over to another control plane.
const ownersEvery = time.Second

// revisions follows which control planes there are and what they are called.
type revisions struct {
	kube      kubernetes.Interface
	namespace string
	log       *slog.Logger

	known atomic.Pointer[revision.Known]    // nil until it has been read
	away  atomic.Pointer[map[string]string] // nodes whose agents ask another control plane, with its revision
}

// run follows the Services that say so until ctx ends.
func (r *revisions) run(ctx context.Context) {
	factory := informers.NewSharedInformerFactoryWithOptions(r.kube, 0, informers.WithNamespace(r.namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = revision.Label }))
	informer := factory.Core().V1().Services().Informer()
	again := func(any) {
		if !informer.HasSynced() {
			return
		}
		var services []revision.Service
		for _, o := range informer.GetStore().List() {
			if s, ok := o.(*corev1.Service); ok && s.DeletionTimestamp == nil {
				services = append(services, s.Labels)
			}
		}
		known := revision.Read(services)
		if was := r.known.Swap(&known); was != nil && !was.Equal(known) {
			r.log.Info("control planes or tags changed", "revisions", len(known.Revisions), "tags", len(known.Tags))
		}
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: again, UpdateFunc: func(_, o any) { again(o) }, DeleteFunc: again}); err != nil {
		r.log.Error("other control planes are not followed", "namespace", r.namespace, "error", err)
		return
	}
	factory.Start(ctx.Done())
	if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		again(nil)
	}
	<-ctx.Done()
	factory.Shutdown()
}

// secondary reports whether this control plane is one beside that which does what there is once in a mesh: which the agents ask,
// or Istio's.
func (c Config) secondary() bool { return c.Revision != revision.Default }

// owner is the revision whose a Gateway is, or why it is nobody's; known is false until that can be told.
func (cp *controlPlane) owner(g *gatewayv1.Gateway) (owner, problem string, known bool) {
	all := cp.revisions.known.Load()
	o, ok := cp.source.Object(index.Namespace, "", g.Namespace)
	ns, is := o.(*corev1.Namespace)
	if all == nil || !ok || !is {
		return "", "", false
	}
	owner, problem = all.Owner(revision.Asked(g.Labels, ns.Labels))
	return owner, problem, true
}

// claim is [deploy.Deployer.Claim].
func (cp *controlPlane) claim(g *gatewayv1.Gateway) deploy.Claim {
	owner, problem, known := cp.owner(g)
	if !known {
		return deploy.Claim{}
	}
	c := deploy.Claim{Mine: owner == cp.cfg.Revision}
	if !cp.cfg.secondary() {
		c.Problem = problem
	}
	return c
}

// ownerOf is the revision that says what becomes of things at a Gateway: its own, or the default one where it is nobody's.
func (cp *controlPlane) ownerOf(namespace, name string) string {
	o, _ := cp.source.Object(index.Gateway, namespace, name)
	g, ok := o.(*gatewayv1.Gateway)
	if !ok {
		return revision.Default
	}
	if owner, _, known := cp.owner(g); known && owner != "" {
		return owner
	}
	return revision.Default
}

// tells is the revision whose control plane tells a waypoint or gateway what it does. The Service that was made for a Gateway
// names it; one that somebody else made says whom its pods ask.
func (cp *controlPlane) tells(name mesh.ServiceName) string {
	short, _, _ := strings.Cut(name.Hostname, ".")
	o, _ := cp.source.Object(index.Service, name.Namespace, short)
	svc, ok := o.(*corev1.Service)
	if !ok {
		return cp.ownerOf(name.Namespace, short)
	}
	if gateway := svc.Labels[policy.LabelGateway]; gateway != "" {
		return cp.ownerOf(name.Namespace, gateway)
	}
	if all := cp.revisions.known.Load(); all != nil {
		if owner, _ := all.Owner(revision.Asked(svc.Labels, nil)); owner != "" {
			return owner
		}
	}
	return revision.Default
}

// saysOfRoutes reports whether this control plane says what becomes of a route at one of its parents: the one that owns the
// Gateway does; of Services, the default one.
func (cp *controlPlane) saysOfRoutes(k index.RouteKey, ref gatewayv1.ParentReference) bool {
	ns, kind := k.Namespace, "Gateway"
	if ref.Namespace != nil {
		ns = string(*ref.Namespace)
	}
	if ref.Kind != nil {
		kind = string(*ref.Kind)
	}
	name := string(ref.Name)
	switch kind {
	case "ListenerSet":
		o, _ := cp.source.Object(index.ListenerSet, ns, name)
		set, ok := o.(*gatewayv1.ListenerSet)
		if !ok {
			return !cp.cfg.secondary()
		}
		name = string(set.Spec.ParentRef.Name)
		if n := set.Spec.ParentRef.Namespace; n != nil {
			ns = string(*n)
		}
	case "Gateway":
	default:
		return !cp.cfg.secondary()
	}
	return cp.ownerOf(ns, name) == cp.cfg.Revision
}

// awayNow are the nodes whose agents ask another control plane than the default one: their pods say so by its revision.
func (cp *controlPlane) awayNow() map[string]string {
	out := map[string]string{}
	for p := range cp.source.SeenPods(cp.cfg.Namespace) {
		if rev := p.Labels[revision.Label]; p.Labels["app"] == "ztunnel" && p.Node != "" && !p.Ending && rev != "" && rev != revision.Default {
			out[p.Node] = rev
		}
	}
	return out
}

// away is what awayNow was when it was last looked at.
func (cp *controlPlane) away() map[string]string {
	if m := cp.revisions.away.Load(); m != nil {
		return *m
	}
	return nil
}

// followOwners has statuses looked at again where Gateways, or agents, went over to another control plane, until ctx ends.
func (cp *controlPlane) followOwners(ctx context.Context) {
	var was map[types.UID]string
	tick := time.NewTicker(ownersEvery)
	defer tick.Stop()
	for {
		if list, ok := cp.source.OurGateways(); ok && cp.revisions.known.Load() != nil {
			now := map[types.UID]string{}
			for _, g := range list {
				owner, _, _ := cp.owner(g)
				now[g.UID] = owner
			}
			away := cp.awayNow()
			left := !maps.Equal(away, cp.away())
			cp.revisions.away.Store(&away)
			if moved(was, now) || left {
				cp.policies.Again()
				cp.routes.Again()
			}
			was = now
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// moved reports whether a Gateway has another owner than it had. Before the first look they were taken for the default one's.
func moved(was, now map[types.UID]string) bool {
	for uid, owner := range now {
		before, there := was[uid]
		if there && owner != before || was == nil && owner != revision.Default {
			return true
		}
	}
	return false
}

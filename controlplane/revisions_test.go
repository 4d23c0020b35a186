package controlplane

import (
	"context"
	"log/slog"
	"testing"
	"time"

	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	fakediscovery "k8s.io/client-go/discovery/fake"
	"k8s.io/client-go/kubernetes/fake"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"

	"github.com/warrenmesh/warren/controlplane/deploy"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

// Two control planes of one mesh have one root, which the default one makes; each Gateway is one's; and what there is once in a
// mesh the default one does.
func TestTwoControlPlanes(t *testing.T) {
	labelled := func(kv ...string) map[string]string {
		out := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			out[kv[i]] = kv[i+1]
		}
		return out
	}
	service := func(namespace, name string, kv ...string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labelled(kv...)}}
	}
	kube := fake.NewClientset(
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "istio-system"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "pay", Labels: labelled(revision.Label, "next")}},
		service("istio-system", "istiod-next", "app", "istiod", revision.Label, "next"),
		service("istio-system", "istiod-revision-tag-prod", revision.TagLabel, "prod", revision.Label, "next"),
		service("pay", "edge-istio", policy.LabelGateway, "edge"), service("shop", "chart", revision.Label, "prod"), service("shop", "plain"),
	)
	kube.Discovery().(*fakediscovery.FakeDiscovery).Resources = []*metav1.APIResourceList{
		{GroupVersion: gatewayv1.GroupVersion.String(), APIResources: []metav1.APIResource{{Name: "gateways"}, {Name: "listenersets"}}}}
	gateways := gatewayfake.NewSimpleClientset()
	gateway := func(namespace, name, class string, kv ...string) *gatewayv1.Gateway {
		g := &gatewayv1.Gateway{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labelled(kv...)}, Spec: gatewayv1.GatewaySpec{GatewayClassName: gatewayv1.ObjectName(class)}}
		if _, err := gateways.GatewayV1().Gateways(namespace).Create(t.Context(), g, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		return g
	}
	all := []*gatewayv1.Gateway{
		gateway("shop", "way", index.WaypointClass), gateway("shop", "tagged", index.WaypointClass, revision.Label, "prod"), gateway("shop", "lost", index.WaypointClass, revision.Label, "nobody"),
		gateway("pay", "edge", index.IngressClass), gateway("pay", "home", index.WaypointClass, revision.Label, revision.Default),
	}
	set := &gatewayv1.ListenerSet{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "more"}, Spec: gatewayv1.ListenerSetSpec{ParentRef: gatewayv1.ParentGatewayReference{Name: "edge", Namespace: new(gatewayv1.Namespace("pay"))}}}
	if _, err := gateways.GatewayV1().ListenerSets("shop").Create(t.Context(), set, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	begin := func(rev string) *controlPlane {
		cp, err := newControlPlane(t.Context(), Config{Revision: rev, PodName: "control-" + rev, Log: slog.New(slog.DiscardHandler)},
			Clients{Kube: kube, Istio: istiofake.NewSimpleClientset(), Gateways: gateways})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- cp.run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("run: %v", err)
			}
		})
		return cp
	}
	next := begin("next")
	time.Sleep(50 * time.Millisecond)
	if _, err := kube.CoreV1().Secrets("istio-system").Get(t.Context(), "istio-ca-secret", metav1.GetOptions{}); !apierrors.IsNotFound(err) || next.ready.Load() {
		t.Errorf("a control plane that joins has made a root, or goes on without one: %v", err)
	}
	home := begin(revision.Default)
	c := &cluster{T: t, kube: kube}
	c.eventually("both are ready", func() bool {
		return next.ready.Load() && home.ready.Load() && next.revisions.known.Load() != nil && home.revisions.known.Load() != nil
	})
	if string(next.root()) != string(home.root()) || len(home.root()) == 0 {
		t.Error("there are two roots")
	}
	for _, lease := range []string{"warren-control-leader", "warren-control-leader-next"} {
		c.eventually("each has a leader of its own", func() bool {
			l, err := kube.CoordinationV1().Leases("istio-system").Get(t.Context(), lease, metav1.GetOptions{})
			return err == nil && held(l)
		})
	}
	c.eventually("the namespaces have the root", func() bool {
		_, err := kube.CoreV1().ConfigMaps("shop").Get(t.Context(), "istio-ca-root-cert", metav1.GetOptions{})
		return err == nil
	})
	if names := next.cfg.dnsNames(); names[0] != "istiod-next.istio-system.svc" || home.cfg.dnsNames()[0] != "istiod.istio-system.svc" {
		t.Errorf("the second one's certificate is for %v", names)
	}

	c.eventually("the Gateways are read", func() bool {
		list, ok := next.source.OurGateways()
		more, ok2 := home.source.OurGateways()
		return ok && ok2 && len(list) == len(all) && len(more) == len(all) && len(next.source.ListenerSets()) == 1 && len(home.source.ListenerSets()) == 1
	})
	for i, of := range []string{revision.Default, "next", "", "next", revision.Default} {
		for _, cp := range []*controlPlane{next, home} {
			is := cp.claim(all[i])
			want := deploy.Claim{Mine: of == cp.cfg.Revision}
			if of == "" && cp == home {
				want.Problem = is.Problem
			}
			if is != want || of == "" && cp == home && is.Problem == "" {
				t.Errorf("%s/%s, as %s has it: %+v, want it to be of %q", all[i].Namespace, all[i].Name, cp.cfg.Revision, is, of)
			}
		}
	}
	for name, want := range map[mesh.ServiceName]string{
		next.cfg.Mesh.ServiceName("shop", "way"): revision.Default, next.cfg.Mesh.ServiceName("shop", "tagged"): "next", next.cfg.Mesh.ServiceName("shop", "lost"): revision.Default,
		next.cfg.Mesh.ServiceName("pay", "edge-istio"): "next", next.cfg.Mesh.ServiceName("shop", "chart"): "next", next.cfg.Mesh.ServiceName("shop", "plain"): revision.Default,
		next.cfg.Mesh.ServiceName("shop", "gone"): revision.Default,
	} {
		if got := next.tells(name); got != want || home.tells(name) != want {
			t.Errorf("%s is told by %q, want %q", name.Hostname, got, want)
		}
	}
	ref := func(kind, namespace, name string) gatewayv1.ParentReference {
		return gatewayv1.ParentReference{Kind: new(gatewayv1.Kind(kind)), Namespace: new(gatewayv1.Namespace(namespace)), Name: gatewayv1.ObjectName(name)}
	}
	for _, r := range []struct {
		ref gatewayv1.ParentReference
		of  string
	}{
		{ref("Gateway", "pay", "edge"), "next"}, {ref("Gateway", "shop", "way"), revision.Default}, {ref("Gateway", "shop", "gone"), revision.Default}, {ref("Service", "shop", "plain"), revision.Default},
		{ref("ListenerSet", "shop", "more"), "next"}, {ref("ListenerSet", "shop", "gone"), revision.Default}, {gatewayv1.ParentReference{Name: "tagged"}, "next"},
	} {
		k := index.RouteKey{Kind: index.HTTPRoute, Namespace: "shop", Name: "r"}
		for _, cp := range []*controlPlane{next, home} {
			if got := cp.saysOfRoutes(k, r.ref); got != (r.of == cp.cfg.Revision) {
				t.Errorf("%+v: the control plane of %s says what becomes of routes there: %t", r.ref, cp.cfg.Revision, got)
			}
		}
	}
}

func held(l *coordinationv1.Lease) bool {
	return l.Spec.HolderIdentity != nil && *l.Spec.HolderIdentity != ""
}

package status

import (
	"context"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
)

// Events emits events under the control plane's name. Repeated ones are counted instead of written anew.
type Events struct {
	broadcaster record.EventBroadcaster
	recorder    record.EventRecorder
}

// NewEvents starts a recorder; Close stops it.
func NewEvents(kube kubernetes.Interface) *Events {
	b := record.NewBroadcaster()
	b.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: kube.CoreV1().Events("")})
	return &Events{b, b.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "warren-control"})}
}

// Event implements [Recorder].
func (e *Events) Event(on corev1.ObjectReference, kind, reason, message string) {
	e.recorder.Event(&on, kind, reason, message)
}

// Close stops the recorder.
func (e *Events) Close() { e.broadcaster.Shutdown() }

// Notices turns what the index has to say about objects into events. It keeps what holds now, so that a replica
// that becomes the leader says it once.
type Notices struct {
	events Recorder

	mu      sync.Mutex
	current map[index.NoticeKey]index.Notice
	unsaid  map[index.NoticeKey]bool
	wake    chan struct{}
}

// NewNotices returns Notices that hold nothing.
func NewNotices(events Recorder) *Notices {
	return &Notices{events: events, current: map[index.NoticeKey]index.Notice{}, unsaid: map[index.NoticeKey]bool{}, wake: make(chan struct{}, 1)}
}

// Take notes what changed. It does not block.
func (n *Notices) Take(changed map[index.NoticeKey]*index.Notice) {
	if len(changed) == 0 {
		return
	}
	n.mu.Lock()
	for k, v := range changed {
		if v == nil {
			delete(n.current, k)
			delete(n.unsaid, k)
			continue
		}
		n.current[k] = *v
		n.unsaid[k] = true
	}
	n.mu.Unlock()
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Run emits events until ctx ends, beginning with everything that holds. It is the leader's.
func (n *Notices) Run(ctx context.Context) {
	n.mu.Lock()
	for k := range n.current {
		n.unsaid[k] = true
	}
	n.mu.Unlock()
	for {
		n.mu.Lock()
		todo := map[index.NoticeKey]index.Notice{}
		for k := range n.unsaid {
			todo[k] = n.current[k]
		}
		clear(n.unsaid)
		n.mu.Unlock()
		for k, v := range todo {
			n.events.Event(reference(k, v), corev1.EventTypeWarning, v.Reason, v.Message)
		}
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		}
	}
}

func reference(k index.NoticeKey, v index.Notice) corev1.ObjectReference {
	ref := corev1.ObjectReference{Kind: k.Kind.String(), APIVersion: "v1", Namespace: k.Namespace, Name: k.Name, UID: types.UID(v.UID)}
	switch k.Kind {
	case index.Namespace:
		ref.Namespace = k.Name // an event has to be somewhere; here `kubectl get events -n` finds it
	case index.AuthorizationPolicy, index.PeerAuthentication, index.RequestAuthentication:
		ref.APIVersion = "security.istio.io/v1"
	case index.Telemetry:
		ref.APIVersion = "telemetry.istio.io/v1"
	case index.WasmPlugin:
		ref.APIVersion = "extensions.istio.io/v1alpha1"
	case index.EnvoyFilter:
		ref.APIVersion = "networking.istio.io/v1alpha3"
	case index.RateLimit:
		ref.APIVersion = policy.RateLimits.GroupVersion().String()
	case index.HTTPRoute, index.GRPCRoute, index.TLSRoute, index.TCPRoute, index.BackendTLSPolicy, index.Gateway, index.ListenerSet:
		ref.APIVersion = "gateway.networking.k8s.io/v1"
	case index.ServiceEntry, index.WorkloadEntry, index.VirtualService, index.DestinationRule, index.IstioGateway:
		ref.APIVersion = "networking.istio.io/v1"
	}
	return ref
}

package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/index"
)

// Pods is what is known about pods now.
type Pods interface {
	PodByName(namespace, name string) (index.Placed, bool)
	PodsOn(node string) []index.Placed
}

// Config is what the status service needs.
type Config struct {
	Kube    kubernetes.Interface
	Callers interface {
		Authenticate(context.Context) (*auth.Caller, error)
	}
	NodeOf  func(*auth.Caller) (string, error)
	Pods    Pods
	Events  Recorder
	Log     *slog.Logger
	Metrics prometheus.Registerer
}

// Recorder emits Kubernetes events.
type Recorder interface {
	Event(on corev1.ObjectReference, kind, reason, message string)
}

// Nodes is warren.node.v1.NodeStatus.
type Nodes struct {
	node.UnimplementedNodeStatusServer
	cfg Config

	patches *prometheus.CounterVec

	mu      sync.Mutex
	nodes   map[string]NodeState
	writers map[string]*writer // of the stream that a node opened last: an agent's successor may be beside it
}

// NodeState is the last report of a node.
type NodeState struct {
	Node    string
	Version string
	At      time.Time
	Types   []*node.TypeStatus
	Pods    []*node.PodStatus
}

// NewNodes returns the service.
func NewNodes(cfg Config) *Nodes {
	n := &Nodes{cfg: cfg, nodes: map[string]NodeState{}, writers: map[string]*writer{}, patches: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "warren_redirection_patches_total", Help: "Writes of the annotation ambient.istio.io/redirection, by result.",
	}, []string{"result"})}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(n.patches)
	}
	return n
}

// States returns the last report of every node that is connected to this replica.
func (n *Nodes) States() []NodeState {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]NodeState, 0, len(n.nodes))
	for _, s := range n.nodes {
		out = append(out, s)
	}
	return out
}

const (
	// recheck is how often the annotations are compared with the report without a new one.
	recheck = 10 * time.Second
	// absence is how long a pod may miss in a node's reports before its annotation is taken away: an agent that
	// has just started reports before it has looked at every pod.
	absence = time.Minute
	// doubt is how long a pod that was captured may be reported as pending before its annotation says so. From then on
	// other nodes send to it in clear; an agent that restarts, or repairs its capture, takes a moment.
	doubt = 5 * time.Second
)

// Report takes the reports of one node until it leaves.
func (n *Nodes) Report(stream grpc.ClientStreamingServer[node.StatusReport, node.StatusSummary]) error {
	ctx := stream.Context()
	caller, err := n.cfg.Callers.Authenticate(ctx)
	if err != nil {
		return err
	}
	name, err := n.cfg.NodeOf(caller)
	if err != nil {
		return status.Errorf(codes.PermissionDenied, "status report refused: %v", err)
	}
	reports := make(chan *node.StatusReport)
	ended := make(chan error, 1)
	go func() { // ends when the stream's context does, at the latest when Report returns
		for {
			r, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case reports <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	w := n.begin(name)
	trusts := ""
	defer n.end(w)
	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			if errors.Is(err, io.EOF) {
				return stream.SendAndClose(&node.StatusSummary{})
			}
			return err
		case r := <-reports:
			if r.Node != "" && r.Node != name {
				return status.Errorf(codes.PermissionDenied, "the report is about node %s, the caller runs on %s", r.Node, name)
			}
			w.last = r
			if r.RootsDigest != trusts {
				trusts = r.RootsDigest
				n.noteTrust(ctx, caller, trusts)
			}
		case <-tick.C:
		}
		if w.last != nil && n.heed(w) {
			w.reconcile(ctx, time.Now())
		}
	}
}

// begin makes a writer that is heeded from now on.
func (n *Nodes) begin(node string) *writer {
	w := &writer{n: n, node: node, written: map[string]string{}, told: map[string]string{}, missing: map[string]time.Time{}, doubted: map[string]time.Time{}}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.writers[node] = w
	return w
}

// heed takes note of a writer's last report, unless another agent of the node came after it.
func (n *Nodes) heed(w *writer) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.writers[w.node] != w {
		return false
	}
	r := w.last
	n.nodes[w.node] = NodeState{Node: w.node, Version: r.Version, At: time.Now(), Types: r.Types, Pods: r.Pods}
	return true
}

func (n *Nodes) end(w *writer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.writers[w.node] == w {
		delete(n.writers, w.node)
		delete(n.nodes, w.node)
	}
}

// writer brings the pods of one node in line with its last report.
type writer struct {
	n       *Nodes
	node    string
	last    *node.StatusReport
	written map[string]string    // pod UID → annotation as last written, for as long as the watch may lag behind
	told    map[string]string    // pod UID → last event, so that one is not repeated
	missing map[string]time.Time // pod UID → since when it is annotated but not reported
	doubted map[string]time.Time // pod UID → since when it is annotated as captured and reported as pending
}

// annotation is what a report says about a pod in the words of the annotation; "" for none.
func annotation(p *node.PodStatus) string {
	switch p.Redirection {
	case node.PodStatus_REDIRECTION_ENABLED:
		return index.RedirectionEnabled
	case node.PodStatus_REDIRECTION_PENDING:
		return index.RedirectionPending
	}
	return ""
}

// untried reports whether the node knows that the pod is to be captured and has not got to it.
func untried(p *node.PodStatus) bool {
	return p.Redirection == node.PodStatus_REDIRECTION_PENDING && p.Reason == ""
}

func (w *writer) reconcile(ctx context.Context, now time.Time) {
	reported := map[string]bool{}
	for _, p := range w.last.Pods {
		reported[p.Uid] = true
		have, ok := w.n.cfg.Pods.PodByName(p.Namespace, p.Name)
		if !ok || have.UID != p.Uid || have.Node != w.node {
			continue // gone, or not this node's to speak of
		}
		if w.believes(have, p, now) {
			w.write(ctx, have, annotation(p))
		}
		w.tell(have, p)
	}
	seen := map[string]bool{}
	for _, have := range w.n.cfg.Pods.PodsOn(w.node) {
		seen[have.UID] = true
		if reported[have.UID] || have.Redirection == "" || have.Phase == index.PodFinished || have.Phase == index.PodTerminating {
			delete(w.missing, have.UID)
			continue
		}
		since, ok := w.missing[have.UID]
		if !ok {
			w.missing[have.UID] = now
		} else if now.Sub(since) >= absence {
			w.write(ctx, have, "")
		}
	}
	for _, m := range []map[string]string{w.written, w.told} {
		for uid := range m {
			if !seen[uid] {
				delete(m, uid)
			}
		}
	}
	for _, m := range []map[string]time.Time{w.missing, w.doubted} {
		for uid := range m {
			if !seen[uid] {
				delete(m, uid)
			}
		}
	}
}

// believes reports whether what is reported about a pod is to be written.
func (w *writer) believes(have index.Placed, p *node.PodStatus, now time.Time) bool {
	if have.Redirection == "" && untried(p) {
		return false // a moment later there is something to say
	}
	captured := have.Redirection == index.RedirectionEnabled || w.written[have.UID] == index.RedirectionEnabled
	if !captured || p.Redirection != node.PodStatus_REDIRECTION_PENDING {
		delete(w.doubted, have.UID)
		return true
	}
	since, ok := w.doubted[have.UID]
	if !ok {
		w.doubted[have.UID] = now
	}
	return ok && now.Sub(since) >= doubt
}

func (w *writer) write(ctx context.Context, have index.Placed, want string) {
	if have.Redirection == want {
		delete(w.written, have.UID)
		return
	}
	if last, ok := w.written[have.UID]; ok && last == want {
		delete(w.written, have.UID) // the watch will show it; if it still does not at the next look, write again
		return
	}
	err := patchRedirection(ctx, w.n.cfg.Kube, have, want)
	switch {
	case err == nil:
		w.n.patches.WithLabelValues("ok").Inc()
		w.written[have.UID] = want
	case apierrors.IsNotFound(err) || apierrors.IsConflict(err): // gone, or another pod of that name
		w.n.patches.WithLabelValues("gone").Inc()
	default:
		w.n.patches.WithLabelValues("error").Inc()
		w.n.cfg.Log.Warn("redirection not written to the pod", "namespace", have.Namespace, "pod", have.Name, "error", err)
	}
}

// patchRedirection sets the annotation, or removes it where value is empty. The UID keeps it off another pod of
// the same name.
func patchRedirection(ctx context.Context, kube kubernetes.Interface, pod index.Placed, value string) error {
	var v any
	if value != "" {
		v = value
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pod.UID, "annotations": map[string]any{index.AnnotationRedirection: v},
	}})
	if err != nil {
		return fmt.Errorf("make the patch: %w", err)
	}
	_, err = kube.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

// tell emits the events that belong to a pod's state.
func (w *writer) tell(have index.Placed, p *node.PodStatus) {
	var kind, reason, message string
	switch {
	case p.Redirection == node.PodStatus_REDIRECTION_PENDING && p.Reason != "":
		kind, reason, message = corev1.EventTypeWarning, "RedirectionPending", "the pod's traffic is not captured: "+p.Reason
	case p.Redirection == node.PodStatus_REDIRECTION_ENABLED && p.OpenConnections > 0:
		kind, reason = corev1.EventTypeNormal, "OpenConnections"
		message = "1 connection was open when the pod was enrolled; it is not captured until it is made anew"
		if n := p.OpenConnections; n > 1 {
			message = fmt.Sprintf("%d connections were open when the pod was enrolled; they are not captured until they are made anew", n)
		}
	}
	if w.told[p.Uid] == reason+message {
		return
	}
	w.told[p.Uid] = reason + message
	if reason == "" {
		return
	}
	w.n.cfg.Events.Event(corev1.ObjectReference{
		Kind: "Pod", APIVersion: "v1", Namespace: have.Namespace, Name: have.Name, UID: types.UID(have.UID),
	}, kind, reason, message)
}

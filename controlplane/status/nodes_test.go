package status

import (
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/controlplane/index"
)

// view is what the watch shows of pods.
type view map[string]index.Placed // by namespace/name

func (v view) PodByName(ns, name string) (index.Placed, bool) {
	p, ok := v[ns+"/"+name]
	return p, ok
}

func (v view) PodsOn(node string) []index.Placed {
	var out []index.Placed
	for _, p := range v {
		if p.Node == node {
			out = append(out, p)
		}
	}
	return out
}

type said []string

func (s *said) Event(on corev1.ObjectReference, _, reason, _ string) {
	*s = append(*s, on.Namespace+"/"+on.Name+" "+reason)
}

type bench struct {
	*testing.T
	kube  *fake.Clientset
	pods  view
	said  said
	w     *writer
	count int
}

func newBench(t *testing.T, names ...string) *bench {
	b := &bench{T: t, kube: fake.NewClientset(), pods: view{}}
	for _, n := range names {
		b.pods["shop/"+n] = index.Placed{UID: "uid-" + n, Namespace: "shop", Name: n, Node: "n1", Phase: index.PodRunning}
		if err := b.kube.Tracker().Add(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: n, UID: types.UID("uid-" + n)}}); err != nil {
			t.Fatal(err)
		}
	}
	n := NewNodes(Config{Kube: b.kube, Pods: b.pods, Events: &b.said, Log: slog.New(slog.DiscardHandler)})
	b.w = n.begin("n1")
	return b
}

func (b *bench) report(pods ...*node.PodStatus) { b.w.last = &node.StatusReport{Pods: pods} }

// patches reconciles and returns how many writes that took.
func (b *bench) patches(at time.Time) int {
	b.w.reconcile(b.Context(), at)
	n := 0
	for _, a := range b.kube.Actions() {
		if a.GetVerb() == "patch" {
			n++
		}
	}
	n, b.count = n-b.count, n
	return n
}

func (b *bench) annotation(name string) string {
	p, err := b.kube.CoreV1().Pods("shop").Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return p.Annotations[index.AnnotationRedirection]
}

// show lets the watch catch up with what was written.
func (b *bench) show(name string) {
	p := b.pods["shop/"+name]
	p.Redirection = b.annotation(name)
	b.pods["shop/"+name] = p
}

func captured(name string) *node.PodStatus {
	return &node.PodStatus{Uid: "uid-" + name, Namespace: "shop", Name: name, Redirection: node.PodStatus_REDIRECTION_ENABLED}
}

func TestAnnotationFollowsTheReport(t *testing.T) {
	b, now := newBench(t, "ui"), time.Now()
	b.report(captured("ui"))
	if n := b.patches(now); n != 1 || b.annotation("ui") != "enabled" {
		t.Fatalf("%d writes, %q", n, b.annotation("ui"))
	}
	if n := b.patches(now); n != 0 {
		t.Errorf("%d writes before the watch has caught up", n)
	}
	b.show("ui")
	if n := b.patches(now); n != 0 {
		t.Errorf("%d writes of what is there", n)
	}
	p := b.pods["shop/ui"]
	p.Redirection = "" // somebody took it away
	b.pods["shop/ui"] = p
	if n := b.patches(now); n != 1 {
		t.Errorf("%d writes to repair it", n)
	}
	b.report(&node.PodStatus{Uid: "uid-ui", Namespace: "shop", Name: "ui", Redirection: node.PodStatus_REDIRECTION_PENDING, Reason: "Kata"})
	if n := b.patches(now); n != 0 {
		t.Errorf("%d writes of what may be over in a moment: other nodes would send in clear", n)
	}
	b.patches(now.Add(doubt))
	b.show("ui")
	if b.annotation("ui") != "pending" || len(b.said) != 1 || b.said[0] != "shop/ui RedirectionPending" {
		t.Errorf("%q, events %q", b.annotation("ui"), b.said)
	}
	b.patches(now)
	if len(b.said) != 1 {
		t.Errorf("said again: %q", b.said)
	}
	b.report(&node.PodStatus{Uid: "uid-ui", Namespace: "shop", Name: "ui", Redirection: node.PodStatus_REDIRECTION_DISABLED})
	b.patches(now)
	if b.annotation("ui") != "" {
		t.Errorf("released, and still %q", b.annotation("ui"))
	}
}

// TestUntriedPods: that a node has not got to a pod yet is no news, unless the pod is said to be captured.
func TestUntriedPods(t *testing.T) {
	b, now := newBench(t, "ui"), time.Now()
	untried := &node.PodStatus{Uid: "uid-ui", Namespace: "shop", Name: "ui", Redirection: node.PodStatus_REDIRECTION_PENDING}
	b.report(untried)
	if n := b.patches(now); n != 0 || len(b.said) != 0 {
		t.Errorf("%d writes, events %q", n, b.said)
	}
	b.report(captured("ui"))
	b.patches(now)
	b.show("ui")
	b.report(untried) // the node was booted
	b.patches(now)
	if n := b.patches(now.Add(doubt)); n != 1 || b.annotation("ui") != "pending" || len(b.said) != 0 {
		t.Errorf("%d writes, %q, events %q", n, b.annotation("ui"), b.said)
	}
}

// TestDoubtEnds: a pod that is captured again in a moment was never said to be anything else, and the next doubt takes
// its own time.
func TestDoubtEnds(t *testing.T) {
	b, now := newBench(t, "ui"), time.Now()
	lost := &node.PodStatus{Uid: "uid-ui", Namespace: "shop", Name: "ui", Redirection: node.PodStatus_REDIRECTION_PENDING, Reason: "lost"}
	b.report(captured("ui"))
	b.patches(now)
	b.report(lost) // before the watch shows the first write
	if n := b.patches(now); n != 0 {
		t.Errorf("%d writes", n)
	}
	b.show("ui")
	b.report(captured("ui"))
	b.patches(now.Add(doubt))
	b.report(lost)
	if n := b.patches(now.Add(doubt + time.Second)); n != 0 || b.annotation("ui") != "enabled" {
		t.Errorf("%d writes, %q", n, b.annotation("ui"))
	}
}

// TestTheLastAgentOfANodeIsHeeded: one that was superseded and still reports is not, until the other is gone.
func TestTheLastAgentOfANodeIsHeeded(t *testing.T) {
	b := newBench(t, "ui")
	n := b.w.n
	b.report(captured("ui"))
	second := n.begin("n1")
	second.last = &node.StatusReport{Version: "2"}
	if n.heed(b.w) || !n.heed(second) || n.States()[0].Version != "2" {
		t.Errorf("states %+v", n.States())
	}
	n.end(b.w)
	if !n.heed(second) || len(n.States()) != 1 {
		t.Error("the end of the first is taken for that of the second")
	}
	n.end(second)
	if len(n.States()) != 0 {
		t.Errorf("states %+v", n.States())
	}
}

// TestANodeSpeaksOfItsOwnPods: not of another node's, nor of a pod that has another's name.
func TestANodeSpeaksOfItsOwnPods(t *testing.T) {
	b := newBench(t, "ui", "db")
	p := b.pods["shop/db"]
	p.Node = "n2"
	b.pods["shop/db"] = p
	old := captured("ui")
	old.Uid = "uid-before"
	b.report(captured("db"), old, captured("nobody"))
	if n := b.patches(time.Now()); n != 0 {
		t.Errorf("%d writes", n)
	}
}

// TestUnreportedPods: the annotation of a pod that its node does not speak of is taken away, in time.
func TestUnreportedPods(t *testing.T) {
	b, now := newBench(t, "ui"), time.Now()
	b.report(captured("ui"))
	b.patches(now)
	b.show("ui")
	b.report() // an agent that has just started
	if n := b.patches(now) + b.patches(now.Add(absence/2)); n != 0 {
		t.Errorf("%d writes at once", n)
	}
	b.report(captured("ui"))
	b.patches(now.Add(absence))
	b.report()
	b.patches(now.Add(absence))
	if n := b.patches(now.Add(2 * absence)); n != 1 || b.annotation("ui") != "" {
		t.Errorf("%d writes, %q", n, b.annotation("ui"))
	}
}

func TestThePatchNamesThePod(t *testing.T) {
	b := newBench(t, "ui")
	b.report(captured("ui"))
	b.patches(time.Now())
	for _, a := range b.kube.Actions() {
		patch, ok := a.(k8stesting.PatchAction)
		if !ok {
			continue
		}
		var body struct {
			Metadata struct {
				UID         string             `json:"uid"`
				Annotations map[string]*string `json:"annotations"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(patch.GetPatch(), &body); err != nil {
			t.Fatal(err)
		}
		if body.Metadata.UID != "uid-ui" || len(body.Metadata.Annotations) != 1 {
			t.Errorf("patch %s", patch.GetPatch())
		}
	}
}

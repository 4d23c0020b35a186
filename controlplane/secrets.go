package controlplane

import (
	"context"
	"log/slog"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/warrenmesh/warren/controlplane/index"
)

// secretWatch follows the Secrets that gateways show to their clients, each by itself: no other is ever read.
type secretWatch struct {
	kube kubernetes.Interface
	tell func(index.SecretKey, *index.SecretState)
	log  *slog.Logger

	mu      sync.Mutex
	ctx     context.Context // nil until run, and after it
	wanted  map[index.SecretKey]context.CancelFunc
	pending []index.SecretKey // asked for before run
	work    sync.WaitGroup
}

func newSecretWatch(kube kubernetes.Interface, tell func(index.SecretKey, *index.SecretState), log *slog.Logger) *secretWatch {
	return &secretWatch{kube: kube, tell: tell, log: log, wanted: map[index.SecretKey]context.CancelFunc{}}
}

// run follows what is wanted until ctx ends.
func (w *secretWatch) run(ctx context.Context) {
	w.mu.Lock()
	w.ctx = ctx
	pending := w.pending
	w.mu.Unlock()
	w.want(pending)
	<-ctx.Done()
	w.mu.Lock()
	w.ctx = nil
	w.mu.Unlock()
	w.work.Wait()
}

// want has just these followed. It does not block.
func (w *secretWatch) want(keys []index.SecretKey) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ctx == nil {
		w.pending = keys
		return
	}
	next := map[index.SecretKey]bool{}
	for _, k := range keys {
		next[k] = true
		if w.wanted[k] == nil {
			ctx, cancel := context.WithCancel(w.ctx)
			w.wanted[k] = cancel
			w.work.Go(func() { w.follow(ctx, k) })
		}
	}
	for k, cancel := range w.wanted {
		if !next[k] {
			cancel()
			delete(w.wanted, k)
		}
	}
}

func (w *secretWatch) follow(ctx context.Context, k index.SecretKey) {
	factory := informers.NewSharedInformerFactoryWithOptions(w.kube, 0, informers.WithNamespace(k.Namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", k.Name).String()
		}),
		informers.WithTransform(func(o any) (any, error) {
			if s, ok := o.(*corev1.Secret); ok { // nothing of it is kept here
				return &kept{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, ResourceVersion: s.ResourceVersion}, state: index.ReadSecret(s.Data)}, nil
			}
			return o, nil
		}))
	saw := func(o any) {
		if s, ok := o.(*kept); ok && ctx.Err() == nil && s.Name == k.Name {
			w.tell(k, s.state)
		}
	}
	if _, err := factory.Core().V1().Secrets().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    saw,
		UpdateFunc: func(_, is any) { saw(is) },
		DeleteFunc: func(any) {
			if ctx.Err() == nil {
				w.tell(k, nil)
			}
		},
	}); err != nil {
		w.log.Error("a gateway's Secret is not followed", "namespace", k.Namespace, "secret", k.Name, "error", err)
		return
	}
	factory.Start(ctx.Done())
	<-ctx.Done()
	factory.Shutdown()
}

// kept is what is left of a Secret.
type kept struct {
	metav1.ObjectMeta
	state *index.SecretState
}

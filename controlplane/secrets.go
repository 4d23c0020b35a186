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

// followed has those objects followed that something refers to, each by itself: no other is ever read.
type followed[K ~struct{ Namespace, Name string }, S any] struct {
	kube     kubernetes.Interface
	informer func(informers.SharedInformerFactory) cache.SharedIndexInformer
	read     func(any) (metav1.Object, *S) // nil for what is no such object
	tell     func(K, *S)
	absent   bool // that there is no such object is told too
	log      *slog.Logger

	mu      sync.Mutex
	ctx     context.Context // nil until run, and after it
	wanted  map[K]context.CancelFunc
	pending []K // asked for before run
	work    sync.WaitGroup
}

// newSecrets follows the Secrets that gateways show to their clients and to applications.
func newSecrets(kube kubernetes.Interface, tell func(index.SecretKey, *index.SecretState), log *slog.Logger) *followed[index.SecretKey, index.SecretState] {
	return &followed[index.SecretKey, index.SecretState]{kube: kube, tell: tell, log: log, wanted: map[index.SecretKey]context.CancelFunc{},
		informer: func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
			return f.Core().V1().Secrets().Informer()
		},
		read: func(o any) (metav1.Object, *index.SecretState) {
			if s, ok := o.(*corev1.Secret); ok {
				return s, index.ReadSecret(s.Data)
			}
			return nil, nil
		}}
}

// newRoots follows the ConfigMaps that certificates are checked against.
func newRoots(kube kubernetes.Interface, tell func(index.RootsKey, *index.RootsState), log *slog.Logger) *followed[index.RootsKey, index.RootsState] {
	return &followed[index.RootsKey, index.RootsState]{kube: kube, tell: tell, log: log, wanted: map[index.RootsKey]context.CancelFunc{},
		informer: func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
			return f.Core().V1().ConfigMaps().Informer()
		},
		read: func(o any) (metav1.Object, *index.RootsState) {
			if m, ok := o.(*corev1.ConfigMap); ok {
				return m, index.ReadRoots(m.Data)
			}
			return nil, nil
		}}
}

// run follows what is wanted until ctx ends.
func (w *followed[K, S]) run(ctx context.Context) {
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
func (w *followed[K, S]) want(keys []K) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ctx == nil {
		w.pending = keys
		return
	}
	next := map[K]bool{}
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

func (w *followed[K, S]) follow(ctx context.Context, k K) {
	at := struct{ Namespace, Name string }(k)
	factory := informers.NewSharedInformerFactoryWithOptions(w.kube, 0, informers.WithNamespace(at.Namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", at.Name).String()
		}),
		informers.WithTransform(func(o any) (any, error) {
			if m, state := w.read(o); state != nil { // nothing else of it is kept here
				return &kept[S]{ObjectMeta: metav1.ObjectMeta{Namespace: m.GetNamespace(), Name: m.GetName(), ResourceVersion: m.GetResourceVersion()}, state: state}, nil
			}
			return o, nil
		}))
	saw := func(o any) {
		if s, ok := o.(*kept[S]); ok && ctx.Err() == nil && s.Name == at.Name {
			w.tell(k, s.state)
		}
	}
	informer := w.informer(factory)
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    saw,
		UpdateFunc: func(_, is any) { saw(is) },
		DeleteFunc: func(any) {
			if ctx.Err() == nil {
				w.tell(k, nil)
			}
		},
	}); err != nil {
		w.log.Error("what a gateway refers to is not followed", "namespace", at.Namespace, "name", at.Name, "error", err)
		return
	}
	factory.Start(ctx.Done())
	if w.absent && cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) && len(informer.GetStore().ListKeys()) == 0 {
		w.tell(k, nil)
	}
	<-ctx.Done()
	factory.Shutdown()
}

// kept is what is left of an object.
type kept[S any] struct {
	metav1.ObjectMeta
	state *S
}

package controlplane

import (
	"context"
	"log/slog"
	"maps"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/warrenmesh/warren/controlplane/deploy"
)

// parameters follows the ConfigMaps that say what Gateways are made with.
type parameters struct {
	named     *followed[deploy.ParametersKey, deploy.Parameters]
	kube      kubernetes.Interface
	namespace string // where defaults of classes are
	log       *slog.Logger

	mu       sync.Mutex
	said     map[deploy.ParametersKey]*deploy.Parameters // nil for one that is not there
	defaults map[string]map[string]*deploy.Parameters    // by class and name; nil until they were read
}

func newParameters(kube kubernetes.Interface, namespace string, log *slog.Logger) *parameters {
	p := &parameters{kube: kube, namespace: namespace, log: log, said: map[deploy.ParametersKey]*deploy.Parameters{}}
	p.named = &followed[deploy.ParametersKey, deploy.Parameters]{kube: kube, log: log, absent: true, wanted: map[deploy.ParametersKey]context.CancelFunc{},
		informer: func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
			return f.Core().V1().ConfigMaps().Informer()
		},
		read: func(o any) (metav1.Object, *deploy.Parameters) {
			if m, ok := o.(*corev1.ConfigMap); ok {
				return m, deploy.ReadParameters(m.Data, m.ResourceVersion)
			}
			return nil, nil
		},
		tell: func(k deploy.ParametersKey, s *deploy.Parameters) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.said[k] = s
		}}
	return p
}

// run follows what is wanted, and the defaults, until ctx ends.
func (p *parameters) run(ctx context.Context) {
	factory := informers.NewSharedInformerFactoryWithOptions(p.kube, 0, informers.WithNamespace(p.namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = deploy.LabelDefaults }))
	informer := factory.Core().V1().ConfigMaps().Informer()
	again := func(any) {
		if !informer.HasSynced() {
			return
		}
		all := map[string]map[string]*deploy.Parameters{}
		for _, o := range informer.GetStore().List() {
			if m, ok := o.(*corev1.ConfigMap); ok {
				class := m.Labels[deploy.LabelDefaults]
				if all[class] == nil {
					all[class] = map[string]*deploy.Parameters{}
				}
				all[class][m.Name] = deploy.ReadParameters(m.Data, m.ResourceVersion)
			}
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.defaults = all
	}
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: again, UpdateFunc: func(_, o any) { again(o) }, DeleteFunc: again}); err != nil {
		p.log.Error("the defaults of gateways' classes are not followed", "namespace", p.namespace, "error", err)
		return
	}
	factory.Start(ctx.Done())
	if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		again(nil)
	}
	p.named.run(ctx)
	factory.Shutdown()
}

// Want implements [deploy.ParameterSource].
func (p *parameters) Want(keys []deploy.ParametersKey) {
	p.mu.Lock()
	wanted := map[deploy.ParametersKey]bool{}
	for _, k := range keys {
		wanted[k] = true
	}
	maps.DeleteFunc(p.said, func(k deploy.ParametersKey, _ *deploy.Parameters) bool { return !wanted[k] })
	p.mu.Unlock()
	p.named.want(keys)
}

// Get implements [deploy.ParameterSource].
func (p *parameters) Get(k deploy.ParametersKey) (said *deploy.Parameters, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	said, known = p.said[k]
	return said, known
}

// Defaults implements [deploy.ParameterSource].
func (p *parameters) Defaults(class string) (all map[string]*deploy.Parameters, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.defaults[class]), p.defaults != nil
}

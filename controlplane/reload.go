package controlplane

import (
	"context"
	"reflect"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
)

// Run serves until ctx ends or something fails that a restart of the process has to repair. When the mesh's ConfigMap
// says something else, everything is built anew: any part may depend on it, and nodes go on meanwhile as they do
// without a control plane.
func Run(ctx context.Context, cfg Config, clients Clients) error {
	cfg = cfg.Defaults()
	for {
		cp, err := newControlPlane(ctx, cfg, clients)
		if err != nil {
			return err
		}
		if again, err := cp.runUntilReconfigured(ctx, cfg); err != nil || !again {
			return err
		}
	}
}

// runUntilReconfigured runs cp, which was made of cfg and the ConfigMap, until that has changed.
func (cp *controlPlane) runUntilReconfigured(ctx context.Context, cfg Config) (changed bool, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var watch sync.WaitGroup
	watch.Go(func() {
		changed = cp.awaitChange(ctx, cfg)
		stop()
	})
	err = cp.run(ctx)
	stop()
	watch.Wait()
	return changed, err
}

// awaitChange waits until cfg with the ConfigMaps is something else than cp runs with. What is wrong is refused, and a
// ConfigMap that is gone says nothing: what was read before holds.
func (cp *controlPlane) awaitChange(ctx context.Context, cfg Config) bool {
	ctx, stop := context.WithCancel(ctx)
	newest := make(chan configMaps, 1)
	var mu sync.Mutex
	var maps configMaps
	synced := make(chan struct{}) // one without the other says something else than both
	for _, name := range cfg.configMapNames() {
		saw := func(obj any) {
			cm, ok := obj.(*corev1.ConfigMap)
			if !ok || cm.Name != name {
				return
			}
			select {
			case <-synced:
			case <-ctx.Done():
				return
			}
			mu.Lock()
			defer mu.Unlock()
			maps = maps.take(cfg, cm)
			select {
			case <-newest:
			default:
			}
			newest <- maps
		}
		factory := informers.NewSharedInformerFactoryWithOptions(cp.clients.Kube, 0, informers.WithNamespace(cfg.Namespace),
			informers.WithTweakListOptions(func(o *metav1.ListOptions) {
				o.FieldSelector = fields.OneTermEqualSelector("metadata.name", name).String()
			}))
		informer := factory.Core().V1().ConfigMaps().Informer()
		if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: saw, UpdateFunc: func(_, is any) { saw(is) },
		}); err != nil {
			cp.cfg.Log.Error("changes of the mesh configuration are not seen", "error", err)
		}
		factory.Start(ctx.Done())
		defer factory.Shutdown()
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			mu.Lock()
			for _, o := range informer.GetStore().List() {
				if cm, ok := o.(*corev1.ConfigMap); ok && cm.Name == name {
					maps = maps.take(cfg, cm)
				}
			}
			mu.Unlock()
		}
	}
	close(synced)
	defer stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case maps := <-newest:
			next, err := cfg.configured(maps)
			if err == nil {
				err = next.Validate()
			}
			switch {
			case err != nil:
				cp.cfg.Log.Error("mesh configuration refused; the one before holds", "error", err)
			case !reflect.DeepEqual(next, cp.cfg):
				cp.cfg.Log.Info("the mesh configuration has changed; starting over with it", "configMaps", strings.Join(cfg.configMapNames(), ", "))
				return true
			}
		}
	}
}

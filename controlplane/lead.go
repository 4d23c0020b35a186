package controlplane

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"github.com/warrenmesh/warren/controlplane/ca"
)

const leaseName = "warren-control-leader"

// lead takes part in the election until ctx ends, and does the leader's work while it is one.
func (cp *controlPlane) lead(ctx context.Context) error {
	lock, err := resourcelock.New(resourcelock.LeasesResourceLock, cp.cfg.Namespace, leaseName,
		cp.clients.Kube.CoreV1(), cp.clients.Kube.CoordinationV1(), resourcelock.ResourceLockConfig{Identity: cp.cfg.PodName})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	for ctx.Err() == nil { // an election ends with the loss of the lease; there is always another
		// The elector says on a goroutine of its own that this replica won; the work is done on one that ends here.
		won, over := make(chan context.Context, 1), make(chan struct{})
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second,
			ReleaseOnCancel: true, Name: leaseName,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(ctx context.Context) { won <- ctx },
				OnStoppedLeading: func() {},
			},
		})
		if err != nil {
			return fmt.Errorf("leader election: %w", err)
		}
		var work sync.WaitGroup
		work.Go(func() {
			select {
			case leading := <-won:
				cp.cfg.Log.Info("this replica leads", "identity", cp.cfg.PodName)
				cp.leaderWork(leading)
			case <-over:
			}
		})
		elector.Run(ctx)
		close(over)
		work.Wait()
	}
	return nil
}

// leaderWork is what one replica does for all.
func (cp *controlPlane) leaderWork(ctx context.Context) {
	factory := informers.NewSharedInformerFactoryWithOptions(cp.clients.Kube, 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", ca.RootConfigMap).String()
		}))
	maps := factory.Core().V1().ConfigMaps().Informer()
	check := func(obj any) {
		if name, err := cache.DeletionHandlingObjectToName(obj); err == nil && name.Name == ca.RootConfigMap {
			cp.roots.Check(name.Namespace)
		}
	}
	if _, err := maps.AddEventHandler(cache.ResourceEventHandlerFuncs{
		UpdateFunc: func(was, is any) {
			a, ok1 := was.(*corev1.ConfigMap)
			b, ok2 := is.(*corev1.ConfigMap)
			if ok1 && ok2 && a.ResourceVersion != b.ResourceVersion {
				check(is)
			}
		},
		DeleteFunc: check,
	}); err != nil {
		cp.cfg.Log.Error("root certificates are not watched", "error", err)
	}
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	cp.recheckRoots()
	cp.authority.Lead(ctx)
	var wg sync.WaitGroup
	wg.Add(3)
	go func() { defer wg.Done(); cp.roots.Run(ctx) }()
	go func() { defer wg.Done(); cp.notices.Run(ctx) }()
	wg.Go(func() { cp.policies.Run(ctx) })
	wg.Go(func() { cp.waypoints().Run(ctx) })
	go func() { defer wg.Done(); cp.bundle.Run(ctx) }()
	wg.Wait()
}

// recheckRoots has every namespace looked at.
func (cp *controlPlane) recheckRoots() {
	for _, ns := range cp.cache.Names(namespaceType) {
		cp.roots.Check(ns)
	}
}

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
	"github.com/warrenmesh/warren/internal/revision"
)

// lead takes part in the election until ctx ends, and does the leader's work while it is one.
func (cp *controlPlane) lead(ctx context.Context) error {
	name := revision.Lease(cp.cfg.Revision)
	lock, err := resourcelock.New(resourcelock.LeasesResourceLock, cp.cfg.Namespace, name,
		cp.clients.Kube.CoreV1(), cp.clients.Kube.CoordinationV1(), resourcelock.ResourceLockConfig{Identity: cp.cfg.PodName})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	for ctx.Err() == nil { // an election ends with the loss of the lease; there is always another
		// The elector says on a goroutine of its own that this replica won; the work is done on one that ends here.
		won, over := make(chan context.Context, 1), make(chan struct{})
		elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
			Lock: lock, LeaseDuration: 15 * time.Second, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second,
			ReleaseOnCancel: true, Name: name,
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
	var wg sync.WaitGroup
	defer wg.Wait()
	// Of each revision: what its Gateways need.
	if cp.cfg.BesideIstio == "" { // Istio writes conditions of policies, and knows no other control plane that does
		wg.Go(func() { cp.policies.Run(ctx) })
	}
	if cp.routes != nil {
		wg.Go(func() { cp.routes.Run(ctx) })
		wg.Go(func() { cp.followOwners(ctx) })
	}
	if d := cp.deployer(); d != nil {
		wg.Go(func() { d.Run(ctx) })
	}
	if !cp.cfg.secondary() {
		cp.meshWork(ctx)
	}
}

// meshWork is what there is once in a mesh. The control plane that the agents ask does it; the others take what it wrote.
func (cp *controlPlane) meshWork(ctx context.Context) {
	for _, c := range cp.copies {
		defer cp.watchCopies(ctx, c)()
	}
	cp.recheckCopies()
	cp.authority.Lead(ctx)
	var wg sync.WaitGroup
	for _, c := range cp.copies {
		wg.Go(func() { c.Run(ctx) })
	}
	wg.Go(func() { cp.notices.Run(ctx) })
	wg.Go(func() { cp.waypoints().Run(ctx) })
	wg.Go(func() { cp.addresses().Run(ctx) })
	wg.Go(func() { cp.bundle.Run(ctx) })
	wg.Wait()
}

// watchCopies has a namespace looked at whose ConfigMap somebody else has changed, until ctx ends; the function it
// returns waits for that.
func (cp *controlPlane) watchCopies(ctx context.Context, c *ca.Copies) (ended func()) {
	factory := informers.NewSharedInformerFactoryWithOptions(cp.clients.Kube, 0,
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", c.Name()).String()
		}))
	maps := factory.Core().V1().ConfigMaps().Informer()
	saw := func(obj any) {
		if cm, ok := obj.(*corev1.ConfigMap); ok && cm.Name == c.Name() {
			c.Saw(cm)
		}
	}
	if _, err := maps.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    saw,
		UpdateFunc: func(_, is any) { saw(is) },
		DeleteFunc: func(obj any) {
			if name, err := cache.DeletionHandlingObjectToName(obj); err == nil && name.Name == c.Name() {
				c.Check(name.Namespace)
			}
		},
	}); err != nil {
		cp.cfg.Log.Error("ConfigMaps are not watched", "name", c.Name(), "error", err)
	}
	factory.Start(ctx.Done())
	return factory.Shutdown
}

// recheckCopies has every namespace looked at.
func (cp *controlPlane) recheckCopies() {
	for _, ns := range cp.cache.Names(namespaceType) {
		for _, c := range cp.copies {
			c.Check(ns)
		}
	}
}

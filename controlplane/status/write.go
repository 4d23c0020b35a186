package status

import (
	"context"
	"sync"
	"time"

	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/client-go/util/workqueue"
)

type toWrite[K comparable] = workqueue.TypedRateLimitingInterface[K]

// write reconciles what enter puts into the queue, and whoever keeps that, until ctx ends. enter is called at first and
// every now and then, to put in everything; advanced is called where moved says so.
func write[K comparable](ctx context.Context, reconcile func(context.Context, toWrite[K], flowcontrol.RateLimiter, K), enter func(toWrite[K]), moved <-chan struct{}, advanced func()) {
	q := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[K](retryAtFirst, retryAtMost))
	limit := flowcontrol.NewTokenBucketRateLimiter(writesPerS, burst)
	enter(q)
	var work sync.WaitGroup
	for range writers {
		work.Go(func() {
			for {
				k, ended := q.Get()
				if ended {
					return
				}
				reconcile(ctx, q, limit, k)
				q.Done(k)
			}
		})
	}
	tick := time.NewTicker(resync)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
			enter(q)
		case <-moved:
			advanced()
		}
	}
	q.ShutDown()
	work.Wait()
}

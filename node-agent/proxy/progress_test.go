package proxy

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestProgressWakesWhoWaitsForItAndNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p progress
		p.reach(3)
		if err := p.await(t.Context(), 2); err != nil {
			t.Fatal(err)
		}
		woken := make(chan uint64, 2)
		for _, rev := range []uint64{4, 6} {
			go func() {
				if p.await(t.Context(), rev) == nil {
					woken <- rev
				}
			}()
		}
		synctest.Wait()
		p.reach(2) // never back
		p.reach(5)
		if got := <-woken; got != 4 {
			t.Errorf("who waits for %d was woken at 5", got)
		}
		p.reach(6)
		if got := <-woken; got != 6 {
			t.Errorf("who waits for %d was woken at 6", got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := p.await(ctx, 7); !errors.Is(err, context.Canceled) {
			t.Errorf("waiting for what does not come: %v", err)
		}
	})
}

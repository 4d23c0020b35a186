package proxy

import (
	"errors"
	commandline "flag"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/results"
)

var long = commandline.Bool("long", false, "the numbers of a soak instead of those of a check")

// A policy that ends very many connections at once ends them all soon, and holds nobody else up meanwhile.
func TestManyOpenConnectionsEndTogetherAndOthersGoOn(t *testing.T) {
	n := 500
	if *long {
		var lim unix.Rlimit
		check(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &lim))
		lim.Cur = lim.Max
		check(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &lim))
		n = min(20000, int(lim.Max-500)/7) // both ends and both nodes are in this process
	}
	l := shop(t)
	conns := make([]*net.TCPConn, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				c, err := l.pods["ui"].dial(service(false))
				if err == nil {
					_, _, _, err = seen(c)
				}
				if err != nil {
					t.Error(err)
					return
				}
				conns[i] = c
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}

	// Somebody else goes on opening connections.
	var slowest time.Duration
	stop, others := make(chan struct{}), make(chan int)
	go func() {
		count := 0
		defer func() { others <- count }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			began := time.Now()
			c, err := l.pods["load"].dial(service(false))
			if err == nil {
				_, _, _, err = seen(c)
				c.Close()
			}
			if err != nil {
				t.Errorf("who is allowed: %v", err)
				return
			}
			slowest = max(slowest, time.Since(began))
			count++
		}
	}()
	time.Sleep(100 * time.Millisecond)
	before := runtime.NumGoroutine()
	l.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "no-ui"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Principals: []mesh.StringMatch{{Value: "cluster.local/ns/shop/sa/ui"}}}}}}}}})
	began := time.Now()
	l.commit()
	for _, node := range l.nodes {
		check(t, node.proxy.Rechecked(t.Context(), l.rev))
	}
	rechecked := time.Since(began)
	failures := 0
	for _, c := range conns {
		if err := untilEnd(c, 30*time.Second); !errors.Is(err, syscall.ECONNRESET) {
			failures++
		}
		c.Close()
	}
	took := time.Since(began)
	close(stop)
	count := <-others
	t.Logf("%d connections: enforced after %s, the last was reset after %s; %d of others meanwhile, the slowest took %s; %d goroutines before",
		n, rechecked, took, count, slowest, before)
	if failures > 0 {
		t.Errorf("%d of %d connections were not reset", failures, n)
	}
	check(t, results.Record("open-connections",
		results.Row{Name: "one policy ends many connections on one node: until the last client sees the reset", Inputs: n, Failures: failures, Figure: float64(took.Milliseconds()), Unit: "ms"},
		results.Row{Name: "one policy ends many connections on one node: the slowest new connection of others meanwhile", Inputs: count, Failures: 0, Figure: float64(slowest.Milliseconds()), Unit: "ms"}))
}

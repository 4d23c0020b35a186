package proxy

import (
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestAnEndpointThatIsSilentIsPassedOver(t *testing.T) {
	l := newLab(t, configured(func(c *Config) { c.ConnectTimeout = 2 * plenty }))
	for _, name := range []string{"catalog-1", "catalog-2"} {
		p := l.pods[name]
		p.listen(appPort, p.greet)
	}
	// The link to catalog-1's node swallows what is for it, as a node without power does.
	check(t, l.nodes["node-b"].ns.Do(func() error {
		return netlink.RouteReplace(&netlink.Route{Dst: hostNet(l.pods["catalog-1"].v4), Type: unix.RTN_BLACKHOLE})
	}))
	ask := func() {
		t.Helper()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				began := time.Now()
				c, err := l.pods["ui"].dial(service(false))
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(plenty))
				by, _, _, err := seen(c)
				if err != nil || by != "catalog-2" {
					t.Errorf("served by %q: %v", by, err)
				}
				if took := time.Since(began); took > plenty {
					t.Errorf("served after %s, as if there were no other endpoint", took)
				}
			})
		}
		wg.Wait()
	}
	tried := func() float64 {
		return l.nodes["node-a"].metric("warren_failovers_total", map[string]string{"result": "tried"})
	}
	ask()
	before := tried()
	if before == 0 {
		t.Error("nobody came to the silent endpoint first")
	}
	suspects := &l.nodes["node-a"].proxy.suspects
	suspects.mu.Lock()
	for uid := range suspects.until { // a machine that is busy may take as long as they are remembered
		suspects.until[uid] = time.Now().Add(time.Hour)
	}
	suspects.mu.Unlock()
	ask()
	if again := tried() - before; again > 0 {
		t.Errorf("%v connections had to find out again", again)
	}
}

func TestSuspectsAreForgotten(t *testing.T) {
	var s suspects
	if got := s.list(); got != nil {
		t.Errorf("nobody is suspected, listed are %v", got)
	}
	s.add("a")
	s.add("b")
	s.clear("b")
	if got := s.list(); len(got) != 1 || got[0] != "a" {
		t.Errorf("a is suspected, listed are %v", got)
	}
	s.until["a"] = time.Now().Add(-time.Millisecond)
	if got := s.list(); got != nil || s.n.Load() != 0 {
		t.Errorf("a's time is over, listed are %v", got)
	}
}

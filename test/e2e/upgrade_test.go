package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// New connections go on while warren exchanges the control plane and the agents of both nodes, and while an upgrade that
// cannot come up is rolled back. The command names the nodes it waits for, and in the end what was there before is in force.
func TestUpgradeUnderLoad(t *testing.T) {
	ownCluster(t)
	t.Cleanup(func() {
		if err := mesh.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	ns := namespace(t, "e2e-upgrade", ambient)
	strict(t, ns)
	_, err := warrenProgram()
	must(t, err)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	agents := func() map[string]bool {
		t.Helper()
		pods, err := mesh.Pods(t.Context(), lab.Namespace, lab.NodeApp)
		must(t, err)
		out := map[string]bool{}
		for _, p := range pods {
			if !p.Terminating {
				out[p.UID] = true
			}
		}
		return out
	}
	during := func(what string, do func()) {
		t.Helper()
		report := loadUntil(t, ns, "client", "-for", "20m", "-rate", fmt.Sprint(size(200, 1000)), "-timeout", "60s", "far:9000")
		start := time.Now()
		do()
		took := time.Since(start)
		r := report()
		failed := r.failures()
		if failed > 0 || r.Connections == 0 {
			t.Errorf("%s: %+v", what, r)
		}
		record("upgrade-new-connections", what, r.Connections, failed, float64(r.Connections)/r.Seconds, "new connections a second")
		t.Logf("%s: %.1f s; of %d new connections %d failed", what, took.Seconds(), r.Connections, failed)
	}

	if *long { // an agent that goes waits half a minute for what it carries
		before := agents()
		during("upgrade of both nodes and the control plane", func() {
			now := fmt.Sprint(time.Now().Unix())
			said, err := warrenSays(t, "upgrade", "--set-string", "node.podAnnotations.build="+now, "--set-string", "control.podAnnotations.build="+now)
			if err != nil || !strings.Contains(said, "node agents 0/2 (node") {
				t.Errorf("the nodes that are waited for are not named: %v\n%s", err, said)
			}
		})
		for uid := range agents() {
			if before[uid] {
				t.Error("an agent was not exchanged")
			}
		}
	}
	was := agents()
	during("an upgrade that does not come up, and the way back", func() {
		said, err := warrenSays(t, "upgrade", "--set", "image.tag=nowhere", "--timeout", "20s")
		if err == nil || !strings.Contains(said, "going back to revision") || !strings.Contains(said, "rolled back to revision") || !strings.Contains(said, ":nowhere") {
			t.Errorf("%v\n%s", err, said)
		}
	})
	for uid := range agents() {
		if !was[uid] {
			t.Error("an agent was exchanged by an upgrade that never came up")
		}
	}
}

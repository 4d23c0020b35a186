package e2e

import (
	"context"
	"fmt"
	"maps"
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
	on := func() map[string]string { // node: its agent
		t.Helper()
		pods, err := mesh.Pods(t.Context(), lab.Namespace, lab.NodeApp)
		must(t, err)
		out := map[string]string{}
		for _, p := range pods {
			if !p.Terminating {
				out[p.Node] += p.UID
			}
		}
		return out
	}
	agents := func() map[string]bool {
		t.Helper()
		out := map[string]bool{}
		for _, uid := range on() {
			out[uid] = true
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
	// The agent of one node comes first, and the other is left alone until all are exchanged.
	label := func(how string) {
		t.Helper()
		_, err := mesh.Kubectl(t.Context(), "label", "node", nodes[0], how)
		must(t, err)
	}
	label("pool=canary")
	defer label("pool-")
	first := []string{"upgrade", "--set", "node.canary.nodes=pool=canary"}
	then := on()
	if *long {
		during("a canary that does not come up, and the way back", func() {
			said, err := warrenSays(t, append(first, "--set", "node.canary.tag=nowhere", "--timeout", "20s")...)
			if err == nil || !strings.Contains(said, "canaries' node agents 0/1") || !strings.Contains(said, "rolled back to revision") {
				t.Errorf("%v\n%s", err, said)
			}
		})
		if now := on(); !maps.Equal(now, then) {
			t.Errorf("agents %v were exchanged for %v by a canary that never came up", then, now)
		}
	}
	upgrade := func(args ...string) {
		t.Helper()
		if _, err := warren(t, args...); err != nil {
			t.Error(err)
		}
	}
	during("a canary", func() { upgrade(first...) })
	now := on()
	if now[nodes[0]] == then[nodes[0]] || now[nodes[1]] != then[nodes[1]] {
		t.Errorf("the agents of %s are %v, and were %v", nodes[0], now, then)
	}
	during("the others after a canary", func() { upgrade("upgrade", "--reset-values") })
	if last := on(); last[nodes[0]] == now[nodes[0]] {
		t.Errorf("%s still has the canary's agent", nodes[0])
	}
}

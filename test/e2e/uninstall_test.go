package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// An upgrade to the same chart changes nothing.
func TestUpgradeIsIdempotent(t *testing.T) {
	before, err := mesh.Pods(t.Context(), lab.Namespace, "")
	must(t, err)
	must(t, mesh.Install(t.Context()))
	after, err := mesh.Pods(t.Context(), lab.Namespace, "")
	must(t, err)
	name := func(pods []lab.Pod) (s []string) {
		for _, p := range pods {
			if !p.Terminating {
				s = append(s, p.Name)
			}
		}
		return s
	}
	if a, b := strings.Join(name(before), " "), strings.Join(name(after), " "); a != b {
		t.Errorf("pods changed from %s to %s", a, b)
	}
}

// Uninstalling ends capture, leaves pods working, and nothing on the nodes; installing again captures again.
func TestUninstall(t *testing.T) {
	ns := pair(t, "e2e-uninstall")
	must(t, mesh.Uninstall(t.Context()))
	dial := func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		return err
	}
	if err := lab.Eventually(t.Context(), 20*time.Second, dial); err != nil {
		t.Errorf("pods of the mesh are cut off when it is uninstalled: %v", err)
	}
	if mesh.Cluster != nil {
		for _, name := range nodes[:2] {
			n, err := mesh.Cluster.Node(name)
			must(t, err)
			left, err := n.Exec(t.Context(), "sh", "-c", "ls -d /sys/fs/bpf/warren /opt/cni/bin/warren-cni 2>/dev/null; grep -l warren-cni /etc/cni/net.d/* 2>/dev/null; true")
			must(t, err)
			if strings.TrimSpace(left) != "" {
				t.Errorf("left on %s:\n%s", name, left)
			}
		}
	}
	// The pods that clean stay until they are deleted, and do not start over and over.
	events, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "get", "events", "--field-selector=reason=BackOff",
		"-o", `jsonpath={range .items[*]}{.involvedObject.name}: {.message}{"\n"}{end}`)
	must(t, err)
	for line := range strings.Lines(events) {
		if strings.HasPrefix(line, "warren-uninstall-") {
			t.Errorf("a pod that cleans: %s", line)
		}
	}
	must(t, mesh.Run(t.Context(), lab.PodSpec{Namespace: ns, Name: "later", Node: nodes[0], Args: []string{"sleep"}}))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))

	must(t, mesh.Install(t.Context()))
	_, err = mesh.AwaitRedirection(t.Context(), ns, "enabled", time.Minute)
	must(t, err)
	must(t, lab.Eventually(t.Context(), 10*time.Second, func() error {
		if err := dial(); err != nil {
			return fmt.Errorf("after installing again: %w", err)
		}
		return nil
	}))
}

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// Who is killed while it installs, upgrades or uninstalls has left nothing that a second run does not complete.
func TestWhatIsInterruptedIsCompleted(t *testing.T) {
	ownCluster(t)
	t.Cleanup(func() {
		if err := mesh.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	ns := pair(t, "e2e-interrupted")
	_, err := warrenProgram() // or the time it is killed after would be that of its making
	must(t, err)
	dial := func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		return err
	}
	took := map[string]time.Duration{"upgrade": 4 * time.Second, "uninstall": 4 * time.Second, "install": 4 * time.Second} // the whole run before
	runs, killed, failed := 0, 0, 0
	for round := range size(1, 8) {
		build, canary := fmt.Sprintf("podAnnotations.build=%d", time.Now().Unix()), ""
		if round%2 == 0 { // two DaemonSets of agents
			canary = "kubernetes.io/hostname=" + nodes[0]
		}
		for _, tc := range []struct {
			args []string
			then func() error
		}{
			{[]string{"upgrade", "--set-string", "node." + build, "--set-string", "control." + build, "--set", "node.canary.nodes=" + canary}, dial},
			{[]string{"uninstall"}, func() error {
				if left := residue(t); len(left) > 0 {
					return fmt.Errorf("left on the nodes:\n%s", strings.Join(left, "\n"))
				}
				return nil
			}},
			{[]string{"install"}, func() error {
				if _, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", time.Minute); err != nil {
					return err
				}
				return lab.Eventually(t.Context(), 10*time.Second, dial)
			}},
		} {
			what, runs0 := fmt.Sprintf("round %d: %s", round+1, tc.args[0]), runs
			for range 1 + rand.N(2) {
				runs++
				after := rand.N(took[tc.args[0]])
				if wasKilled, said := killWarren(t, after, tc.args...); wasKilled {
					killed++
					t.Logf("%s: killed after %s, when it said %q", what, after.Round(time.Millisecond), lastLine(said))
				}
			}
			start := time.Now()
			out, errs, err := runWarren(t.Context(), t, tc.args...)
			took[tc.args[0]] = time.Since(start)
			if err != nil {
				failed++
				t.Errorf("%s, after %d interrupted: %v: %s%s", what, runs-runs0, err, out, errs)
				continue
			}
			if err := tc.then(); err != nil {
				failed++
				t.Errorf("%s, after %d interrupted: %v\n%s", what, runs-runs0, err, errs)
			}
		}
	}
	if killed == 0 {
		t.Error("nothing was interrupted: every run had ended before")
	}
	record("interrupted", "interrupted", runs, failed, float64(killed), "installs, upgrades and uninstalls killed at random, and completed by a second run")
}

// killWarren runs the command line and kills it after a time, and says whether it still ran, and what it had said.
func killWarren(t *testing.T, after time.Duration, args ...string) (killed bool, said string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), after)
	defer cancel()
	_, said, err := runWarren(ctx, t, args...)
	return err != nil && ctx.Err() != nil, said
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

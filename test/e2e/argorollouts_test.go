package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// The controller of Argo Rollouts drives canaries of the demo's inventory behind a waypoint, by the files of
// examples/argo-rollouts: step by step until a version is for all, and back at once when one is given up. Each version gets
// its share of the requests, and none fails.
func TestCanaryByArgoRollouts(t *testing.T) {
	ownCluster(t)
	if !*long {
		t.Skip("building the controller takes more than four minutes of two cores; with -long")
	}
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	remove, err := mesh.InstallArgoRollouts(ctx)
	if remove != nil {
		t.Cleanup(func() {
			if err := remove(context.WithoutCancel(ctx)); err != nil {
				t.Error(err)
			}
		})
	}
	must(t, err)
	for _, by := range []string{"services", "subsets"} {
		t.Run(by, func(t *testing.T) {
			t.Parallel()
			newCanary(t, by).run(t)
		})
	}
}

// canary is the demo's inventory under a Rollout.
type canary struct {
	ns   string
	stop func() requestReport
}

const inventoryURL = "http://inventory:8080/stock"

// newCanary has the demo's inventory answer behind a waypoint, asks it all the time, and leaves it to a Rollout.
func newCanary(t *testing.T, by string) canary {
	t.Helper()
	ctx := t.Context()
	c := canary{ns: namespace(t, "e2e-argo-"+by, ambient)}
	t.Cleanup(func() {
		if t.Failed() {
			for _, who := range [][]string{{"-n", c.ns, "logs", "deploy/way"}, {"-n", lab.ArgoNamespace, "logs", "deploy/argo-rollouts"}} {
				said, err := mesh.Kubectl(context.WithoutCancel(ctx), append(who, "--tail=20")...)
				t.Logf("%s: %v\n%s", who, err, said)
			}
		}
	})
	example := func(file string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(mesh.Root(), "examples", file))
		must(t, err)
		must(t, mesh.Apply(ctx, strings.ReplaceAll(string(b), "namespace: shop", "namespace: "+c.ns)))
	}
	must(t, mesh.Run(ctx, caller(c.ns, "client", nodes[0])))
	example("demo/inventory.yaml")
	must(t, mesh.Rollout(ctx, c.ns, "deploy/inventory"))
	must(t, mesh.AwaitReady(ctx, c.ns, time.Minute))
	inMesh(t, c.ns) // before there are pods that are not captured
	applyIn(t, c.ns, aWaypoint)
	for _, step := range [][]string{
		{"wait", "--timeout=180s", "--for=condition=Programmed", "gateway.gateway.networking.k8s.io/way"},
		{"label", "service", "inventory", "istio.io/use-waypoint=way"},
		{"wait", "--timeout=60s", "--for=condition=istio.io/WaypointBound", "service/inventory"},
	} {
		c.kubectl(t, step...)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		_, err := mesh.Exec(ctx, c.ns, "client", "/demo", "get", inventoryURL)
		return err
	}))
	c.stop = startRequests(t, c.ns, "client", inventoryURL, 50)

	example("argo-rollouts/" + by + "/versions.yaml")
	example("argo-rollouts/" + by + "/canary.yaml")
	c.becomes(t, "healthy", func(r rolloutStatus) bool { return r.Phase == "Healthy" && r.StableRS != "" })
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if n := c.kubectl(t, "get", "deployment", "inventory", "-o", "jsonpath={.spec.replicas}"); n != "0" {
			return fmt.Errorf("the Deployment goes on with %s replicas", n)
		}
		return nil
	}))
	c.share(t, "v1", 100)
	return c
}

func (c canary) run(t *testing.T) {
	c.kubectl(t, "set", "env", "deployment/inventory", "VERSION=v2")
	for i, percent := range []int{20, 50, 100} {
		c.pauses(t, i, percent)
		c.share(t, "v2", percent)
		c.wellFormed(t)
		c.patch(t, `{"pauseConditions":null}`)
	}
	c.becomes(t, "v2 for all", func(r rolloutStatus) bool { return r.Phase == "Healthy" && r.StableRS == r.CurrentPodHash })
	c.weighs(t, 0)
	c.share(t, "v2", 100)
	c.wellFormed(t)

	c.kubectl(t, "set", "env", "deployment/inventory", "VERSION=v3")
	c.pauses(t, 0, 20)
	c.share(t, "v3", 20)
	began := time.Now()
	c.patch(t, `{"abort":true}`)
	must(t, lab.Eventually(t.Context(), 10*time.Second, func() error {
		at := time.Now()
		if v := c.answers(t, 50); v["v3"] > 0 {
			return fmt.Errorf("v3 is given up, and answers: %v", v)
		}
		t.Logf("%s after it was given up v3 answers no more", at.Sub(began).Round(10*time.Millisecond))
		return nil
	}))
	c.share(t, "v3", 0)
	c.becomes(t, "v3 given up", func(r rolloutStatus) bool { return r.Abort && r.Phase == "Degraded" })
	c.weighs(t, 0)
	c.wellFormed(t)

	r := c.stop()
	t.Logf("%+v", r)
	if r.Failed > 0 || r.Requests == 0 {
		t.Errorf("%d of %d requests failed: %v", r.Failed, r.Requests, r.Examples)
	}
}

func (c canary) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := mesh.Kubectl(t.Context(), append([]string{"-n", c.ns}, args...)...)
	if err != nil {
		t.Fatal(err, out)
	}
	return out
}

// patch does what `kubectl argo rollouts` does, in the Rollout's status.
func (c canary) patch(t *testing.T, status string) {
	t.Helper()
	c.kubectl(t, "patch", "rollouts.argoproj.io", "inventory", "--subresource=status", "--type=merge", "-p", `{"status":`+status+`}`)
}

// answers is how many of n answers came of each version.
func (c canary) answers(t *testing.T, n int) map[string]int {
	t.Helper()
	out, err := mesh.Exec(t.Context(), c.ns, "client", "/demo", "load", "-n", fmt.Sprint(n), "-every", "4ms", "-count", "-url", inventoryURL)
	must(t, err)
	var v map[string]int
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return v
}

// share asks until a version's share of the answers is right. Of 400 that are drawn by lot with a chance of 20 or 50 % the
// number is off by more than 50 less often than once in two million times; with 0 and 100 % it is not off at all.
func (c canary) share(t *testing.T, version string, percent int) {
	t.Helper()
	const n = 400
	must(t, lab.Eventually(t.Context(), 10*time.Second, func() error {
		v := c.answers(t, n)
		off, allowed := v[version]-n*percent/100, 50
		if percent == 0 || percent == 100 {
			allowed = 0
		}
		if off < -allowed || off > allowed {
			return fmt.Errorf("%s has %d %% of the requests, and of %d answers came %v", version, percent, n, v)
		}
		t.Logf("%s has %d %%: %v", version, percent, v)
		return nil
	}))
}

// rolloutStatus is what a Rollout says of itself.
type rolloutStatus struct {
	Phase, Message           string
	CurrentStepIndex         int
	PauseConditions          []struct{ Reason string }
	StableRS, CurrentPodHash string
	Abort                    bool
	Canary                   struct {
		Weights struct{ Canary struct{ Weight int } }
	}
}

func (c canary) becomes(t *testing.T, what string, is func(rolloutStatus) bool) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		var r struct{ Status rolloutStatus }
		if err := mesh.API().Get(t.Context(), "/apis/argoproj.io/v1alpha1/namespaces/"+c.ns+"/rollouts/inventory", &r); err != nil {
			return err
		}
		if !is(r.Status) {
			return fmt.Errorf("%s: the Rollout is %+v", what, r.Status)
		}
		return nil
	}))
}

// pauses waits until the controller has set a weight and waits for somebody to go on.
func (c canary) pauses(t *testing.T, weight, percent int) {
	t.Helper()
	c.becomes(t, fmt.Sprintf("a pause at %d %%", percent), func(r rolloutStatus) bool {
		return r.CurrentStepIndex == 2*weight+1 && len(r.PauseConditions) > 0 && r.Canary.Weights.Canary.Weight == percent && r.StableRS != r.CurrentPodHash
	})
	c.weighs(t, percent)
}

// weighs waits until the controller has written the canary's weight into the VirtualService.
func (c canary) weighs(t *testing.T, percent int) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), 20*time.Second, func() error {
		var v struct {
			Spec struct {
				HTTP []struct{ Route []struct{ Weight int } }
			}
		}
		if err := mesh.API().Get(t.Context(), "/apis/networking.istio.io/v1/namespaces/"+c.ns+"/virtualservices/inventory", &v); err != nil {
			return err
		}
		var got []int
		for _, r := range v.Spec.HTTP[0].Route {
			got = append(got, r.Weight)
		}
		if !slices.Equal(got, []int{100 - percent, percent}) {
			return fmt.Errorf("the VirtualService has the weights %v, want %d for the canary", got, percent)
		}
		return nil
	}))
}

// wellFormed checks that the control plane finds nothing wrong with what the controller has written.
func (c canary) wellFormed(t *testing.T) {
	t.Helper()
	for _, kind := range []string{"VirtualService", "DestinationRule"} {
		if said := c.kubectl(t, "get", "events", "--field-selector=type!=Normal,involvedObject.kind="+kind, "-o", `jsonpath={range .items[*]}{.reason}: {.message}{"\n"}{end}`); said != "" {
			t.Errorf("of the %s it is said: %s", kind, said)
		}
	}
	if out, err := warren(t, "analyze", "--only", c.ns); err != nil || !strings.Contains(out, "nothing is wrong with") {
		t.Errorf("%v: %s", err, out)
	}
}

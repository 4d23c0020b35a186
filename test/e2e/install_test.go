package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// warrenProgram builds the command line once.
var warrenProgram = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(mesh.Root(), "bin", "warren")
	build := exec.Command("go", "build", "-o", bin, "./cmd/warren")
	build.Dir = mesh.Root()
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building warren: %w\n%s", err, out)
	}
	return bin, nil
})

// warren runs the command line and returns its standard output.
func warren(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, errs, err := runWarren(t.Context(), t, args...)
	if err != nil {
		err = fmt.Errorf("warren %s: %w: %s", strings.Join(args, " "), err, errs)
	}
	return out, err
}

// warrenSays runs the command line and returns what it says of its progress and of errors.
func warrenSays(t *testing.T, args ...string) (string, error) {
	t.Helper()
	_, errs, err := runWarren(t.Context(), t, args...)
	return errs, err
}

// runWarren runs the command line until it ends, or is killed with ctx.
func runWarren(ctx context.Context, t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	bin, err := warrenProgram()
	must(t, err)
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig())
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// The manifest of every profile is applied at the first try to a cluster that has nothing; warren takes it away again
// and leaves nothing on the nodes; warren installs, and helm goes on from there.
func TestInstall(t *testing.T) {
	ownCluster(t)
	if !*long {
		t.Skip("minutes: every profile on an emptied cluster; -long does it")
	}
	t.Cleanup(func() {
		if err := mesh.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	ns := pair(t, "e2e-install")
	empty := func() {
		t.Helper()
		out, err := warren(t, "uninstall", "--purge")
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		must(t, lab.Eventually(t.Context(), time.Minute, func() error {
			out, err := mesh.Kubectl(t.Context(), "get", "namespaces,customresourcedefinitions", "-o", "name")
			if err == nil && (strings.Contains(out, "/"+lab.Namespace+"\n") || strings.Contains(out, "istio.io\n") || strings.Contains(out, "gateway.networking")) {
				why, _ := mesh.Kubectl(t.Context(), "get", "customresourcedefinitions", "-o",
					`jsonpath={range .items[*]}{.metadata.name} {.metadata.deletionTimestamp} {.metadata.finalizers} {.status.conditions[?(@.type=="Terminating")].message}{"\n"}{end}`)
				err = fmt.Errorf("not empty yet: %s%s", out, why)
			}
			return err
		}))
	}
	held := strings.Join(residue(t), "\n")
	for _, what := range []string{"at cgroup", "sk_lookup programs", "at link", "the rule", "/sys/fs/bpf/warren", "warren-cni", "/run/warren/", "/var/lib/warren/"} {
		if !strings.Contains(held, what) {
			t.Errorf("while the mesh runs the nodes have nothing of %q, so that nothing could be found left:\n%s", what, held)
		}
	}
	left, uninstalls := 0, 0
	gone := func(how string) {
		t.Helper()
		uninstalls++
		if found := residue(t); len(found) > 0 {
			left += len(found)
			t.Errorf("%s leaves\n%s", how, strings.Join(found, "\n"))
		}
	}

	empty() // what helm installed
	gone("uninstalling what helm installed")

	failed := 0
	list, err := warren(t, "profile", "list", "-o", "json")
	must(t, err)
	var named []struct{ Name string }
	must(t, json.Unmarshal([]byte(list), &named))
	profiles := []string{"default"}
	for _, p := range named {
		if p.Name != "default" {
			profiles = append(profiles, p.Name)
		}
	}
	for _, p := range profiles {
		manifest, err := warren(t, "manifest", "generate", "--profile", p)
		must(t, err)
		if manifest == "" {
			continue // nothing to apply
		}
		if err := mesh.Apply(t.Context(), manifest); err != nil {
			failed++
			t.Errorf("%s: %.2000v", p, err)
		}
		if p == "default" {
			if out, err := warren(t, "status", "--wait"); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			if _, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", time.Minute); err != nil {
				t.Error(err)
			}
		}
		empty()
		gone("uninstalling the manifest of " + p)
	}
	record("manifests-first-try", "manifests-first-try", len(profiles), failed, float64(len(profiles)-failed), "profiles whose manifest an empty cluster takes at the first try")

	start := time.Now()
	if out, err := warren(t, "install"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	took := time.Since(start)
	t.Logf("install to ready: %.1f s", took.Seconds())
	record("figures", "warren install to ready, empty cluster", 1, 0, took.Seconds(), "s")
	if out, err := mesh.Helm(t.Context(), "list", "-n", lab.Namespace); err != nil || !strings.Contains(out, "deployed") {
		t.Errorf("helm does not know the release: %v\n%s", err, out)
	}
	must(t, mesh.Install(t.Context())) // helm goes on from it
	if out, err := warren(t, "upgrade", "--set", "control.logLevel=debug"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	_, err = mesh.AwaitRedirection(t.Context(), ns, "enabled", time.Minute)
	must(t, err)
	if out, err := warren(t, "uninstall"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	gone("uninstalling")
	record("uninstall-residue", "uninstall-residue", uninstalls, left, float64(left), "BPF programs, links and maps, CNI entries, files and rules left on two nodes")
}

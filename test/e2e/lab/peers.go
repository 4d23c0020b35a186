package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// plainBuild is how programs are built that ask for nothing else. What is built alike has the packages in common compiled once, which is
// why the modules of peers ask for the versions of libraries that the root module has, too.
var plainBuild = []string{"build", "-p=2", "-buildvcs=false", "-trimpath", "-ldflags=-s -w"}

// peer is a module of programs that come from elsewhere and that tests run.
type peer struct {
	dir      string            // of the module, below the repository
	packages map[string]string // by the names of their programs
	flags    []string          // besides plainBuild, the last of a kind counts
}

// istioctlVersion is what Istio's command line calls itself: a release number, for what it compares with others.
const istioctlVersion = "1.31.0"

var peers = map[string]peer{
	"argo-rollouts": {dir: "test/e2e/argo-rollouts", packages: map[string]string{"argo-rollouts": argoModule + "/cmd/rollouts-controller"}},
	"cilium": {dir: "test/e2e/cilium",
		packages: map[string]string{"cilium-agent": ciliumModule + "/daemon", "cilium-cni": ciliumModule + "/plugins/cilium-cni"}},
	"collector": {dir: "test/e2e/collector", packages: map[string]string{"collector": "."}},
	"istiod":    {dir: "test/interop/istiod", packages: map[string]string{"istiod": "istio.io/istio/pilot/cmd/pilot-discovery", "validate": "./validate"}},
	"istioctl": {dir: "test/e2e/istioctl", packages: map[string]string{"istioctl": "istio.io/istio/istioctl/cmd/istioctl"},
		flags: []string{"-ldflags=-s -w -X istio.io/istio/pkg/version.buildVersion=" + istioctlVersion}},
	"limiter": {dir: "test/e2e/limiter", packages: map[string]string{"limiter": "."}},
	// Kubernetes is its only service discovery.
	"prometheus": {dir: "test/e2e/prometheus", packages: map[string]string{"prometheus": "github.com/prometheus/prometheus/cmd/prometheus"},
		flags: []string{"-tags=remove_all_sd,enable_kubernetes_sd"}},
}

// Peers are the names of the peers that the tests of each run need, in the order in which these come.
var Peers = []string{"prometheus", "istioctl", "istiod", "limiter", "collector"}

// Peer returns a program of another project, built from the module of its name into the user's cache, which the first time takes minutes of
// both cores.
func (l *Lab) Peer(ctx context.Context, name string) (string, error) {
	dir, err := BuildPeer(ctx, name, l.log)
	return filepath.Join(dir, name), err
}

// BuildPeer builds the programs of a peer and returns the directory that they are in. The cache keeps one of each peer. Who comes while they
// are built waits.
func BuildPeer(ctx context.Context, name string, log func(format string, args ...any)) (string, error) {
	p, ok := peers[name]
	if !ok {
		return "", fmt.Errorf("no peer is called %q; there are %q", name, slices.Sorted(maps.Keys(peers)))
	}
	root, err := repository()
	if err != nil {
		return "", err
	}
	src := filepath.Join(root, filepath.FromSlash(p.dir))
	args := append(slices.Clone(plainBuild), p.flags...)
	key, err := p.key(src, args)
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	top := filepath.Join(cache, "warren")
	if err := os.MkdirAll(top, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(top, name+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close() // which gives it back
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", lock.Name(), err)
	}
	dir := filepath.Join(top, name+"-"+key)
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	log("building %s from source; the first time takes several minutes", name)
	tmp := dir + ".new"
	for program, pkg := range p.packages {
		cmd := exec.CommandContext(ctx, "go", append(slices.Clone(args), "-o", filepath.Join(tmp, program), pkg)...)
		cmd.Dir = src
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOGC=800") // a compiler that collects less needs a fifth less time
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s in %s: %w\n%s", program, src, err, out)
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(top, name+"-*"))
	for _, o := range old {
		if o != dir {
			err = os.RemoveAll(o)
		}
	}
	return dir, err
}

// key tells builds apart: by their flags and by what is in the module's directory.
func (p peer) key(src string, args []string) (string, error) {
	key := sha256.New()
	fmt.Fprintln(key, runtime.Version(), runtime.GOARCH, args)
	for _, pattern := range []string{"*.*", "*/*.go"} {
		files, err := filepath.Glob(filepath.Join(src, pattern))
		if err != nil {
			return "", err
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				return "", err
			}
			key.Write(b)
		}
	}
	return hex.EncodeToString(key.Sum(nil)[:8]), nil
}

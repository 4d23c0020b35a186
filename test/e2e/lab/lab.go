// Package lab is what the demo and the end-to-end tests do to a Kubernetes: bring one up or take the one they
// are given, install the chart, run the shop, talk to pods and watch the link between the nodes.
//
// It uses kubectl and helm as a user would, and the API itself for pods, which it asks about all the time. It knows nothing
// of how Warren works inside.
package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/warrenmesh/warren/test/cluster"
)

// Names that the chart gives.
const (
	Namespace = "istio-system"
	Release   = "warren"
	Label     = "istio.io/dataplane-mode"
	NodeApp   = "app=ztunnel"
)

// Lab is a Kubernetes and the means to work on it.
type Lab struct {
	// Cluster is nil on a cluster that is not ours: no packet capture, no power cuts there.
	Cluster *cluster.Cluster

	root       string // of the repository
	kubectl    string
	helm       string
	kubeconfig string
	api        *API
	waypoint   bool // its image is loaded
	log        func(format string, args ...any)
	build      string // identifies what the images hold
}

// Open takes the cluster of kubeconfig, or, when that is empty, the one that runs on this machine, which it
// starts if need be.
func Open(ctx context.Context, kubeconfig string, log func(string, ...any)) (*Lab, error) {
	root, err := repository()
	if err != nil {
		return nil, err
	}
	l := &Lab{root: root, log: log, kubeconfig: kubeconfig}
	say := func(s string) { log("%s", s) }
	if kubeconfig != "" {
		bin, err := cluster.Binaries(ctx, say)
		if err != nil {
			return nil, err
		}
		l.kubectl, l.helm = filepath.Join(bin, "kubectl"), filepath.Join(bin, "helm")
		l.api, err = openAPI(l.kubeconfig)
		return l, err
	}
	c, err := cluster.Attach("")
	if errors.Is(err, cluster.ErrNotRunning) {
		start := time.Now()
		c, err = cluster.Start(ctx, cluster.Options{Nodes: 2, Log: say})
		if err == nil {
			log("cluster of 2 nodes ready in %.1f s", time.Since(start).Seconds())
		}
	}
	if err != nil {
		return nil, err
	}
	l.Cluster, l.kubeconfig = c, c.Kubeconfig()
	l.kubectl, l.helm = c.Program("kubectl"), c.Program("helm")
	l.api, err = openAPI(l.kubeconfig)
	return l, err
}

// Root is the top of the repository.
func (l *Lab) Root() string { return l.root }

// Kubeconfig is the path of the cluster's kubeconfig.
func (l *Lab) Kubeconfig() string { return l.kubeconfig }

// KubectlPath is the kubectl that the lab uses.
func (l *Lab) KubectlPath() string { return l.kubectl }

// repository finds the directory with the chart, from this file or from the working directory.
func repository() (string, error) {
	var starts []string
	if _, f, _, ok := runtime.Caller(0); ok {
		starts = append(starts, filepath.Dir(f))
	}
	if wd, err := os.Getwd(); err == nil {
		starts = append(starts, wd)
	}
	for _, d := range starts {
		for ; d != filepath.Dir(d); d = filepath.Dir(d) {
			if _, err := os.Stat(filepath.Join(d, "charts", "warren", "Chart.yaml")); err == nil {
				return d, nil
			}
		}
	}
	return "", errors.New("find the chart: run inside Warren's repository")
}

// Kubectl runs kubectl and returns its standard output.
func (l *Lab) Kubectl(ctx context.Context, args ...string) (string, error) {
	return l.run(ctx, nil, l.kubectl, args...)
}

// Program runs a program with the cluster's kubeconfig and returns its standard output.
func (l *Lab) Program(ctx context.Context, program string, args ...string) (string, error) {
	return l.run(ctx, nil, program, args...)
}

// Helm runs helm and returns its standard output.
func (l *Lab) Helm(ctx context.Context, args ...string) (string, error) {
	return l.run(ctx, nil, l.helm, args...)
}

// Apply applies a manifest.
func (l *Lab) Apply(ctx context.Context, manifest string) error {
	_, err := l.run(ctx, strings.NewReader(manifest), l.kubectl, "apply", "-f", "-")
	return err
}

func (l *Lab) run(ctx context.Context, in io.Reader, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.kubeconfig)
	cmd.Stdin = in
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err,
			strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// BuildImages builds Warren's images and the demo's, and loads them into our own cluster.
func (l *Lab) BuildImages(ctx context.Context) error {
	out, err := os.MkdirTemp("", "warren-images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(out)
	err = cluster.BuildImages(ctx, cluster.ImageOptions{Out: out, Tag: "dev", Log: func(string) {}})
	if err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(out, "*.tar"))
	if err != nil {
		return err
	}
	sum := sha256.New()
	for _, a := range archives {
		b, err := os.ReadFile(a)
		if err != nil {
			return err
		}
		if name := filepath.Base(a); name == "node-agent.tar" || name == "controlplane.tar" {
			sum.Write(b)
		}
	}
	l.build = hex.EncodeToString(sum.Sum(nil))[:12]
	if l.Cluster == nil {
		return nil
	}
	return l.Cluster.LoadImages(ctx, archives...)
}

// LoadFIPSImages builds Warren's images with the certified cryptographic module, loads them into our own cluster beside
// the others and returns their tag.
func (l *Lab) LoadFIPSImages(ctx context.Context) (tag string, err error) {
	out, err := os.MkdirTemp("", "warren-images-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(out)
	if err := cluster.BuildImages(ctx, cluster.ImageOptions{Out: out, Tag: "dev", FIPS: true, Log: func(string) {}}); err != nil {
		return "", err
	}
	archives, err := filepath.Glob(filepath.Join(out, "*.tar"))
	if err != nil {
		return "", err
	}
	for i, a := range archives { // an archive replaces the one that has its name
		archives[i] = strings.TrimSuffix(a, ".tar") + "-fips.tar"
		if err := os.Rename(a, archives[i]); err != nil {
			return "", err
		}
	}
	return "dev-fips", l.Cluster.LoadImages(ctx, archives...)
}

// Install installs the chart, or upgrades it, and waits until it works. Pods of the same tag but of another
// build are replaced.
func (l *Lab) Install(ctx context.Context, set ...string) error {
	wait := "--wait"
	if slices.ContainsFunc(set, func(s string) bool { return strings.HasPrefix(s, "image.") }) {
		wait = "--wait=legacy" // other images leave the holders alone (OnDelete), and the watcher waits for them too
	}
	args := []string{"upgrade", "--install", Release, filepath.Join(l.root, "charts", "warren"),
		"--namespace", Namespace, "--create-namespace", wait, "--timeout", "180s"}
	if l.build != "" {
		args = append(args, "--set-string", "node.podAnnotations.build="+l.build,
			"--set-string", "control.podAnnotations.build="+l.build)
	}
	for _, s := range set {
		args = append(args, "--set", s)
	}
	if l.Cluster != nil { // a run that was interrupted leaves Helm waiting for an operation that nobody finishes
		if _, err := l.Kubectl(ctx, "-n", Namespace, "delete", "secrets", "--ignore-not-found",
			"-l", "owner=helm,name="+Release+",status in (pending-install,pending-upgrade,pending-rollback)"); err != nil {
			return err
		}
	}
	if _, err := l.Helm(ctx, args...); err != nil {
		return fmt.Errorf("%w\n%s", err, l.Diagnose(context.WithoutCancel(ctx)))
	}
	return nil
}

// Uninstall removes the release.
func (l *Lab) Uninstall(ctx context.Context) error {
	_, err := l.Helm(ctx, "uninstall", Release, "--namespace", Namespace, "--wait", "--timeout", "120s")
	return err
}

// Diagnose collects what a reader of a failure wants to see, of Warren and of the given namespaces, shortly: what
// is ordinary is left out.
func (l *Lab) Diagnose(ctx context.Context, namespaces ...string) string {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var b strings.Builder
	say := func(what, out string, err error, keep int) {
		if err != nil {
			out += err.Error()
		}
		lines := slices.Collect(strings.Lines(out))
		fmt.Fprintf(&b, "--- %s\n%s\n", what, strings.TrimRight(strings.Join(lines[max(0, len(lines)-keep):], ""), "\n"))
	}
	for _, ns := range append([]string{Namespace}, namespaces...) {
		out, err := l.Kubectl(ctx, "-n", ns, "get", "pods", "-o", "wide")
		say("pods of "+ns, out, err, 15)
		out, err = l.Kubectl(ctx, "-n", ns, "get", "events", "--field-selector=type!=Normal", "--sort-by=.lastTimestamp",
			"-o", `jsonpath={range .items[*]}{.lastTimestamp} {.involvedObject.name} {.reason}: {.message}{"\n"}{end}`)
		say("warnings of "+ns, out, err, 6)
	}
	for _, app := range []string{NodeApp, "app=istiod", "app=warren-holder"} {
		out, err := l.Kubectl(ctx, "-n", Namespace, "logs", "-l", app, "--tail=2000", "--prefix")
		var odd strings.Builder
		for line := range strings.Lines(out) {
			_, said, _ := strings.Cut(line, "] ") // after the pod's name; I begins a line of client-go's
			ordinary := strings.Contains(line, "level=debug") || strings.Contains(line, `"level":"info"`) || strings.HasPrefix(said, "I") ||
				strings.Contains(line, "level=info") && !strings.Contains(line, "error=") ||
				strings.Contains(line, "context canceled") || strings.Contains(line, "outcome=policy_denied")
			if !ordinary {
				odd.WriteString(line)
			}
		}
		say("what "+app+" warns of", odd.String(), err, 16)
	}
	if l.Cluster == nil {
		return b.String()
	}
	for _, n := range l.Cluster.Nodes() {
		// Neighbours between the nodes, and pods that do not answer.
		out, err := n.Exec(ctx, "sh", "-c", "ip neigh show dev eth0; ip neigh show nud failed; ip neigh show nud incomplete")
		say("neighbours of "+n.Name(), out, err, 10)
	}
	return b.String()
}

// Shop deploys the demo application and waits until it answers.
func (l *Lab) Shop(ctx context.Context) error {
	dir := filepath.Join(l.root, "examples", "demo")
	for _, f := range []string{"namespace", "inventory", "catalog", "ui", "load"} {
		if _, err := l.Kubectl(ctx, "apply", "-f", filepath.Join(dir, f+".yaml")); err != nil {
			return err
		}
	}
	return l.Rollout(ctx, "shop", "deploy/inventory", "deploy/catalog-v1", "deploy/catalog-v2", "deploy/ui", "deploy/load")
}

// Rollout waits until the objects are rolled out.
func (l *Lab) Rollout(ctx context.Context, namespace string, objects ...string) error {
	for _, o := range objects {
		if _, err := l.Kubectl(ctx, "-n", namespace, "rollout", "status", o, "--timeout=120s"); err != nil {
			return fmt.Errorf("%w\n%s", err, l.Diagnose(context.WithoutCancel(ctx)))
		}
	}
	return nil
}

// Enrol labels a namespace, or takes the label away.
func (l *Lab) Enrol(ctx context.Context, namespace string, yes bool) error {
	v := Label + "-"
	if yes {
		v = Label + "=ambient"
	}
	_, err := l.Kubectl(ctx, "label", "--overwrite", "namespace", namespace, v)
	return err
}

// Pod is what the tests want to know of a pod.
type Pod struct {
	Namespace, Name, UID, Node, IP string
	IPs                            []string
	Labels, Annotations            map[string]string
	Phase                          string
	Ready                          bool
	Terminating                    bool
	Restarts                       int
}

// Redirection is what the node says about the pod's capture.
func (p Pod) Redirection() string { return p.Annotations["ambient.istio.io/redirection"] }

// Pods lists pods by namespace and label selector, oldest name first.
func (l *Lab) Pods(ctx context.Context, namespace, selector string) ([]Pod, error) {
	var list struct {
		Items []struct {
			Metadata struct {
				Namespace, Name, UID string
				DeletionTimestamp    string
				Labels, Annotations  map[string]string
			}
			Spec   struct{ NodeName string }
			Status struct {
				Phase, PodIP      string
				PodIPs            []struct{ IP string }
				Conditions        []struct{ Type, Status string }
				ContainerStatuses []struct {
					RestartCount int
				}
			}
		}
	}
	if err := l.api.Get(ctx, podsPath(namespace)+"?labelSelector="+url.QueryEscape(selector), &list); err != nil {
		return nil, fmt.Errorf("reading the pods of %s: %w", namespace, err)
	}
	var pods []Pod
	for _, i := range list.Items {
		p := Pod{Namespace: i.Metadata.Namespace, Name: i.Metadata.Name, UID: i.Metadata.UID, Node: i.Spec.NodeName,
			IP: i.Status.PodIP, Labels: i.Metadata.Labels, Annotations: i.Metadata.Annotations,
			Phase: i.Status.Phase, Terminating: i.Metadata.DeletionTimestamp != ""}
		for _, a := range i.Status.PodIPs {
			p.IPs = append(p.IPs, a.IP)
		}
		for _, c := range i.Status.Conditions {
			p.Ready = p.Ready || c.Type == "Ready" && c.Status == "True"
		}
		for _, c := range i.Status.ContainerStatuses {
			p.Restarts += c.RestartCount
		}
		pods = append(pods, p)
	}
	slices.SortFunc(pods, func(a, b Pod) int { return strings.Compare(a.Name, b.Name) })
	return pods, nil
}

// AwaitRedirection waits until every live pod of the namespace has the value ("" is no annotation), and
// returns how long that took.
func (l *Lab) AwaitRedirection(ctx context.Context, namespace, want string, limit time.Duration) (time.Duration, error) {
	start := time.Now()
	var wrong []string
	err := Eventually(ctx, limit, func() error {
		pods, err := l.Pods(ctx, namespace, "")
		if err != nil {
			return err
		}
		wrong = nil
		for _, p := range pods {
			if !p.Terminating && p.Phase == "Running" && p.Redirection() != want {
				wrong = append(wrong, fmt.Sprintf("%s is %q", p.Name, p.Redirection()))
			}
		}
		if len(wrong) > 0 {
			return fmt.Errorf("want redirection=%q in %s: %s", want, namespace, strings.Join(wrong, ", "))
		}
		return nil
	})
	return time.Since(start), err
}

// Exec runs a command in a pod and returns its standard output.
func (l *Lab) Exec(ctx context.Context, namespace, pod string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	if err := l.api.exec(ctx, namespace, pod, args, nil, &out, &errs); err != nil {
		return out.String(), failed(namespace, pod, args, err, errs.String())
	}
	return out.String(), nil
}

func failed(namespace, pod string, args []string, err error, errs string) error {
	return fmt.Errorf("%s in %s/%s: %w: %s", strings.Join(args, " "), namespace, pod, err, strings.TrimSpace(errs))
}

// Running is a command in a pod.
type Running struct {
	stdin io.Closer
	ended chan struct{}
	out   bytes.Buffer
	err   error
}

// Wait waits for the command's end and returns its standard output.
func (r *Running) Wait() (string, error) {
	<-r.ended
	return r.out.String(), r.err
}

// Stop ends the command's standard input, which tells it to end, and waits for that.
func (r *Running) Stop() (string, error) {
	r.stdin.Close()
	return r.Wait()
}

// Start begins a command in a pod and returns when it has said a line on its standard error, or has ended.
func (l *Lab) Start(ctx context.Context, line, namespace, pod string, args ...string) *Running {
	in, stdin := io.Pipe()
	said, errs := io.Pipe()
	r := &Running{stdin: stdin, ended: make(chan struct{})}
	var other strings.Builder
	begun, heard := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(heard)
		seen := sync.OnceFunc(func() { close(begun) })
		defer seen()
		for s := bufio.NewScanner(said); s.Scan(); {
			if s.Text() == line {
				seen()
			} else {
				fmt.Fprintln(&other, s.Text())
			}
		}
		_, _ = io.Copy(io.Discard, said) // after a line that is too long
	}()
	go func() {
		defer close(r.ended)
		err := l.api.exec(ctx, namespace, pod, args, in, &r.out, errs)
		errs.Close()
		in.Close()
		<-heard
		if err != nil {
			r.err = failed(namespace, pod, args, err, other.String())
		}
	}()
	<-begun
	return r
}

// Eventually calls f until it succeeds or the limit has passed, and returns its last error.
func Eventually(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", limit, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/warrenmesh/warren/bench"
)

// Names of what the benchmark puts into a cluster.
const (
	benchNamespace = "warren-bench" // and -VARIANT
	benchLabel     = "app.kubernetes.io/part-of"
	benchDir       = "/etc/bench" // where a sidecar finds its files
	benchLife      = 6 * 3600     // seconds, should nobody delete what is left
	benchCPU       = "100m"       // that client, server and sidecars ask for: beside what asks for some, pods that ask for none get next to nothing of busy cores
)

// benchSite sets variants up on two nodes: for each a namespace with a Job for the client and one for the
// server. A pod on each node reads processor times; it sees the node's processes and has no other right.
type benchSite struct {
	c              *conn
	app            *app
	client, server string // nodes
	image, sidecar string
	nodes          []corev1.Node
	shared         bool // both nodes have one kernel
}

func openBenchSite(ctx context.Context, a *app, c *conn, f benchFlags) (*benchSite, error) {
	s := &benchSite{c: c, app: a, image: f.image, sidecar: f.sidecar}
	named := []string{}
	if len(f.nodes) == 0 {
		agents, err := a.agents(ctx, c)
		if err != nil {
			return nil, err
		}
		for _, p := range agents {
			if ready(&p) {
				named = append(named, p.Spec.NodeName)
			}
		}
	}
	var err error
	if s.client, s.server, err = pickNodes(f.nodes, named); err != nil {
		return nil, err
	}
	for _, n := range []string{s.client, s.server} {
		node, err := c.CoreV1().Nodes().Get(ctx, n, metav1.GetOptions{})
		if err != nil {
			return nil, fmt.Errorf("node %s: %w", n, err)
		}
		s.nodes = append(s.nodes, *node)
	}
	if err := s.close(ctx); err != nil { // what an earlier run left
		return nil, err
	}
	if err := s.openMeters(ctx); err != nil {
		return nil, errors.Join(err, s.close(context.WithoutCancel(ctx)))
	}
	return s, nil
}

// close deletes every namespace of the benchmark.
func (s *benchSite) close(ctx context.Context) error { return s.remove(ctx) }

// remove deletes the namespaces of the benchmark but some, and waits until they are gone.
func (s *benchSite) remove(ctx context.Context, but ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	namespaces := s.c.CoreV1().Namespaces()
	return s.app.poll(ctx, "deleting the benchmark's namespaces", func() (string, error) {
		list, err := namespaces.List(ctx, metav1.ListOptions{LabelSelector: benchLabel + "=" + benchNamespace})
		if err != nil {
			return "", err
		}
		left := slices.DeleteFunc(list.Items, func(n corev1.Namespace) bool { return slices.Contains(but, n.Name) })
		for _, n := range left {
			if n.DeletionTimestamp == nil {
				if err := namespaces.Delete(ctx, n.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
					return "", err
				}
			}
		}
		if len(left) == 0 {
			return "", nil
		}
		return plural(len(left), "namespace") + " left", nil
	})
}

// Machine describes the nodes.
func (s *benchSite) Machine(context.Context) (bench.Machine, error) {
	var names, kernels []string
	for _, n := range s.nodes {
		i := n.Status.NodeInfo
		cpu, memory := n.Status.Capacity[corev1.ResourceCPU], n.Status.Capacity[corev1.ResourceMemory]
		names = append(names, fmt.Sprintf("%s cores, %.0f GB, %s, %s", cpu.String(), float64(memory.Value())/1e9, i.Architecture, i.OSImage))
		kernels = append(kernels, i.KernelVersion)
	}
	kernels = slices.Compact(kernels)
	m := bench.Machine{Kernel: strings.Join(kernels, ", "), Name: "Two nodes of " + names[0]}
	switch {
	case s.shared:
		m.Name = "Two nodes that share one kernel and " + names[0] + ": rates that use all cores compare costs of CPU"
	case names[0] != names[1]:
		m.Name = "Client: " + names[0] + "; server: " + names[1]
	}
	m.Name += "; Kubernetes " + s.nodes[0].Status.NodeInfo.KubeletVersion
	return m, nil
}

// namespace makes one for a variant.
func (s *benchSite) namespace(ctx context.Context, name string, labels map[string]string) error {
	all := map[string]string{benchLabel: benchNamespace}
	for k, v := range labels {
		all[k] = v
	}
	_, err := s.c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: all}}, metav1.CreateOptions{})
	return err
}

// openMeters starts a pod on each node that sees its processes.
func (s *benchSite) openMeters(ctx context.Context) error {
	if err := s.namespace(ctx, benchNamespace, map[string]string{"pod-security.kubernetes.io/enforce": "privileged", modeLabel: "none"}); err != nil {
		return err
	}
	for _, node := range []string{s.client, s.server} {
		job := s.job(benchNamespace, "meter-"+node, node, []string{"/load", "sleep"})
		job.Spec.Template.Spec.HostPID = true
		if _, err := s.c.BatchV1().Jobs(benchNamespace).Create(ctx, job, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	for _, node := range []string{s.client, s.server} {
		if _, err := s.await(ctx, benchNamespace, "meter-"+node, nil); err != nil {
			return err
		}
	}
	// One kernel's counters can only grow from reading to reading, whichever node reads them.
	var order []bench.Reading
	for _, node := range []string{s.client, s.server, s.client} {
		r, err := s.read(ctx, node, nil)
		if err != nil {
			return err
		}
		order = append(order, *r)
	}
	s.shared = order[0].BootTime == order[1].BootTime && order[0].Switches <= order[1].Switches && order[1].Switches <= order[2].Switches
	return nil
}

// job is a pod of the load program on a node.
func (s *benchSite) job(namespace, name, node string, command []string) *batchv1.Job {
	no, yes, once, life, grace, user := false, true, int32(0), int64(benchLife), int64(1), int64(65532)
	container := corev1.Container{Name: "load", Image: s.image, ImagePullPolicy: corev1.PullIfNotPresent, Command: command,
		SecurityContext: &corev1.SecurityContext{AllowPrivilegeEscalation: &no, RunAsNonRoot: &yes, RunAsUser: &user,
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}}
	return &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace},
		Spec: batchv1.JobSpec{BackoffLimit: &once, ActiveDeadlineSeconds: &life, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": name}},
			Spec: corev1.PodSpec{NodeName: node, RestartPolicy: corev1.RestartPolicyNever, TerminationGracePeriodSeconds: &grace,
				AutomountServiceAccountToken: &no, EnableServiceLinks: &no, Containers: []corev1.Container{container}}}}}
}

// await waits for the pod of a job: all its containers run, and it has the annotations.
func (s *benchSite) await(ctx context.Context, namespace, job string, annotations map[string]string) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var found *corev1.Pod
	err := s.app.poll(ctx, "waiting for "+namespace+"/"+job, func() (string, error) {
		list, err := s.c.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "job-name=" + job})
		if err != nil {
			return "", err
		}
		if len(list.Items) == 0 {
			return "there is no pod yet", nil
		}
		for i := range list.Items {
			if why := settled(&list.Items[i], annotations); why != "" {
				return why, nil
			}
		}
		found = &list.Items[0]
		return "", nil
	})
	return found, err
}

// settled says what a pod still lacks.
func settled(p *corev1.Pod, annotations map[string]string) string {
	for _, c := range p.Status.ContainerStatuses {
		switch {
		case c.State.Waiting != nil && c.State.Waiting.Reason != "":
			return fmt.Sprintf("%s: %s %s", c.Name, c.State.Waiting.Reason, c.State.Waiting.Message)
		case c.State.Terminated != nil:
			return fmt.Sprintf("%s has ended with %d: see kubectl -n %s logs %s -c %s", c.Name, c.State.Terminated.ExitCode, p.Namespace, p.Name, c.Name)
		}
	}
	if p.Status.Reason != "" { // the node has no room for it
		return fmt.Sprintf("%s is %s: %s", p.Name, p.Status.Reason, p.Status.Message)
	}
	if !ready(p) || p.Status.PodIP == "" {
		return p.Name + " is " + string(p.Status.Phase)
	}
	for k, v := range annotations {
		if p.Annotations[k] != v {
			return fmt.Sprintf("%s has no annotation %s=%s", p.Name, k, v)
		}
	}
	return ""
}

// exec runs a command in a pod and returns its standard output.
func (c *conn) exec(ctx context.Context, namespace, pod, container string, command ...string) ([]byte, error) {
	cfg := rest.CopyConfig(c.rest)
	cfg.Timeout = 0
	u := c.CoreV1().RESTClient().Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Container: container, Command: command, Stdout: true, Stderr: true}, scheme.ParameterCodec).URL()
	e, err := remotecommand.NewSPDYExecutor(cfg, http.MethodPost, u)
	if err != nil {
		return nil, err
	}
	var out, errs bytes.Buffer
	if err := e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &errs}); err != nil {
		return nil, fmt.Errorf("%s in %s/%s: %w: %s", strings.Join(command, " "), namespace, pod, err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}

// read asks a node's meter.
func (s *benchSite) read(ctx context.Context, node string, containers []string) (*bench.Reading, error) {
	p, err := s.await(ctx, benchNamespace, "meter-"+node, nil)
	if err != nil {
		return nil, err
	}
	out, err := s.c.exec(ctx, benchNamespace, p.Name, "load", append([]string{"/load", "meter"}, containers...)...)
	if err != nil {
		return nil, err
	}
	r := &bench.Reading{}
	if err := json.Unmarshal(out, r); err != nil {
		return nil, fmt.Errorf("the meter on %s: %w: %q", node, err, out)
	}
	return r, nil
}

// readAll asks the meters of both nodes at once.
func (s *benchSite) readAll(ctx context.Context, containers map[string][]string) ([]bench.Reading, error) {
	nodes := slices.Compact([]string{s.client, s.server})
	out, errs := make([]bench.Reading, len(nodes)), make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			r, err := s.read(ctx, n, containers[n])
			if err != nil {
				errs[i] = err
				return
			}
			if i > 0 && s.shared { // counted once
				r.Busy, r.SoftIRQ = 0, 0
			}
			if len(r.Processes) < len(containers[n]) {
				errs[i] = fmt.Errorf("node %s runs %d of the %d proxies", n, len(r.Processes), len(containers[n]))
			}
			out[i] = *r
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

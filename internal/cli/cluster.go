package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	istio "istio.io/client-go/pkg/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"

	"github.com/warrenmesh/warren/internal/cli/release"
)

// Labels and annotations that the mesh's objects carry.
const (
	agentSelector   = "app=ztunnel," + ourSelector
	canaryLabel     = "warren.io/canary"       // of agents that are tried first
	canaryNodes     = "warren.io/canary-nodes" // annotation of the other agents' DaemonSet: the label of nodes that are not theirs
	holderSelector  = "app=warren-holder"
	controlSelector = anyControl + "," + ourSelector
	ourSelector     = "app.kubernetes.io/part-of=warren" // Istio's objects have the same labels but for this
	anyControl      = "app=istiod"                       // of control planes, Istio's among them
	modeLabel       = "istio.io/dataplane-mode"
	redirection     = "ambient.istio.io/redirection"
	adminPort       = 15000 // of an agent
	monitoringPort  = 15014 // of a control plane
)

// isOurs reports whether an object's labels are those that ourSelector asks for.
func isOurs(labels map[string]string) bool { return labels["app.kubernetes.io/part-of"] == "warren" }

// conn is a Kubernetes API.
type conn struct {
	kubernetes.Interface
	istio istio.Interface
	rest  *rest.Config
	// namespace is the context's, for what is not the control plane's.
	namespace string
	// objects applies and deletes what the chart yields.
	objects release.Cluster
	// ask asks a port of a pod over HTTP; a seam for tests.
	ask func(ctx context.Context, pod *corev1.Pod, port int, path string) ([]byte, error)
	// stream is the same for an answer that has no end of its own. The caller closes it.
	stream func(ctx context.Context, pod *corev1.Pod, port int, path string) (io.ReadCloser, error)
	// tunnel forwards a local port, 0 for any, to a pod's; another seam.
	tunnel func(ctx context.Context, pod *corev1.Pod, local, port int) (*portForward, error)
}

func dialCluster(a *app) (*conn, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = a.file
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: a.context})
	cfg, err := loader.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w; name one with --kubeconfig or KUBECONFIG", err)
	}
	cfg.QPS, cfg.Burst = 50, 100
	if cfg.Timeout == 0 {
		cfg.Timeout = 20 * time.Second
	}
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	i, err := istio.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(k.Discovery()))
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	c := &conn{Interface: k, istio: i, rest: cfg, namespace: namespace, objects: release.Cluster{Client: d, Mapper: mapper}}
	c.ask, c.stream, c.tunnel = c.forward, c.open, c.listen
	return c, nil
}

// agents lists the agents' pods, one for each node: of two on one node the ready, younger one.
func (a *app) agents(ctx context.Context, c *conn) ([]corev1.Pod, error) {
	list, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: agentSelector})
	if err != nil {
		return nil, fmt.Errorf("listing the node agents in %s: %w", a.namespace, err)
	}
	pods := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.Spec.NodeName == "" })
	slices.SortFunc(pods, func(x, y corev1.Pod) int {
		better := func(p corev1.Pod) int {
			if ready(&p) && p.DeletionTimestamp == nil {
				return 0
			}
			return 1
		}
		return cmp.Or(strings.Compare(x.Spec.NodeName, y.Spec.NodeName), cmp.Compare(better(x), better(y)),
			y.CreationTimestamp.Compare(x.CreationTimestamp.Time))
	})
	return slices.CompactFunc(pods, func(x, y corev1.Pod) bool { return x.Spec.NodeName == y.Spec.NodeName }), nil
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// someAgents are the agent for target, or, where that is "", all, of which there is one at least.
func (a *app) someAgents(ctx context.Context, c *conn, target string) ([]corev1.Pod, error) {
	if target != "" {
		p, err := a.agentFor(ctx, c, target)
		if err != nil {
			return nil, err
		}
		return []corev1.Pod{*p}, nil
	}
	pods, err := a.agents(ctx, c)
	if err == nil && len(pods) == 0 {
		err = fmt.Errorf("no node agent runs in %s: see %s check", a.namespace, a.name())
	}
	return pods, err
}

// agentFor finds the agent for a node, an agent's pod, or the node of a pod written NAME, NAME.NAMESPACE or
// NAMESPACE/NAME.
func (a *app) agentFor(ctx context.Context, c *conn, target string) (*corev1.Pod, error) {
	agents, err := a.agents(ctx, c)
	if err != nil {
		return nil, err
	}
	node := target
	if i := slices.IndexFunc(agents, func(p corev1.Pod) bool { return p.Name == target || p.Spec.NodeName == target }); i >= 0 {
		return &agents[i], nil
	}
	namespace, name := "default", target
	if before, after, ok := strings.Cut(target, "/"); ok {
		namespace, name = before, after
	} else if i := strings.LastIndexByte(target, '.'); i > 0 {
		name, namespace = target[:i], target[i+1:]
	}
	p, err := c.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		var nodes []string
		for _, p := range agents {
			nodes = append(nodes, p.Spec.NodeName)
		}
		return nil, fmt.Errorf("%q is neither a node with an agent (%s) nor a pod (%w); write a pod as NAMESPACE/POD", target, strings.Join(nodes, ", "), err)
	}
	node = p.Spec.NodeName
	for i := range agents {
		if agents[i].Spec.NodeName == node {
			return &agents[i], nil
		}
	}
	return nil, fmt.Errorf("no agent runs on node %s: see kubectl -n %s get pods -l %s -o wide", node, a.namespace, agentSelector)
}

// forward asks, and reads the whole answer.
func (c *conn) forward(ctx context.Context, pod *corev1.Pod, port int, path string) ([]byte, error) {
	body, err := c.open(ctx, pod, port, path)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

// forwarded is an answer, and the end of its port forward.
type forwarded struct {
	io.ReadCloser
	end func()
}

func (f *forwarded) Close() error {
	defer f.end()
	return f.ReadCloser.Close()
}

// portForward is a local port that leads to a pod's.
type portForward struct {
	port  int           // of 127.0.0.1
	ended chan struct{} // closed when it is no more
	errs  *bytes.Buffer // what went wrong for single connections
	stop  chan struct{}
	err   error // why it is no more, once it has ended
}

func (f *portForward) close() {
	close(f.stop)
	<-f.ended
}

// listen forwards a local port, 0 for any, to a pod's.
func (c *conn) listen(ctx context.Context, pod *corev1.Pod, local, port int) (*portForward, error) {
	tr, up, err := spdy.RoundTripperFor(c.rest)
	if err != nil {
		return nil, err
	}
	u := c.CoreV1().RESTClient().Post().Resource("pods").Namespace(pod.Namespace).Name(pod.Name).SubResource("portforward").URL()
	f := &portForward{ended: make(chan struct{}), stop: make(chan struct{}), errs: new(bytes.Buffer)}
	ready := make(chan struct{})
	p, err := portforward.NewOnAddresses(spdy.NewDialer(up, &http.Client{Transport: tr}, http.MethodPost, u),
		[]string{"127.0.0.1"}, []string{fmt.Sprintf("%d:%d", local, port)}, f.stop, ready, io.Discard, f.errs)
	if err != nil {
		return nil, err
	}
	go func() {
		defer close(f.ended)
		f.err = p.ForwardPorts()
	}()
	select {
	case <-ready:
	case <-f.ended:
		return nil, fmt.Errorf("forwarding a port to %s: %w; this needs the right to create pods/portforward", pod.Name, f.err)
	case <-ctx.Done():
		f.close()
		return nil, ctx.Err()
	}
	ports, err := p.GetPorts()
	if err != nil {
		f.close()
		return nil, err
	}
	f.port = int(ports[0].Local)
	return f, nil
}

// open asks through the API's port forward: an agent's admin port listens on the node's loopback.
func (c *conn) open(ctx context.Context, pod *corev1.Pod, port int, path string) (body io.ReadCloser, err error) {
	f, err := c.listen(ctx, pod, 0, port)
	if err != nil {
		return nil, err
	}
	end := sync.OnceFunc(f.close)
	defer func() {
		if body == nil {
			end()
		}
	}()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", f.port, path), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("asking %s on node %s: %w %s", pod.Name, pod.Spec.NodeName, err, strings.TrimSpace(f.errs.String()))
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		says, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
		return nil, &answerError{pod: pod.Name, path: path, status: resp.StatusCode, says: strings.TrimSpace(string(says))}
	}
	return &forwarded{resp.Body, end}, nil
}

// answerError is an answer other than 200.
type answerError struct {
	pod, path, says string
	status          int
}

func (e *answerError) Error() string {
	s := fmt.Sprintf("asking %s for %s: %d %s", e.pod, e.path, e.status, http.StatusText(e.status))
	if e.says != "" && e.status != http.StatusNotFound {
		s += ": " + e.says
	}
	return s
}

// readDump reads a saved /config_dump.
func readDump(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if !json.Valid(b) {
		return nil, errors.New(file + " is not JSON: save one with curl localhost:15000/config_dump on a node")
	}
	return b, nil
}

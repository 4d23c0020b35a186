package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"

	"github.com/warrenmesh/warren/bench"
)

// benchStage is a variant in its namespace.
type benchStage struct {
	site       *benchSite
	namespace  string
	pod        string // the client's
	http, tcp  string
	containers map[string][]string // of the proxies, by node
}

func (st *benchStage) Targets() (http, tcp string) { return st.http, st.tcp }

func (st *benchStage) Load(ctx context.Context, args ...string) (*bench.Outcome, error) {
	out, err := st.site.c.exec(ctx, st.namespace, st.pod, "load", append([]string{"/load"}, args...)...)
	if err != nil {
		return nil, err
	}
	o := &bench.Outcome{}
	if err := json.Unmarshal(out, o); err != nil {
		return nil, fmt.Errorf("the load program said %q: %w", out, err)
	}
	return o, nil
}

func (st *benchStage) Meter(ctx context.Context) ([]bench.Reading, error) {
	return st.site.readAll(ctx, st.containers)
}

// Stage makes the namespace, the server, and then the client, whose sidecar has to know the server's address.
func (s *benchSite) Stage(ctx context.Context, v *bench.Variant) (bench.Stage, error) {
	st := &benchStage{site: s, namespace: benchNamespace + "-" + v.Name, containers: map[string][]string{}}
	if err := s.namespace(ctx, st.namespace, v.NamespaceLabels); err != nil {
		return nil, err
	}
	place := bench.Place{Dir: benchDir, Namespace: st.namespace}
	objects, err := v.Objects(place)
	if err != nil {
		return nil, err
	}
	if err := s.c.apply(ctx, objects); err != nil {
		return nil, fmt.Errorf("the variant's objects: %w", err)
	}
	var certs map[string]map[string][]byte
	if v.Sidecar != nil && v.Sidecar.Certificates {
		if certs, err = bench.Certificates("client", "server"); err != nil {
			return nil, err
		}
	}
	for _, role := range []string{"server", "client"} {
		place.Role = role
		p, err := s.pod(ctx, v, place, certs[role])
		if err != nil {
			return nil, err
		}
		if role == "server" {
			place.Server = bracketed(p.Status.PodIP)
		}
		st.pod = p.Name
		if v.Sidecar != nil {
			st.addProxies(p, "sidecar")
		}
	}
	if v.Between != nil {
		if err := s.between(ctx, st, v.Between); err != nil {
			return nil, err
		}
	}
	if place.Service, err = s.service(ctx, st.namespace); err != nil {
		return nil, err
	}
	if st.http, st.tcp, err = v.Targets(place); err != nil {
		return nil, err
	}
	if v.Proxies.Selector != "" {
		list, err := s.c.CoreV1().Pods(v.Proxies.Namespace).List(ctx, metav1.ListOptions{LabelSelector: v.Proxies.Selector})
		if err != nil {
			return nil, fmt.Errorf("finding the proxies: %w", err)
		}
		for i := range list.Items {
			if n := list.Items[i].Spec.NodeName; (n == s.client || n == s.server) && ready(&list.Items[i]) {
				st.addProxies(&list.Items[i], v.Proxies.Container)
			}
		}
	}
	if len(st.containers) == 0 && (v.Sidecar != nil || v.Proxies.Selector != "") {
		return nil, fmt.Errorf("no container %s in pods %s of %s on these nodes: is the mesh installed?", v.Proxies.Container, v.Proxies.Selector, v.Proxies.Namespace)
	}
	return st, nil
}

// between waits for the proxies of a variant's own namespace.
func (s *benchSite) between(ctx context.Context, st *benchStage, what *bench.Proxies) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	return s.app.poll(ctx, "waiting for "+what.Selector+" in "+st.namespace, func() (string, error) {
		list, err := s.c.CoreV1().Pods(st.namespace).List(ctx, metav1.ListOptions{LabelSelector: what.Selector})
		if err != nil {
			return "", err
		}
		i := slices.IndexFunc(list.Items, func(p corev1.Pod) bool { return ready(&p) })
		if i < 0 {
			return "none is ready", nil
		}
		p := &list.Items[i]
		if n := p.Spec.NodeName; n != s.client && n != s.server {
			return "", fmt.Errorf("%s runs on node %s, where nothing is measured: cordon all nodes but %s and %s, or name it with --nodes", p.Name, n, s.client, s.server)
		}
		st.addProxies(p, what.Container)
		return "", nil
	})
}

// service is the address of a variant's Service, if it has one.
func (s *benchSite) service(ctx context.Context, namespace string) (string, error) {
	svc, err := s.c.CoreV1().Services(namespace).Get(ctx, "server", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return bracketed(svc.Spec.ClusterIP), nil
}

// bracketed is an address as it stands before a port.
func bracketed(addr string) string {
	if strings.Contains(addr, ":") {
		return "[" + addr + "]"
	}
	return addr
}

// addProxies keeps the id of a container.
func (st *benchStage) addProxies(p *corev1.Pod, container string) {
	for _, c := range p.Status.ContainerStatuses {
		if _, id, ok := strings.Cut(c.ContainerID, "://"); ok && c.Name == container {
			st.containers[p.Spec.NodeName] = append(st.containers[p.Spec.NodeName], id)
		}
	}
}

// pod starts one side of a variant and waits until it is in the mesh.
func (s *benchSite) pod(ctx context.Context, v *bench.Variant, place bench.Place, certs map[string][]byte) (*corev1.Pod, error) {
	node, command := s.client, []string{"/load", "sleep"}
	if place.Role == "server" {
		command = []string{"/load", "serve"}
		if !v.SameNode {
			node = s.server
		}
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: place.Role, Namespace: place.Namespace}}
	if _, err := s.c.CoreV1().ServiceAccounts(place.Namespace).Create(ctx, account, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	job := s.job(place.Namespace, place.Role, node, command)
	t := &job.Spec.Template
	t.Spec.ServiceAccountName = place.Role
	t.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(benchCPU)}
	t.Annotations = v.PodAnnotations
	for k, l := range v.PodLabels {
		t.Labels[k] = l
	}
	if v.Sidecar != nil {
		files, err := v.SidecarFiles(place)
		if err != nil {
			return nil, err
		}
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: place.Role, Namespace: place.Namespace}, StringData: files, Data: certs}
		if _, err := s.c.CoreV1().Secrets(place.Namespace).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
			return nil, err
		}
		side := *t.Spec.Containers[0].DeepCopy()
		side.Name = "sidecar"
		if v.Sidecar.Image != "" {
			side.Image = cmp.Or(s.sidecar, v.Sidecar.Image)
		}
		if side.Command, err = v.SidecarCommand(place); err != nil {
			return nil, err
		}
		side.VolumeMounts = []corev1.VolumeMount{{Name: "files", MountPath: benchDir, ReadOnly: true}}
		t.Spec.Containers = append(t.Spec.Containers, side)
		t.Spec.Volumes = []corev1.Volume{{Name: "files", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: place.Role}}}}
	}
	if _, err := s.c.BatchV1().Jobs(place.Namespace).Create(ctx, job, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	return s.await(ctx, place.Namespace, place.Role, v.Await)
}

// Rest adds a job of many pods on the client's node. A node takes about as many as that: the other variants are
// removed first.
func (s *benchSite) Rest(ctx context.Context, v *bench.Variant, pods int) (func(context.Context) error, error) {
	namespace, n := benchNamespace+"-"+v.Name, int32(pods)
	if err := s.remove(ctx, benchNamespace, namespace); err != nil {
		return nil, err
	}
	job := s.job(namespace, "rest", s.client, []string{"/load", "sleep"})
	job.Spec.Parallelism, job.Spec.Completions = &n, &n
	if _, err := s.c.BatchV1().Jobs(namespace).Create(ctx, job, metav1.CreateOptions{}); err != nil {
		return nil, err
	}
	end := func(ctx context.Context) error {
		background := metav1.DeletePropagationForeground
		return s.c.BatchV1().Jobs(namespace).Delete(ctx, "rest", metav1.DeleteOptions{PropagationPolicy: &background})
	}
	err := s.app.poll(ctx, "waiting for resting pods", func() (string, error) {
		list, err := s.c.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "job-name=rest"})
		if err != nil {
			return "", err
		}
		if len(list.Items) < pods {
			return fmt.Sprintf("%d of %d are there", len(list.Items), pods), nil
		}
		for i := range list.Items {
			if list.Items[i].Status.Phase == corev1.PodFailed {
				return "", fmt.Errorf("%s: %s", list.Items[i].Name, list.Items[i].Status.Message)
			}
			if why := settled(&list.Items[i], v.Await); why != "" {
				return why, nil
			}
		}
		return "", nil
	})
	if err != nil {
		return nil, errors.Join(err, end(context.WithoutCancel(ctx)))
	}
	return end, nil
}

// apply creates the objects of a manifest.
func (c *conn) apply(ctx context.Context, manifest string) error {
	if strings.TrimSpace(manifest) == "" {
		return nil
	}
	client, err := dynamic.NewForConfig(c.rest)
	if err != nil {
		return err
	}
	groups, err := restmapper.GetAPIGroupResources(c.Discovery())
	if err != nil {
		return fmt.Errorf("asking for the kinds of objects: %w", err)
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	for d := yamlutil.NewYAMLOrJSONDecoder(strings.NewReader(manifest), 4096); ; {
		o := &unstructured.Unstructured{}
		switch err := d.Decode(o); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case len(o.Object) == 0:
			continue
		}
		gvk := o.GroupVersionKind()
		m, err := mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
		if err != nil {
			return err
		}
		if _, err := client.Resource(m.Resource).Namespace(o.GetNamespace()).Create(ctx, o, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("%s %s: %w", gvk.Kind, o.GetName(), err)
		}
	}
}

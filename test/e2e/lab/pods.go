package lab

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// Image is the demo's, which holds the TCP programs of the tests too.
const Image = "ghcr.io/warrenmesh/warren/demo:dev"

// PodSpec is a pod of one of the demo's programs.
type PodSpec struct {
	Namespace, Name string
	Node            string // "" is any
	Labels          map[string]string
	Account         string         // service account, made with the pod; "" is default
	Program         string         // of the image; "" is /demo
	Args            []string       // of the program
	Init            []string       // of the program in an init container
	Container       map[string]any // merged into the container
	Once            bool           // runs to its end
	HostNetwork     bool
	Port            int // 0: no Service
	ServiceType     string
	Headless        bool
}

type object = map[string]any

// Run creates pods with their accounts and Services, and does not wait.
func (l *Lab) Run(ctx context.Context, specs ...PodSpec) error {
	for _, s := range specs {
		account := s.Account
		if account == "" {
			account = "default"
		} else {
			if err := l.apply(ctx, "serviceaccounts", object{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": object{"name": account, "namespace": s.Namespace}}); err != nil {
				return err
			}
		}
		labels := map[string]string{"app": s.Name}
		for k, v := range s.Labels {
			labels[k] = v
		}
		security := object{"allowPrivilegeEscalation": false, "capabilities": object{"drop": []string{"ALL"}},
			"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": object{"type": "RuntimeDefault"}}
		program := s.Program
		if program == "" {
			program = "/demo"
		}
		container := func(name string, args []string) object {
			return object{"name": name, "image": Image, "imagePullPolicy": "IfNotPresent",
				"command": append([]string{program}, args...), "securityContext": security}
		}
		main := container("demo", s.Args)
		for k, v := range s.Container {
			main[k] = v
		}
		spec := object{"serviceAccountName": account, "terminationGracePeriodSeconds": 1, "containers": []any{main},
			"hostNetwork": s.HostNetwork, "enableServiceLinks": false}
		if s.Node != "" {
			spec["nodeSelector"] = object{"kubernetes.io/hostname": s.Node}
		}
		if s.Init != nil {
			spec["initContainers"] = []any{container("first", s.Init)}
		}
		if s.Once {
			spec["restartPolicy"] = "Never"
		}
		if err := l.apply(ctx, "pods", object{"apiVersion": "v1", "kind": "Pod",
			"metadata": object{"name": s.Name, "namespace": s.Namespace, "labels": labels}, "spec": spec}); err != nil {
			return err
		}
		if s.Port != 0 {
			service := object{"selector": object{"app": s.Name}, "ipFamilyPolicy": "PreferDualStack",
				"ports": []any{object{"name": "tcp", "port": s.Port, "targetPort": s.Port}}}
			if s.ServiceType != "" {
				service["type"] = s.ServiceType
			}
			if s.Headless {
				service["clusterIP"] = "None"
			}
			if err := l.apply(ctx, "services", object{"apiVersion": "v1", "kind": "Service",
				"metadata": object{"name": s.Name, "namespace": s.Namespace}, "spec": service}); err != nil {
				return err
			}
		}
	}
	return nil
}

// apply applies an object of the core group.
func (l *Lab) apply(ctx context.Context, plural string, o object) error {
	meta := o["metadata"].(object)
	_, err := l.api.Apply(ctx, fmt.Sprintf("/api/v1/namespaces/%s/%s/%s", meta["namespace"], plural, meta["name"]), o)
	return err
}

func podsPath(namespace string) string { return "/api/v1/namespaces/" + namespace + "/pods" }

// Logs are what the containers of a pod have written.
func (l *Lab) Logs(ctx context.Context, namespace, pod string, containers ...string) (string, error) {
	var all strings.Builder
	for _, c := range containers {
		b, err := l.api.do(ctx, http.MethodGet, podsPath(namespace)+"/"+pod+"/log?container="+c, "", nil)
		if err != nil {
			return all.String(), err
		}
		all.Write(b)
	}
	return all.String(), nil
}

// AwaitReady waits until every pod of the namespace is ready or has succeeded.
func (l *Lab) AwaitReady(ctx context.Context, namespace string, limit time.Duration) error {
	return Eventually(ctx, limit, func() error {
		pods, err := l.Pods(ctx, namespace, "")
		if err != nil {
			return err
		}
		var wait []string
		for _, p := range pods {
			if !p.Ready && p.Phase != "Succeeded" {
				wait = append(wait, p.Name+" is "+p.Phase)
			}
		}
		if len(wait) > 0 {
			return fmt.Errorf("not ready in %s: %s", namespace, strings.Join(wait, ", "))
		}
		return nil
	})
}

// Pod reads one pod.
func (l *Lab) Pod(ctx context.Context, namespace, name string) (Pod, error) {
	pods, err := l.Pods(ctx, namespace, "")
	if err != nil {
		return Pod{}, err
	}
	for _, p := range pods {
		if p.Name == name {
			return p, nil
		}
	}
	return Pod{}, fmt.Errorf("no pod %s/%s", namespace, name)
}

// NodeNames lists the nodes.
func (l *Lab) NodeNames(ctx context.Context) ([]string, error) {
	out, err := l.Kubectl(ctx, "get", "nodes", "-o", "jsonpath={.items[*].metadata.name}")
	return strings.Fields(out), err
}

// ServiceAddrs returns a Service's cluster IPs.
func (l *Lab) ServiceAddrs(ctx context.Context, namespace, name string) ([]string, error) {
	out, err := l.Kubectl(ctx, "-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIPs[*]}")
	return strings.Fields(out), err
}

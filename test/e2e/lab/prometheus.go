package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// prometheusConfig is how users have it: the job for annotated pods of Istio's sample and of Prometheus' own chart.
const prometheusConfig = `global: {scrape_interval: 1s}
scrape_configs:
  - job_name: kubernetes-pods
    honor_labels: true
    kubernetes_sd_configs: [{role: pod}]
    relabel_configs:
      - {action: keep, regex: "true", source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scrape]}
      - {action: replace, regex: '(https?)', source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scheme], target_label: __scheme__}
      - {action: replace, regex: '(.+)', source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_path], target_label: __metrics_path__}
      - action: replace
        regex: (\d+);(([A-Fa-f0-9]{1,4}::?){1,7}[A-Fa-f0-9]{1,4})
        replacement: '[$2]:$1'
        source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_port, __meta_kubernetes_pod_ip]
        target_label: __address__
      - action: replace
        regex: (\d+);((([0-9]+?)(\.|$)){4})
        replacement: $2:$1
        source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_port, __meta_kubernetes_pod_ip]
        target_label: __address__
      - {action: labelmap, regex: '__meta_kubernetes_pod_label_(.+)'}
      - {action: replace, source_labels: [__meta_kubernetes_namespace], target_label: namespace}
      - {action: replace, source_labels: [__meta_kubernetes_pod_name], target_label: pod}
      - {action: drop, regex: 'Pending|Succeeded|Failed|Completed', source_labels: [__meta_kubernetes_pod_phase]}
      - {action: replace, source_labels: [__meta_kubernetes_pod_node_name], target_label: node}
`

// prometheusDir is where nodes have the program.
const prometheusDir = "/var/lib/warren-prometheus"

// RunPrometheus runs the program as a pod on a node of our own cluster. It does not wait.
func (l *Lab) RunPrometheus(ctx context.Context, program, namespace, node string) error {
	if err := l.install(program, node, prometheusDir, "prometheus"); err != nil {
		return err
	}
	config := "    " + strings.ReplaceAll(prometheusConfig, "\n", "\n    ")
	return l.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: prometheus, namespace: %[1]s}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: e2e-prometheus}
rules: [{apiGroups: [""], resources: [nodes, services, endpoints, pods], verbs: [get, list, watch]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: e2e-prometheus}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: e2e-prometheus}
subjects: [{kind: ServiceAccount, name: prometheus, namespace: %[1]s}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: prometheus, namespace: %[1]s}
data:
  prometheus.yml: |
%[2]s
---
apiVersion: v1
kind: Pod
metadata: {name: prometheus, namespace: %[1]s}
spec:
  serviceAccountName: prometheus
  nodeSelector: {kubernetes.io/hostname: %[3]s}
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65534, fsGroup: 65534}
  containers:
    - name: prometheus
      image: %[4]s
      imagePullPolicy: IfNotPresent
      command: [%[5]s/prometheus, --config.file=/etc/prometheus/prometheus.yml, --storage.tsdb.path=/data]
      readinessProbe: {httpGet: {path: /-/ready, port: 9090}, periodSeconds: 1}
      volumeMounts: [{name: program, mountPath: %[5]s}, {name: config, mountPath: /etc/prometheus}, {name: data, mountPath: /data}]
  volumes:
    - {name: program, hostPath: {path: %[5]s}}
    - {name: config, configMap: {name: prometheus}}
    - {name: data, emptyDir: {}}
`, namespace, config, node, Image, prometheusDir))
}

// OnDisk puts Prometheus on the disk of a node of our own cluster and returns its directory there.
func (l *Lab) OnDisk(prometheus, node string) (string, error) {
	return prometheusDir, l.install(prometheus, node, prometheusDir, "prometheus")
}

// install puts a program on the disk of a node of our own cluster.
func (l *Lab) install(program, node, dir, name string) error {
	n, err := l.Cluster.Node(node)
	if err != nil {
		return err
	}
	dir = filepath.Join(n.Disk(), dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return copyProgram(program, filepath.Join(dir, name))
}

func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// AskPrometheus calls the API of the Prometheus of a namespace, through the API server, and decodes the answer's data.
func (l *Lab) AskPrometheus(ctx context.Context, namespace, path string, query url.Values, data any) error {
	at := "pods"
	if namespace == Namespace { // that of samples/addons
		at = "services"
	}
	out, err := l.Kubectl(ctx, "get", "--raw", "/api/v1/namespaces/"+namespace+"/"+at+"/prometheus:9090/proxy/api/v1/"+path+"?"+query.Encode())
	if err != nil {
		return err
	}
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return fmt.Errorf("Prometheus says %q: %w", out, err)
	}
	if answer.Status != "success" {
		return fmt.Errorf("Prometheus: %s", answer.Error)
	}
	return nil
}

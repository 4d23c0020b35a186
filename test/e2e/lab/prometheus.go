package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// prometheusBuild are the arguments that give a Prometheus with Kubernetes as its only service discovery.
var prometheusBuild = append(slices.Clone(plainBuild), "-tags=remove_all_sd,enable_kubernetes_sd")

// BuildPrometheus returns a Prometheus built from the module in test/e2e/prometheus into the user's cache, which
// the first time takes minutes of both cores.
func (l *Lab) BuildPrometheus(ctx context.Context) (string, error) {
	return l.buildProgram(ctx, "prometheus", "github.com/prometheus/prometheus/cmd/prometheus", prometheusBuild)
}

// plainBuild is how programs are built that ask for nothing else. What is built alike has the packages in common compiled once.
var plainBuild = []string{"build", "-p=2", "-buildvcs=false", "-trimpath", "-ldflags=-s -w"}

// buildProgram builds a program from the module in test/e2e that has its name.
func (l *Lab) buildProgram(ctx context.Context, name, pkg string, args []string) (string, error) {
	dir, err := l.buildPrograms(ctx, name, map[string]string{name: pkg}, args)
	return filepath.Join(dir, name), err
}

// buildPrograms builds packages, by the names that their programs get, from a module in test/e2e, and returns the directory that they are
// in. The cache keeps one of each module.
func (l *Lab) buildPrograms(ctx context.Context, module string, packages map[string]string, args []string) (string, error) {
	src := filepath.Join(l.root, "test", "e2e", module)
	key := sha256.New()
	fmt.Fprintln(key, runtime.Version(), runtime.GOARCH, args)
	files, err := filepath.Glob(filepath.Join(src, "*.*"))
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
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "warren", module+"-"+hex.EncodeToString(key.Sum(nil)[:8]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	l.log("building " + module + " from source; the first time takes several minutes")
	tmp := dir + ".new"
	for name, pkg := range packages {
		cmd := exec.CommandContext(ctx, "go", append(slices.Clone(args), "-o", filepath.Join(tmp, name), pkg)...)
		cmd.Dir = src
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build %s in %s: %w\n%s", name, src, err, out)
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(cache, "warren", module+"-*"))
	for _, o := range old {
		if o != dir {
			err = os.RemoveAll(o)
		}
	}
	return dir, err
}

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

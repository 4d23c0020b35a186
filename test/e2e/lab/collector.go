package lab

import (
	"context"
	"fmt"
	"strings"
)

// collectorConfig has it print whatever comes by OTLP.
const collectorConfig = `receivers: {otlp: {protocols: {grpc: {endpoint: "0.0.0.0:4317"}}}}
exporters: {debug: {verbosity: detailed}}
service:
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], exporters: [debug]}
    logs: {receivers: [otlp], exporters: [debug]}
`

// collectorDir is where nodes have the program.
const collectorDir = "/var/lib/warren-collector"

// RunCollector runs the program as a pod on a node of our own cluster, behind a Service of the name collector. It does not wait.
func (l *Lab) RunCollector(ctx context.Context, program, namespace, node string) error {
	if err := l.install(program, node, collectorDir, "collector"); err != nil {
		return err
	}
	return l.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: collector, namespace: %[1]s}
data:
  config.yaml: |
    %[2]s
---
apiVersion: v1
kind: Service
metadata: {name: collector, namespace: %[1]s}
spec: {selector: {app: collector}, ports: [{name: otlp, port: 4317}]}
---
apiVersion: v1
kind: Pod
metadata: {name: collector, namespace: %[1]s, labels: {app: collector}}
spec:
  nodeSelector: {kubernetes.io/hostname: %[3]s}
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65534}
  containers:
    - name: collector
      image: %[4]s
      imagePullPolicy: IfNotPresent
      command: [%[5]s/collector, --config=/etc/collector/config.yaml]
      readinessProbe: {tcpSocket: {port: 4317}, periodSeconds: 1}
      volumeMounts: [{name: program, mountPath: %[5]s}, {name: config, mountPath: /etc/collector}]
  volumes:
    - {name: program, hostPath: {path: %[5]s}}
    - {name: config, configMap: {name: collector}}
`, namespace, strings.ReplaceAll(collectorConfig, "\n", "\n    "), node, Image, collectorDir))
}

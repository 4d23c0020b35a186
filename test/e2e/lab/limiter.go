package lab

import (
	"context"
	"fmt"
)

// limiterDir is where nodes have the program.
const limiterDir = "/var/lib/warren-limiter"

// RunLimiter runs the program as a captured pod on a node of our own cluster, behind a Service of the name limiter, port 8081. All that
// it is told is that there is a domain. It does not wait.
func (l *Lab) RunLimiter(ctx context.Context, program, namespace, node string) error {
	if err := l.install(program, node, limiterDir, "limiter"); err != nil {
		return err
	}
	return l.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: limiter, namespace: %[1]s}
data:
  warren.yaml: |
    domain: warren
    descriptors: []
---
apiVersion: v1
kind: Service
metadata: {name: limiter, namespace: %[1]s}
spec: {selector: {app: limiter}, ports: [{name: grpc, port: 8081}]}
---
apiVersion: v1
kind: Pod
metadata: {name: limiter, namespace: %[1]s, labels: {app: limiter}}
spec:
  nodeSelector: {kubernetes.io/hostname: %[2]s}
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, runAsUser: 65534}
  containers:
    - name: limiter
      image: %[3]s
      imagePullPolicy: IfNotPresent
      command: [%[4]s/limiter]
      env: [{name: RUNTIME_ROOT, value: /etc/limiter}, {name: RUNTIME_SUBDIRECTORY, value: counts}]
      readinessProbe: {tcpSocket: {port: 8081}, periodSeconds: 1}
      volumeMounts: [{name: program, mountPath: %[4]s}, {name: config, mountPath: /etc/limiter/counts/config}]
  volumes:
    - {name: program, hostPath: {path: %[4]s}}
    - {name: config, configMap: {name: limiter}}
`, namespace, node, Image, limiterDir))
}

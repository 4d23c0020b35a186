package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

const istiodPort = "15112" // beside the API server

// ambientIstio puts an Istio in the place of Warren, until the test ends. Its control plane is Istio's own, run beside the nodes: the
// Deployment istiod is for its name, and has no pods. ztunnel is not to be had as a program here. In its place the DaemonSet ztunnel
// runs Warren's agent as one that knows nothing of Warren's control plane: it has certificates, workloads and policies from Istio's,
// its own directories on the node, and no CNI plugin. istio-cni-node is a process that sleeps; that pods are captured is written on
// them, as Istio's does, by istioCNI. The function that it returns ends Istio's control plane.
func ambientIstio(t *testing.T) (end func()) {
	t.Helper()
	ctx := t.Context()
	program, err := mesh.Peer(ctx, "istiod")
	must(t, err)
	agent, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "daemonset", "warren-node", "-o", "json")
	must(t, err)
	must(t, mesh.Uninstall(ctx))
	clear := func(ctx context.Context) {
		t.Helper()
		for _, what := range [][]string{{"secret", "istio-ca-secret"}, {"configmap", "istio-ca-root-cert", "istio", "warren-trust"}, {"service", "istiod"}, {"deployment", "istiod"},
			{"daemonset", "ztunnel", "istio-cni-node"}, {"serviceaccount", "ztunnel"}} {
			if out, err := mesh.Kubectl(ctx, append([]string{"-n", lab.Namespace, "delete", "--ignore-not-found"}, what...)...); err != nil {
				t.Error(err, out)
			}
		}
	}
	clear(ctx)
	ip, err := mesh.Kubectl(ctx, "get", "endpoints", "kubernetes", "-o", "jsonpath={.subsets[0].addresses[0].ip}")
	must(t, err)
	must(t, mesh.Apply(ctx, strings.NewReplacer("NS", lab.Namespace, "IP", ip, "PORT", istiodPort).Replace(`
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: NS}
data: {mesh: "{rootNamespace: NS, defaultConfig: {discoveryAddress: istiod.NS.svc:15012}}"}
---
apiVersion: v1
kind: Service
metadata: {name: istiod, namespace: NS, labels: {app: istiod, istio: pilot, istio.io/rev: default}}
spec: {ports: [{name: https-dns, port: 15012, targetPort: PORT}]}
---
apiVersion: v1
kind: Endpoints
metadata: {name: istiod, namespace: NS}
subsets: [{addresses: [{ip: IP}], ports: [{name: https-dns, port: PORT}]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: istiod, namespace: NS, labels: {app: istiod, istio: pilot, istio.io/rev: default}}
spec:
  replicas: 0
  selector: {matchLabels: {app: istiod, istio: pilot}}
  template:
    metadata: {labels: {app: istiod, istio: pilot}}
    spec: {containers: [{name: discovery, image: "`+lab.Image+`", imagePullPolicy: IfNotPresent}]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: ztunnel, namespace: NS}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: istio-cni-node, namespace: NS, labels: {k8s-app: istio-cni-node}}
spec:
  selector: {matchLabels: {k8s-app: istio-cni-node}}
  template:
    metadata: {labels: {k8s-app: istio-cni-node}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers: [{name: install-cni, image: "`+lab.Image+`", imagePullPolicy: IfNotPresent, command: [/demo, sleep]}]
`)))
	var log bytes.Buffer
	cmd := mesh.Cluster.OutsideCommand(context.WithoutCancel(ctx), program, "discovery", "--kubeconfig", filepath.Join(mesh.Cluster.Dir(), "pki", "admin.conf"), "--domain", "cluster.local",
		"--secureGRPCAddr", net.JoinHostPort(ip, istiodPort), "--grpcAddr", "", "--httpAddr", "127.0.0.1:15180", "--httpsAddr", "", "--monitoringAddr", "127.0.0.1:15114",
		"--ctrlz_port", "0", "--shutdownDuration", "1s")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), "POD_NAME=istiod-0", "POD_NAMESPACE="+lab.Namespace, "SERVICE_ACCOUNT=istiod", "CLUSTER_ID=Kubernetes", "REVISION=default",
		"CA_TRUSTED_NODE_ACCOUNTS="+lab.Namespace+"/ztunnel", "PILOT_CERT_PROVIDER=istiod", "JWT_POLICY=third-party-jwt", "PILOT_ENABLE_AMBIENT=true",
		"INJECT_ENABLED=false", "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER=false", "ENABLE_LEADER_ELECTION=false")
	cmd.Stdout, cmd.Stderr = &log, &log
	must(t, cmd.Start())
	end = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		timer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
	})
	t.Cleanup(func() {
		end()
		if t.Failed() {
			b := log.Bytes()
			t.Logf("istiod: %s", b[max(0, len(b)-10_000):])
		}
		ctx := context.WithoutCancel(t.Context())
		if _, said, err := runWarren(ctx, t, "migrate", "node", "--all", "--back", "--force", "--timeout", "60s"); err != nil && !strings.Contains(said, "not installed beside") {
			t.Errorf("%v\n%s", err, said)
		}
		_ = mesh.Uninstall(ctx)
		for _, n := range nodes {
			_, _ = mesh.Kubectl(ctx, "label", "node", n, "warren.io/migration-")
			_, _ = mesh.Kubectl(ctx, "uncordon", n)
		}
		clear(ctx)
		for _, name := range nodes { // what the stand-in for ztunnel has left, in the kernel too: what holds it there are its pins
			n, err := mesh.Cluster.Node(name)
			if err == nil {
				_, err = n.Exec(ctx, "rm", "-rf", "/sys/fs/bpf/"+standIn, "/run/"+standIn, "/var/lib/"+standIn)
			}
			if err != nil {
				t.Error(err)
			}
		}
		must(t, mesh.Install(ctx))
	})
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		_, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "secret/istio-ca-secret", "configmap/istio-ca-root-cert")
		return err
	}))
	must(t, mesh.Apply(ctx, ztunnel(t, agent)))
	for _, name := range []string{"ztunnel", "istio-cni-node"} {
		if out, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "rollout", "status", "daemonset/"+name, "--timeout=120s"); err != nil {
			t.Fatal(err, out, mesh.Diagnose(ctx))
		}
	}
	return end
}

const (
	standIn     = "warren-test-ztunnel"
	notGateways = "!gateway.networking.k8s.io/gateway-name"
)

// ztunnel makes of the agent's DaemonSet one that is Istio's by its name and labels and by whom it asks.
func ztunnel(t *testing.T, agent string) string {
	t.Helper()
	var d object
	must(t, json.Unmarshal([]byte(agent), &d))
	delete(d, "status")
	labels := object{"app": "ztunnel", "app.kubernetes.io/part-of": "istio"}
	d["metadata"] = object{"name": "ztunnel", "namespace": lab.Namespace, "labels": labels}
	spec := d["spec"].(object)
	template := spec["template"].(object)
	template["metadata"] = object{"labels": object{"app": "ztunnel", "app.kubernetes.io/part-of": "istio", lab.Label: "none"}}
	pod := template["spec"].(object)
	pod["serviceAccountName"], pod["serviceAccount"] = "ztunnel", "ztunnel"
	pod["terminationGracePeriodSeconds"] = 5
	delete(pod, "affinity")
	for _, v := range pod["volumes"].([]any) {
		switch v := v.(object); v["name"] {
		case "run":
			v["hostPath"] = object{"path": "/run/" + standIn, "type": "DirectoryOrCreate"}
		case "state":
			v["hostPath"] = object{"path": "/var/lib/" + standIn, "type": "DirectoryOrCreate"}
		case "cni-bin", "cni-conf":
			delete(v, "hostPath")
			v["emptyDir"] = object{}
		}
	}
	c := pod["containers"].([]any)[0].(object)
	c["env"] = append(c["env"].([]any), object{"name": "WARREN_BPF_DIR", "value": "/sys/fs/bpf/" + standIn})
	b, err := json.Marshal(d)
	must(t, err)
	return string(b)
}

// istioCNI writes on the pods of a namespace that ztunnel captures them, on nodes where it runs, until the test ends. istiod has it
// captured then: what comes to a pod before that is why the servers here are ready late.
func istioCNI(t *testing.T, ns string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ; ctx.Err() == nil; time.Sleep(300 * time.Millisecond) {
			theirs, err := mesh.Pods(ctx, lab.Namespace, "app=ztunnel,app.kubernetes.io/part-of=istio")
			if err != nil {
				continue
			}
			on := map[string]bool{}
			for _, p := range theirs {
				on[p.Node] = on[p.Node] || p.Ready && !p.Terminating
			}
			pods, err := mesh.Pods(ctx, ns, notGateways)
			if err != nil {
				continue
			}
			for _, p := range pods {
				if on[p.Node] && p.Phase == "Running" && !p.Terminating && p.Redirection() == "" {
					_, _ = mesh.Kubectl(ctx, "-n", ns, "annotate", "pod", p.Name, "ambient.istio.io/redirection=enabled")
				}
			}
		}
	}()
	t.Cleanup(func() { stop(); <-done })
}

// A node goes over from Istio to Warren under load, and back. In between the two tunnel to each other, and each admits whom the
// policy names, by certificates that two control planes have signed with one root.
func TestMigrateFromIstio(t *testing.T) {
	ownCluster(t)
	if !*long {
		t.Skip("builds Istio's control plane, minutes the first time; -long does it, and the command's steps are tested in internal/cli")
	}
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	endIstio := ambientIstio(t)
	moving, staying := nodes[0], nodes[1]
	ns := namespace(t, "e2e-migrate", ambient)
	istioCNI(t, ns)
	strict(t, ns)
	applyIn(t, ns, `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: clients, namespace: NS}
spec: {action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/NS/sa/client]}}]}]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: server, namespace: NS}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: NS}
spec: {selector: {app: server}, ports: [{name: tcp, port: 9000}]}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: server, namespace: NS}
spec: {minAvailable: 3, selector: {matchLabels: {app: server}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: NS}
spec:
  replicas: 4
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec:
      serviceAccountName: server
      terminationGracePeriodSeconds: 20
      topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: server}}}]
      containers:
      - name: server
        image: `+lab.Image+`
        imagePullPolicy: IfNotPresent
        command: [`+tcpcheck+`, serve]
        lifecycle: {preStop: {sleep: {seconds: 8}}}
        readinessProbe: {tcpSocket: {port: 9000}, initialDelaySeconds: 10, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, runAsNonRoot: true, runAsUser: 65532, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
`)
	stranger := func(name, node string) lab.PodSpec {
		p := client(ns, name, node)
		p.Account = "stranger"
		return p
	}
	rollout := func() {
		t.Helper()
		if out, err := mesh.Kubectl(ctx, "-n", ns, "rollout", "status", "deployment/server", "--timeout=180s"); err != nil {
			t.Fatal(err, out, mesh.Diagnose(ctx, ns))
		}
	}
	captured := func() {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			pods, err := mesh.Pods(ctx, ns, notGateways)
			for _, p := range pods {
				if p.Redirection() != "enabled" && !p.Terminating {
					err = fmt.Errorf("%s on %s is not captured: %q", p.Name, p.Node, p.Redirection())
				}
			}
			return err
		}))
		waysKnown(t, ns)
	}
	say := func(args ...string) string {
		t.Helper()
		out, said, err := runWarren(ctx, t, args...)
		if err != nil {
			t.Fatalf("warren %s: %v\n%s%s\n%s", strings.Join(args, " "), err, out, said, mesh.Diagnose(ctx, ns))
		}
		t.Logf("warren %s:\n%s%s", strings.Join(args, " "), out, said)
		return out + said
	}
	must(t, mesh.Run(ctx, client(ns, "client", staying), stranger("stranger", staying)))
	rollout()
	captured()

	root := field(t, lab.Namespace, "secret/istio-ca-secret", "{.metadata.uid}/{.metadata.resourceVersion}")
	istios := field(t, lab.Namespace, "configmap/istio", "{.metadata.uid}/{.metadata.resourceVersion}")
	say("migrate", "begin")
	if out := say("migrate", "status"); !strings.Contains(out, moving+"   istio") {
		t.Errorf("before any move:\n%s", out)
	}
	// Warren makes the Gateways that ask for it, and leaves alone those that do not.
	applyIn(t, ns, strings.Replace(aWaypoint, "labels: {", "labels: {istio.io/rev: warren, ", 1)+"---"+strings.Replace(aWaypoint, "name: way", "name: theirs", 1))
	fieldBecomes(t, ns, "gateway/way", `{.status.conditions[?(@.type=="Programmed")].status}`, "True")
	made := func(name string) string {
		t.Helper()
		out, err := mesh.Kubectl(ctx, "-n", ns, "get", "deployment", name, "--ignore-not-found", "-o", "name")
		must(t, err)
		return strings.TrimSpace(out)
	}
	if got := made("theirs"); got != "" {
		t.Errorf("Warren has made %s for a Gateway that is Istio's", got)
	}
	if out := say("migrate", "status"); !strings.Contains(out, ns+"/theirs   istio") || !strings.Contains(out, ns+"/way      warren") {
		t.Errorf("who serves which Gateway:\n%s", out)
	}
	loads := 0
	// both has loads from the clients to the servers of both nodes, none of which fails, while something is done.
	both := func(what string, clients []string, do func()) {
		t.Helper()
		var ends []func() loadReport
		for _, c := range clients {
			ends = append(ends, loadUntil(t, ns, c, "-for", "20m", "-rate", "50", "-timeout", "60s", "server:9000"))
		}
		do()
		for i, end := range ends {
			r := end()
			loads += r.Connections
			record("migration", what, r.Connections, r.failures(), float64(r.Connections)/r.Seconds, "new connections a second")
			if r.failures() > 0 || r.Connections == 0 {
				t.Errorf("%s: %s: %s %v", what, clients[i], r, r.Examples)
			}
		}
	}
	// refused has connections of a pod that the policy does not name, none of which gets through.
	refused := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if r := startLoad(t, ns, name, "-for", "3s", "-rate", "20", "-timeout", "10s", "server:9000")(); r.OK > 0 || r.Connections == 0 {
				t.Errorf("%s, whom the policy does not name: %s", name, r)
			}
		}
	}
	refused("stranger")
	both("a node goes over from Istio to Warren", []string{"client"}, func() { say("migrate", "node", moving) })
	if out := say("migrate", "status"); !strings.Contains(out, moving+"   warren") || !strings.Contains(out, staying+"   istio") {
		t.Errorf("after the move:\n%s", out)
	}
	for _, app := range []string{"app=ztunnel,app.kubernetes.io/part-of=istio", "k8s-app=istio-cni-node"} {
		pods, err := mesh.Pods(ctx, lab.Namespace, app)
		must(t, err)
		if len(pods) != 1 || pods[0].Node != staying {
			t.Errorf("pods of %s: %+v", app, pods)
		}
	}

	if _, err := mesh.Kubectl(ctx, "-n", ns, "scale", "deployment/server", "--replicas=6"); err != nil {
		t.Fatal(err)
	}
	must(t, mesh.Run(ctx, client(ns, "client-moved", moving), stranger("stranger-moved", moving)))
	rollout()
	captured() // and both say of each other's pods that they are reached by the tunnel
	servers := map[string]string{}
	pods, err := mesh.Pods(ctx, ns, "app=server")
	must(t, err)
	for _, p := range pods {
		servers[p.Name] = p.Node
	}
	for _, name := range []string{"client", "client-moved"} {
		r := startLoad(t, ns, name, "-for", "10s", "-rate", "50", "-timeout", "30s", "server:9000")()
		record("migration", "Istio and Warren beside each other, from "+name, r.Connections, r.failures(), float64(r.Connections)/r.Seconds, "new connections a second")
		if r.failures() > 0 || r.Connections == 0 {
			t.Errorf("beside each other: %s: %s %v", name, r, r.Examples)
		}
		reached := map[string]int{}
		for server, n := range r.Servers {
			reached[servers[server]] += n
		}
		if reached[moving] == 0 || reached[staying] == 0 {
			t.Errorf("%s reached the servers of %v (%v)", name, reached, r.Servers)
		}
	}
	refused("stranger", "stranger-moved")
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "pod", "client-moved", "stranger-moved"); err != nil {
		t.Fatal(err, out)
	}
	both("a node goes back from Warren to Istio", []string{"client"}, func() { say("migrate", "node", moving, "--back") })
	if out := say("migrate", "status"); !strings.Contains(out, moving+"   istio") {
		t.Errorf("after the way back:\n%s", out)
	}
	if now := field(t, lab.Namespace, "secret/istio-ca-secret", "{.metadata.uid}/{.metadata.resourceVersion}"); now != root {
		t.Errorf("Istio's root was %s and is %s", root, now)
	}
	if now := field(t, lab.Namespace, "configmap/istio", "{.metadata.uid}/{.metadata.resourceVersion}"); now != istios {
		t.Errorf("Istio's configuration was %s and is %s", istios, now)
	}
	for _, name := range []string{"ztunnel", "istio-cni-node"} {
		if is := field(t, lab.Namespace, "daemonset/"+name, "{.spec.updateStrategy.type} {.spec.template.spec.affinity} {.metadata.annotations.warren\\.io/before-migration}"); strings.TrimSpace(is) != "RollingUpdate" {
			t.Errorf("%s is left with %s", name, is)
		}
	}
	say("uninstall")
	if got := field(t, lab.Namespace, "configmap/istio-ca-root-cert", "{.metadata.name}"); got != "istio-ca-root-cert" {
		t.Errorf("Istio's roots went with Warren: %s", got)
	}

	// To the end: every node, then Istio goes, then Warren is the mesh alone.
	say("migrate", "begin")
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "pod", "client", "stranger"); err != nil {
		t.Fatal(err, out)
	}
	say("migrate", "node", "--all")
	must(t, mesh.Run(ctx, client(ns, "client", moving), client(ns, "client-too", staying), stranger("stranger", staying)))
	rollout()
	captured()
	if _, said, err := runWarren(ctx, t, "migrate", "finish"); err == nil || !strings.Contains(said, "Of Istio there is left: DaemonSet") {
		t.Errorf("the end with Istio there: %v\n%s", err, said)
	}
	endIstio()
	for _, what := range [][]string{{"daemonset", "ztunnel", "istio-cni-node"}, {"deployment", "istiod"}, {"service", "istiod"}, {"configmap", "istio"}} {
		if out, err := mesh.Kubectl(ctx, append([]string{"-n", lab.Namespace, "delete"}, what...)...); err != nil {
			t.Fatal(err, out)
		}
	}
	holders := field(t, lab.Namespace, "pods", `{.items[?(@.metadata.labels.app=="warren-holder")].metadata.uid}`)
	both("Warren becomes the mesh alone", []string{"client", "client-too"}, func() { say("migrate", "finish") })
	if now := field(t, lab.Namespace, "pods", `{.items[?(@.metadata.labels.app=="warren-holder")].metadata.uid}`); now != holders || len(strings.Fields(now)) != len(nodes) {
		t.Errorf("the holders were %s and are %s", holders, now)
	}
	if now := field(t, lab.Namespace, "secret/istio-ca-secret", "{.metadata.uid}/{.metadata.resourceVersion}"); now != root {
		t.Errorf("the root was %s and is %s", root, now)
	}
	if got, err := mesh.Kubectl(ctx, "get", "nodes", "-l", "warren.io/migration", "-o", "name"); err != nil || strings.TrimSpace(got) != "" {
		t.Errorf("nodes with the label of the migration: %s, %v", got, err)
	}
	if out, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "service/istiod", "configmap/istio", "deployment/warren-control"); err != nil {
		t.Error(err, out)
	}
	refused("stranger")
	fieldBecomes(t, ns, "gateway/theirs", `{.status.conditions[?(@.type=="Programmed")].status}`, "True")
	if made("way") == "" || made("theirs") == "" {
		t.Errorf("of the Gateways there are the Deployments %q, %q", made("way"), made("theirs"))
	}
	say("check")
	t.Logf("%d new connections while a node went over and back, and all of them for good", loads)
}

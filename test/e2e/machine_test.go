package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

var withMachine = flag.String("machine", "", "kernel series of a third node in QEMU, such as 6.12; with -long 6.12")

// The third node, in the ranges that the cluster would give its ninth.
const (
	machine     = "machine"
	machine4    = "172.30.0.19"
	machine6    = "fd00:172:30::13"
	machinePod4 = "10.244.9.2"
	machinePod6 = "fd00:10:244:9::2"
)

// The nodes of our cluster share one kernel. Here one has its own, in a virtual machine: nothing passes because
// both ends of a connection see the same socket or the same map.
func TestNodeWithAKernelOfItsOwn(t *testing.T) {
	ownCluster(t)
	series := *withMachine
	if series == "" {
		if !*long {
			t.Skip("emulates a machine: give -machine=6.12 (make test-kernels does)")
		}
		series = "6.12"
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("qemu-system-x86_64 is missing: make test-kernels installs it")
	}
	ctx := t.Context()
	ns := namespace(t, "e2e-machine")
	deploy(t, ns, false, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	agentPod := newMachineNode(t, ns)
	m := bootMachine(t, series, ns, agentPod)

	far := pod(t, ns, "far")
	dump := func() (tunnel, clear int) {
		b, err := os.ReadFile(m.dump)
		must(t, err)
		return countFrames(b)
	}
	// Without the mesh: connections work, and the marker is seen.
	for _, ip := range far.IPs {
		must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
			_, err := m.run(ctx, tcpcheck, "who", "-timeout", "30s", net.JoinHostPort(ip, "9000"))
			return err
		}))
	}
	tunnel, clear := dump()
	if clear == 0 {
		t.Fatalf("the machine's link shows no marker that was sent in clear (%d frames of a tunnel)", tunnel)
	}

	must(t, mesh.Enrol(ctx, ns, true))
	_, err := mesh.AwaitRedirection(ctx, ns, "enabled", 3*time.Minute)
	must(t, err)
	waysKnown(t, ns)
	strict(t, ns)
	outside := func(ip string) error {
		return mesh.Cluster.Outside(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(ip, "9000"), 10*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprintln(c, "from outside")
			_, err = c.Read(make([]byte, 1))
			return err
		})
	}
	for _, ip := range append([]string{machinePod4, machinePod6}, far.IPs...) {
		must(t, lab.Eventually(ctx, 2*time.Minute, func() error {
			if outside(ip) == nil {
				return fmt.Errorf("%s takes plaintext under STRICT", ip)
			}
			return nil
		}))
	}
	_, before := dump()
	const n = "60"
	check := func(name string, r loadReport) {
		t.Helper()
		t.Logf("%s: %+v", name, r)
		record("wrong-addresses", name, r.Connections, r.failures(), 0, "")
		if r.failures() > 0 || r.OK == 0 {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for i, ip := range []string{machinePod4, machinePod6} {
		family := []string{"IPv4", "IPv6"}[i]
		to := net.JoinHostPort(ip, "9000")
		check("to a node with a kernel of its own, "+family, startLoad(t, ns, "client", "-rate", "10", "-n", n, "-timeout", "60s", to)())
		out, err := m.run(ctx, tcpcheck, "load", "-rate", "10", "-n", n, "-timeout", "60s", net.JoinHostPort(far.IPs[i], "9000"))
		must(t, err)
		var r loadReport
		must(t, json.Unmarshal([]byte(out), &r))
		check("from a node with a kernel of its own, "+family, r)
	}
	tunnel, clear = dump()
	record("clear-packets", "node with a kernel of its own, Linux "+series, tunnel, clear-before, float64(tunnel), "tunnel frames")
	if clear > before || tunnel == 0 {
		t.Errorf("%d frames in clear, %d of tunnels", clear-before, tunnel)
	}
}

// countFrames counts frames of a pcap file with the marker, and those to or from the tunnel's port with payload.
func countFrames(pcap []byte) (tunnel, clear int) {
	const header, record = 24, 16
	for at := header; at+record <= len(pcap); {
		size := int(uint32(pcap[at+8]) | uint32(pcap[at+9])<<8 | uint32(pcap[at+10])<<16 | uint32(pcap[at+11])<<24)
		at += record
		if size < 0 || at+size > len(pcap) {
			break // still being written
		}
		f := pcap[at : at+size]
		at += size
		if bytes.Contains(f, []byte(lab.Marker)) {
			clear++
		}
		if lab.InTunnel(f) {
			tunnel++
		}
	}
	return tunnel, clear
}

// newMachineNode tells the API server of the node and its pod, which no kubelet does, and returns the name of the
// agent's pod there.
func newMachineNode(t *testing.T, ns string) (agentPod string) {
	t.Helper()
	ctx := t.Context()
	status := func(kind, namespace, name string, status any) {
		t.Helper()
		b, err := json.Marshal(map[string]any{"status": status})
		must(t, err)
		args := []string{"patch", kind, name, "--subresource=status", "--type=merge", "-p", string(b)}
		if namespace != "" {
			args = append([]string{"-n", namespace}, args...)
		}
		_, err = mesh.Kubectl(ctx, args...)
		must(t, err)
	}
	removeMachineNode(ctx)
	t.Cleanup(func() { removeMachineNode(context.WithoutCancel(ctx)) })
	must(t, mesh.Apply(ctx, `{apiVersion: v1, kind: Node, metadata: {name: machine, labels: {kubernetes.io/hostname: machine, kubernetes.io/os: linux}}}`))
	type o = map[string]any
	ready := []o{{"type": "Ready", "status": "True", "lastHeartbeatTime": time.Now().UTC().Format(time.RFC3339), "lastTransitionTime": time.Now().UTC().Format(time.RFC3339)}}
	room := o{"cpu": "4", "memory": "4Gi", "pods": "20"} // for the scheduler, which binds the DaemonSets' pods
	status("node", "", machine, o{"conditions": ready, "addresses": []o{{"type": "InternalIP", "address": machine4}, {"type": "InternalIP", "address": machine6}},
		"capacity": room, "allocatable": room})
	renew := func() error {
		return mesh.Apply(ctx, fmt.Sprintf(`{apiVersion: coordination.k8s.io/v1, kind: Lease, metadata: {name: machine, namespace: kube-node-lease},
spec: {holderIdentity: machine, leaseDurationSeconds: 40, renewTime: %q}}`, time.Now().UTC().Format("2006-01-02T15:04:05.000000Z")))
	}
	must(t, renew())
	go func() {
		for ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(4 * time.Second):
				_ = renew() // the node controller has 20 s of patience
			}
		}
	}()
	must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: own-kernel, namespace: %s, labels: {app: own-kernel}}
spec: {serviceAccountName: server, nodeName: machine, containers: [{name: demo, image: %q}]}
`, ns, lab.Image)))
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "get", "pods", "-l", lab.NodeApp, "--field-selector=spec.nodeName="+machine, "-o", "jsonpath={.items[*].metadata.name}")
		if agentPod = strings.TrimSpace(out); err == nil && agentPod == "" {
			err = fmt.Errorf("no agent's pod is bound to the new node")
		}
		return err
	}))
	running := func(addrs ...string) o {
		var ips []o
		for _, a := range addrs {
			ips = append(ips, o{"ip": a})
		}
		return o{"phase": "Running", "hostIP": machine4, "podIP": addrs[0], "podIPs": ips, "startTime": time.Now().UTC().Format(time.RFC3339),
			"conditions": []o{{"type": "Ready", "status": "True"}, {"type": "ContainersReady", "status": "True"}, {"type": "PodScheduled", "status": "True"}}}
	}
	status("pod", lab.Namespace, agentPod, running(machine4, machine6))
	status("pod", ns, "own-kernel", running(machinePod4, machinePod6))
	for _, name := range nodes[:2] {
		n, err := mesh.Cluster.Node(name)
		must(t, err)
		_, err = n.Exec(ctx, "sh", "-c", "ip route replace 10.244.9.0/24 via "+machine4+"; ip -6 route replace fd00:10:244:9::/64 via "+machine6)
		must(t, err)
	}
	return agentPod
}

func removeMachineNode(ctx context.Context) {
	// What fails here is not there.
	_, _ = mesh.Kubectl(ctx, "delete", "node", machine, "--ignore-not-found")
	_, _ = mesh.Kubectl(ctx, "delete", "pods", "-A", "--field-selector=spec.nodeName="+machine, "--force", "--grace-period=0")
}

// virtual is a machine that runs.
type virtual struct {
	dump string // pcap file of its link
}

func bootMachine(t *testing.T, series, ns, agentPod string) *virtual {
	t.Helper()
	ctx := t.Context()
	dir := t.TempDir()
	get := func(args ...string) string {
		t.Helper()
		out, err := mesh.Kubectl(ctx, args...)
		must(t, err)
		return strings.TrimSpace(out)
	}
	write := func(name, content string) string {
		t.Helper()
		f := filepath.Join(dir, name)
		must(t, os.WriteFile(f, []byte(content), 0o600))
		return f
	}
	goRun := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir = mesh.Root()
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	programs := map[string]string{"init": "./test/kernels/machine", "bin/node-agent": "./cmd/node-agent", "bin/holder": "./cmd/holder", "tcpcheck": "./examples/tcpcheck"}
	files := []string{}
	for name, pkg := range programs {
		out := filepath.Join(dir, filepath.Base(name))
		goRun("build", "-ldflags=-s -w", "-o", out, pkg)
		files = append(files, name+"="+out)
	}

	account := get("-n", lab.Namespace, "get", "pod", agentPod, "-o", "jsonpath={.spec.serviceAccountName}")
	uid := get("-n", lab.Namespace, "get", "pod", agentPod, "-o", "jsonpath={.metadata.uid}")
	control := get("-n", lab.Namespace, "get", "pods", "-l", "app=istiod", "--field-selector=status.phase=Running", "-o", "jsonpath={.items[0].status.podIP}")
	token := get("-n", lab.Namespace, "create", "token", account, "--audience=istio-ca", "--duration=12h",
		"--bound-object-kind=Pod", "--bound-object-name="+agentPod, "--bound-object-uid="+uid)
	routes := map[string]string{}
	for _, name := range nodes[:2] {
		n, err := mesh.Cluster.Node(name)
		must(t, err)
		cidrs := strings.Fields(get("get", "node", name, "-o", "jsonpath={.spec.podCIDRs[*]}"))
		for i, c := range cidrs {
			routes[c] = n.Addrs()[i].String()
		}
	}
	config, err := json.Marshal(map[string]any{
		"Name": "own-kernel", "Addrs": []string{machine4 + "/24", machine6 + "/64"}, "Routes": routes,
		"Agent": []string{"NODE_NAME=" + machine, "POD_NAME=" + agentPod, "POD_NAMESPACE=" + lab.Namespace, "POD_UID=" + uid,
			"INSTANCE_IP=" + machine4, "SERVICE_ACCOUNT=" + account, "XDS_ADDRESS=https://istiod." + lab.Namespace + ".svc:15012",
			"CA_ADDRESS=https://istiod." + lab.Namespace + ".svc:15012", "CLUSTER_ID=Kubernetes", "ACCESS_LOG=true",
			"XDS_ROOT_CA=/etc/root-cert.pem", "CA_ROOT_CA=/etc/root-cert.pem", "AUTH_TOKEN=/etc/token"},
		"Pod": map[string]any{"UID": get("-n", ns, "get", "pod", "own-kernel", "-o", "jsonpath={.metadata.uid}"),
			"Addrs": []string{machinePod4 + "/24", machinePod6 + "/64"}, "Gateway": []string{"10.244.9.1/24", "fd00:10:244:9::1/64"},
			"Command": []string{tcpcheck, "serve"}},
	})
	must(t, err)
	files = append(files, "etc/machine.json="+write("machine.json", string(config)), "etc/token="+write("token", token),
		"etc/root-cert.pem="+write("root-cert.pem", get("-n", lab.Namespace, "get", "configmap", "istio-ca-root-cert", "-o", `jsonpath={.data.root-cert\.pem}`)),
		"etc/hosts="+write("hosts", "127.0.0.1 localhost\n"+control+" istiod."+lab.Namespace+".svc\n"))
	goRun(append([]string{"run", "./test/kernels", "-pack", dir, "-series", series}, files...)...)

	tap := "machine0"
	removeTap := func(ctx context.Context) { _ = mesh.Cluster.OutsideCommand(ctx, "ip", "link", "del", tap).Run() } // may not be there
	removeTap(ctx)
	for _, args := range [][]string{{"ip", "tuntap", "add", tap, "mode", "tap"}, {"ip", "link", "set", tap, "master", "warren0", "up"}} {
		if out, err := mesh.Cluster.OutsideCommand(ctx, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	m := &virtual{dump: filepath.Join(dir, "link.pcap")}
	vm := mesh.Cluster.OutsideCommand(context.WithoutCancel(ctx), "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-netdev", "tap,id=n0,ifname="+tap+",script=no,downscript=no,vnet_hdr=off", "-device", "virtio-net-pci,netdev=n0,romfile=,mac=02:77:72:6e:00:09",
		"-object", "filter-dump,id=d0,netdev=n0,file="+m.dump,
		"-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initrd"),
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on net.ifnames=0")
	serial, err := vm.StdoutPipe()
	must(t, err)
	vm.Stderr = vm.Stdout
	must(t, vm.Start())
	var (
		mu    sync.Mutex
		lines []string
		read  = make(chan struct{})
	)
	go func() {
		defer close(read)
		for s := bufio.NewScanner(serial); s.Scan(); {
			mu.Lock()
			lines = append(lines, strings.TrimRight(s.Text(), "\r"))
			mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		_ = vm.Process.Kill() // it may have ended
		<-read
		_ = vm.Wait()
		removeTap(context.WithoutCancel(ctx))
		if t.Failed() {
			t.Logf("the machine's last words:\n%s", strings.Join(lines[max(0, len(lines)-60):], "\n"))
		}
	})
	must(t, lab.Eventually(ctx, 10*time.Minute, func() error {
		mu.Lock()
		defer mu.Unlock()
		if slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "machine: ready") }) {
			return nil
		}
		select {
		case <-read:
			return fmt.Errorf("the machine ended")
		default:
			return fmt.Errorf("the machine has not said that it is ready")
		}
	}))
	return m
}

// run runs a program in the machine's pod.
func (m *virtual) run(ctx context.Context, args ...string) (string, error) {
	var body []byte
	err := mesh.Cluster.Outside(func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(machine4, "7000"), 30*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Minute))
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://machine/run?"+url.Values{"arg": args}.Encode(), nil)
		if err != nil {
			return err
		}
		if err := req.Write(c); err != nil {
			return err
		}
		res, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if body, err = io.ReadAll(res.Body); err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s in the machine's pod: %s", strings.Join(args, " "), body)
		}
		return err
	})
	return string(body), err
}

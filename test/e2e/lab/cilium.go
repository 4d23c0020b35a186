package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// How Cilium may be the cluster's network plugin.
const (
	Cilium          = "cilium"           // beside kube-proxy
	CiliumKubeProxy = "cilium-kubeproxy" // in kube-proxy's place: Services are balanced in connect, packets take BPF's way through the node
)

const ciliumModule = "github.com/cilium/cilium"

// RunCilium makes Cilium the network plugin of our own cluster, which has no pods yet. Its agents are processes of the nodes; they are
// built from their module with what they load into the kernel, for which clang-19 and ipset have to be there. Other plugins may be chained
// to its own (cni-exclusive: false), as a mesh needs it.
func (l *Lab) RunCilium(ctx context.Context, mode string) error {
	if mode != Cilium && mode != CiliumKubeProxy {
		return fmt.Errorf("the network plugin %q is not known: use %s or %s", mode, Cilium, CiliumKubeProxy)
	}
	for _, program := range []string{"clang-19", "ipset"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("cilium needs %s, a package of Debian's of that name", program)
		}
	}
	dir, err := BuildPeer(ctx, "cilium", l.log)
	if err != nil {
		return err
	}
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", ciliumModule)
	list.Dir, list.Env = filepath.Join(l.root, filepath.FromSlash(peers["cilium"].dir)), append(os.Environ(), "GOWORK=off")
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("find the module %s: %w", ciliumModule, err)
	}
	source := strings.TrimSpace(string(out))
	for _, version := range []string{"v2", "v2alpha1"} { // as Cilium's operator does
		if _, err := l.Kubectl(ctx, "apply", "--server-side", "-f", filepath.Join(source, "pkg/k8s/apis/cilium.io/client/crds", version)); err != nil {
			return err
		}
	}
	for _, n := range l.Cluster.Nodes() {
		if err := l.ciliumOn(n.Disk(), source, dir, mode); err != nil {
			return fmt.Errorf("put Cilium on %s: %w", n.Name(), err)
		}
		log, err := os.Create(filepath.Join(l.Cluster.Dir(), "cilium-"+n.Name()+".log"))
		if err != nil {
			return err
		}
		agent := n.Command(context.WithoutCancel(ctx), "env", "K8S_NODE_NAME="+n.Name(), "PATH=/opt/cilium:"+os.Getenv("PATH")+":/usr/sbin:/sbin",
			"/opt/cilium/cilium-agent", "--config-dir=/opt/cilium/config", "--k8s-kubeconfig-path=/opt/cilium/kubeconfig")
		agent.Stdout, agent.Stderr = log, log
		if err := agent.Start(); err != nil {
			return err
		}
		go func() { // until the node ends
			agent.Wait()
			log.Close()
		}()
	}
	// The plugin's configuration is written once there is an agent to answer it.
	return Eventually(ctx, 3*time.Minute, func() error {
		for _, n := range l.Cluster.Nodes() {
			if _, err := os.Stat(filepath.Join(n.Disk(), "etc/cni/net.d", ciliumList)); err != nil {
				return fmt.Errorf("cilium is not ready on %s: see cilium-%s.log in %s", n.Name(), n.Name(), l.Cluster.Dir())
			}
		}
		return nil
	})
}

const ciliumList = "05-cilium.conflist"

// ciliumOn writes what an agent needs to a node's disk.
func (l *Lab) ciliumOn(disk, source, programs, mode string) error {
	home := filepath.Join(disk, "opt/cilium")
	if err := os.MkdirAll(filepath.Join(home, "config"), 0o755); err != nil {
		return err
	}
	bpf := filepath.Join(disk, "var/lib/cilium/bpf")
	if err := errors.Join(os.RemoveAll(bpf), os.MkdirAll(filepath.Dir(bpf), 0o755), os.CopyFS(bpf, os.DirFS(filepath.Join(source, "bpf")))); err != nil {
		return err
	}
	kubeconfig, err := os.ReadFile(l.kubeconfig)
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(kubeconfig), "https://127.0.0.1:")
	port, _, _ := strings.Cut(rest, "\n")
	const server = "https://172.30.0.1:6443" // as nodes reach it
	err = errors.Join(
		os.WriteFile(filepath.Join(home, "kubeconfig"), []byte(strings.Replace(string(kubeconfig), "https://127.0.0.1:"+port, server, 1)), 0o600),
		copyProgram(filepath.Join(programs, "cilium-agent"), filepath.Join(home, "cilium-agent")),
		copyProgram(filepath.Join(programs, "cilium-cni"), filepath.Join(disk, "opt/cni/bin/cilium-cni")),
		os.Symlink("/usr/bin/clang-19", filepath.Join(home, "clang")),
	)
	if err != nil {
		return err
	}
	cgroups := "/sys/fs/cgroup"
	if _, err := os.Stat(cgroups + "/unified"); err == nil { // hybrid
		cgroups += "/unified"
	}
	instead := fmt.Sprint(mode == CiliumKubeProxy)
	for key, value := range map[string]string{
		"cluster-name": "default", "ipam": "kubernetes", "identity-allocation-mode": "crd", "k8s-api-server": server,
		"routing-mode": "native", "auto-direct-node-routes": "true", "devices": "eth0", "direct-routing-device": "eth0",
		"enable-ipv4": "true", "ipv4-native-routing-cidr": "10.244.0.0/16", "enable-ipv4-masquerade": "true",
		"enable-ipv6": "true", "ipv6-native-routing-cidr": "fd00:10:244::/48", "enable-ipv6-masquerade": instead,
		"kube-proxy-replacement": instead, "enable-bpf-masquerade": instead, "cgroup-root": cgroups,
		"write-cni-conf-when-ready": "/etc/cni/net.d/" + ciliumList, "cni-exclusive": "false",
		"enable-l7-proxy": "false", "enable-hubble": "false", "enable-health-checking": "false", "enable-endpoint-health-checking": "false",
	} {
		err = cmp.Or(err, os.WriteFile(filepath.Join(home, "config", key), []byte(value), 0o644))
	}
	return err
}

package plan

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Process is one component to run: a name for its log and a command line. The
// program is looked up in Binaries.
type Process struct {
	Name string
	Args []string
}

// Paths a node sees. NodeMount is where the cluster's own files appear in a
// node's root; everything else there is the node's.
const (
	NodeMount        = "/cluster"
	ContainerdSocket = "/run/containerd/containerd.sock"
	CNIConfDir       = "/etc/cni/net.d"
	CNIBinDir        = "/opt/cni/bin"
	cniConfName      = "10-pods.conflist"
)

// Etcd needs no fsync: a cluster does not outlive its supervisor.
func (c *Cluster) Etcd() Process {
	return Process{"etcd", []string{
		"--data-dir=" + c.Path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380",
	}}
}

// APIServer keeps the default API audience (the issuer): tokens for istio-ca
// are checked by TokenReview with explicit audiences and must not open the API.
// Aggregator routing makes webhooks and aggregated APIs go to endpoint
// addresses, because no kube-proxy runs beside the API server.
func (c *Cluster) APIServer() Process {
	pki := func(f string) string { return c.Path("pki", f) }
	issuer := "https://kubernetes.default.svc." + ClusterDomain
	return Process{"kube-apiserver", []string{
		"--etcd-servers=http://127.0.0.1:2379",
		"--advertise-address=" + c.APIAddr().Addr().String(),
		fmt.Sprintf("--secure-port=%d", APIPort),
		"--service-cluster-ip-range=" + c.serviceCIDRs(),
		"--client-ca-file=" + pki("ca.crt"),
		"--tls-cert-file=" + pki("apiserver.crt"),
		"--tls-private-key-file=" + pki("apiserver.key"),
		"--kubelet-client-certificate=" + pki("kubelet-client.crt"),
		"--kubelet-client-key=" + pki("kubelet-client.key"),
		"--kubelet-certificate-authority=" + pki("ca.crt"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-key-file=" + pki("sa.pub"),
		"--service-account-signing-key-file=" + pki("sa.key"),
		"--service-account-issuer=" + issuer,
		"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + pki("front-proxy-client.crt"),
		"--proxy-client-key-file=" + pki("front-proxy-client.key"),
		"--enable-aggregator-routing=true",
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
		"--profiling=false",
	}}
}

// APIServerOn is one more API server, in a node's network namespace, on the same port, because all of a cluster are
// known under one. Beside a kube-proxy it calls webhooks by the Services' addresses, as usual.
func (c *Cluster) APIServerOn(n Node) Process {
	p := c.APIServer()
	var args []string
	for _, a := range p.Args {
		switch name, _, _ := strings.Cut(a, "="); name {
		case "--advertise-address":
			a = name + "=" + c.Addrs(n)[0].String()
		case "--enable-aggregator-routing":
			continue
		}
		args = append(args, strings.Replace(a, c.Path("pki"), NodeMount+"/pki", 1))
	}
	return Process{p.Name, args}
}

func (c *Cluster) serviceCIDRs() string {
	var s []string
	for _, f := range c.Families() {
		s = append(s, f.Services.String())
	}
	return strings.Join(s, ",")
}

func (c *Cluster) clusterCIDRs() string {
	var s []string
	for _, f := range c.Families() {
		s = append(s, f.Pods.String())
	}
	return strings.Join(s, ",")
}

// ControllerManager notices a lost node within 20 s instead of 50. With the
// default of 20 requests a second it would take 4 s to start its controllers.
func (c *Cluster) ControllerManager() Process {
	kc := c.Path("pki", "kube-controller-manager.conf")
	return Process{"kube-controller-manager", []string{
		"--kubeconfig=" + kc, "--authentication-kubeconfig=" + kc, "--authorization-kubeconfig=" + kc,
		"--bind-address=127.0.0.1", "--leader-elect=false",
		"--service-account-private-key-file=" + c.Path("pki", "sa.key"),
		"--root-ca-file=" + c.Path("pki", "ca.crt"),
		"--cluster-signing-cert-file=" + c.Path("pki", "ca.crt"),
		"--cluster-signing-key-file=" + c.Path("pki", "ca.key"),
		"--use-service-account-credentials=true",
		"--service-cluster-ip-range=" + c.serviceCIDRs(),
		"--node-monitor-period=2s", "--node-monitor-grace-period=20s",
		"--kube-api-qps=500", "--kube-api-burst=500",
	}}
}

// Scheduler is the stock scheduler.
func (c *Cluster) Scheduler() Process {
	kc := c.Path("pki", "kube-scheduler.conf")
	return Process{"kube-scheduler", []string{
		"--kubeconfig=" + kc, "--authentication-kubeconfig=" + kc, "--authorization-kubeconfig=" + kc,
		"--bind-address=127.0.0.1", "--leader-elect=false",
	}}
}

// CoreDNS runs beside the API server and is reached through the usual ClusterIP.
func (c *Cluster) CoreDNS() Process {
	return Process{"coredns", []string{"-conf", c.Path("Corefile")}}
}

// Corefile is CoreDNS's configuration.
func (c *Cluster) Corefile() string {
	return fmt.Sprintf(`.:53 {
  errors
  kubernetes %s in-addr.arpa ip6.arpa {
    kubeconfig %s
    pods insecure
  }
}
`, ClusterDomain, c.Path("pki", "admin.conf"))
}

// Containerd, Kubelet and KubeProxy are one node's processes; their paths are
// those the node sees.
func (c *Cluster) Containerd() Process {
	return Process{"containerd", []string{"--config", "/etc/containerd.toml"}}
}

// Kubelet follows the usual flags; the rest is in KubeletConfig.
func (c *Cluster) Kubelet(n Node) Process {
	return Process{"kubelet", []string{
		"--config=/etc/kubelet.json", "--kubeconfig=" + NodeMount + "/pki/" + n.Name + ".conf",
		"--hostname-override=" + n.Name, "--node-ip=" + join(c.Addrs(n)), "--v=2",
	}}
}

// KubeProxy must not touch conntrack's limits, which belong to the machine.
func (c *Cluster) KubeProxy(n Node) Process {
	return Process{"kube-proxy", []string{
		"--kubeconfig=" + NodeMount + "/pki/kube-proxy.conf", "--hostname-override=" + n.Name,
		"--proxy-mode=nftables", "--cluster-cidr=" + c.clusterCIDRs(),
		"--bind-address=" + c.Addrs(n)[0].String(),
		"--conntrack-max-per-core=0", "--conntrack-min=0",
		"--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
	}}
}

// ContainerdConfig: restrict_oom_score_adj because without CAP_SYS_RESOURCE runc
// may not lower the score and dies with "can't get final child's PID from pipe".
func (c *Cluster) ContainerdConfig(runc string) string {
	return fmt.Sprintf(`version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.tracing",
  "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = [%q]
  conf_dir = %q
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = false
    BinaryName = %q
`, ContainerdSocket, SandboxImage, CNIBinDir, CNIConfDir, runc)
}

// KubeletConfig: failCgroupV1 because hybrid machines keep the controllers on
// v1; localStorageCapacityIsolation stays on, without it the eviction manager
// and stats/summary fail; a lease of 20 s goes with the controller manager's
// grace period.
func (c *Cluster) KubeletConfig(n Node) ([]byte, error) {
	var dns []string
	for _, f := range c.Families() {
		dns = append(dns, f.Service(10).String())
	}
	type m = map[string]any
	return json.MarshalIndent(m{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"failCgroupV1":             false,
		"cgroupDriver":             "cgroupfs",
		"containerRuntimeEndpoint": "unix://" + ContainerdSocket,
		"address":                  c.Addrs(n)[0].String(),
		"authentication": m{
			"anonymous": m{"enabled": false},
			"webhook":   m{"enabled": true},
			"x509":      m{"clientCAFile": NodeMount + "/pki/ca.crt"},
		},
		"authorization":               m{"mode": "Webhook"},
		"tlsCertFile":                 NodeMount + "/pki/" + n.Name + ".crt",
		"tlsPrivateKeyFile":           NodeMount + "/pki/" + n.Name + ".key",
		"clusterDNS":                  dns,
		"clusterDomain":               ClusterDomain,
		"resolvConf":                  "/etc/resolv.conf",
		"failSwapOn":                  false,
		"nodeLeaseDurationSeconds":    20,
		"imageGCHighThresholdPercent": 100,
		"evictionHard": m{
			"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.inodesFree": "1%",
		},
		"serializeImagePulls": false,
		"registryPullQPS":     0,
		"shutdownGracePeriod": "0s",
		"maxPods":             200,
	}, "", "  ")
}

// CNIConf is the node's chained plugin list. Others append themselves to it, so
// a node writes it once and finds it again after a reboot.
func (c *Cluster) CNIConf(n Node) (name string, list []byte, err error) {
	type m = map[string]any
	var ranges [][]m
	var routes []m
	for _, p := range c.PodCIDRs(n) {
		ranges = append(ranges, []m{{"subnet": p.String()}})
		if p.Addr().Is4() {
			routes = append(routes, m{"dst": "0.0.0.0/0"})
		} else {
			routes = append(routes, m{"dst": "::/0"})
		}
	}
	first := m{"type": c.CNI, "mtu": 1500, "ipam": m{"type": "host-local", "ranges": ranges, "routes": routes}}
	if c.CNI == "bridge" {
		first["bridge"], first["isGateway"], first["hairpinMode"] = "cni0", true, true
	}
	list, err = json.MarshalIndent(m{
		"cniVersion": "1.0.0",
		"name":       "pods",
		"plugins":    []m{first, {"type": "portmap", "capabilities": m{"portMappings": true}}},
	}, "", "  ")
	return cniConfName, list, err
}

// CNIPlugins are the programs a node needs in CNIBinDir.
func (c *Cluster) CNIPlugins() []string {
	return []string{c.CNI, "host-local", "loopback", "portmap"}
}

// ImportLimit is the time one import may take; it takes a second or so where
// nothing else runs.
const ImportLimit = 2 * time.Minute

// ImportArgs are ctr's arguments that import an image archive for kubelet.
func ImportArgs(archive string) []string {
	return []string{"--namespace=k8s.io", "images", "import", "--local", archive}
}

// ImportMarker is the file on a node's disk that says that this very archive was
// imported.
func ImportMarker(archive string) (string, error) {
	fi, err := os.Stat(archive)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("/var/lib/images-imported/%s-%d-%d", filepath.Base(archive), fi.Size(), fi.ModTime().UnixNano()), nil
}

package nodeagent

import (
	"cmp"
	"crypto/fips140"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// Config is everything the agent is told when it starts. Durations and paths that are zero take the defaults
// named here; Validate fills them in.
type Config struct {
	// Who the agent is.
	Node           string
	PodName        string
	PodNamespace   string // also the namespace that never waits for the agent. Default istio-system
	PodUID         string
	ServiceAccount string
	InstanceIP     netip.Addr
	Cluster        string // Default Kubernetes
	ClusterDomain  string // Default cluster.local
	TrustDomain    string // until the control plane says; default cluster.local
	Network        string
	Version        string

	// Where the control plane is. Addresses are host:port, with or without https://.
	XDSAddress    string // default istiod.<PodNamespace>.svc:15012
	XDSServerName string // name in its certificate, where it is not the host of the address
	XDSRoot       string // PEM file; default /var/run/secrets/istio/root-cert.pem
	CAAddress     string // default XDSAddress
	CAServerName  string
	CARoot        string        // default XDSRoot
	Token         string        // file; default /var/run/secrets/tokens/istio-token
	SecretTTL     time.Duration // asked of the CA: 24 h

	// Where things of the node are, as the agent sees them.
	BPFDir     string   // default /sys/fs/bpf/warren
	CgroupRoot string   // default /sys/fs/cgroup
	Proc       string   // default /proc
	Holder     string   // socket; default /run/warren/holder.sock
	CNISocket  string   // default /run/warren/cni.sock
	StateDir   string   // survives a reboot; default /var/lib/warren
	CNIBinary  string   // the plugin in the agent's image; empty: the CNI plugin is not installed
	CNIBinDir  string   // default /opt/cni/bin
	CNIConfDir string   // default /etc/cni/net.d
	CNIReplace []string // types of chained plugins that go when ours comes; default none
	Exempt     []string // namespaces whose pods never wait for the agent. Default kube-system

	AdminAddr   string // default 127.0.0.1:15000
	MetricsAddr string // default :15020
	ReadyAddr   string // default :15021

	// Grace is how long open connections may go on after the agent was told to stop: 30 s.
	Grace      time.Duration
	PoolIdle   time.Duration // a tunnel without streams is closed: 5 min
	MaxStreams int           // streams of one tunnel: 100
	MaxFrame   int           // longest DATA frame of a tunnel, 16 KiB to 1 MiB: 1 MiB
	AccessLog  bool
	// DNSCapture has the kernel answer captured pods that ask DNS for hosts of ServiceEntries; a pod's annotation goes before it.
	DNSCapture bool

	Level *slog.LevelVar
	Log   *slog.Logger
	// Access is the logger of the access log; it is not used when AccessLog is false.
	Access *slog.Logger
}

// Validate fills in the defaults and says everything that is wrong.
func (c *Config) Validate() error {
	def := func(s *string, v string) { *s = cmp.Or(*s, v) }
	def(&c.PodNamespace, "istio-system")
	def(&c.Cluster, "Kubernetes")
	def(&c.ClusterDomain, "cluster.local")
	def(&c.TrustDomain, "cluster.local")
	def(&c.Version, "unknown")
	def(&c.XDSAddress, "istiod."+c.PodNamespace+".svc:15012")
	def(&c.XDSRoot, "/var/run/secrets/istio/root-cert.pem")
	def(&c.CAAddress, c.XDSAddress)
	def(&c.CARoot, c.XDSRoot)
	def(&c.Token, "/var/run/secrets/tokens/istio-token")
	def(&c.BPFDir, "/sys/fs/bpf/warren")
	def(&c.CgroupRoot, "/sys/fs/cgroup")
	def(&c.Proc, "/proc")
	def(&c.Holder, "/run/warren/holder.sock")
	def(&c.CNISocket, "/run/warren/cni.sock")
	def(&c.StateDir, "/var/lib/warren")
	def(&c.CNIBinDir, "/opt/cni/bin")
	def(&c.CNIConfDir, "/etc/cni/net.d")
	def(&c.AdminAddr, "127.0.0.1:15000")
	def(&c.MetricsAddr, ":15020")
	def(&c.ReadyAddr, ":15021")
	c.SecretTTL = cmp.Or(c.SecretTTL, 24*time.Hour)
	c.Grace = cmp.Or(c.Grace, 30*time.Second)
	if c.Exempt == nil {
		c.Exempt = []string{"kube-system"}
	}
	if c.Level == nil {
		c.Level = new(slog.LevelVar)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Access == nil || !c.AccessLog {
		c.Access = slog.New(slog.DiscardHandler)
	}

	var errs []error
	if c.Node == "" {
		errs = append(errs, errors.New("NODE_NAME is empty: set it from the pod's spec.nodeName"))
	}
	for _, a := range []*string{&c.XDSAddress, &c.CAAddress} {
		hp, err := hostPort(*a)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		*a = hp
	}
	for name, path := range map[string]string{"bpf directory": c.BPFDir, "state directory": c.StateDir, "/proc": c.Proc} {
		if !filepath.IsAbs(path) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", name, path))
		}
	}
	if !c.externalCA() {
		def(&c.CAServerName, c.XDSServerName)
	}
	if c.SecretTTL < time.Minute {
		errs = append(errs, fmt.Errorf("SECRET_TTL %s is too short: a certificate must live for a minute", c.SecretTTL))
	}
	if c.MaxFrame != 0 && (c.MaxFrame < 16<<10 || c.MaxFrame > 1<<20) {
		errs = append(errs, fmt.Errorf("HTTP2_FRAME_SIZE %d is not between %d and %d", c.MaxFrame, 16<<10, 1<<20))
	}
	return errors.Join(errs...)
}

// hostPort takes an address as ztunnel's environment has it: a URL or host:port.
func hostPort(a string) (string, error) {
	if strings.Contains(a, "://") {
		u, err := url.Parse(a)
		if err != nil || u.Host == "" {
			return "", fmt.Errorf("control plane address %q is neither host:port nor https://host:port", a)
		}
		if u.Scheme != "https" {
			return "", fmt.Errorf("control plane address %q: only https is supported, the token must not travel in the clear", a)
		}
		a = u.Host
		if u.Port() == "" {
			a = net.JoinHostPort(u.Hostname(), "443")
		}
	}
	if _, _, err := net.SplitHostPort(a); err != nil {
		return "", fmt.Errorf("control plane address %q is neither host:port nor https://host:port", a)
	}
	return a, nil
}

// enrolledFile is where enrolment writes down for the CNI plugin which namespaces are enrolled. The plugin runs
// on the node itself, so the state directory has to have the same path there.
func (c *Config) enrolledFile() string {
	return filepath.Join(c.StateDir, filepath.Base(cni.DefaultStateFile))
}

// settings is the part of the configuration that /config_dump shows.
func (c *Config) settings() map[string]any {
	return map[string]any{
		"fips140":   fips140.Enabled(),
		"localNode": c.Node, "clusterId": c.Cluster, "clusterDomain": c.ClusterDomain, "network": c.Network,
		"xdsAddress": c.XDSAddress, "caAddress": c.CAAddress, "secretTtl": c.SecretTTL.String(),
		"adminAddr": c.AdminAddr, "statsAddr": c.MetricsAddr, "readinessAddr": c.ReadyAddr,
		"inboundAddr": "[::]:15008", "inboundPlaintextAddr": "[::]:15006", "outboundAddr": "[::]:15001",
		"poolMaxStreamsPerConn": cmp.Or(c.MaxStreams, 100), "poolUnusedReleaseTimeout": cmp.Or(c.PoolIdle, 5*time.Minute).String(),
		"selfTerminationDeadline": c.Grace.String(), "accessLog": c.AccessLog, "dnsCapture": c.DNSCapture,
		"proxyWorkloadInformation": map[string]string{"name": c.PodName, "namespace": c.PodNamespace, "serviceAccount": c.ServiceAccount},
	}
}

package main

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/warrenmesh/warren/internal/build"
	"github.com/warrenmesh/warren/internal/environ"
	nodeagent "github.com/warrenmesh/warren/node-agent"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// environment reads the Config. Names that ztunnel has are ztunnel's, so that its manifests work; WARREN_ is
// for what it does not have.
type environment struct {
	environ.Reader
	flush func() // writes what the access log still has, see loggers
}

func (e *environment) config() nodeagent.Config {
	c := nodeagent.Config{
		Node: e.Text("NODE_NAME"), PodName: e.Text("POD_NAME"), PodNamespace: e.Text("POD_NAMESPACE"), PodUID: e.Text("POD_UID"),
		ServiceAccount: e.Text("SERVICE_ACCOUNT"),
		Cluster:        e.Text("CLUSTER_ID", "ISTIO_META_CLUSTER_ID"), ClusterDomain: e.Text("CLUSTER_DOMAIN"),
		TrustDomain: e.Text("TRUST_DOMAIN"), Network: e.Text("NETWORK"), Version: build.Version,

		XDSAddress: e.Text("XDS_ADDRESS"), XDSServerName: e.Text("ALT_XDS_HOSTNAME"), XDSRoot: e.Text("XDS_ROOT_CA"),
		CAAddress: e.Text("CA_ADDRESS"), CAServerName: e.Text("ALT_CA_HOSTNAME"), CARoot: e.Text("CA_ROOT_CA"),
		Token: e.Text("AUTH_TOKEN"), SecretTTL: e.Duration("SECRET_TTL"),

		BPFDir: e.Text("WARREN_BPF_DIR"), CgroupRoot: e.Text("WARREN_CGROUP_ROOT"), Proc: e.Text("WARREN_PROC"),
		Holder: e.Text("WARREN_HOLDER_SOCKET"), CNISocket: e.Text("WARREN_CNI_SOCKET"), StateDir: e.Text("WARREN_STATE_DIR"),
		CNIBinary: e.Text("WARREN_CNI_BINARY"), CNIBinDir: e.Text("WARREN_CNI_BIN_DIR"), CNIConfDir: e.Text("WARREN_CNI_CONF_DIR"),
		CNIReplace: e.List("WARREN_CNI_REPLACES"),

		AdminAddr: e.Text("WARREN_ADMIN_ADDRESS"), MetricsAddr: e.Text("WARREN_METRICS_ADDRESS"), ReadyAddr: e.Text("WARREN_READY_ADDRESS"),

		PoolIdle: e.Duration("POOL_UNUSED_RELEASE_TIMEOUT"), MaxStreams: e.Number("POOL_MAX_STREAMS_PER_CONNECTION", 0),
		MaxFrame:  e.Number("HTTP2_FRAME_SIZE", 0),
		AccessLog: e.Bool("ACCESS_LOG", true),
		Exempt:    e.List("WARREN_EXEMPT_NAMESPACES"),

		DNSCapture: e.Bool("ISTIO_META_DNS_CAPTURE", true),
	}
	if v := e.Text("INSTANCE_IP"); v != "" {
		a, err := netip.ParseAddr(v)
		if err != nil {
			e.Wrong("INSTANCE_IP", v, "use an address")
		}
		c.InstanceIP = a
	}
	if c.Grace = e.Duration("CONNECTION_TERMINATION_DEADLINE"); c.Grace == 0 {
		// The kubelet kills after its grace period: stop a little before.
		if s := e.Number("TERMINATION_GRACE_PERIOD_SECONDS", 0); s > 0 {
			c.Grace = max(time.Duration(s)*time.Second-2*time.Second, time.Second)
		}
	}
	if self, err := os.Executable(); c.CNIBinary == "" && err == nil {
		c.CNIBinary = filepath.Join(filepath.Dir(self), cni.PluginType)
	}
	c.Level = new(slog.LevelVar)
	e.level(c.Level)
	c.Log, c.Access, e.flush = loggers(os.Stdout, e.Text("LOG_FORMAT") == "json", c.Level)
	return c
}

// level takes LOG_LEVEL, or the default level of a RUST_LOG.
func (e *environment) level(l *slog.LevelVar) {
	if e.Level("LOG_LEVEL", l) {
		return
	}
	for _, part := range strings.Split(e.Text("RUST_LOG"), ",") {
		if !strings.Contains(part, "=") && l.UnmarshalText([]byte(part)) == nil {
			return
		}
	}
}

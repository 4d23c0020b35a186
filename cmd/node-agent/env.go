package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	nodeagent "github.com/warrenmesh/warren/node-agent"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// environment reads the Config. Names that ztunnel has are ztunnel's, so that its manifests work; WARREN_ is
// for what it does not have.
type environment struct {
	lookup func(string) string
	errs   []error
	flush  func() // writes what the access log still has, see loggers
}

func (e *environment) str(name string) string { return e.lookup(name) }

// first returns the value of the first name that is set.
func (e *environment) first(names ...string) string {
	for _, n := range names {
		if v := e.lookup(n); v != "" {
			return v
		}
	}
	return ""
}

func (e *environment) duration(name string) time.Duration {
	v := e.lookup(name)
	if v == "" {
		return 0
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 {
		e.errs = append(e.errs, fmt.Errorf("%s=%q is not a duration such as 30s", name, v))
	}
	return d
}

func (e *environment) number(name string) int {
	v := e.lookup(name)
	if v == "" {
		return 0
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 {
		e.errs = append(e.errs, fmt.Errorf("%s=%q is not a number", name, v))
	}
	return n
}

func (e *environment) boolean(name string, def bool) bool {
	v := e.lookup(name)
	if v == "" {
		return def
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		e.errs = append(e.errs, fmt.Errorf("%s=%q is neither true nor false", name, v))
	}
	return b
}

func (e *environment) config() nodeagent.Config {
	c := nodeagent.Config{
		Node: e.str("NODE_NAME"), PodName: e.str("POD_NAME"), PodNamespace: e.str("POD_NAMESPACE"), PodUID: e.str("POD_UID"),
		ServiceAccount: e.str("SERVICE_ACCOUNT"),
		Cluster:        e.first("CLUSTER_ID", "ISTIO_META_CLUSTER_ID"), ClusterDomain: e.str("CLUSTER_DOMAIN"),
		TrustDomain: e.str("TRUST_DOMAIN"), Network: e.str("NETWORK"), Version: version,

		XDSAddress: e.str("XDS_ADDRESS"), XDSServerName: e.str("ALT_XDS_HOSTNAME"), XDSRoot: e.str("XDS_ROOT_CA"),
		CAAddress: e.str("CA_ADDRESS"), CAServerName: e.str("ALT_CA_HOSTNAME"), CARoot: e.str("CA_ROOT_CA"),
		Token: e.str("AUTH_TOKEN"), SecretTTL: e.duration("SECRET_TTL"),

		BPFDir: e.str("WARREN_BPF_DIR"), CgroupRoot: e.str("WARREN_CGROUP_ROOT"), Proc: e.str("WARREN_PROC"),
		Holder: e.str("WARREN_HOLDER_SOCKET"), CNISocket: e.str("WARREN_CNI_SOCKET"), StateDir: e.str("WARREN_STATE_DIR"),
		CNIBinary: e.str("WARREN_CNI_BINARY"), CNIBinDir: e.str("WARREN_CNI_BIN_DIR"), CNIConfDir: e.str("WARREN_CNI_CONF_DIR"),

		AdminAddr: e.str("WARREN_ADMIN_ADDRESS"), MetricsAddr: e.str("WARREN_METRICS_ADDRESS"), ReadyAddr: e.str("WARREN_READY_ADDRESS"),

		PoolIdle: e.duration("POOL_UNUSED_RELEASE_TIMEOUT"), MaxStreams: e.number("POOL_MAX_STREAMS_PER_CONNECTION"),
		MaxFrame:  e.number("HTTP2_FRAME_SIZE"),
		AccessLog: e.boolean("ACCESS_LOG", true),
	}
	if v := e.str("INSTANCE_IP"); v != "" {
		a, err := netip.ParseAddr(v)
		if err != nil {
			e.errs = append(e.errs, fmt.Errorf("INSTANCE_IP=%q is not an address", v))
		}
		c.InstanceIP = a
	}
	if v := e.str("WARREN_EXEMPT_NAMESPACES"); v != "" {
		c.Exempt = strings.Split(v, ",")
	}
	if c.Grace = e.duration("CONNECTION_TERMINATION_DEADLINE"); c.Grace == 0 {
		// The kubelet kills after its grace period: stop a little before.
		if s := e.number("TERMINATION_GRACE_PERIOD_SECONDS"); s > 0 {
			c.Grace = max(time.Duration(s)*time.Second-2*time.Second, time.Second)
		}
	}
	if self, err := os.Executable(); c.CNIBinary == "" && err == nil {
		c.CNIBinary = filepath.Join(filepath.Dir(self), cni.PluginType)
	}
	c.Level = new(slog.LevelVar)
	e.level(c.Level)
	c.Log, c.Access, e.flush = loggers(os.Stdout, e.str("LOG_FORMAT") == "json", c.Level)
	return c
}

// level takes LOG_LEVEL, or the default level of a RUST_LOG.
func (e *environment) level(l *slog.LevelVar) {
	if v := e.str("LOG_LEVEL"); v != "" {
		if err := l.UnmarshalText([]byte(v)); err != nil {
			e.errs = append(e.errs, fmt.Errorf("LOG_LEVEL=%q is none of debug, info, warn, error", v))
		}
		return
	}
	for _, part := range strings.Split(e.str("RUST_LOG"), ",") {
		if !strings.Contains(part, "=") && l.UnmarshalText([]byte(part)) == nil {
			return
		}
	}
}

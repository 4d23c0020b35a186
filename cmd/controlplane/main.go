// Command controlplane runs Warren's control plane, configured by the environment.
//
//	controlplane          runs it
//	controlplane version  says which it is
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/warrenmesh/warren/controlplane"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/logformat"
)

// version is set when the binary is linked.
var version = "dev"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "controlplane:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 {
		if args[0] == "version" && len(args) == 1 {
			fmt.Println(version)
			return nil
		}
		return fmt.Errorf("arguments %q: the only command is version; settings are read from the environment", args)
	}
	env := environment{lookup: os.LookupEnv}
	cfg := env.config()
	if err := errors.Join(env.errs...); err != nil {
		return err
	}
	clients, err := connect()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return controlplane.Run(ctx, cfg, clients)
}

// connect uses the pod's own account, or KUBECONFIG outside a cluster.
func connect() (controlplane.Clients, error) {
	restConfig, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		restConfig, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
			clientcmd.NewDefaultClientConfigLoadingRules(), nil).ClientConfig()
	}
	if err != nil {
		return controlplane.Clients{}, fmt.Errorf("find the API server: %w", err)
	}
	restConfig.UserAgent = "warren-control/" + version
	restConfig.QPS, restConfig.Burst = 80, 160
	kube, err := kubernetes.NewForConfig(restConfig)
	if err != nil {
		return controlplane.Clients{}, fmt.Errorf("make a client of Kubernetes: %w", err)
	}
	istioClient, err := istio.NewForConfig(restConfig)
	if err != nil {
		return controlplane.Clients{}, fmt.Errorf("make a client of Istio's resources: %w", err)
	}
	dynamicClient, err := dynamic.NewForConfig(restConfig)
	if err != nil {
		return controlplane.Clients{}, fmt.Errorf("make a client of other resources: %w", err)
	}
	gateways, err := gateway.NewForConfig(restConfig)
	if err != nil {
		return controlplane.Clients{}, fmt.Errorf("make a client of the Gateway API: %w", err)
	}
	return controlplane.Clients{Kube: kube, Istio: istioClient, Dynamic: dynamicClient, Gateways: gateways}, nil
}

// environment reads variables and collects what is wrong with them.
type environment struct {
	lookup func(string) (string, bool)
	errs   []error
}

func (e *environment) text(name, otherwise string) string {
	if v, ok := e.lookup(name); ok && v != "" {
		return v
	}
	return otherwise
}

func (e *environment) duration(name string) time.Duration {
	v := e.text(name, "")
	if v == "" {
		return 0
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		e.errs = append(e.errs, fmt.Errorf("%s=%q: %w", name, v, err))
	}
	return d
}

func (e *environment) boolean(name string, otherwise bool) bool {
	v := e.text(name, strconv.FormatBool(otherwise))
	b, err := strconv.ParseBool(v)
	if err != nil {
		e.errs = append(e.errs, fmt.Errorf("%s=%q: use true or false", name, v))
	}
	return b
}

func (e *environment) list(name string) []string {
	var out []string
	for _, v := range strings.Split(e.text(name, ""), ",") {
		if v = strings.TrimSpace(v); v != "" {
			out = append(out, v)
		}
	}
	return out
}

func (e *environment) config() controlplane.Config {
	var level slog.Level
	if v := e.text("LOG_LEVEL", "info"); level.UnmarshalText([]byte(v)) != nil {
		e.errs = append(e.errs, fmt.Errorf("LOG_LEVEL=%q: use debug, info, warn or error", v))
	}
	handler := logformat.New(os.Stdout, e.text("LOG_FORMAT", "") == "json", level)
	admissionAddr := e.text("ADMISSION_LISTEN", ":15017")
	if !e.boolean("ADMISSION", true) {
		admissionAddr = ""
	}
	return controlplane.Config{
		Namespace:      e.text("POD_NAMESPACE", ""),
		PodName:        e.text("POD_NAME", ""),
		Revision:       e.text("REVISION", ""),
		ServiceAccount: e.text("SERVICE_ACCOUNT", ""),
		Version:        version,
		Mesh: index.Config{
			ClusterID:     e.text("CLUSTER_ID", ""),
			ClusterDomain: e.text("CLUSTER_DOMAIN", ""),
			TrustDomain:   e.text("TRUST_DOMAIN", ""),
			Network:       e.text("NETWORK", ""),
		},
		Waypoints: controlplane.WaypointConfig{
			Image: e.text("WAYPOINT_IMAGE", ""), PullPolicy: e.text("WAYPOINT_PULL_POLICY", "IfNotPresent"), PullSecrets: e.list("WAYPOINT_PULL_SECRETS"),
		},
		TrustedNodes:   e.list("CA_TRUSTED_NODE_ACCOUNTS"),
		DefaultCertTTL: e.duration("DEFAULT_WORKLOAD_CERT_TTL"),
		MaxCertTTL:     e.duration("MAX_WORKLOAD_CERT_TTL"),
		RootTTL:        e.duration("CITADEL_SELF_SIGNED_CA_CERT_TTL"),
		CACertsDir:     e.text("CA_CERTS_DIR", "/etc/cacerts"),
		XDSAddr:        e.text("XDS_LISTEN", ":15012"),
		MonitoringAddr: e.text("MONITORING_LISTEN", ":15014"),
		ReadyAddr:      e.text("READY_LISTEN", ":8080"),
		AdmissionAddr:  admissionAddr,
		Log:            slog.New(handler),
	}
}

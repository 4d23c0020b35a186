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
	"syscall"

	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	gateway "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned"

	"github.com/warrenmesh/warren/controlplane"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/build"
	"github.com/warrenmesh/warren/internal/environ"
	"github.com/warrenmesh/warren/internal/logformat"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "controlplane:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 {
		if args[0] == "version" && len(args) == 1 {
			fmt.Println(build.Version)
			return nil
		}
		return fmt.Errorf("arguments %q: the only command is version; settings are read from the environment", args)
	}
	var env environ.Reader
	cfg := config(&env)
	if err := env.Err(); err != nil {
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
	restConfig.UserAgent = "warren-control/" + build.Version
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

func config(e *environ.Reader) controlplane.Config {
	var level slog.LevelVar
	e.Level("LOG_LEVEL", &level)
	handler := logformat.New(os.Stdout, e.Text("LOG_FORMAT") == "json", level.Level())
	admissionAddr := e.TextOr("ADMISSION_LISTEN", ":15017")
	if !e.Bool("ADMISSION", true) {
		admissionAddr = ""
	}
	return controlplane.Config{
		Namespace:      e.Text("POD_NAMESPACE"),
		PodName:        e.Text("POD_NAME"),
		Revision:       e.Text("REVISION"),
		BesideIstio:    e.Text("BESIDE_ISTIO"),
		ServiceAccount: e.Text("SERVICE_ACCOUNT"),
		Version:        build.Version,
		Mesh: index.Config{
			ClusterID:     e.Text("CLUSTER_ID"),
			ClusterDomain: e.Text("CLUSTER_DOMAIN"),
			TrustDomain:   e.Text("TRUST_DOMAIN"),
			Network:       e.Text("NETWORK"),
		},
		Waypoints: controlplane.WaypointConfig{
			Image: e.Text("WAYPOINT_IMAGE"), PullPolicy: e.TextOr("WAYPOINT_PULL_POLICY", "IfNotPresent"), PullSecrets: e.List("WAYPOINT_PULL_SECRETS"),
		},
		TrustedNodes:   e.List("CA_TRUSTED_NODE_ACCOUNTS"),
		DefaultCertTTL: e.Duration("DEFAULT_WORKLOAD_CERT_TTL"),
		MaxCertTTL:     e.Duration("MAX_WORKLOAD_CERT_TTL"),
		RootTTL:        e.Duration("CITADEL_SELF_SIGNED_CA_CERT_TTL"),
		CACertsDir:     e.TextOr("CA_CERTS_DIR", "/etc/cacerts"),
		XDSAddr:        e.TextOr("XDS_LISTEN", ":15012"),
		MonitoringAddr: e.TextOr("MONITORING_LISTEN", ":15014"),
		ReadyAddr:      e.TextOr("READY_LISTEN", ":8080"),
		AdmissionAddr:  admissionAddr,
		Log:            slog.New(handler),
	}
}

package index

import (
	"errors"
	"fmt"
	"net/netip"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Config is what holds for the whole mesh.
type Config struct {
	ClusterID     string // "Kubernetes" unless the mesh has several clusters
	ClusterDomain string // "cluster.local"
	TrustDomain   string // "cluster.local"
	Network       string // "" where the mesh has one network
	Revision      string // istio.io/rev of this control plane

	TrustDomainAliases []string // peers of these are accepted too
	SameNode           mesh.SameNode
	RegistryOnly       bool             // outboundTrafficPolicy
	Locality           *mesh.LocalityLB // localityLbSetting
	RootNamespace      string           // of mesh-wide policies

	// APIServerSources are further addresses from which the API server calls pods, where it does not come from those
	// under which the cluster knows it (a managed control plane behind tunnels or NAT).
	APIServerSources []netip.Prefix

	// Providers are the extension providers that CUSTOM policies may name.
	Providers map[string]*mesh.AuthProvider

	// Telemetry are those that Telemetry objects may name.
	Telemetry policy.TelemetryProviders

	// Enablement enrols pods beyond the istio.io/dataplane-mode labels, as istio-cni's enablementSelectors do.
	Enablement []EnablementSelector
}

// EnablementSelector enrols the pods that both selectors match. An empty selector matches everything.
type EnablementSelector struct {
	PodSelector       metav1.LabelSelector `json:"podSelector"`
	NamespaceSelector metav1.LabelSelector `json:"namespaceSelector"`
}

// compiled is Config ready for use.
type compiled struct {
	Config
	enablement []enablement
}

type enablement struct{ pod, namespace labels.Selector }

func (c Config) compile() (compiled, error) {
	if c.ClusterID == "" || c.ClusterDomain == "" || c.TrustDomain == "" || c.RootNamespace == "" {
		return compiled{}, errors.New("index: cluster id, cluster domain, trust domain and root namespace must be set")
	}
	out := compiled{Config: c}
	for i, s := range c.Enablement {
		pod, err := metav1.LabelSelectorAsSelector(&s.PodSelector)
		if err != nil {
			return compiled{}, fmt.Errorf("enablement selector %d: pod selector: %w", i, err)
		}
		ns, err := metav1.LabelSelectorAsSelector(&s.NamespaceSelector)
		if err != nil {
			return compiled{}, fmt.Errorf("enablement selector %d: namespace selector: %w", i, err)
		}
		if pod.Empty() && ns.Empty() {
			return compiled{}, fmt.Errorf("enablement selector %d: both selectors are empty, which would enrol every pod of the cluster", i)
		}
		out.enablement = append(out.enablement, enablement{pod: pod, namespace: ns})
	}
	return out, nil
}

func (c Config) meshConfig() mesh.Config {
	return mesh.Config{
		TrustDomain: c.TrustDomain, TrustDomainAliases: c.TrustDomainAliases, Cluster: c.ClusterID, ClusterDomain: c.ClusterDomain,
		Network: c.Network, RootNamespace: c.RootNamespace, ControlRevision: c.Revision, SameNode: c.SameNode,
		RegistryOnly: c.RegistryOnly, Locality: c.Locality,
	}
}

// Validate reports what is wrong with the configuration.
func (c Config) Validate() error {
	_, err := c.compile()
	return err
}

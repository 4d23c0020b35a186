package controlplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	networking "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

// Config is what a control plane has to be told.
type Config struct {
	Namespace string // its own; also the root namespace of the mesh unless the mesh config says otherwise
	PodName   string // its identity in the leader election
	// Revision is istio.io/rev. The control plane of another than the default one makes and configures the waypoints and gateways
	// that ask for it, and leaves the rest of the mesh to that.
	Revision string
	// BesideIstio is the ConfigMap with the mesh configuration of an Istio whose control plane is beside this one; "" for none. What
	// there is once in a mesh is that one's then, but for agents: those of the nodes that were moved ask this one.
	BesideIstio string
	Version     string // of Warren, reported on /version

	Mesh      index.Config
	Waypoints WaypointConfig

	// TrustedNodes are the service accounts of node agents, as namespace/name.
	TrustedNodes []string
	// ServiceNames are the Services under which clients reach it, for the serving certificate.
	ServiceNames   []string
	ServiceAccount string

	DefaultCertTTL time.Duration
	MaxCertTTL     time.Duration
	RootTTL        time.Duration // of a self-signed root; 0: 10 years
	// ExternalCA is who signs for workloads instead of this control plane, "" for nobody.
	ExternalCA string
	// KeysByHTTP lets key sets that verify tokens be fetched without TLS.
	KeysByHTTP bool
	// CACertsDir is where a plugged-in signing key is mounted, "" for nowhere.
	CACertsDir string

	// Listeners. An empty address closes the port.
	XDSAddr        string // xDS and CA, TLS
	MonitoringAddr string // /metrics /version /ready
	ReadyAddr      string // /ready
	AdmissionAddr  string // the admission webhook, TLS

	Log *slog.Logger
}

// Defaults fills what is empty.
func (c Config) Defaults() Config {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&c.Namespace, "istio-system")
	def(&c.PodName, "warren-control")
	def(&c.Revision, revision.Default)
	def(&c.Version, "unknown")
	def(&c.ServiceAccount, "warren-control")
	def(&c.Mesh.ClusterID, "Kubernetes")
	def(&c.Mesh.ClusterDomain, "cluster.local")
	def(&c.Mesh.TrustDomain, "cluster.local")
	def(&c.Mesh.RootNamespace, c.Namespace)
	def(&c.Mesh.Revision, c.Revision)
	if len(c.TrustedNodes) == 0 {
		c.TrustedNodes = []string{c.Namespace + "/warren-node", c.Namespace + "/ztunnel"}
	}
	if len(c.ServiceNames) == 0 {
		c.ServiceNames = []string{"istiod" + revision.Suffix(c.Revision), "warren-control" + revision.Suffix(c.Revision)}
	}
	if c.DefaultCertTTL == 0 {
		c.DefaultCertTTL = 24 * time.Hour
	}
	if c.MaxCertTTL == 0 {
		c.MaxCertTTL = max(24*time.Hour, c.DefaultCertTTL)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// Validate names everything that is wrong.
func (c Config) Validate() error {
	var errs []error
	if err := c.Mesh.Validate(); err != nil {
		errs = append(errs, err)
	}
	if err := revision.Check(c.Revision); err != nil {
		errs = append(errs, fmt.Errorf("revision: %w", err))
	}
	if c.BesideIstio != "" && (c.Revision != revision.BesideIstio || c.BesideIstio == c.configMapName()) {
		errs = append(errs, fmt.Errorf("beside Istio (ConfigMap %s) the revision is %q, not %q, and the ConfigMap %s is Warren's", c.BesideIstio, revision.BesideIstio, c.Revision, c.configMapName()))
	}
	for _, a := range c.TrustedNodes {
		if ns, sa, ok := strings.Cut(a, "/"); !ok || ns == "" || sa == "" || strings.Contains(sa, "/") {
			errs = append(errs, fmt.Errorf("trusted node account %q is not namespace/service-account", a))
		}
	}
	if c.DefaultCertTTL < time.Minute || c.MaxCertTTL < c.DefaultCertTTL {
		errs = append(errs, fmt.Errorf("certificate lifetimes: default %s, maximum %s; want 1m <= default <= maximum", c.DefaultCertTTL, c.MaxCertTTL))
	}
	for _, a := range []string{c.XDSAddr, c.MonitoringAddr, c.ReadyAddr, c.AdmissionAddr} {
		if a == "" || strings.HasPrefix(a, ":") {
			continue
		}
		if _, err := netip.ParseAddrPort(a); err != nil {
			errs = append(errs, fmt.Errorf("listen address %q: %w", a, err))
		}
	}
	return errors.Join(errs...)
}

// dnsNames are the names of the serving certificate.
func (c Config) dnsNames() []string {
	var out []string
	for _, s := range c.ServiceNames {
		out = append(out, s+"."+c.Namespace+".svc", s+"."+c.Namespace+".svc."+c.Mesh.ClusterDomain, s+"."+c.Namespace, s)
	}
	return out
}

// meshFile is what is read of Istio's MeshConfig (key mesh).
type meshFile struct {
	RootNamespace      string   `json:"rootNamespace"`
	TrustDomain        string   `json:"trustDomain"`
	TrustDomainAliases []string `json:"trustDomainAliases"`
	CAAddress          string   `json:"caAddress"`

	AccessLogFile         string `json:"accessLogFile"`
	OutboundTrafficPolicy struct {
		Mode string `json:"mode"`
	} `json:"outboundTrafficPolicy"`

	LocalityLbSetting *networking.LocalityLoadBalancerSetting `json:"localityLbSetting"`

	ExtensionProviders []extensionProvider `json:"extensionProviders"`
	DefaultProviders   struct {
		Tracing       []string `json:"tracing"`
		AccessLogging []string `json:"accessLogging"`
	} `json:"defaultProviders"`
}

// warrenFile is what only Warren knows (key warren of the same ConfigMap).
type warrenFile struct {
	ClusterID           string             `json:"clusterID"`
	ClusterDomain       string             `json:"clusterDomain"`
	Network             string             `json:"network"`
	SameNode            string             `json:"sameNode"`
	EnablementSelectors []enablementSource `json:"enablementSelectors"`
	APIServerSources    []string           `json:"apiServerSources"`
	KeySets             struct {
		AllowHTTP bool `json:"allowHTTP"`
	} `json:"keySets"`
}

// enablementSource is an enablement selector in istio-cni's form, or a bare label selector of namespaces.
type enablementSource struct {
	index.EnablementSelector `json:",inline"`
	metav1.LabelSelector     `json:",inline"`
}

func (e enablementSource) selector() (index.EnablementSelector, error) {
	bare := len(e.MatchLabels)+len(e.MatchExpressions) > 0
	full := len(e.NamespaceSelector.MatchLabels)+len(e.NamespaceSelector.MatchExpressions)+
		len(e.PodSelector.MatchLabels)+len(e.PodSelector.MatchExpressions) > 0
	if bare && full {
		return index.EnablementSelector{}, errors.New("an enablement selector is either a label selector of namespaces or has podSelector and namespaceSelector, not both")
	}
	if bare {
		return index.EnablementSelector{NamespaceSelector: e.LabelSelector}, nil
	}
	return e.EnablementSelector, nil
}

// configMapName is that of this control plane's own MeshConfig.
func (c Config) configMapName() string {
	return "istio" + revision.Suffix(c.Revision)
}

// configMaps are those with the mesh's configuration, each nil where it is not there.
type configMaps struct {
	own    *corev1.ConfigMap
	istios *corev1.ConfigMap // beside an Istio: its
}

// configMapNames are those of the ConfigMaps that say something.
func (c Config) configMapNames() []string {
	if c.BesideIstio != "" {
		return []string{c.configMapName(), c.BesideIstio}
	}
	return []string{c.configMapName()}
}

// take is m with another version of one of the two.
func (m configMaps) take(c Config, cm *corev1.ConfigMap) configMaps {
	if cm.Name == c.BesideIstio {
		m.istios = cm
	} else {
		m.own = cm
	}
	return m
}

// withConfigMap adds what the mesh's ConfigMap says; it wins over what was set before. A mesh without one is fine.
func (c Config) withConfigMap(ctx context.Context, kube kubernetes.Interface) (Config, error) {
	var maps configMaps
	for _, name := range c.configMapNames() {
		cm, err := kube.CoreV1().ConfigMaps(c.Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return c, fmt.Errorf("read the mesh configuration from ConfigMap %s/%s: %w", c.Namespace, name, err)
		}
		maps = maps.take(c, cm)
	}
	return c.configured(maps)
}

// sameTrustDomain refuses a trust domain other than that of the Istio beside this control plane: certificates of the one would
// name nobody whom the other knows.
func (c Config) sameTrustDomain(istios meshFile) error {
	if theirs := cmp.Or(istios.TrustDomain, "cluster.local"); c.Mesh.TrustDomain != theirs {
		return fmt.Errorf("ConfigMap %s/%s: the trust domain of Istio is %q, and this control plane was told %q: install it with mesh.trustDomain=%s",
			c.Namespace, c.BesideIstio, theirs, c.Mesh.TrustDomain, theirs)
	}
	return nil
}

// configured is c with what the ConfigMaps say. Beside an Istio the mesh is what Istio's says, for as long as that is there; what
// only Warren knows is in its own.
func (c Config) configured(maps configMaps) (Config, error) {
	if maps.own == nil && maps.istios == nil {
		return c, nil
	}
	own, of := maps.own, maps.own
	if own == nil {
		own = &corev1.ConfigMap{}
	}
	if maps.istios != nil {
		of = maps.istios
	}
	name := of.Name
	var m meshFile
	if err := yaml.Unmarshal([]byte(of.Data["mesh"]), &m); err != nil {
		return c, fmt.Errorf("ConfigMap %s/%s, key mesh: %w", c.Namespace, name, err)
	}
	if maps.istios != nil {
		if err := c.sameTrustDomain(m); err != nil {
			return c, err
		}
	}
	var w warrenFile
	if err := yaml.UnmarshalStrict([]byte(own.Data["warren"]), &w); err != nil {
		return c, fmt.Errorf("ConfigMap %s/%s, key warren: %w", c.Namespace, own.Name, err)
	}
	set := func(dst *string, v string) {
		if v != "" {
			*dst = v
		}
	}
	set(&c.Mesh.RootNamespace, m.RootNamespace)
	set(&c.Mesh.TrustDomain, m.TrustDomain)
	set(&c.ExternalCA, m.CAAddress)
	set(&c.Mesh.ClusterID, w.ClusterID)
	set(&c.Mesh.ClusterDomain, w.ClusterDomain)
	set(&c.Mesh.Network, w.Network)
	if len(m.TrustDomainAliases) > 0 {
		c.Mesh.TrustDomainAliases = m.TrustDomainAliases
	}
	switch mode := m.OutboundTrafficPolicy.Mode; mode {
	case "", "ALLOW_ANY":
		c.Mesh.RegistryOnly = false
	case "REGISTRY_ONLY":
		c.Mesh.RegistryOnly = true
	default:
		return c, fmt.Errorf("ConfigMap %s/%s: outboundTrafficPolicy.mode is %q: it must be ALLOW_ANY or REGISTRY_ONLY", c.Namespace, name, mode)
	}
	locality, problems := routing.MeshLocality(m.LocalityLbSetting)
	if len(problems) > 0 {
		return c, fmt.Errorf("ConfigMap %s/%s: %s", c.Namespace, name, strings.Join(problems, "; "))
	}
	c.Mesh.Locality = locality
	for _, p := range m.ExtensionProviders {
		provider, err := p.provider(c.Mesh.ClusterDomain)
		if err != nil {
			return c, fmt.Errorf("ConfigMap %s/%s: extensionProviders: %w", c.Namespace, name, err)
		}
		if provider == nil {
			if err := c.addTelemetry(p); err != nil {
				return c, fmt.Errorf("ConfigMap %s/%s: extensionProviders: %w", c.Namespace, name, err)
			}
			continue
		}
		if c.Mesh.Providers == nil {
			c.Mesh.Providers = map[string]*mesh.AuthProvider{}
		}
		c.Mesh.Providers[p.Name] = provider
	}
	c.Mesh.Telemetry.Tracing, c.Mesh.Telemetry.Logs = m.DefaultProviders.Tracing, m.DefaultProviders.AccessLogging
	if logs := &c.Mesh.Telemetry.Logs; *logs == nil && m.AccessLogFile != "" {
		if m.AccessLogFile != "/dev/stdout" {
			return c, fmt.Errorf("ConfigMap %s/%s: accessLogFile: access logs go to /dev/stdout or to providers of defaultProviders.accessLogging, not to %q", c.Namespace, name, m.AccessLogFile)
		}
		*logs = []string{policy.StdoutProvider}
	}
	if err := c.Mesh.Telemetry.Check(); err != nil {
		return c, fmt.Errorf("ConfigMap %s/%s: defaultProviders: %w", c.Namespace, name, err)
	}
	switch w.SameNode {
	case "", "auto":
		c.Mesh.SameNode = mesh.SameNodeAuto
	case "kernel":
		c.Mesh.SameNode = mesh.SameNodeKernel
	case "encrypt":
		c.Mesh.SameNode = mesh.SameNodeEncrypt
	default:
		return c, fmt.Errorf("ConfigMap %s/%s: sameNode is %q: it must be auto, kernel or encrypt", c.Namespace, own.Name, w.SameNode)
	}
	c.KeysByHTTP = c.KeysByHTTP || w.KeySets.AllowHTTP
	for _, v := range w.APIServerSources {
		p, err := netip.ParsePrefix(v)
		if a, aerr := netip.ParseAddr(v); err != nil && aerr == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return c, fmt.Errorf("ConfigMap %s/%s: apiServerSources: %q is neither an address nor a CIDR range", c.Namespace, own.Name, v)
		}
		c.Mesh.APIServerSources = append(c.Mesh.APIServerSources, p.Masked())
	}
	for _, e := range w.EnablementSelectors {
		sel, err := e.selector()
		if err != nil {
			return c, fmt.Errorf("ConfigMap %s/%s: %w", c.Namespace, own.Name, err)
		}
		c.Mesh.Enablement = append(c.Mesh.Enablement, sel)
	}
	return c, nil
}

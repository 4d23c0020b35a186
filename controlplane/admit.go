package controlplane

import (
	"iter"
	"net/netip"
	"slices"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/controlplane/admission"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
)

// newAdmission makes the webhook's server.
func (cp *controlPlane) newAdmission() *admission.Server {
	judge := admission.Judge{
		Mesh: policy.Mesh{
			RootNamespace: cp.cfg.Mesh.RootNamespace, TrustDomain: cp.cfg.Mesh.TrustDomain, TrustDomainAliases: cp.cfg.Mesh.TrustDomainAliases,
		},
		Cluster: surroundings{cp},
	}
	return admission.NewServer(admission.Config{
		Judge: judge.Judge, APIServer: cp.isAPIServer, Log: cp.cfg.Log.With("scope", "admission"), Metrics: cp.metrics,
	})
}

// isAPIServer reports whether the API server calls from an address.
func (cp *controlPlane) isAPIServer(a netip.Addr) bool {
	known := cp.apiServer.Load()
	return known != nil && slices.ContainsFunc(*known, func(p netip.Prefix) bool { return p.Contains(a) })
}

// surroundings shows the state of the cluster to admission.
type surroundings struct{ cp *controlPlane }

func (s surroundings) Namespaces() []string          { return s.cp.source.NamespaceNames() }
func (s surroundings) HasNamespace(name string) bool { return s.cp.source.HasNamespace(name) }

func (s surroundings) Pods(namespace string) iter.Seq[admission.Pod] {
	now := s.cp.store.Load()
	prefix := s.cp.cfg.Mesh.ClusterID + "//Pod/"
	return func(yield func(admission.Pod) bool) {
		for p := range s.cp.source.SeenPods(namespace) {
			out := admission.Pod{
				Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, Labels: p.Labels, Captured: p.Captured,
			}
			if now.Ingress(s.cp.cfg.Mesh.ServiceName(p.Namespace, p.ServiceAccount)) != nil { // a gateway decides for itself
				out.Captured, out.Waypoint = true, true
			} else if p.Captured {
				w := now.Workload(prefix + p.Namespace + "/" + p.Name)
				out.Waypoint = w != nil && w.Waypoint != nil
			}
			if !yield(out) {
				return
			}
		}
	}
}

func (s surroundings) PeerAuthentications(namespace string) iter.Seq[*securityv1.PeerAuthentication] {
	return s.cp.source.PeerAuthentications(namespace)
}

func (s surroundings) HasTarget(kind policy.TargetKind, namespace, name string) bool {
	of := index.Service
	if kind == policy.TargetServiceEntry {
		of = index.ServiceEntry
	}
	_, ok := s.cp.source.Object(of, namespace, name)
	return ok
}

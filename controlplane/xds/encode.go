package xds

import (
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// encode turns what changed into resources.
func (c *Cache) encode(u *index.Update) ([]change, error) {
	var out []change
	var errs []error
	put := func(kind, name string, m proto.Message, node string, aliases []string) {
		if m == nil {
			out = append(out, change{kind, name, nil})
			return
		}
		r, err := newResource(name, m)
		if err != nil {
			errs = append(errs, err)
			return
		}
		r.node, r.aliases = node, aliases
		out = append(out, change{kind, name, r})
	}
	c.mu.RLock()
	old := c.snapshot
	c.mu.RUnlock()

	workloads, services, policies := u.Snapshot.Changes(old)
	for ch := range policies {
		if ch.Old != nil && (ch.New == nil || policyType(ch.New) != policyType(ch.Old)) {
			put(policyType(ch.Old), ch.Old.Name.String(), nil, "", nil)
		}
		if ch.New == nil {
			continue
		}
		if ch.New.Action == mesh.Audit {
			m, err := wds.EncodeAudit(ch.New)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			put(TypeAudit, ch.New.Name.String(), m, "", nil)
			continue
		}
		m, err := wds.EncodePolicy(ch.New)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		put(TypeAuthorization, ch.New.Name.String(), m, "", nil)
	}
	for ch := range services {
		if ch.New == nil {
			put(TypeAddress, ch.Old.Name.String(), nil, "", nil)
			continue
		}
		put(TypeAddress, ch.New.Name.String(), wds.EncodeService(ch.New), "", serviceAliases(ch.New))
	}
	for ch := range workloads {
		if ch.New == nil {
			put(TypeAddress, ch.Old.UID, nil, "", nil)
			continue
		}
		put(TypeAddress, ch.New.UID, wds.EncodeWorkload(ch.New), "", workloadAliases(ch.New))
	}
	for uid, p := range u.LocalPods {
		if p == nil {
			put(TypeLocalPod, uid, nil, "", nil)
			continue
		}
		put(TypeLocalPod, uid, wds.EncodeLocalPod(localPod(p)), p.Node, nil)
	}
	for name, ns := range u.Namespaces {
		if ns == nil {
			put(TypeNamespace, name, nil, "", nil)
			continue
		}
		put(TypeNamespace, name, wds.EncodeNamespace(ns.Name, ns.Enrolled), "", nil)
	}
	if old == nil || !old.Config().Equal(u.Snapshot.Config()) {
		put(TypeMeshConfig, wds.MeshConfigName, wds.EncodeConfig(u.Snapshot.Config()), "", nil)
	}
	return out, errors.Join(errs...)
}

// policyType is the type by which a policy is served.
func policyType(p *mesh.Policy) string {
	if p.Action == mesh.Audit {
		return TypeAudit
	}
	return TypeAuthorization
}

// An alias is network/address, as on-demand clients ask.
func alias(a mesh.NetAddr) string { return a.Network + "/" + a.Addr.String() }

func workloadAliases(w *mesh.Workload) []string {
	if w.HostNetwork {
		return nil // the address is shared
	}
	var out []string
	for _, a := range w.Addrs {
		out = append(out, alias(mesh.NetAddr{Network: w.Network, Addr: a}))
	}
	return out
}

func serviceAliases(s *mesh.Service) []string {
	var out []string
	for _, a := range s.VIPs {
		out = append(out, alias(a))
	}
	return out
}

func localPod(p *index.LocalPod) wds.LocalPod {
	out := wds.LocalPod{
		UID: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, WorkloadUID: p.WorkloadUID,
		Node: p.Node, Addrs: p.Addrs, Enrolled: p.Enrolled, Reason: string(p.Reason), Strict: p.Strict, HostNetwork: p.HostNetwork,
		Selected: wds.Selected(p.Selected), DNSCapture: p.DNSCapture,
	}
	switch p.Phase {
	case index.PodPending:
		out.State = wds.PodPending
	case index.PodRunning:
		out.State = wds.PodRunning
	case index.PodTerminating:
		out.State = wds.PodTerminating
	case index.PodFinished:
		out.State = wds.PodFinished
	}
	return out
}

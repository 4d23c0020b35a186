package wds

import (
	"net/netip"
	"slices"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/mesh"
)

// LocalPod is one pod scheduled to the node that asks, enrolled or not. Its resource name is the UID.
type LocalPod struct {
	UID            string // metadata.uid
	Namespace      string
	Name           string
	ServiceAccount string
	WorkloadUID    string // of its mesh.Workload
	Node           string
	Addrs          []netip.Addr // empty until the pod has one
	Enrolled       bool
	Reason         string // why it is enrolled or not: a stable word
	Strict         bool   // STRICT applies to every port
	HostNetwork    bool
	State          PodState
	Selected       Selected // by a NetworkPolicy
	DNSCapture     mesh.DNSCapture
}

// Selected says whether a NetworkPolicy selects a pod.
type Selected uint8

const (
	SelectedUnknown Selected = iota // the control plane does not say
	SelectedNo
	SelectedYes
)

// PodState is how far a pod has come.
type PodState uint8

const (
	PodUnknown PodState = iota
	PodPending
	PodRunning
	PodTerminating
	PodFinished // succeeded or failed: nothing of it runs any more
)

// MeshConfigName is the name of the one MeshConfig resource.
const MeshConfigName = "mesh"

// TrustBundleName is the name of the one TrustBundle resource.
const TrustBundleName = "trust"

// EncodeLocalPod writes a pod.
func EncodeLocalPod(p LocalPod) *node.LocalPod {
	return &node.LocalPod{
		Uid: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount,
		WorkloadUid: p.WorkloadUID, Node: p.Node, Addresses: encodeAll(p.Addrs, encodeAddr),
		Enrolled: p.Enrolled, Reason: p.Reason, Strict: p.Strict, HostNetwork: p.HostNetwork,
		State: node.LocalPod_State(p.State), Selected: node.LocalPod_Selected(p.Selected),
		DnsCapture: node.LocalPod_DNSCapture(p.DNSCapture),
	}
}

// DecodeLocalPod reads a pod.
func DecodeLocalPod(p *node.LocalPod) (LocalPod, error) {
	d := LocalPod{
		UID: p.GetUid(), Namespace: p.GetNamespace(), Name: p.GetName(), ServiceAccount: p.GetServiceAccount(),
		WorkloadUID: p.GetWorkloadUid(), Node: p.GetNode(),
		Enrolled: p.GetEnrolled(), Reason: p.GetReason(), Strict: p.GetStrict(), HostNetwork: p.GetHostNetwork(),
	}
	if d.UID == "" || d.Namespace == "" || d.Name == "" {
		return LocalPod{}, bad("a pod without uid, namespace or name")
	}
	if p.State < 0 || p.State > node.LocalPod_STATE_FINISHED {
		return LocalPod{}, bad("the pod %s/%s has the state %d", d.Namespace, d.Name, p.State)
	}
	d.State = PodState(p.State)
	if p.Selected > 0 && p.Selected <= node.LocalPod_SELECTED_YES { // else of a later version: not known
		d.Selected = Selected(p.Selected)
	}
	if p.DnsCapture > 0 && p.DnsCapture <= node.LocalPod_DNS_CAPTURE_ON { // likewise
		d.DNSCapture = mesh.DNSCapture(p.DnsCapture)
	}
	var err error
	d.Addrs, err = decodeAll(p.Addresses, decodeAddr)
	return d, err
}

// EncodeNamespace writes a namespace; its resource name is its name.
func EncodeNamespace(name string, enrolled bool) *node.Namespace {
	return &node.Namespace{Name: name, Enrolled: enrolled}
}

// DecodeNamespace reads a namespace.
func DecodeNamespace(p *node.Namespace) (name string, enrolled bool, err error) {
	if p.GetName() == "" {
		return "", false, bad("a namespace without a name")
	}
	return p.Name, p.Enrolled, nil
}

// EncodeConfig writes the mesh-wide settings; the resource name is MeshConfigName.
func EncodeConfig(c mesh.Config) *node.MeshConfig {
	outbound := node.MeshConfig_OUTBOUND_ALLOW_ANY
	if c.RegistryOnly {
		outbound = node.MeshConfig_OUTBOUND_REGISTRY_ONLY
	}
	return &node.MeshConfig{
		TrustDomain: c.TrustDomain, TrustDomainAliases: c.TrustDomainAliases,
		ClusterId: c.Cluster, ClusterDomain: c.ClusterDomain, Network: c.Network,
		RootNamespace: c.RootNamespace, Revision: c.ControlRevision,
		SameNode: node.MeshConfig_SameNode(c.SameNode), UdpNamespaces: c.UDPNamespaces, Outbound: outbound,
	}
}

// DecodeConfig reads the mesh-wide settings.
func DecodeConfig(p *node.MeshConfig) (mesh.Config, error) {
	c := mesh.Config{
		TrustDomain: p.GetTrustDomain(), TrustDomainAliases: p.GetTrustDomainAliases(),
		Cluster: p.GetClusterId(), ClusterDomain: p.GetClusterDomain(), Network: p.GetNetwork(),
		RootNamespace: p.GetRootNamespace(), ControlRevision: p.GetRevision(),
		RegistryOnly: p.GetOutbound() != node.MeshConfig_OUTBOUND_ALLOW_ANY, // also of a later version: the safe one
	}
	if len(c.TrustDomainAliases) == 0 {
		c.TrustDomainAliases = nil
	}
	if len(p.GetUdpNamespaces()) > 0 {
		c.UDPNamespaces = slices.Compact(slices.Sorted(slices.Values(p.UdpNamespaces)))
	}
	if c.TrustDomain == "" {
		return mesh.Config{}, bad("the mesh has no trust domain")
	}
	switch p.SameNode {
	case node.MeshConfig_SAME_NODE_UNSPECIFIED, node.MeshConfig_SAME_NODE_KERNEL, node.MeshConfig_SAME_NODE_ENCRYPT:
		c.SameNode = mesh.SameNode(p.SameNode)
	default:
		c.SameNode = mesh.SameNodeEncrypt // of a later version: the safe one
	}
	return c, nil
}

package xds

import (
	"cmp"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// Node is who the agent says it is.
type Node struct {
	Name           string // of the Kubernetes node
	Pod            string // the agent's own pod
	Namespace      string
	ServiceAccount string
	IP             netip.Addr
	Cluster        string
	ClusterDomain  string // empty: cluster.local
	Network        string
	Version        string
}

func (n Node) domain() string { return cmp.Or(n.ClusterDomain, "cluster.local") }

func (n Node) metadata() *structpb.Struct {
	fields := map[string]*structpb.Value{
		"INSTANCE_IPS": structpb.NewStringValue(n.IP.String()),
	}
	for key, value := range map[string]string{
		"NAME": n.Pod, "NAMESPACE": n.Namespace, "SERVICE_ACCOUNT": n.ServiceAccount, "NODE_NAME": n.Name,
		"CLUSTER_ID": n.Cluster, "NETWORK": n.Network, "WARREN_VERSION": n.Version,
	} {
		if value != "" {
			fields[key] = structpb.NewStringValue(value)
		}
	}
	return &structpb.Struct{Fields: fields}
}

// derivePods makes LocalPod records of the workloads on a node, for a control plane that has none: what has a
// tunnel of ours is enrolled. The pods' own UIDs are not known.
func derivePods(s *mesh.Snapshot, node string) []wds.LocalPod {
	var pods []wds.LocalPod
	for w := range s.WorkloadsOn(node) {
		p := wds.LocalPod{
			Namespace: w.Namespace, Name: w.Name, ServiceAccount: w.Identity.ServiceAccount,
			WorkloadUID: w.UID, Node: w.Node, Addrs: w.Addrs, HostNetwork: w.HostNetwork, State: wds.PodRunning,
		}
		switch {
		case w.HostNetwork:
			p.Reason = "host-network"
		case w.NativeTunnel:
			p.Reason = "native-tunnel"
		case w.Tunnel == mesh.TunnelHBONE:
			p.Enrolled, p.Reason = true, "workload"
		default:
			p.Reason = "not-in-mesh"
		}
		pods = append(pods, p)
	}
	return pods
}

func comparePods(a, b wds.LocalPod) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), strings.Compare(a.UID, b.UID))
}

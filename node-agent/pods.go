package nodeagent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll"
	"github.com/warrenmesh/warren/node-agent/proxy"
	"github.com/warrenmesh/warren/node-agent/xds"
)

// acceptor lets enrolment hand pods to the proxy.
type acceptor struct {
	proxy   *proxy.Proxy
	network func() string
}

// AddPod begins to accept a pod's connections. The listeners stay the caller's.
func (a acceptor) AddPod(p enroll.Pod, l datapath.Listeners) (enroll.Accepting, error) {
	var ls proxy.Listeners
	for _, x := range []struct {
		file *os.File
		to   *[]net.Listener
		role string
	}{{l.Outbound, &ls.Outbound, "outbound"}, {l.Inbound, &ls.Inbound, "plaintext"}, {l.HBONE, &ls.HBONE, "HBONE"}} {
		ln, err := net.FileListener(x.file)
		if err != nil {
			ls.Close()
			return nil, fmt.Errorf("%s listener of pod %s/%s: %w", x.role, p.Namespace, p.Name, err)
		}
		*x.to = append(*x.to, ln)
	}
	h, err := a.proxy.AddPod(proxy.Pod{
		UID: p.UID, WorkloadUID: p.WorkloadUID, Identity: p.Identity, Network: a.network(), Addrs: p.Addrs, NetNS: p.NetNS,
	}, ls)
	if err != nil {
		ls.Close()
		return nil, err
	}
	return h, nil
}

// setPods tells enrolment what the control plane says about this node's pods.
func (a *agent) setPods(ps xds.LocalPods) {
	snapshot := a.store.Load()
	local := make([]enroll.LocalPod, 0, len(ps.Pods))
	namespaces := map[string]bool{}
	selected := map[string]bool{}
	for _, p := range ps.Pods {
		id := mesh.Identity{TrustDomain: snapshot.Config().TrustDomain, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount}
		if w := snapshot.Workload(p.WorkloadUID); w != nil {
			id = w.Identity
		}
		local = append(local, enroll.LocalPod{
			UID: p.UID, Namespace: p.Namespace, Name: p.Name, WorkloadUID: p.WorkloadUID, Identity: id, Addrs: p.Addrs,
			Enrolled: p.Enrolled, Reason: p.Reason, Strict: p.Strict, HostNetwork: p.HostNetwork, Finished: p.State == wds.PodFinished,
			DNSCapture: p.DNSCapture.On(a.cfg.DNSCapture),
		})
		if p.Selected != wds.SelectedUnknown {
			selected[p.UID] = p.Selected == wds.SelectedYes
		}
		namespaces[p.Namespace] = namespaces[p.Namespace] || p.Enrolled
	}
	a.registry.SetPods(local, ps.Live)
	if err := a.datapath.SetSelected(selected); err != nil && !errors.Is(err, datapath.ErrYielded) {
		a.cfg.Log.Error("choosing the ways of direct connections", "error", err)
	}
	if ps.Derived { // nor does such a control plane say anything about namespaces
		a.setNamespaces(namespaces)
	}
}

func (a *agent) setNamespaces(namespaces map[string]bool) {
	if err := a.registry.SetNamespaces(namespaces); err != nil {
		a.cfg.Log.Error("writing down which namespaces are enrolled", "error", err)
	}
}

var redirections = map[enroll.Redirection]xds.Redirection{
	enroll.Enabled: xds.RedirectionEnabled, enroll.Pending: xds.RedirectionPending, enroll.Disabled: xds.RedirectionDisabled,
}

// reportPods takes the truth about the pods back to the control plane.
func (a *agent) reportPods(statuses []enroll.PodStatus) {
	out := make([]xds.PodStatus, 0, len(statuses))
	for _, s := range statuses {
		out = append(out, xds.PodStatus{UID: s.UID, Namespace: s.Namespace, Name: s.Name,
			Redirection: redirections[s.Redirection], Reason: s.Reason, OpenConnections: s.OpenConnections})
	}
	a.xds.ReportPods(out)
}

// awaitState keeps the agent from being ready until it knows the mesh.
func (a *agent) awaitState(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-a.xds.Synced():
		a.found("state")
	}
	return nil
}

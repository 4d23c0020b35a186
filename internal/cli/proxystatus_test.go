package cli

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestProxyStatus(t *testing.T) {
	s := newSite(t, pod("istio-system", "warren-control-a", "node1", map[string]string{"app": "istiod"}, nil),
		pod("istio-system", "warren-node-a", "node1", map[string]string{"app": "ztunnel"}, nil), pod("istio-system", "warren-node-b", "node2", map[string]string{"app": "ztunnel"}, nil),
		pod("istio-system", "warren-node-c", "node3", map[string]string{"app": "ztunnel"}, nil),
		pod("shop", "way-1", "node1", map[string]string{gatewayLabel: "way"}, nil))
	s.ask = func(_ context.Context, p *corev1.Pod, port int, path string) ([]byte, error) {
		if p.Name != "warren-control-a" || port != monitoringPort || path != "/debug/syncz" {
			return nil, fmt.Errorf("unexpected question %s to port %d of %s", path, port, p.Name)
		}
		return []byte(`[{"proxy":"node1","type":"node","states":{"Address":"SYNCED","Authorization":"SYNCED"}},
			{"proxy":"node2","type":"node","states":{"Address":"STALE","Authorization":"REFUSED"},"trouble":"Authorization shop/x: too large"},
			{"proxy":"way-1","namespace":"shop","waypoint":"way","type":"waypoint","states":{"listener":"SYNCED","route":"STALE"}}]`), nil
	}
	session(t, "testdata/proxy-status.txtar", s.run)
}

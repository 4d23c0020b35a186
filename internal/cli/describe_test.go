package cli

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// held is what every node of the tests holds: a shop whose ui may ask the catalog, which is behind a waypoint.
func held(t *testing.T) []byte {
	t.Helper()
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local", RootNamespace: "istio-system"})
	way := mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	service := func(name, vip string, waypoint *mesh.Gateway) mesh.ServiceName {
		n := mesh.ServiceName{Namespace: "shop", Hostname: name + ".shop.svc.cluster.local"}
		b.PutService(&mesh.Service{Name: n, Short: name, VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr(vip)}}, Ports: []mesh.ServicePort{{Port: 80, Target: 8080}}, Waypoint: waypoint})
		return n
	}
	catalog := service("catalog", "10.96.0.7", &mesh.Gateway{Service: way, HBONEPort: 15008})
	service("way", "10.96.0.8", nil)
	put := func(name, addr, node string, healthy bool, policies []mesh.PolicyName, services ...mesh.ServiceName) {
		w := &mesh.Workload{UID: "Kubernetes//Pod/shop/" + name, Name: name, Namespace: "shop", Addrs: []netip.Addr{netip.MustParseAddr(addr)}, Node: node, Healthy: healthy,
			Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: name}, Tunnel: mesh.TunnelHBONE, Policies: policies, Services: map[mesh.ServiceName][]mesh.ServicePort{}}
		for _, s := range services {
			w.Services[s] = []mesh.ServicePort{{Port: 80, Target: 8080}}
		}
		b.PutWorkload(w)
	}
	allow := mesh.PolicyName{Namespace: "shop", Name: "allow-ui"}
	b.PutPolicy(&mesh.Policy{Name: allow, Scope: mesh.ScopeWorkload, Action: mesh.Allow, Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{
		{Principals: []mesh.StringMatch{{Value: "cluster.local/ns/shop/sa/ui"}}}}}}}}})
	b.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "trial"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, DryRun: true, Rules: []mesh.Rule{{}}})
	put("ui", "10.1.0.5", "node1", true, nil)
	put("catalog-1", "10.1.0.6", "node1", true, []mesh.PolicyName{allow}, catalog)
	put("catalog-2", "10.1.1.6", "node2", false, []mesh.PolicyName{allow, {Namespace: "shop", Name: "gone"}}, catalog)
	out, err := wds.EncodeSnapshot(b.Commit(1))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// asked is a site whose agents and Envoys answer.
func asked(t *testing.T) *site {
	t.Helper()
	s := newSite(t, pod("istio-system", "warren-node-a", "node1", map[string]string{"app": "ztunnel"}, nil), pod("istio-system", "warren-node-b", "node2", map[string]string{"app": "ztunnel"}, nil),
		pod("shop", "ui", "node1", nil, nil), pod("shop", "catalog-1", "node1", nil, nil), pod("shop", "catalog-2", "node2", nil, nil),
		pod("shop", "way-1", "node1", map[string]string{gatewayLabel: "way"}, nil))
	state := held(t)
	files := map[string]string{"/config_dump?resource=dynamic_listeners": "listeners", "/config_dump?resource=dynamic_route_configs": "routes", "/clusters?format=json": "clusters"}
	s.ask = func(_ context.Context, p *corev1.Pod, port int, path string) ([]byte, error) {
		switch {
		case p.Name == "way-1" && port == adminPort && files[path] != "":
			return os.ReadFile("envoy/testdata/" + files[path] + ".json")
		case p.Labels["app"] == "ztunnel" && path == "/debug/mesh":
			return state, nil
		case p.Labels["app"] == "ztunnel" && path == "/config_dump":
			var pods, certs []string
			for _, w := range map[string][]string{"node1": {"ui", "catalog-1"}, "node2": {"catalog-2"}}[p.Spec.NodeName] {
				pods = append(pods, fmt.Sprintf(`"uid-of-%s":{"state":"Up","info":{"name":%[1]q,"namespace":"shop"}}`, w))
				if w != "catalog-2" {
					certs = append(certs, fmt.Sprintf(`{"identity":"spiffe://cluster.local/ns/shop/sa/%s","state":"Available"}`, w))
				}
			}
			return fmt.Appendf(nil, `{"workloadState":{%s},"certificates":[%s]}`, strings.Join(pods, ","), strings.Join(certs, ",")), nil
		}
		return nil, fmt.Errorf("unexpected question %s to port %d of %s", path, port, p.Name)
	}
	return s
}

func TestDescribe(t *testing.T) { session(t, "testdata/describe.txtar", asked(t).run) }

func TestProxyConfig(t *testing.T) { session(t, "testdata/proxy-config.txtar", asked(t).run) }

func TestAuthzTest(t *testing.T) { session(t, "testdata/authz.txtar", asked(t).run) }

package wds

import (
	"errors"
	"net/netip"
	"reflect"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/internal/mesh"
)

func marshalled(f *testing.F, ms ...proto.Message) {
	for _, m := range ms {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
}

// refused: every error is ErrResource and comes with nothing.
func refused(t *testing.T, err error, nothing bool) bool {
	t.Helper()
	if err == nil {
		return false
	}
	if !errors.Is(err, ErrResource) || !nothing {
		t.Errorf("the error %v, with a value: %v", err, !nothing)
	}
	return true
}

func FuzzAddress(f *testing.F) {
	w := &mesh.Workload{UID: "Kubernetes//Pod/shop/ui", Name: "ui", Namespace: "shop", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Healthy: true,
		Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}, Tunnel: mesh.TunnelHBONE,
		Policies: []mesh.PolicyName{{Namespace: "shop", Name: "allow"}},
		Services: map[mesh.ServiceName][]mesh.ServicePort{{Namespace: "shop", Hostname: "ui.shop.svc"}: {{Port: 80, Target: 8080}}}}
	s := &mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc"}, Ports: []mesh.ServicePort{{Port: 80}},
		VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.1")}}, VIPNets: []mesh.NetPrefix{{Prefix: netip.MustParsePrefix("fd00::/64")}},
		Waypoint: &mesh.Gateway{Service: mesh.ServiceName{Namespace: "shop", Hostname: "waypoint"}, HBONEPort: 15008}}
	marshalled(f, EncodeWorkload(w), EncodeService(s), &workload.Address{},
		&workload.Address{Type: &workload.Address_Workload{Workload: &workload.Workload{Uid: "a", ServiceAccount: "..", AuthorizationPolicies: []string{"a/b/c"}}}},
		&workload.Address{Type: &workload.Address_Service{Service: &workload.Service{Namespace: "a", Hostname: "b", Addresses: []*workload.NetworkAddress{{Address: make([]byte, 5)}}}}})
	f.Fuzz(func(t *testing.T, data []byte) {
		var m workload.Address
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		w, s, err := DecodeAddress(&m)
		if refused(t, err, w == nil && s == nil) {
			return
		}
		if (w == nil) == (s == nil) {
			t.Fatal("neither workload nor service, or both")
		}
		if w != nil {
			if _, err := mesh.ParseIdentity(w.Identity.String()); !w.Identity.IsZero() && err != nil {
				t.Errorf("a workload with the identity %q", w.Identity)
			}
			again, _, err := DecodeAddress(EncodeWorkload(w))
			if err != nil || !again.Equal(w) {
				t.Errorf("got %+v (%v)\nwant %+v", again, err, w)
			}
			return
		}
		_, again, err := DecodeAddress(EncodeService(s))
		if err != nil || !again.Equal(s) {
			t.Errorf("got %+v (%v)\nwant %+v", again, err, s)
		}
	})
}

// FuzzAuthorization: what is decoded is encoded back as it was, what is not decoded denies, and nothing that was
// in the message is left out of the decision.
func FuzzAuthorization(f *testing.F) {
	str := &security.StringMatch{MatchType: &security.StringMatch_Exact{Exact: "shop"}}
	rule := func(m *security.Match) []*security.Group {
		return []*security.Group{{Rules: []*security.Rules{{Matches: []*security.Match{m}}}}}
	}
	later := &security.Match{Namespaces: []*security.StringMatch{str}}
	later.ProtoReflect().SetUnknown([]byte{0xfa, 0x01, 0x01, 'x'}) // field 31, of a later version
	marshalled(f,
		&security.Authorization{Name: "a", Namespace: "shop", Action: security.Action_ALLOW, Scope: security.Scope_NAMESPACE, Groups: rule(&security.Match{Namespaces: []*security.StringMatch{str}, DestinationPorts: []uint32{80}})},
		&security.Authorization{Name: "a", Action: security.Action_DENY, Groups: rule(&security.Match{NotPrincipals: []*security.StringMatch{{MatchType: &security.StringMatch_Presence{}}}, SourceIps: []*security.Address{{Address: []byte{10, 0, 0, 0}, Length: 8}}})},
		&security.Authorization{Name: "a", Namespace: "shop", Action: 9}, &security.Authorization{Name: "a", Namespace: "shop", Scope: 9},
		&security.Authorization{Name: "a", Namespace: "shop", DryRun: true, Groups: rule(&security.Match{DestinationPorts: []uint32{70000}})},
		&security.Authorization{Name: "a", Namespace: "shop", Groups: rule(&security.Match{NotSourceIps: []*security.Address{{Address: []byte{1}, Length: 200}}})},
		&security.Authorization{Name: "a", Namespace: "shop", Groups: rule(&security.Match{Namespaces: []*security.StringMatch{{}}})},
		&security.Authorization{Name: "a", Namespace: "shop", Groups: rule(later)},
	)
	f.Fuzz(func(t *testing.T, data []byte) {
		var m security.Authorization
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		p, err := DecodePolicy(&m)
		if err != nil {
			if !errors.Is(err, ErrResource) {
				t.Error(err)
			}
			if p != nil && (p.Action != mesh.Deny || !p.Matches(mesh.Conn{}) || p.Name.Name != m.Name || p.DryRun != m.DryRun) {
				t.Errorf("what cannot be decoded (%v) becomes %+v", err, p)
			}
			return
		}
		wire, err := EncodePolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodePolicy(wire)
		if err != nil || !again.Equal(p) {
			t.Errorf("got %+v (%v)\nwant %+v", again, err, p)
		}
		if got, want := parts(&m), parts(wire); got != want {
			t.Errorf("the message has %d parts, the policy %d: %+v", got, want, p)
		}
		audit := *p
		audit.Action, audit.DryRun = mesh.Audit, false
		a, err := EncodeAudit(&audit)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeAudit(a); err != nil || !got.Equal(&audit) {
			t.Errorf("audit: got %+v (%v)", got, err)
		}
	})
}

// parts counts what takes part in the decision.
func parts(a *security.Authorization) (n int) {
	for _, g := range a.Groups {
		n++
		for _, r := range g.Rules {
			n++
			for _, m := range r.Matches {
				n += 1 + len(m.Namespaces) + len(m.NotNamespaces) + len(m.Principals) + len(m.NotPrincipals) + len(m.ServiceAccounts) + len(m.NotServiceAccounts) +
					len(m.SourceIps) + len(m.NotSourceIps) + len(m.DestinationIps) + len(m.NotDestinationIps) + len(m.DestinationPorts) + len(m.NotDestinationPorts)
				n += len(m.ProtoReflect().GetUnknown())
			}
		}
	}
	return n
}

// FuzzNodeResources: Warren's own types.
func FuzzNodeResources(f *testing.F) {
	marshalled(f, EncodeLocalPod(LocalPod{UID: "u", Namespace: "shop", Name: "ui", ServiceAccount: "ui", Node: "n", Addrs: []netip.Addr{netip.MustParseAddr("fd00::1")},
		Enrolled: true, Strict: true, State: PodRunning}), &node.LocalPod{Uid: "u", State: 99}, &node.LocalPod{Uid: "u", Namespace: "a", Name: "b", Addresses: [][]byte{{1}}},
		EncodeNamespace("shop", true), EncodeConfig(mesh.Config{TrustDomain: "cluster.local", TrustDomainAliases: []string{"old"}, RootNamespace: "istio-system", UDPNamespaces: []string{"shop"}}),
		&node.MeshConfig{SameNode: 77, TrustDomain: "a"})
	f.Fuzz(func(t *testing.T, data []byte) {
		var pod node.LocalPod
		if proto.Unmarshal(data, &pod) == nil {
			if p, err := DecodeLocalPod(&pod); !refused(t, err, true) {
				if again, err := DecodeLocalPod(EncodeLocalPod(p)); err != nil || !reflect.DeepEqual(again, p) {
					t.Errorf("got %+v (%v)\nwant %+v", again, err, p)
				}
				if p.UID == "" || p.Namespace == "" || p.Name == "" {
					t.Errorf("a pod without a name: %+v", p)
				}
			}
		}
		var ns node.Namespace
		if proto.Unmarshal(data, &ns) == nil {
			if name, enrolled, err := DecodeNamespace(&ns); !refused(t, err, name == "" && !enrolled) {
				if n, e, err := DecodeNamespace(EncodeNamespace(name, enrolled)); err != nil || n != name || e != enrolled {
					t.Errorf("%q %v becomes %q %v (%v)", name, enrolled, n, e, err)
				}
			}
		}
		var cfg node.MeshConfig
		if proto.Unmarshal(data, &cfg) == nil {
			if c, err := DecodeConfig(&cfg); !refused(t, err, c.Equal(mesh.Config{})) {
				if again, err := DecodeConfig(EncodeConfig(c)); err != nil || !again.Equal(c) {
					t.Errorf("got %+v (%v)\nwant %+v", again, err, c)
				}
				if cfg.SameNode != node.MeshConfig_SAME_NODE_KERNEL && c.SameNode == mesh.SameNode(node.MeshConfig_SAME_NODE_KERNEL) {
					t.Error("plaintext on a node that nobody asked for")
				}
			}
		}
	})
}

func FuzzNames(f *testing.F) {
	for _, s := range []string{"shop/ui.shop.svc", "/allow", "shop/allow", "a/b/c", "/", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseServiceName(s); !refused(t, err, n == mesh.ServiceName{}) && n.String() != s {
			t.Errorf("%q is read as %q", s, n)
		}
		if n, err := ParsePolicyName(s); !refused(t, err, n == mesh.PolicyName{}) && n.String() != s {
			t.Errorf("%q is read as %q", s, n)
		}
	})
}

package wds

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/internal/mesh"
)

// gen draws domain values.
type gen struct{ *rapid.T }

func (g gen) n(most int) int { return rapid.IntRange(0, most).Draw(g.T, "n") }
func (g gen) yes() bool      { return rapid.Bool().Draw(g.T, "yes") }

func (g gen) word() string {
	return rapid.StringMatching(`[a-z][a-z0-9.-]{0,8}`).Draw(g.T, "word")
}

func (g gen) port() uint16 { return rapid.Uint16().Draw(g.T, "port") }

func (g gen) addr() netip.Addr {
	if g.yes() {
		return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(g.T, "v4")))
	}
	return netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(g.T, "v6"))).Unmap()
}

func (g gen) prefix() netip.Prefix {
	a := g.addr()
	p := netip.PrefixFrom(a, g.n(a.BitLen())).Masked()
	return p
}

func some[T any](g gen, most int, one func() T) []T {
	var out []T
	for range g.n(most) {
		out = append(out, one())
	}
	return out
}

func (g gen) service() mesh.ServiceName {
	return mesh.ServiceName{Namespace: g.word(), Hostname: g.word()}
}

func (g gen) servicePort() mesh.ServicePort {
	return mesh.ServicePort{Port: g.port(), Target: g.port(), App: mesh.AppProtocol(g.n(5))}
}

func (g gen) gateway() *mesh.Gateway {
	switch g.n(2) {
	case 0:
		return nil
	case 1:
		return &mesh.Gateway{Service: g.service(), HBONEPort: g.port()}
	default:
		return &mesh.Gateway{Addr: mesh.NetAddr{Network: g.word(), Addr: g.addr()}, HBONEPort: g.port()}
	}
}

func (g gen) workload() *mesh.Workload {
	w := &mesh.Workload{
		UID: g.word(), Name: g.word(), Namespace: g.word(), Cluster: g.word(), Network: g.word(),
		Addrs: some(g, 3, g.addr), Hostname: g.word(),
		Tunnel: mesh.TunnelProtocol(g.n(1)), NativeTunnel: g.yes(), HostNetwork: g.yes(), Node: g.word(), Healthy: g.yes(),
		CanonicalName: g.word(), CanonicalRevision: g.word(), WorkloadName: g.word(), Kind: mesh.WorkloadKind(g.n(3)),
		Locality: mesh.Locality{Region: g.word(), Zone: g.word(), Subzone: g.word()}, Capacity: uint32(g.n(100)),
		Policies: some(g, 2, func() mesh.PolicyName { return mesh.PolicyName{Namespace: g.word(), Name: g.word()} }),
		Audits:   some(g, 2, func() mesh.PolicyName { return mesh.PolicyName{Namespace: g.word(), Name: g.word()} }),
		Waypoint: g.gateway(), NetworkGateway: g.gateway(), AppTunnel: mesh.AppTunnel{Proxy: g.yes(), Port: g.port()},
	}
	w.Identity = mesh.Identity{
		TrustDomain: []string{"cluster.local", "td"}[g.n(1)], Namespace: w.Namespace, ServiceAccount: []string{"default", "sa"}[g.n(1)],
	}
	for range g.n(2) {
		if w.Services == nil {
			w.Services = map[mesh.ServiceName][]mesh.ServicePort{}
		}
		w.Services[g.service()] = some(g, 2, g.servicePort)
	}
	return w
}

func (g gen) meshService() *mesh.Service {
	s := &mesh.Service{
		Name: g.service(), Short: g.word(), Ports: some(g, 3, g.servicePort), SANs: some(g, 2, g.word), Waypoint: g.gateway(),
		IngressUseWaypoint: g.yes(), Canonical: g.yes(),
		VisibleIn: [][]string{nil, {}, {"a", "b"}}[g.n(2)],
		VIPs:      some(g, 3, func() mesh.NetAddr { return mesh.NetAddr{Network: g.word(), Addr: g.addr()} }),
	}
	for range g.n(2) {
		if p := g.prefix(); !p.IsSingleIP() {
			s.VIPNets = append(s.VIPNets, mesh.NetPrefix{Network: g.word(), Prefix: p})
		}
	}
	s.LB = mesh.LoadBalancing{
		Prefer: some(g, 3, func() mesh.LBScope { return mesh.LBScope(g.n(6)) }), Mode: mesh.LBMode(g.n(3)), AllowUnhealthy: g.yes(),
	}
	return s
}

func (g gen) policy() *mesh.Policy {
	p := &mesh.Policy{
		Name: mesh.PolicyName{Namespace: g.word(), Name: g.word()}, Scope: mesh.Scope(g.n(2)), Action: mesh.Action(g.n(2)),
	}
	p.DryRun = p.Action != mesh.Audit && g.yes()
	str := func() mesh.StringMatch {
		k := mesh.StringMatchKind(g.n(3))
		if k == mesh.MatchPresence {
			return mesh.StringMatch{Kind: k}
		}
		return mesh.StringMatch{Kind: k, Value: g.word()}
	}
	sa := func() mesh.ServiceAccountMatch {
		return mesh.ServiceAccountMatch{Namespace: g.word(), ServiceAccount: g.word()}
	}
	p.Rules = some(g, 2, func() mesh.Rule {
		return mesh.Rule{Clauses: some(g, 2, func() mesh.Clause {
			return mesh.Clause{Matches: some(g, 2, func() mesh.Match {
				return mesh.Match{
					Namespaces: some(g, 1, str), NotNamespaces: some(g, 1, str), Principals: some(g, 1, str), NotPrincipals: some(g, 1, str),
					ServiceAccounts: some(g, 1, sa), NotServiceAccounts: some(g, 1, sa),
					SourceIPs: some(g, 1, g.prefix), NotSourceIPs: some(g, 1, g.prefix),
					DestinationIPs: some(g, 1, g.prefix), NotDestinationIPs: some(g, 1, g.prefix),
					DestinationPorts: some(g, 1, g.port), NotDestinationPorts: some(g, 1, g.port),
				}
			})}
		})}
	})
	return p
}

// wire sends a message through its bytes.
func wire[M proto.Message](t rapid.TB, m, into M) M {
	data, err := proto.Marshal(m)
	if err == nil {
		err = proto.Unmarshal(data, into)
	}
	if err != nil {
		t.Fatal(err)
	}
	return into
}

func TestDecodeUndoesEncode(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := gen{t}
		w := g.workload()
		got, _, err := DecodeAddress(wire(t, EncodeWorkload(w), &workload.Address{}))
		if err != nil || !got.Equal(w) {
			t.Fatalf("workload\ngot  %+v (%v)\nwant %+v", got, err, w)
		}
		s := g.meshService()
		_, gotS, err := DecodeAddress(wire(t, EncodeService(s), &workload.Address{}))
		if err != nil || !gotS.Equal(s) {
			t.Fatalf("service\ngot  %+v (%v)\nwant %+v", gotS, err, s)
		}
		p := g.policy()
		gotP, err := throughTheWire(t, p)
		if err != nil || !gotP.Equal(p) {
			t.Fatalf("policy\ngot  %+v (%v)\nwant %+v", gotP, err, p)
		}
		l := LocalPod{
			UID: g.word(), Namespace: g.word(), Name: g.word(), ServiceAccount: g.word(), WorkloadUID: g.word(), Node: g.word(),
			Addrs: some(g, 2, g.addr), Enrolled: g.yes(), Reason: g.word(), Strict: g.yes(), HostNetwork: g.yes(), State: PodState(g.n(4)),
			DNSCapture: mesh.DNSCapture(g.n(2)),
		}
		gotL, err := DecodeLocalPod(wire(t, EncodeLocalPod(l), &node.LocalPod{}))
		if err != nil || fmt.Sprint(gotL) != fmt.Sprint(l) {
			t.Fatalf("pod\ngot  %+v (%v)\nwant %+v", gotL, err, l)
		}
		c := mesh.Config{
			TrustDomain: g.word(), TrustDomainAliases: some(g, 2, g.word), Cluster: g.word(), ClusterDomain: g.word(),
			Network: g.word(), RootNamespace: g.word(), ControlRevision: g.word(), SameNode: mesh.SameNode(g.n(2)),
			UDPNamespaces: slices.Compact(slices.Sorted(slices.Values(some(g, 2, g.word)))),
			RegistryOnly:  g.yes(),
		}
		gotC, err := DecodeConfig(wire(t, EncodeConfig(c), &node.MeshConfig{}))
		if err != nil || !gotC.Equal(c) {
			t.Fatalf("config\ngot  %+v (%v)\nwant %+v", gotC, err, c)
		}
	})
}

// A Snapshot that went through its wire form has the same in it.
func TestSnapshotIsReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := gen{t}
		b := mesh.NewBuilder(nil)
		b.SetConfig(mesh.Config{TrustDomain: "td", Network: g.word()})
		for range g.n(4) {
			b.PutWorkload(g.workload())
			b.PutService(g.meshService())
			p := g.policy()
			if p.Action == mesh.Audit {
				p.DryRun = false
			}
			b.PutPolicy(p)
		}
		want := b.Commit(uint64(1 + g.n(9)))
		data, err := EncodeSnapshot(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeSnapshot(data)
		if err != nil {
			t.Fatal(err)
		}
		workloads, services, policies := got.Changes(want)
		for c := range workloads {
			if c.Old == nil || c.New == nil || !c.Old.Equal(c.New) {
				t.Errorf("workload %+v became %+v", c.Old, c.New)
			}
		}
		for c := range services {
			if c.Old == nil || c.New == nil || !c.Old.Equal(c.New) {
				t.Errorf("service %+v became %+v", c.Old, c.New)
			}
		}
		for c := range policies {
			if c.Old == nil || c.New == nil || !c.Old.Equal(c.New) {
				t.Errorf("policy %+v became %+v", c.Old, c.New)
			}
		}
		if got.Revision() != want.Revision() || !got.Config().Equal(want.Config()) {
			t.Errorf("revision %d, %+v", got.Revision(), got.Config())
		}
	})
	if s, err := DecodeSnapshot([]byte("{}")); err != nil || s.Revision() != 0 {
		t.Errorf("of a node that knows nothing yet: %v", err)
	}
	for _, data := range []string{"", "[]", `{"revision":1,"addresses":["/w=="]}`, `{"revision":1,"config":""}`} {
		if _, err := DecodeSnapshot([]byte(data)); !errors.Is(err, ErrResource) {
			t.Errorf("%q: %v", data, err)
		}
	}
}

func throughTheWire(t rapid.TB, p *mesh.Policy) (*mesh.Policy, error) {
	if p.Action == mesh.Audit {
		m, err := EncodeAudit(p)
		if err != nil {
			t.Fatal(err)
		}
		return DecodeAudit(wire(t, m, &node.AuditPolicy{}))
	}
	m, err := EncodePolicy(p)
	if err != nil {
		t.Fatal(err)
	}
	return DecodePolicy(wire(t, m, &security.Authorization{}))
}

// Istio's contract has no action AUDIT: an agent that got such a policy as another would act on it.
func TestAuditIsNoAuthorization(t *testing.T) {
	for _, action := range []mesh.Action{mesh.Audit, mesh.Audit + 1} {
		if m, err := EncodePolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "a"}, Action: action}); err == nil {
			t.Errorf("the action %d is sent as %v", action, m)
		}
	}
	if m, err := EncodeAudit(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "a"}}); err == nil {
		t.Errorf("an ALLOW policy is sent as %v", m)
	}
	for _, name := range EncodeWorkload(&mesh.Workload{Audits: []mesh.PolicyName{{Namespace: "shop", Name: "a"}}}).GetWorkload().AuthorizationPolicies {
		t.Errorf("the workload names %s among the policies that decide", name)
	}
}

func TestWhatIsRefused(t *testing.T) {
	w := func(f func(*workload.Workload)) *workload.Address {
		p := &workload.Workload{Uid: "u", Namespace: "shop"}
		f(p)
		return &workload.Address{Type: &workload.Address_Workload{Workload: p}}
	}
	s := func(f func(*workload.Service)) *workload.Address {
		p := &workload.Service{Namespace: "shop", Hostname: "h"}
		f(p)
		return &workload.Address{Type: &workload.Address_Service{Service: p}}
	}
	long := uint32(33)
	for name, a := range map[string]*workload.Address{
		"neither":                      {},
		"nil workload":                 {Type: &workload.Address_Workload{}},
		"no uid":                       w(func(p *workload.Workload) { p.Uid = "" }),
		"address of 5 bytes":           w(func(p *workload.Workload) { p.Addresses = [][]byte{make([]byte, 5)} }),
		"tunnel of a later version":    w(func(p *workload.Workload) { p.TunnelProtocol = 9 }),
		"status of a later version":    w(func(p *workload.Workload) { p.Status = 9 }),
		"mode of a later version":      w(func(p *workload.Workload) { p.NetworkMode = 9 }),
		"service key":                  w(func(p *workload.Workload) { p.Services = map[string]*workload.PortList{"x": nil} }),
		"policy key":                   w(func(p *workload.Workload) { p.AuthorizationPolicies = []string{"x"} }),
		"gateway to nowhere":           w(func(p *workload.Workload) { p.Waypoint = &workload.GatewayAddress{} }),
		"slash in the service account": w(func(p *workload.Workload) { p.ServiceAccount = "a/b" }),
		"service without a hostname":   s(func(p *workload.Service) { p.Hostname = "" }),
		"port 65536":                   s(func(p *workload.Service) { p.Ports = []*workload.Port{{ServicePort: 65536}} }),
		"prefix of 33 bits": s(func(p *workload.Service) {
			p.Addresses = []*workload.NetworkAddress{{Address: make([]byte, 4), Length: &long}}
		}),
		"load balancing of a later one": s(func(p *workload.Service) { p.LoadBalancing = &workload.LoadBalancing{Mode: 9} }),
	} {
		if _, _, err := DecodeAddress(a); !errors.Is(err, ErrResource) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What a policy says that this version does not understand must not open anything.
func TestPolicyThatIsNotUnderstoodDenies(t *testing.T) {
	p, err := DecodePolicy(&security.Authorization{
		Name: "p", Namespace: "shop", Scope: security.Scope_NAMESPACE,
		Groups: []*security.Group{{Rules: []*security.Rules{{Matches: []*security.Match{{Principals: []*security.StringMatch{{}}}}}}}},
	})
	if !errors.Is(err, ErrResource) || p == nil || p.Action != mesh.Deny || p.Scope != mesh.ScopeNamespace || !p.Matches(mesh.Conn{}) {
		t.Errorf("got %+v, %v", p, err)
	}
}

func FuzzDecode(f *testing.F) {
	seed := func(m proto.Message) {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	rapid.Check(f, func(t *rapid.T) {
		g := gen{t}
		seed(EncodeWorkload(g.workload()))
		seed(EncodeService(g.meshService()))
		p := g.policy()
		if p.Action == mesh.Audit {
			m, err := EncodeAudit(p)
			if err != nil {
				t.Fatal(err)
			}
			seed(m)
			return
		}
		m, err := EncodePolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		seed(m)
	})
	f.Fuzz(func(t *testing.T, data []byte) {
		var a workload.Address
		if proto.Unmarshal(data, &a) == nil {
			w, s, err := DecodeAddress(&a)
			switch {
			case err != nil && !errors.Is(err, ErrResource):
				t.Fatal(err)
			case err == nil && w != nil:
				again, _, err := DecodeAddress(EncodeWorkload(w))
				if w.Namespace != "" && (err != nil || !again.Equal(w)) {
					t.Fatalf("%+v becomes %+v (%v)", w, again, err)
				}
			case err == nil:
				_, again, err := DecodeAddress(EncodeService(s))
				if err != nil || !again.Equal(s) && len(s.VIPNets) == 0 {
					t.Fatalf("%+v becomes %+v (%v)", s, again, err)
				}
			}
		}
		var p security.Authorization
		if proto.Unmarshal(data, &p) == nil {
			d, err := DecodePolicy(&p)
			if err != nil {
				if d != nil && d.Action != mesh.Deny {
					t.Fatalf("a policy that is not understood has the action %d", d.Action)
				}
				return
			}
			m, err := EncodePolicy(d)
			if err != nil {
				t.Fatal(err)
			}
			if again, err := DecodePolicy(m); err != nil || !again.Equal(d) {
				t.Fatalf("%+v becomes %+v (%v)", d, again, err)
			}
		}
		var audit node.AuditPolicy
		if proto.Unmarshal(data, &audit) == nil {
			if d, err := DecodeAudit(&audit); err == nil && (d.Action != mesh.Audit || d.DryRun) {
				t.Fatalf("an audit policy has the action %d", d.Action)
			}
		}
		var l node.LocalPod
		if proto.Unmarshal(data, &l) == nil {
			_, _ = DecodeLocalPod(&l)
		}
	})
}

func TestNames(t *testing.T) {
	for _, s := range []string{"", "x", "/h", "ns/", "a/b/c", "c//Pod/ns/name"} {
		if n, err := ParseServiceName(s); err == nil {
			t.Errorf("%q is the service %s", s, n)
		}
	}
	n, err := ParsePolicyName("istio-system/istio_converted_static_strict")
	if err != nil || !slices.Equal([]string{n.Namespace, n.Name}, []string{"istio-system", "istio_converted_static_strict"}) {
		t.Errorf("got %v, %v", n, err)
	}
}

// What pods may reach outside is not opened by a word of a later version.
func TestOutboundOfALaterVersion(t *testing.T) {
	for mode, want := range map[node.MeshConfig_Outbound]bool{node.MeshConfig_OUTBOUND_ALLOW_ANY: false, node.MeshConfig_OUTBOUND_REGISTRY_ONLY: true, 9: true} {
		if c, err := DecodeConfig(&node.MeshConfig{TrustDomain: "td", Outbound: mode}); err != nil || c.RegistryOnly != want {
			t.Errorf("%v: %t, %v", mode, c.RegistryOnly, err)
		}
	}
}

package policy

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"testing"

	securityv1beta1 "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// probes are connections of all kinds.
func probes() (out []mesh.Conn) {
	for _, id := range []mesh.Identity{{}, {TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "ui"}, {TrustDomain: "old.domain", Namespace: "other", ServiceAccount: "default"}} {
		for _, src := range []string{"10.0.0.1", "fd00::1", "192.168.7.7"} {
			for _, port := range []uint16{80, 8443} {
				out = append(out, mesh.Conn{Source: id, SourceIP: netip.MustParseAddr(src), Dst: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), port), Plaintext: id.IsZero()})
			}
		}
	}
	return out
}

func matches(p *mesh.Policy) (n int) {
	for _, c := range probes() {
		if p.Matches(c) {
			n++
		}
	}
	return n
}

// visible reports whether a rule has a condition that nodes see, and whether it has one that they do not.
func visible(r *securityv1beta1.Rule) (l4, http bool) {
	for _, f := range r.From {
		s := f.GetSource()
		l4 = l4 || len(s.GetPrincipals())+len(s.GetNotPrincipals())+len(s.GetNamespaces())+len(s.GetNotNamespaces())+len(s.GetIpBlocks())+len(s.GetNotIpBlocks())+
			len(s.GetServiceAccounts())+len(s.GetNotServiceAccounts())+len(s.GetTrustDomains())+len(s.GetNotTrustDomains()) > 0
		http = http || len(s.GetRequestPrincipals())+len(s.GetNotRequestPrincipals())+len(s.GetRemoteIpBlocks())+len(s.GetNotRemoteIpBlocks()) > 0
	}
	for _, t := range r.To {
		o := t.GetOperation()
		l4 = l4 || len(o.GetPorts())+len(o.GetNotPorts()) > 0
		http = http || len(o.GetHosts())+len(o.GetNotHosts())+len(o.GetMethods())+len(o.GetNotMethods())+len(o.GetPaths())+len(o.GetNotPaths()) > 0
	}
	return l4 || len(r.When) > 0, http
}

// FuzzAuthorizationPolicy compiles objects as the API server may hand them over. Compiling is a function, does
// not grow what it is given beyond bounds, and is never weaker than the object: an ALLOW that needs what nodes do
// not see allows nothing, a DENY of which nothing else is left denies everything.
func FuzzAuthorizationPolicy(f *testing.F) {
	for _, s := range []string{
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"rules":[{"from":[{"source":{"namespaces":["shop","x-*"]}}],"to":[{"operation":{"ports":["80"]}}]}]}}`,
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"action":"DENY","rules":[{"to":[{"operation":{"methods":["GET"],"paths":["/admin*"]}}]}]}}`,
		`{"metadata":{"name":"a","namespace":"istio-system"},"spec":{"action":"ALLOW","rules":[{"from":[{"source":{"principals":["*"],"notIpBlocks":["10.0.0.0/8","::ffff:1.2.3.4"]}}],"when":[{"key":"source.ip","values":["x"]},{"key":"request.headers[a]","values":["b"]}]}]}}`,
		`{"metadata":{"name":"a","namespace":"shop","annotations":{"istio.io/dry-run":"maybe"}},"spec":{"action":"CUSTOM","provider":{"name":"p"},"rules":[{}]}}`,
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"targetRefs":[{"kind":"Service","name":"ui"},{"kind":"Gateway","group":"gateway.networking.k8s.io","name":"g"}],"action":"AUDIT","rules":[{}]}}`,
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"selector":{"matchLabels":{"app":"ui"}},"action":"DENY","rules":[{"from":[{"source":{"serviceAccounts":["ui","a/b","a/b/c",""]}},{}],"to":[{"operation":{"ports":["0","65536","http",""],"notPorts":["x"]}}]}]}}`,
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"action":"DENY","rules":[{"from":[{"source":{"trustDomains":["old.*"],"notTrustDomains":["*"]}}]},null]}}`,
		`{"spec":{"rules":[{"from":[{"source":null}],"to":[null],"when":[null]}]}}`, `{"spec":{}}`, `{}`,
	} {
		f.Add([]byte(s))
	}
	m := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local", TrustDomainAliases: []string{"old.domain"}}
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &securityv1.AuthorizationPolicy{}
		if json.Unmarshal(data, p) != nil {
			return
		}
		c := m.Compile(p)
		if again := m.Compile(p.DeepCopy()); !again.Policy.Equal(c.Policy) || !reflect.DeepEqual(again.Targets, c.Targets) || again.Message != c.Message {
			t.Errorf("compiled twice: %+v\n%+v", c, again)
		}
		if c.Exact != (c.Reason == "") || c.Exact != (c.Message == "") {
			t.Errorf("exact %v, and %q: %q", c.Exact, c.Reason, c.Message)
		}
		attached := len(p.Spec.TargetRefs) > 0 || p.Spec.TargetRef != nil
		deny := p.Spec.Action != securityv1beta1.AuthorizationPolicy_ALLOW && p.Spec.Action != securityv1beta1.AuthorizationPolicy_AUDIT
		if deny && c.Policy.Action != mesh.Deny || c.Policy.Action == mesh.Allow && p.Spec.Action != securityv1beta1.AuthorizationPolicy_ALLOW {
			t.Errorf("%s becomes %d", p.Spec.Action, c.Policy.Action)
		}
		all := len(probes())
		if attached && c.Policy.Action != mesh.Audit && !c.Policy.DryRun && matches(c.Policy) != all {
			t.Errorf("a policy for a waypoint that is not there lets somebody in: %+v", c.Policy)
		}
		if !attached {
			for _, r := range p.Spec.Rules {
				if r == nil {
					continue
				}
				one := p.DeepCopy()
				one.Spec.Rules = []*securityv1beta1.Rule{r}
				n := matches(m.Compile(one).Policy)
				l4, http := visible(r)
				switch {
				case http && !deny && n > 0:
					t.Errorf("a rule that needs HTTP lets %d of %d match: %v", n, all, r)
				case http && deny && !l4 && n != all:
					t.Errorf("a rule that denies by HTTP alone denies %d of %d: %v", n, all, r)
				}
			}
			if len(p.Spec.Rules) == 0 && matches(c.Policy) > 0 {
				t.Error("a policy without rules matches")
			}
		}
		values := 0
		for _, r := range c.Policy.Rules {
			for _, cl := range r.Clauses {
				for _, x := range cl.Matches {
					values += len(x.Namespaces) + len(x.NotNamespaces) + len(x.Principals) + len(x.NotPrincipals) + len(x.ServiceAccounts) + len(x.NotServiceAccounts) +
						len(x.SourceIPs) + len(x.NotSourceIPs) + len(x.DestinationIPs) + len(x.NotDestinationIPs) + len(x.DestinationPorts) + len(x.NotDestinationPorts)
				}
			}
		}
		if values > 100*len(data)+100 {
			t.Errorf("%d bytes become %d values", len(data), values)
		}
		roundTrip(t, c.Policy)
		problems := m.Check(p)
		for _, x := range problems {
			if x.Message == "" || x.Field == "" || x.Code == "" {
				t.Errorf("a problem that does not say what it is: %+v", x)
			}
		}
		if len(problems) > 2*(MaxProblems+1) || (c.Reason == ReasonTooLarge || c.Reason == ReasonUnsupported) && len(problems) == 0 {
			t.Errorf("%d problems, and the nodes say %s: %s", len(problems), c.Reason, c.Message)
		}
	})
}

// roundTrip: what was compiled is what a node decodes.
func roundTrip(t *testing.T, p *mesh.Policy) {
	if _, err := wds.ParsePolicyName(p.Name.String()); err != nil {
		return // an object without a name does not exist
	}
	if p.Action == mesh.Audit {
		a, err := wds.EncodeAudit(p)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := wds.DecodeAudit(a); err != nil || !got.Equal(p) {
			t.Errorf("got %+v (%v)\nwant %+v", got, err, p)
		}
		return
	}
	a, err := wds.EncodePolicy(p)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := wds.DecodePolicy(a); err != nil || !got.Equal(p) {
		t.Errorf("got %+v (%v)\nwant %+v", got, err, p)
	}
}

// FuzzCheck: the other objects of the security API.
func FuzzCheck(f *testing.F) {
	for _, s := range []string{
		`{"metadata":{"name":"default","namespace":"istio-system"},"spec":{"mtls":{"mode":"STRICT"}}}`,
		`{"spec":{"selector":{"matchLabels":{"":"x"}},"portLevelMtls":{"0":{"mode":"STRICT"},"70000":{"mode":"DISABLE"}}}}`,
		`{"spec":{"jwtRules":[{"issuer":"","jwksUri":"x"}]}}`, `{"spec":{"mtls":null,"portLevelMtls":{"80":null}}}`, `{}`,
	} {
		f.Add([]byte(s))
	}
	m := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, obj := range []any{&securityv1.PeerAuthentication{}, &securityv1.RequestAuthentication{}} {
			if json.Unmarshal(data, obj) != nil {
				continue
			}
			for _, x := range m.Check(obj) {
				if x.Message == "" || x.Field == "" || x.Code == "" {
					t.Errorf("a problem that does not say what it is: %+v", x)
				}
			}
		}
	})
}

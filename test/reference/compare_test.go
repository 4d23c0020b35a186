package reference

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"testing"

	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
	"github.com/warrenmesh/warren/results"
)

var (
	long = flag.Bool("long", false, "the numbers of a soak instead of those of a check")
	seed = flag.Uint64("seed", 0, "of the one world to look at, as a failure prints it")
)

// snapshot is the world as the control plane derives it.
func (w *World) snapshot(t testing.TB) *mesh.Snapshot {
	x, err := index.New(index.Config{
		ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: w.TrustDomain, TrustDomainAliases: w.TrustDomainAliases,
		RootNamespace: w.RootNamespace,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range w.objects() {
		x.Set(o)
	}
	return x.Commit().Snapshot
}

func (w *World) objects() []any {
	var out []any
	for _, o := range w.Namespaces {
		out = append(out, o)
	}
	for _, o := range w.Services {
		out = append(out, o)
	}
	for _, o := range w.Pods {
		out = append(out, o)
	}
	for _, o := range w.Policies {
		out = append(out, o)
	}
	for _, o := range w.Peers {
		out = append(out, o)
	}
	return out
}

func wire[M proto.Message](t testing.TB, m, into M) M {
	data, err := proto.Marshal(m)
	if err == nil {
		err = proto.Unmarshal(data, into)
	}
	if err != nil {
		t.Fatal(err)
	}
	return into
}

// received is the Snapshot as a node has it.
func received(t testing.TB, s *mesh.Snapshot) *mesh.Snapshot {
	b := mesh.NewBuilder(nil)
	b.SetConfig(s.Config())
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for p := range s.Policies() {
		if p.Action == mesh.Audit {
			m, err := wds.EncodeAudit(p)
			check(err)
			got, err := wds.DecodeAudit(wire(t, m, &node.AuditPolicy{}))
			check(err)
			b.PutPolicy(got)
			continue
		}
		m, err := wds.EncodePolicy(p)
		check(err)
		got, err := wds.DecodePolicy(wire(t, m, &security.Authorization{}))
		check(err)
		b.PutPolicy(got)
	}
	for w := range s.Workloads() {
		got, _, err := wds.DecodeAddress(wire(t, wds.EncodeWorkload(w), &workload.Address{}))
		check(err)
		b.PutWorkload(got)
	}
	return b.Commit(1)
}

func (c Connection) conn(s *mesh.Snapshot) mesh.Conn {
	out := mesh.Conn{SourceIP: c.SourceIP, Plaintext: !c.authenticated()}
	if c.authenticated() {
		out.Source = mesh.Identity{TrustDomain: c.TrustDomain, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount}
	}
	out.DstWorkload = s.Workload("Kubernetes//Pod/" + c.To.Namespace + "/" + c.To.Name)
	if out.DstWorkload == nil {
		panic("the pod is no workload")
	}
	out.Dst = addrPort(c)
	return out
}

// TestAgentDecidesAsDocumented: what the control plane compiles, the wire carries and the agent decides is what
// the documentation says of the objects.
func TestAgentDecidesAsDocumented(t *testing.T) {
	worlds, each := 400, 50
	if *long {
		worlds = 20_000
	}
	first := rand.Uint64() >> 1
	if *seed != 0 {
		first, worlds, each = *seed, 1, 1000
	}
	cases, wrong, denied := 0, 0, 0
	for i := range worlds {
		r := rand.New(rand.NewPCG(first+uint64(i), 0))
		w := Draw(r)
		s := received(t, w.snapshot(t))
		for range each {
			c := w.Connect(r)
			v := s.Authorize(c.conn(s))
			want := w.Allows(c)
			cases++
			if !want {
				denied++
			}
			if v.Allow == want {
				continue
			}
			if wrong++; wrong <= 3 {
				t.Errorf("-seed %d: %s: the agent says %t (%s %s), the reference %t\n%s", first+uint64(i), c, v.Allow, v.Why, v.By, want, w)
			}
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d connections are decided otherwise", wrong, cases)
	}
	if *seed == 0 && (denied < cases/10 || denied > cases*9/10) {
		t.Errorf("%d of %d connections are to be denied: the worlds try one side only", denied, cases)
	}
	t.Logf("%d connections, %d to be denied, %d decided otherwise", cases, denied, wrong)
	if err := results.Record("policy-differential", results.Row{Name: "reference against agent", Inputs: cases, Failures: wrong, Figure: float64(wrong), Unit: "disagreements"}); err != nil {
		t.Error(err)
	}
}

func (c Connection) String() string {
	return fmt.Sprintf("%q from %s to %s/%s at %s port %d", c.principal(), c.SourceIP, c.To.Namespace, c.To.Name, c.DestIP, c.DestPort)
}

func (w *World) String() string {
	out := fmt.Sprintf("trust domain %s, aliases %v\n", w.TrustDomain, w.TrustDomainAliases)
	for _, o := range w.objects() {
		text, err := yaml.Marshal(o)
		if err != nil {
			return err.Error()
		}
		out += "---\n" + string(text)
	}
	return out
}

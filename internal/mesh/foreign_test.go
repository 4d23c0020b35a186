package mesh

import "testing"

// TestAPodsAddressIsNobodyElses: a service that names a pod's address, as a ServiceEntry or an external IP can,
// draws the connections of its own namespace and those to its own pods, and nobody else's.
func TestAPodsAddressIsNobodyElses(t *testing.T) {
	victim, thief := pod("victim", "10.0.0.1"), pod("thief", "10.0.0.66")
	thief.UID, thief.Namespace, thief.Identity = "c//Pod/evil/thief", "evil", Identity{"cluster.local", "evil", "thief"}
	claim := func(namespace string) *Service {
		s := svc("claim", "10.0.0.1")
		s.Name = ServiceName{namespace, "claim.example"}
		return s
	}
	thief.Services = map[ServiceName][]ServicePort{{"evil", "claim.example"}: {{Port: 80, Target: 8080}}, {"shop", "claim.example"}: {{Port: 80, Target: 8080}}}
	from := func(namespace string) *Workload {
		w := pod("client", "10.0.0.9")
		w.UID, w.Namespace = "c//Pod/"+namespace+"/client", namespace
		return w
	}
	node := pod("victim", "10.0.0.1")
	node.HostNetwork = true
	for _, tc := range []struct {
		name  string
		parts []any
		src   *Workload
		want  string
	}{
		{"a client of the pod's namespace", []any{claim("evil"), victim, thief}, from("shop"), "victim"},
		{"a client of a third namespace", []any{claim("evil"), victim, thief}, from("third"), "victim"},
		{"a client that is not known", []any{claim("evil"), victim, thief}, nil, "victim"},
		{"a client of the service's namespace", []any{claim("evil"), victim, thief}, from("evil"), "thief"},
		{"a service of the pod's namespace", []any{claim("shop"), victim, thief}, from("third"), "thief"},
		{"no pod has the address", []any{claim("evil"), thief}, from("third"), "thief"},
		{"a node has the address", []any{claim("evil"), node, thief}, from("third"), "thief"},
	} {
		r := build(tc.parts...).Resolve(tc.src, dst("10.0.0.1:80"), nil)
		if r.Workload == nil || r.Workload.Name != tc.want {
			t.Errorf("%s reaches %+v, want %s", tc.name, r, tc.want)
		}
	}
}

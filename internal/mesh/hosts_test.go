package mesh

import (
	"net/netip"
	"slices"
	"testing"
)

// Which ServiceEntry pods mean by a host: their own namespace's, or the first that they know; Kubernetes' Services are not
// meant by anybody's, and names in the cluster's domain are only for the namespace in them.
func TestHosts(t *testing.T) {
	b := NewBuilder(nil)
	b.SetConfig(Config{TrustDomain: "cluster.local", ClusterDomain: "Mesh.Example"})
	put := func(namespace, host string, canonical bool, visibleIn ...string) {
		b.PutService(&Service{Name: ServiceName{Namespace: namespace, Hostname: host}, Canonical: canonical, VisibleIn: visibleIn})
	}
	put("b", "api.example.com", false)
	put("a", "API.example.com.", false, "a", "c")
	put("b", "only.example.com", false, "b")
	put("b", "*.example.com", false)
	put("b", "a.*.example.com", false)
	put("b", "db.b.svc.mesh.example", false)
	put("b", "db.a.svc.mesh.example", false)
	put("b", "www.example.com.svc.mesh.example", false)
	put("a", "ui.a.svc.mesh.example", true)
	put("a", "UI.a.svc.mesh.example", false)
	hosts := b.Commit(1).Hosts()
	var names []string
	for h := range hosts {
		names = append(names, h)
	}
	slices.Sort(names)
	if want := []string{"*.example.com", "api.example.com", "db.b.svc.mesh.example", "only.example.com"}; !slices.Equal(names, want) {
		t.Errorf("hosts %q, want %q", names, want)
	}
	for _, c := range []struct{ host, client, want string }{
		{"api.example.com", "a", "a"}, {"api.example.com", "b", "b"}, {"api.example.com", "c", "a"}, {"api.example.com", "d", "b"}, {"api.example.com", "", "b"},
		{"only.example.com", "b", "b"}, {"only.example.com", "a", ""}, {"only.example.com", "", ""},
	} {
		got := ""
		if svc := Meant(hosts[c.host], c.client); svc != nil {
			got = svc.Name.Namespace
		}
		if got != c.want {
			t.Errorf("pods of %q mean that of %q by %s, want %q", c.client, got, c.host, c.want)
		}
	}
}

func TestAllocated(t *testing.T) {
	for a, want := range map[string]bool{"240.240.0.1": true, "240.241.0.1": false, "2001:2::1": true, "2001:2:1::1": false, "10.0.0.1": false} {
		if got := Allocated(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %t", a, got)
		}
	}
}

func TestDNSCaptureOn(t *testing.T) {
	for _, c := range []struct {
		pod        DNSCapture
		node, want bool
	}{{DNSCaptureUnsaid, true, true}, {DNSCaptureUnsaid, false, false}, {DNSCaptureOn, false, true}, {DNSCaptureOff, true, false}} {
		if got := c.pod.On(c.node); got != c.want {
			t.Errorf("%+v: %t", c, got)
		}
	}
}

package status

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	"istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func serviceEntry(name string, age time.Duration, hosts ...string) *networkingv1.ServiceEntry {
	e := &networkingv1.ServiceEntry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, CreationTimestamp: metav1.NewTime(time.Unix(1_000_000, 0).Add(-age))}}
	e.Spec.Hosts, e.Spec.Resolution = hosts, networkingv1alpha3.ServiceEntry_DNS
	return e
}

func with(e *networkingv1.ServiceEntry, host string, values ...string) *networkingv1.ServiceEntry {
	for _, v := range values {
		e.Status.Addresses = append(e.Status.Addresses, &networkingv1alpha3.ServiceEntryAddress{Value: v, Host: host})
	}
	return e
}

func TestHostsGetAddresses(t *testing.T) {
	own := serviceEntry("own", 0, "own.example")
	own.Spec.Addresses = []string{"192.0.2.1"}
	passes := serviceEntry("passes", 0, "passes.example")
	passes.Spec.Resolution = networkingv1alpha3.ServiceEntry_NONE
	without := serviceEntry("without", 0, "without.example")
	without.Labels = map[string]string{labelAllocate: "false"}
	dynamic := serviceEntry("dynamic", 0, "*.dynamic.example")
	dynamic.Spec.Resolution = networkingv1alpha3.ServiceEntry_DYNAMIC_DNS
	entries := []*networkingv1.ServiceEntry{
		own, passes, without, dynamic, serviceEntry("wild", 0, "*.example"),
		with(serviceEntry("had", time.Hour, "had.example"), "had.example", "240.240.0.7", "2001:2::7"),
		with(serviceEntry("claims", time.Minute, "claims.example"), "claims.example", "240.240.0.7"),
		with(serviceEntry("grew", 0, "one.example", "two.example"), "one.example", "240.240.0.9"),
		with(serviceEntry("foreign", 0, "foreign.example"), "foreign.example", "10.0.0.1"),
	}
	var got []string
	seen := map[string]bool{"240.240.0.7": true, "2001:2::7": true}
	todo, left := allocate(entries)
	for _, a := range todo {
		for _, x := range a.addresses {
			if seen[x.Value] {
				t.Errorf("%s is given twice", x.Value)
			}
			seen[x.Value] = true
			got = append(got, a.entry.Name+" "+x.Host)
		}
		// The same from whoever asks first, and nothing more once it is written.
		a.entry.Status.Addresses = a.addresses
	}
	want := "claims claims.example, claims claims.example, dynamic *.dynamic.example, dynamic *.dynamic.example, foreign foreign.example, foreign foreign.example, grew one.example, grew two.example, grew two.example"
	if s := strings.Join(got, ", "); s != want || len(left) != 0 {
		t.Errorf("got  %s\nwant %s (and %v)", s, want, left)
	}
	if again, _ := allocate(entries); len(again) != 0 {
		t.Errorf("%d are written again", len(again))
	}
}

// Once all addresses are taken, hosts are told apart from those that got one.
func TestAddressesEnd(t *testing.T) {
	var entries []*networkingv1.ServiceEntry
	for i := range most + 2 {
		entries = append(entries, serviceEntry(fmt.Sprint(i), 0, fmt.Sprintf("h%d.example", i)))
	}
	todo, without := allocate(entries)
	if len(todo) != most || len(without) != 2 {
		t.Errorf("%d hosts got addresses and %d did not", len(todo), len(without))
	}
}

func TestAddressesAreWritten(t *testing.T) {
	e := serviceEntry("api", 0, "api.example")
	client := fake.NewSimpleClientset(e)
	a := &Addresses{Istio: client, Log: slog.New(slog.DiscardHandler)}
	todo, _ := allocate([]*networkingv1.ServiceEntry{e})
	a.write(t.Context(), todo[0])
	got, err := client.NetworkingV1().ServiceEntries("shop").Get(t.Context(), "api", metav1.GetOptions{})
	if err != nil || len(got.Status.Addresses) != 2 || got.Status.Addresses[0].Host != "api.example" || got.Status.Addresses[0].Value != todo[0].addresses[0].Value {
		t.Errorf("%v %+v", err, got.Status.Addresses)
	}
}

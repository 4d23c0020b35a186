package tap

import (
	"encoding/json"
	"net/netip"
	"net/url"
	"strings"
	"testing"
)

// call is a connection of shop/ui-1 to the Service catalog.
func call() *Event {
	return &Event{What: Open, Direction: "outbound", Path: "tunnel",
		Source:      End{Addr: netip.MustParseAddrPort("10.1.0.5:40000"), Namespace: "shop", Pod: "ui-1", Workload: "ui"},
		Destination: End{Addr: netip.MustParseAddrPort("10.1.1.6:8080"), Namespace: "stock", Pod: "catalog-v1-1", Workload: "catalog-v1"},
		Asked:       netip.MustParseAddrPort("10.96.0.7:80"), Service: "catalog.stock.svc.cluster.local"}
}

func TestFilter(t *testing.T) {
	for query, want := range map[string]bool{
		"": true,
		// The client.
		"from=shop": true, "from=shop/ui-1": true, "from=shop/ui": true, "from=10.1.0.5": true, "from=10.1.0.0/24": true, "from=10.1.0.5:40000": true,
		"from=stock": false, "from=shop/catalog": false, "from=10.1.1.6": false, "from=10.1.0.5:80": false, "from=catalog.stock": false,
		// The server, or what was asked for.
		"to=stock": true, "to=stock/catalog-v1-1": true, "to=stock/catalog-v1": true, "to=stock/catalog": true, "to=catalog.stock": true,
		"to=catalog.stock.svc.cluster.local:80": true, "to=stock/catalog:8080": true, "to=10.96.0.7": true, "to=10.1.1.6:8080": true, "to=10.1.1.0/24": true,
		"to=shop": false, "to=stock/cat": false, "to=catalog.stoc": false, "to=stock/catalog:443": false, "to=10.96.0.8": false,
		// Either, and all that is asked for.
		"of=shop": true, "of=stock": true, "of=shop/ui": true, "of=bank": false, "of=10.96.0.7:80": true,
		"of=shop&to=stock": true, "from=shop&to=bank": false,
		"direction=outbound": true, "direction=inbound": false, "verdict=allowed": true, "verdict=denied": false,
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		f, err := ParseQuery(q)
		if err != nil {
			t.Errorf("%s: %v", query, err)
			continue
		}
		if f.Match(call()) != want {
			t.Errorf("%s matches: %t", query, !want)
		}
		again, err := ParseQuery(f.Query())
		if err != nil || again != f {
			t.Errorf("%s is sent as %s and read as %+v, %v", query, f.Query().Encode(), again, err)
		}
	}
	for outcome, denied := range map[string]bool{"policy_denied": true, "policy_revoked": true, "app_refused": false, "completed": false} {
		e := call()
		e.What, e.Outcome = Close, outcome
		if (Filter{Verdict: "denied"}).Match(e) != denied || (Filter{Verdict: "allowed"}).Match(e) == denied {
			t.Errorf("%s is taken for denied: %t", outcome, !denied)
		}
	}
}

func TestWhatIsNoFilterIsRefused(t *testing.T) {
	for query, says := range map[string]string{
		"to=shop/": "nothing behind the slash", "to=a/b/c": "two slashes", "to=shop:x": "port", "to=shop/ui:0": "port", "to=shop/ui:70000": "port",
		"to=10.1.0.1/24": "10.1.0.0/24", "to=/ui": "name of a namespace", "to=a b": "name of a namespace", "to=a.b/c": "name of a namespace",
		"direction=up": "inbound, outbound", "verdict=no": "allowed, denied", "pod=ui": "none of of, from, to",
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if f, err := ParseQuery(q); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s is read as %+v, %v", query, f, err)
		}
	}
}

func TestNothingUnknownIsWritten(t *testing.T) {
	b, err := json.Marshal(&Event{What: Missed, Count: 3})
	if err != nil || string(b) != `{"time":"0001-01-01T00:00:00Z","event":"missed","source":{},"destination":{},"count":3}` {
		t.Errorf("%s, %v", b, err)
	}
}

func FuzzParty(f *testing.F) {
	for _, s := range []string{"shop", "shop/ui:80", "[::1]:80", "::1", "10.0.0.0/8", "a.b.c:1", ":", "/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseParty(s)
		if err != nil {
			return
		}
		if p.String() != s {
			t.Errorf("%q is said to be %q", s, p)
		}
		p.destination(call())
	})
}

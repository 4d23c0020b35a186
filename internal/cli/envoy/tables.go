package envoy

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Table is one view of a configuration.
type Table struct {
	Name, About string
	Path        string // at the admin endpoint
	Head        []string
	Rows        func(Value) [][]string
	Hidden      []string // fields that are not shown
}

// Tables are all views.
var Tables = []Table{
	{"clusters", "where requests and connections can be sent", "/config_dump?resource=dynamic_active_clusters",
		[]string{"CLUSTER", "TYPE", "BALANCING", "CONNECT TIMEOUT"}, clusterRows, nil},
	{"listeners", "which addresses are taken, and by what", "/config_dump?resource=dynamic_listeners",
		[]string{"LISTENER", "ADDRESS", "PORT", "TAKEN BY"}, listenerRows, nil},
	{"routes", "what becomes of requests", "/config_dump?resource=dynamic_route_configs",
		[]string{"ROUTES OF", "HOSTS", "MATCH", "SENT TO"}, routeRows, nil},
	{"endpoints", "the endpoints and what Envoy thinks of them", "/clusters?format=json",
		[]string{"CLUSTER", "ENDPOINT", "HEALTH", "WEIGHT", "OPEN", "REQUESTS", "ERRORS"}, endpointRows, nil},
	{"secrets", "certificates, without their keys", "/config_dump?resource=dynamic_active_secrets",
		[]string{"SECRET", "KIND", "IDENTITY", "VALID FROM", "EXPIRES", "SERIAL"}, secretRows, []string{"private_key", "private_key_provider", "session_ticket_keys", "generic_secret"}},
}

func clusterRows(v Value) [][]string {
	var rows [][]string
	for _, c := range v.At("configs").List() {
		c = c.At("cluster")
		lb := c.At("lb_policy").Text()
		if lb == "" {
			lb = "ROUND_ROBIN" // the one that is not written
		}
		kind := c.At("type").Text()
		if kind == "" {
			kind = "STATIC"
		}
		rows = append(rows, []string{c.At("name").Text(), kind, lb, c.At("connect_timeout").Text()})
	}
	return rows
}

func listenerRows(v Value) [][]string {
	var rows [][]string
	for _, c := range v.At("configs").List() {
		l := c.At("active_state", "listener")
		name := l.At("name").Text()
		if s := l.At("address", "socket_address"); s.Is() {
			for _, at := range append([]Value{l}, l.At("additional_addresses").List()...) {
				s := at.At("address", "socket_address")
				rows = append(rows, []string{name, s.At("address").Text(), s.At("port_value").Text(), chainNames(l)})
			}
			continue
		}
		found := len(rows)
		addresses := l.At("filter_chain_matcher", "matcher_tree", "exact_match_map", "map")
		for _, addr := range addresses.Keys() {
			ports := addresses.At(addr, "matcher", "matcher_tree", "exact_match_map", "map")
			for _, port := range ports.Keys() {
				rows = append(rows, []string{name, addr, port, strings.Join(chainsOf(ports.At(port)), ", ")})
			}
		}
		if len(rows) == found {
			rows = append(rows, []string{name, "-", "-", chainNames(l)})
		}
	}
	return rows
}

func chainNames(l Value) string {
	var names []string
	for _, c := range l.At("filter_chains").List() {
		names = append(names, c.At("name").Text())
	}
	return strings.Join(names, ", ")
}

// chainsOf are the filter chains that a branch of a matcher may lead to.
func chainsOf(on Value) []string {
	if name := on.At("action", "name").Text(); name != "" {
		return []string{name}
	}
	var out []string
	m := on.At("matcher")
	branches := m.At("matcher_tree", "exact_match_map", "map")
	for _, k := range branches.Keys() {
		out = append(out, chainsOf(branches.At(k))...)
	}
	if rest := m.At("on_no_match"); rest.Is() {
		out = append(out, chainsOf(rest)...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func routeRows(v Value) [][]string {
	var rows [][]string
	for _, c := range v.At("configs").List() {
		c = c.At("route_config")
		for _, h := range c.At("virtual_hosts").List() {
			var hosts []string
			for _, d := range h.At("domains").List() {
				hosts = append(hosts, d.Text())
			}
			for _, r := range h.At("routes").List() {
				rows = append(rows, []string{c.At("name").Text(), strings.Join(hosts, ","), matchText(r.At("match")), Sent(r)})
			}
		}
	}
	return rows
}

// matchText says what a route matches.
func matchText(m Value) string {
	var out []string
	switch {
	case m.At("path").Is():
		out = append(out, "path = "+m.At("path").Text())
	case m.At("path_separated_prefix").Is():
		out = append(out, "path under "+m.At("path_separated_prefix").Text())
	case m.At("safe_regex").Is():
		out = append(out, "path ~ "+m.At("safe_regex", "regex").Text())
	case m.At("prefix").Is():
		out = append(out, "path from "+m.At("prefix").Text())
	case m.At("connect_matcher").Is():
		out = append(out, "CONNECT")
	}
	for _, h := range m.At("headers").List() {
		not := ""
		if h.At("invert_match").True() {
			not = "not "
		}
		out = append(out, not+h.At("name").Text()+" "+stringText(h.At("string_match"), "is there"))
	}
	for _, q := range m.At("query_parameters").List() {
		out = append(out, "?"+q.At("name").Text()+" "+stringText(q.At("string_match"), "is there"))
	}
	return strings.Join(out, ", ")
}

func stringText(m Value, without string) string {
	for _, k := range []struct{ field, says string }{{"exact", "= "}, {"prefix", "from "}, {"suffix", "up to "}, {"contains", "with "}} {
		if m.At(k.field).Is() {
			return k.says + m.At(k.field).Text()
		}
	}
	if m.At("safe_regex").Is() {
		return "~ " + m.At("safe_regex", "regex").Text()
	}
	return without
}

// Sent says where a route sends a request.
func Sent(r Value) string {
	to := r.At("route")
	switch {
	case r.At("direct_response").Is():
		return "answer " + r.At("direct_response", "status").Text()
	case r.At("redirect").Is():
		return "redirect"
	case to.At("cluster").Is():
		return to.At("cluster").Text()
	case to.At("weighted_clusters").Is():
		var out []string
		for _, c := range to.At("weighted_clusters", "clusters").List() {
			out = append(out, c.At("name").Text()+" "+strconv.Itoa(c.At("weight").Int()))
		}
		return strings.Join(out, ", ")
	}
	return "-"
}

func endpointRows(v Value) [][]string {
	var rows [][]string
	for _, c := range v.At("cluster_statuses").List() {
		for _, h := range c.At("host_statuses").List() {
			count := map[string]string{}
			for _, s := range h.At("stats").List() {
				n := s.At("value").Text()
				if n == "" {
					n = "0"
				}
				count[s.At("name").Text()] = n
			}
			rows = append(rows, []string{c.At("name").Text(), addressText(h.At("address")), health(h.At("health_status")),
				strconv.Itoa(max(1, h.At("weight").Int())), count["cx_active"], count["rq_total"], count["rq_error"]})
		}
	}
	return rows
}

func addressText(a Value) string {
	if s := a.At("socket_address"); s.Is() {
		addr, err := netip.ParseAddr(s.At("address").Text())
		if err != nil {
			return s.At("address").Text() + ":" + s.At("port_value").Text()
		}
		return netip.AddrPortFrom(addr, uint16(s.At("port_value").Int())).String()
	}
	if i := a.At("envoy_internal_address"); i.Is() {
		return i.At("endpoint_id").Text()
	}
	return a.At("pipe", "path").Text()
}

// health names everything that keeps an endpoint from being used.
func health(s Value) string {
	var out []string
	if e := s.At("eds_health_status").Text(); e != "" && e != "HEALTHY" {
		out = append(out, strings.ToLower(e))
	}
	for _, k := range s.Keys() {
		if s.At(k).True() {
			out = append(out, strings.ReplaceAll(strings.TrimPrefix(k, "failed_"), "_", " "))
		}
	}
	if len(out) == 0 {
		return "healthy"
	}
	return strings.Join(out, ", ")
}

func secretRows(v Value) [][]string {
	var rows [][]string
	for _, c := range v.At("configs").List() {
		s := c.At("secret")
		row := []string{c.At("name").Text(), "?", "-", "-", "-", "-"}
		var chain Value
		switch {
		case s.At("tls_certificate").Is():
			row[1], chain = "certificate", s.At("tls_certificate", "certificate_chain")
		case s.At("validation_context").Is():
			row[1], chain = "roots", s.At("validation_context", "trusted_ca")
		}
		certs := certificates(chain)
		if len(certs) == 0 {
			rows = append(rows, row)
			continue
		}
		if row[1] == "certificate" {
			certs = certs[:1]
		}
		for _, x := range certs {
			who := x.Subject.String()
			if len(x.URIs) > 0 {
				who = x.URIs[0].String()
			}
			if who == "" {
				who = "-"
			}
			rows = append(rows, []string{row[0], row[1], who, x.NotBefore.UTC().Format(time.RFC3339), x.NotAfter.UTC().Format(time.RFC3339), fmt.Sprintf("%x", x.SerialNumber)})
		}
	}
	return rows
}

// certificates reads PEM from a data source.
func certificates(source Value) []*x509.Certificate {
	text := []byte(source.At("inline_string").Text())
	if b := source.At("inline_bytes").Text(); b != "" {
		var err error
		if text, err = base64.StdEncoding.DecodeString(b); err != nil {
			return nil
		}
	}
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return out
		}
		if x, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, x)
		}
	}
}

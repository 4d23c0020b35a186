package tap

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// Filter says which connections somebody wants to hear of. The zero Filter wants all.
type Filter struct {
	Of, From, To Party  // either end; the client; the server
	Direction    string // inbound, outbound or "": both
	Verdict      string // denied: what policies refused or ended; allowed: the others; "": both
}

// Party is who may be at an end of a connection. The zero Party is anybody.
type Party struct {
	text      string
	namespace string
	name      string       // of a pod, a workload or, at the server's end, of a Service
	host      string       // of a Service
	net       netip.Prefix // addresses
	port      uint16
}

// String is what ParseParty was given.
func (p Party) String() string { return p.text }

// ParseParty reads NAMESPACE, NAMESPACE/NAME, a hostname, an address or a prefix; a port may follow all but a prefix.
func ParseParty(s string) (Party, error) {
	p := Party{text: s}
	bad := func(why string) (Party, error) {
		return Party{}, fmt.Errorf("%q is none of NAMESPACE, NAMESPACE/NAME, HOST, ADDRESS, each with or without :PORT, and PREFIX: %s", s, why)
	}
	if s == "" {
		return p, nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		p.net = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())
		return p, nil
	}
	if n, err := netip.ParsePrefix(s); err == nil {
		if p.net = n.Masked(); p.net != n {
			return bad("it has bits beyond its length; " + p.net.String() + " is meant?")
		}
		return p, nil
	}
	rest := s
	if i := strings.LastIndexByte(s, ':'); i >= 0 {
		n, err := strconv.ParseUint(s[i+1:], 10, 16)
		if err != nil || n == 0 {
			return bad("the port is not one of 1 to 65535")
		}
		rest, p.port = s[:i], uint16(n)
	}
	if a, err := netip.ParseAddr(strings.Trim(rest, "[]")); err == nil {
		p.net = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())
		return p, nil
	}
	namespace, name, named := strings.Cut(rest, "/")
	switch {
	case !named && strings.Contains(rest, "."):
		p.host, rest = rest, ""
	case named && name == "":
		return bad("there is nothing behind the slash")
	case named && strings.Contains(name, "/"):
		return bad("there are two slashes")
	default:
		p.namespace, p.name = namespace, name
	}
	if strings.ContainsAny(s, " *\t") || p.host == "" && (p.namespace == "" || strings.Contains(p.namespace, ".")) {
		return bad("that is not the name of a namespace")
	}
	return p, nil
}

// source reports whether p is the client of e.
func (p Party) source(e *Event) bool { return p.is(e.Source, netip.AddrPort{}, "") }

// destination reports whether p is the server of e, or what was asked for.
func (p Party) destination(e *Event) bool { return p.is(e.Destination, e.Asked, e.Service) }

func (p Party) is(end End, asked netip.AddrPort, service string) bool {
	if p == (Party{}) {
		return true
	}
	if p.port != 0 && end.Addr.Port() != p.port && asked.Port() != p.port {
		return false
	}
	switch {
	case p.net.IsValid():
		return p.net.Contains(end.Addr.Addr().Unmap()) || p.net.Contains(asked.Addr().Unmap())
	case p.host != "":
		return service == p.host || strings.HasPrefix(service, p.host+".")
	case p.name == "":
		return end.Namespace == p.namespace || strings.Contains(service, "."+p.namespace+".svc.")
	default:
		return end.Namespace == p.namespace && (end.Pod == p.name || end.Workload == p.name) ||
			strings.HasPrefix(service, p.name+"."+p.namespace+".svc.")
	}
}

// Match reports whether e is wanted.
func (f Filter) Match(e *Event) bool {
	return (f.Of.source(e) || f.Of.destination(e)) && f.From.source(e) && f.To.destination(e) &&
		(f.Direction == "" || f.Direction == e.Direction) && (f.Verdict == "" || (f.Verdict == "denied") == e.Denied())
}

// Query is the Filter as a URL has it. ParseQuery reads it.
func (f Filter) Query() url.Values {
	q := url.Values{}
	for key, v := range map[string]string{"of": f.Of.text, "from": f.From.text, "to": f.To.text, "direction": f.Direction, "verdict": f.Verdict} {
		if v != "" {
			q.Set(key, v)
		}
	}
	return q
}

// ParseQuery reads a Filter. What it does not know it refuses: an agent that leaves a condition out would tell too much.
func ParseQuery(q url.Values) (f Filter, err error) {
	for key := range q {
		v := q.Get(key)
		switch key {
		case "of":
			f.Of, err = ParseParty(v)
		case "from":
			f.From, err = ParseParty(v)
		case "to":
			f.To, err = ParseParty(v)
		case "direction":
			f.Direction, err = oneOf(v, "inbound", "outbound")
		case "verdict":
			f.Verdict, err = oneOf(v, "allowed", "denied")
		default:
			return Filter{}, fmt.Errorf("%q is none of of, from, to, direction, verdict", key)
		}
		if err != nil {
			return Filter{}, fmt.Errorf("%s: %w", key, err)
		}
	}
	return f, nil
}

func oneOf(v string, words ...string) (string, error) {
	for _, w := range words {
		if v == w || v == "" {
			return v, nil
		}
	}
	return "", fmt.Errorf("%q is none of %s", v, strings.Join(words, ", "))
}

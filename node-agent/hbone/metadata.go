package hbone

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"
)

// Header names that travel with a CONNECT.
const (
	HeaderBaggage     = "baggage"
	HeaderForwarded   = "forwarded"
	HeaderTraceparent = "traceparent"
)

// Baggage is what one side tells the other about its workload; it informs telemetry and decides nothing.
type Baggage struct {
	Cluster      string // k8s.cluster.name
	Namespace    string // k8s.namespace.name
	WorkloadKind string // "deployment", "pod", "job", "cronjob", …: the key is k8s.<kind>.name
	Workload     string
	Service      string // service.name, the canonical service
	Version      string // service.version, its revision
	Region       string // cloud.region
	Zone         string // cloud.availability_zone
}

// maxMetadata bounds the length of a header that is parsed at all.
const maxMetadata = 8 << 10

// maxMember is the longest value of a known key; Kubernetes has no longer names.
const maxMember = 253

var workloadKinds = [...]string{"deployment", "pod", "job", "cronjob", "statefulset", "daemonset", "replicaset"}

// String returns the header's value, without empty members.
func (b Baggage) String() string {
	var s strings.Builder
	s.Grow(192)
	put := func(k, v string) {
		if v == "" {
			return
		}
		if s.Len() > 0 {
			s.WriteByte(',')
		}
		s.WriteString(k)
		s.WriteByte('=')
		escape(&s, v)
	}
	put("k8s.cluster.name", b.Cluster)
	put("k8s.namespace.name", b.Namespace)
	if b.WorkloadKind != "" {
		put("k8s."+b.WorkloadKind+".name", b.Workload)
	}
	put("service.name", b.Service)
	put("service.version", b.Version)
	put("cloud.region", b.Region)
	put("cloud.availability_zone", b.Zone)
	return s.String()
}

// ParseBaggage reads a W3C baggage value. Unknown keys and properties after ';' are skipped; a malformed
// member, a repeated key or a value that is too long is an error, and then nothing of it is to be trusted.
func ParseBaggage(v string) (Baggage, error) {
	var b Baggage
	if len(v) > maxMetadata {
		return b, fmt.Errorf("baggage: %d bytes, at most %d are read", len(v), maxMetadata)
	}
	if strings.Trim(v, " \t") == "" {
		return b, nil
	}
	for member := range strings.SplitSeq(v, ",") {
		kv, _, _ := strings.Cut(member, ";")
		k, val, ok := strings.Cut(kv, "=")
		k, val = strings.Trim(k, " \t"), strings.Trim(val, " \t")
		if !ok || !isToken(k) {
			return Baggage{}, fmt.Errorf("baggage: member %q is not key=value", member)
		}
		val, ok = unescape(val)
		if !ok {
			return Baggage{}, fmt.Errorf("baggage: value of %s is malformed", k)
		}
		var dst *string
		switch k {
		case "k8s.cluster.name":
			dst = &b.Cluster
		case "k8s.namespace.name":
			dst = &b.Namespace
		case "service.name":
			dst = &b.Service
		case "service.version":
			dst = &b.Version
		case "cloud.region":
			dst = &b.Region
		case "cloud.availability_zone":
			dst = &b.Zone
		default:
			for _, kind := range workloadKinds {
				if rest, ok := strings.CutPrefix(k, "k8s."); ok && rest == kind+".name" {
					if b.WorkloadKind != "" {
						return Baggage{}, fmt.Errorf("baggage: %s comes after a %s", k, b.WorkloadKind)
					}
					b.WorkloadKind = kind
					dst = &b.Workload
				}
			}
			if dst == nil {
				continue
			}
		}
		if *dst != "" {
			return Baggage{}, fmt.Errorf("baggage: %s is repeated", k)
		}
		if len(val) > maxMember || !utf8.ValidString(val) { // it becomes a metric's label, which must be UTF-8
			return Baggage{}, fmt.Errorf("baggage: %s is longer than %d bytes or no UTF-8", k, maxMember)
		}
		*dst = val
	}
	return b, nil
}

// escape writes v with everything outside W3C baggage-octet, and '%', percent-encoded.
func escape(s *strings.Builder, v string) {
	const hex = "0123456789ABCDEF"
	for i := range len(v) {
		if c := v[i]; isBaggageOctet(c) && c != '%' {
			s.WriteByte(c)
		} else {
			s.Write([]byte{'%', hex[c>>4], hex[c&15]})
		}
	}
}

func unescape(v string) (string, bool) {
	plain := true
	for i := range len(v) {
		if !isBaggageOctet(v[i]) {
			return "", false
		}
		plain = plain && v[i] != '%'
	}
	if plain {
		return v, true
	}
	out := make([]byte, 0, len(v))
	for i := 0; i < len(v); i++ {
		if v[i] != '%' {
			out = append(out, v[i])
			continue
		}
		if i+2 >= len(v) {
			return "", false
		}
		hi, lo := unhex(v[i+1]), unhex(v[i+2])
		if hi < 0 || lo < 0 {
			return "", false
		}
		c := byte(hi<<4 | lo)
		if c < ' ' || c == 0x7f { // a control character would reach logs and metric labels
			return "", false
		}
		out = append(out, c)
		i += 2
	}
	return string(out), true
}

func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// isBaggageOctet: printable ASCII without space, quote, comma, semicolon and backslash.
func isBaggageOctet(c byte) bool {
	return c > ' ' && c < 0x7f && c != '"' && c != ',' && c != ';' && c != '\\'
}

func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

// Forwarded is the `forwarded` header (RFC 7239): where a connection came from before the tunnel, and the
// service that the application addressed, where it addressed one.
type Forwarded struct {
	For  netip.AddrPort
	Host string
}

// String returns the header's value.
func (f Forwarded) String() string {
	s := `for="` + f.For.String() + `"`
	switch {
	case f.Host == "":
	case strings.ContainsAny(f.Host, ":[]"):
		s += `;host="` + f.Host + `"`
	default:
		s += ";host=" + f.Host
	}
	return s
}

// ParseForwarded reads a value of one hop. Parameters other than for and host are skipped; a list of hops,
// an obfuscated or portless node and a malformed or repeated parameter are errors.
func ParseForwarded(v string) (Forwarded, error) {
	var f Forwarded
	if len(v) > maxMetadata {
		return f, fmt.Errorf("forwarded: %d bytes, at most %d are read", len(v), maxMetadata)
	}
	for rest := v; ; {
		k, after, ok := strings.Cut(rest, "=")
		k = strings.ToLower(strings.Trim(k, " \t"))
		if !ok || !isToken(k) {
			return Forwarded{}, fmt.Errorf("forwarded: %q is not a list of name=value", v)
		}
		var val string
		if strings.HasPrefix(after, `"`) {
			val, rest, ok = strings.Cut(after[1:], `"`)
			if !ok || strings.IndexByte(val, '\\') >= 0 {
				return Forwarded{}, fmt.Errorf("forwarded: %q has a malformed quoted string", v)
			}
		} else {
			i := strings.IndexAny(after, "; \t,")
			if i < 0 {
				i = len(after)
			}
			val, rest = after[:i], after[i:]
			if val == "" {
				return Forwarded{}, fmt.Errorf("forwarded: %s is empty", k)
			}
		}
		switch k {
		case "for":
			ap, err := netip.ParseAddrPort(val)
			if err != nil || f.For.IsValid() || ap.Addr().Zone() != "" {
				return Forwarded{}, fmt.Errorf("forwarded: for=%q is not one address and port", val)
			}
			f.For = ap
		case "host":
			if f.Host != "" || !isHost(val) {
				return Forwarded{}, fmt.Errorf("forwarded: host=%q is not one host", val)
			}
			f.Host = val
		}
		rest = strings.Trim(rest, " \t")
		if rest == "" {
			break
		}
		if rest[0] != ';' {
			return Forwarded{}, fmt.Errorf("forwarded: %q names more than one hop or is malformed", v)
		}
		rest = rest[1:]
	}
	if !f.For.IsValid() {
		return Forwarded{}, fmt.Errorf("forwarded: %q has no for", v)
	}
	return f, nil
}

func isHost(s string) bool {
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == ':', c == '[', c == ']', c == '*':
		default:
			return false
		}
	}
	return s != "" && len(s) <= 255+6
}

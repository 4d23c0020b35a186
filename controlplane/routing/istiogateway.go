package routing

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Gateways of Istio's own API: what their servers ask for, and what VirtualServices say at them.

// Serves is what a server of a Gateway takes.
type Serves uint8

const (
	ServesHTTP  Serves = iota // requests
	ServesHTTPS               // requests, of which TLS ends at the gateway
	ServesTLS                 // connections, of which TLS ends at the gateway
	ServesSNI                 // connections that are TLS and go on as they come
	ServesTCP                 // connections
)

// Family is what can share a port.
func (s *Server) Family() string {
	family := "TLS"
	switch s.Serves {
	case ServesHTTP:
		family = "HTTP"
	case ServesTCP:
		family = "TCP"
	}
	if s.Tunnelled {
		family += " by the mesh's tunnel"
	}
	return family
}

// Server is a server of a Gateway that can be served.
type Server struct {
	At          string // in the Gateway, for messages
	Port        uint16
	Serves      Serves
	Hosts       []ServerHost
	HTTPSOnly   bool
	Tunnelled   bool     // only what comes by the mesh's tunnel (ISTIO_MUTUAL)
	Credentials []string // Secrets, in the namespace of the gateway's pods
	ClientRoots string   // the Secret whose roots clients' certificates are checked against; "" asks for none
	TLS         mesh.ListenerTLS
}

// ServerHost is a host of a server.
type ServerHost struct {
	Namespace string // whose VirtualServices may be for it; "" for all
	Name      string // "*", "*.domain" or a name
}

// GatewayPorts are the ports that a gateway's pods have for themselves.
var GatewayPorts = []uint16{15000, mesh.HBONEPort, 15020, 15021}

// RootsSuffix is what Istio adds to a credential's name for the Secret with the roots of clients.
const RootsSuffix = "-cacert"

// Problem is what of an object cannot be followed, and where in it.
type Problem struct{ Field, Message string }

func (p Problem) String() string { return p.Field + ": " + p.Message }

// ciphers are those that Envoy has for TLS up to 1.2.
var ciphers = []string{
	"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384",
	"ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-RSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-SHA", "ECDHE-RSA-AES128-SHA",
	"ECDHE-ECDSA-AES256-SHA", "ECDHE-RSA-AES256-SHA", "AES128-GCM-SHA256", "AES256-GCM-SHA384", "AES128-SHA", "AES256-SHA",
}

// Gateway returns the servers of a Gateway, and what is wrong with the others: those are not served.
func Gateway(namespace string, g *networking.Gateway) (servers []Server, problems []Problem) {
	if len(g.Selector) == 0 {
		problems = append(problems, Problem{"selector", "it is empty; name the labels of the gateway's pods, as istio: ingressgateway"})
	}
	if len(g.Servers) == 0 {
		problems = append(problems, Problem{"servers", "there is none"})
	}
	for i, s := range g.Servers {
		c := &serverConverter{at: fmt.Sprintf("servers[%d]", i)}
		out := c.server(namespace, s)
		if len(c.problems) > 0 {
			problems = append(problems, c.problems...)
			continue
		}
		servers = append(servers, out)
	}
	return servers, problems
}

type serverConverter struct {
	at       string
	problems []Problem
}

func (c *serverConverter) say(field, format string, args ...any) {
	c.problems = append(c.problems, Problem{c.at + "." + field, fmt.Sprintf(format, args...)})
}

func (c *serverConverter) server(namespace string, s *networking.Server) Server {
	out := Server{At: c.at, Port: uint16(s.GetPort().GetNumber())}
	switch n := s.GetPort().GetNumber(); {
	case n == 0 || n > 65535:
		c.say("port.number", "%d is no port", n)
	case slices.Contains(GatewayPorts, uint16(n)):
		c.say("port.number", "port %d is the gateway's own", n)
	}
	if s.GetBind() != "" {
		c.say("bind", "a server listens on all addresses of the gateway's pods; remove it")
	}
	if s.GetDefaultEndpoint() != "" {
		c.say("defaultEndpoint", "it is not followed; remove it")
	}
	if len(s.GetHosts()) == 0 {
		c.say("hosts", `there is none; write "*" for all`)
	}
	for i, h := range s.GetHosts() {
		ns, name, qualified := strings.Cut(h, "/")
		if !qualified {
			ns, name = "*", h
		}
		switch ns {
		case "*":
			ns = ""
		case ".":
			ns = namespace
		case "":
			c.say(fmt.Sprintf("hosts[%d]", i), "%q has an empty namespace", h)
		}
		name = strings.ToLower(name)
		if !validHost(name) {
			c.say(fmt.Sprintf("hosts[%d]", i), `%q is neither a name of DNS, nor "*.domain", nor "*"`, h)
		}
		out.Hosts = append(out.Hosts, ServerHost{ns, name})
	}
	t := s.GetTls()
	switch protocol := strings.ToUpper(s.GetPort().GetProtocol()); protocol {
	case "HTTP", "HTTP2", "GRPC", "GRPC-WEB":
		out.HTTPSOnly = t.GetHttpsRedirect()
		if t.GetMode() != networking.ServerTLSSettings_PASSTHROUGH || t.GetCredentialName() != "" || len(t.GetCredentialNames()) > 0 {
			c.say("tls", "protocol %s is without TLS, of which there is only httpsRedirect; for TLS write HTTPS", protocol)
		}
	case "HTTPS", "TLS":
		if t == nil {
			c.say("tls", "it is missing; protocol %s needs it", protocol)
			break
		}
		out.Serves = ServesHTTPS
		if protocol == "TLS" {
			out.Serves = ServesTLS
		}
		c.tls(t, &out)
	case "TCP", "MONGO", "MYSQL", "REDIS":
		out.Serves = ServesTCP
		if t != nil {
			out.Serves = ServesTLS
			c.tls(t, &out)
		}
	default:
		c.say("port.protocol", "%q is none of HTTP, HTTPS, HTTP2, GRPC, GRPC-WEB, TLS, TCP, MONGO, MYSQL and REDIS", s.GetPort().GetProtocol())
	}
	return out
}

// validHost reports whether a host is "*", "*.domain" or a name, as Envoy and certificates have them.
func validHost(h string) bool {
	if h == "*" {
		return true
	}
	for label := range strings.SplitSeq(strings.TrimPrefix(h, "*."), ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	return len(h) <= 253
}

var tlsVersions = map[networking.ServerTLSSettings_TLSProtocol]uint16{
	networking.ServerTLSSettings_TLSV1_0: 0x0301, networking.ServerTLSSettings_TLSV1_1: 0x0302,
	networking.ServerTLSSettings_TLSV1_2: 0x0303, networking.ServerTLSSettings_TLSV1_3: 0x0304,
}

func (c *serverConverter) tls(t *networking.ServerTLSSettings, out *Server) {
	switch t.Mode {
	case networking.ServerTLSSettings_PASSTHROUGH:
		out.Serves = ServesSNI
		return
	case networking.ServerTLSSettings_ISTIO_MUTUAL:
		c.tunnelled(t, out)
		return
	case networking.ServerTLSSettings_SIMPLE, networking.ServerTLSSettings_MUTUAL, networking.ServerTLSSettings_OPTIONAL_MUTUAL:
	default:
		c.say("tls.mode", "%s is not followed; use SIMPLE, MUTUAL, OPTIONAL_MUTUAL, ISTIO_MUTUAL or PASSTHROUGH", t.Mode)
		return
	}
	if t.ServerCertificate != "" || t.PrivateKey != "" || t.CaCertificates != "" || t.CaCrl != "" || len(t.TlsCertificates) > 0 {
		c.say("tls", "files in the gateway's pods are not read; put them into a Secret and write credentialName")
	}
	if len(t.SubjectAltNames) > 0 || len(t.VerifyCertificateSpki) > 0 || len(t.VerifyCertificateHash) > 0 || t.InsecureSkipVerify.GetValue() {
		c.say("tls", "subjectAltNames, verifyCertificateSpki, verifyCertificateHash and insecureSkipVerify are not followed: clients' certificates are checked against roots alone")
	}
	names := t.CredentialNames
	if t.CredentialName != "" {
		if len(names) > 0 {
			c.say("tls.credentialNames", "there is credentialName too; write one of them")
		}
		names = []string{t.CredentialName}
	}
	if len(names) == 0 && len(c.problems) == 0 {
		c.say("tls.credentialName", "it is missing: which Secret has the certificate?")
	}
	for _, n := range names {
		out.Credentials = append(out.Credentials, c.credential("tls.credentialName", n))
	}
	if t.Mode != networking.ServerTLSSettings_SIMPLE && len(names) > 0 {
		out.TLS.Optional = t.Mode == networking.ServerTLSSettings_OPTIONAL_MUTUAL
		out.ClientRoots = out.Credentials[0] + RootsSuffix
		if t.CaCertCredentialName != "" {
			out.ClientRoots = c.credential("tls.caCertCredentialName", t.CaCertCredentialName)
		}
	}
	out.TLS.MinVersion, out.TLS.MaxVersion = tlsVersions[t.MinProtocolVersion], tlsVersions[t.MaxProtocolVersion]
	if out.TLS.MinVersion != 0 && out.TLS.MaxVersion != 0 && out.TLS.MinVersion > out.TLS.MaxVersion {
		c.say("tls.minProtocolVersion", "%s is above maxProtocolVersion, %s", t.MinProtocolVersion, t.MaxProtocolVersion)
	}
	for i, name := range t.CipherSuites {
		if !slices.Contains(ciphers, name) {
			c.say(fmt.Sprintf("tls.cipherSuites[%d]", i), "%q is not known", name)
		}
	}
	out.TLS.Ciphers = t.CipherSuites
}

// tunnelled is a server for clients with certificates of the mesh, which come by its tunnel.
func (c *serverConverter) tunnelled(t *networking.ServerTLSSettings, out *Server) {
	if out.Tunnelled = true; out.Serves == ServesHTTPS {
		out.Serves = ServesHTTP
	} else {
		out.Serves = ServesTCP
	}
	if t.CredentialName != "" || len(t.CredentialNames) > 0 || t.CaCertCredentialName != "" || t.ServerCertificate != "" || t.PrivateKey != "" || t.CaCertificates != "" ||
		t.CaCrl != "" || len(t.TlsCertificates) > 0 || len(t.SubjectAltNames) > 0 || len(t.VerifyCertificateSpki) > 0 || len(t.VerifyCertificateHash) > 0 ||
		t.InsecureSkipVerify.GetValue() || t.MinProtocolVersion != 0 || t.MaxProtocolVersion != 0 || len(t.CipherSuites) > 0 {
		c.say("tls", "ISTIO_MUTUAL is the mesh's own TLS, of which nothing else can be set; who may come says an AuthorizationPolicy")
	}
}

// credential is the Secret that a credential's name means.
func (c *serverConverter) credential(field, name string) string {
	name = strings.TrimPrefix(name, "kubernetes://")
	if name == "" || strings.ContainsAny(name, ":/") {
		c.say(field, "%q is not the name of a Secret, which is in the namespace of the gateway's pods", name)
	}
	return name
}

// AtGateway is what a VirtualService says at a Gateway, or within the mesh.
type AtGateway struct {
	HTTP []mesh.HTTPRule // nil where it says nothing about requests
	TLS  []ConnectionRule
	TCP  []ConnectionRule
}

// ConnectionRule is where connections go.
type ConnectionRule struct {
	Name     string
	Port     uint16           // of the gateway; 0 for all
	Names    []string         // in TLS
	Only     *mesh.RoutedOnly // within the mesh; nil: all
	Backends []mesh.HTTPBackend
}

// VirtualServiceAt returns what a VirtualService says at one of its Gateways, and in words what of it does not work. here
// reports whether a list of gateways in a match has that Gateway.
func VirtualServiceAt(namespace, name string, v *networking.VirtualService, here func([]string) bool, resolve Resolve) (*AtGateway, []string) {
	c := &converter{namespace: namespace, resolve: resolve, here: here}
	out := &AtGateway{}
	if len(v.Http) > 0 {
		out.HTTP = c.http(namespace+"/"+name, v.Http)
	}
	out.TLS, out.TCP = c.connectionRules(namespace, name, v)
	for _, rules := range []*[]ConnectionRule{&out.TLS, &out.TCP} { // what nothing is for is closed
		*rules = slices.DeleteFunc(*rules, func(r ConnectionRule) bool { return r.Backends == nil })
	}
	return out, c.problems
}

// connectionRules are the tls and the tcp routes of a VirtualService that are for here. One that cannot be followed has no backends.
func (c *converter) connectionRules(namespace, name string, v *networking.VirtualService) (byName, all []ConnectionRule) {
	for i, r := range v.Tls {
		c.at = fmt.Sprintf("tls[%d]", i)
		backends := c.connections(r.Route)
		for j, m := range r.Match {
			switch {
			case len(m.Gateways) > 0 && !c.here(m.Gateways):
			case c.unknown(j, m.SourceLabels, len(m.DestinationSubnets) > 0 || m.SourceNamespace != ""):
			case m.Port > 65535 || len(m.SniHosts) == 0 || slices.ContainsFunc(m.SniHosts, func(h string) bool { return !validHost(strings.ToLower(h)) }):
				c.say("match[%d] has no sniHosts, or one that is no host, or a port above 65535: it matches nothing", j)
			default:
				only, ok := c.only(j, m.SourceNamespace, "", m.DestinationSubnets)
				if !ok {
					continue
				}
				rule := ConnectionRule{Name: fmt.Sprintf("%s/%s/%d/%d", namespace, name, i, j), Port: uint16(m.Port), Only: only, Backends: backends}
				for _, h := range m.SniHosts {
					rule.Names = append(rule.Names, strings.ToLower(h))
				}
				byName = append(byName, rule)
			}
		}
	}
	for i, r := range v.Tcp {
		c.at = fmt.Sprintf("tcp[%d]", i)
		backends := c.connections(r.Route)
		rule := ConnectionRule{Name: fmt.Sprintf("%s/%s/%d", namespace, name, i), Backends: backends}
		if len(r.Match) == 0 {
			all = append(all, rule)
		}
		for j, m := range r.Match {
			switch {
			case len(m.Gateways) > 0 && !c.here(m.Gateways):
			case c.unknown(j, m.SourceLabels, len(m.DestinationSubnets) > 0 || m.SourceSubnet != "" || m.SourceNamespace != ""):
			case m.Port > 65535:
				c.say("match[%d] has a port above 65535: it matches nothing", j)
			default:
				var ok bool
				if rule.Only, ok = c.only(j, m.SourceNamespace, m.SourceSubnet, m.DestinationSubnets); ok {
					rule.Port = uint16(m.Port)
					all = append(all, rule)
				}
			}
		}
	}
	return byName, all
}

// unknown reports whether a match of connections is by what is not known here. Which clients have labels is told to route tables alone: a
// listener that was told would change, and with it all that it serves, with each pod that comes.
func (c *converter) unknown(match int, labels map[string]string, more bool) bool {
	switch {
	case len(labels) > 0:
		c.say("match[%d] has sourceLabels, which are followed for requests alone: it matches nothing", match)
	case more && !c.sends:
		c.say("match[%d] has destinationSubnets, sourceSubnet or sourceNamespace, which are followed within the mesh alone: it matches nothing", match)
	default:
		return false
	}
	return true
}

// only is what a match says of connections beside their port and server name, nil for nothing; ok is false where that is no range.
func (c *converter) only(match int, namespace, source string, destinations []string) (_ *mesh.RoutedOnly, ok bool) {
	out := &mesh.RoutedOnly{Source: namespace}
	ranges := func(field string, list []string) (all []netip.Prefix) {
		for _, s := range list {
			p, ok := mesh.ParseRange(s)
			if !ok {
				c.say("match[%d].%s: %q is neither an address nor a range: it matches nothing", match, field, s)
				return nil
			}
			all = append(all, p)
		}
		return all
	}
	if source != "" {
		if out.From = ranges("sourceSubnet", []string{source}); out.From == nil {
			return nil, false
		}
	}
	if len(destinations) > 0 {
		if out.To = ranges("destinationSubnets", destinations); out.To == nil {
			return nil, false
		}
	}
	if namespace == "" && out.From == nil && out.To == nil {
		return nil, true
	}
	return out, true
}

// connections are where connections go; nil where that cannot be followed.
func (c *converter) connections(routes []*networking.RouteDestination) (out []mesh.HTTPBackend) {
	var total int64
	for _, d := range routes {
		b, ok := c.destination(d.Destination)
		if !ok || d.Weight < 0 {
			c.say("a destination without a host, with a port above 65535 or with a negative weight: connections that it matches are closed")
			return nil
		}
		b.Weight = uint32(d.Weight)
		total += int64(d.Weight)
		out = append(out, b)
	}
	switch {
	case len(out) == 1:
		out[0].Weight = 1 // whatever its weight
	case total == 0 || total > 1<<32-1:
		c.say("it has no destination with a weight, or weights above 2^32-1 together: connections that it matches are closed")
		return nil
	}
	return out
}

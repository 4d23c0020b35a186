package mesh

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// Hosts are the hosts of ServiceEntries that pods may ask DNS for, in lower case, each with the services that have it in the order
// of their names. A host that a Kubernetes Service has as well is the cluster's DNS' own. "*.domain" is every name below.
//
// Names in the cluster's domain are for the namespace in them alone to have, as its Services are: the resolvers of other
// namespaces' pods try them first for whatever they are asked (search domains).
func (s *Snapshot) Hosts() map[string][]*Service {
	out := map[string][]*Service{}
	domain := "." + strings.ToLower(cmp.Or(s.config.ClusterDomain, "cluster.local"))
	for svc := range s.Services() {
		if svc.Canonical { // a Kubernetes Service, as nearly all are
			continue
		}
		host := hostOf(svc)
		if strings.Contains(strings.TrimPrefix(host, "*."), "*") || strings.HasSuffix(host, domain) && !strings.HasSuffix(host, "."+svc.Name.Namespace+".svc"+domain) {
			continue
		}
		out[host] = append(out[host], svc)
	}
	if len(out) == 0 {
		return out
	}
	for svc := range s.Services() {
		if svc.Canonical {
			delete(out, hostOf(svc))
		}
	}
	for _, list := range out {
		slices.SortFunc(list, func(a, b *Service) int { return a.Name.Compare(b.Name) })
	}
	return out
}

func hostOf(s *Service) string { return strings.ToLower(strings.TrimSuffix(s.Name.Hostname, ".")) }

// Meant is which of the services of one host, in order, the pods of a namespace mean by it: of those that they know the namespace's
// own, or the first. Nil: they know none. The pods of "" are those of a namespace that none of the services is in or is made
// known to by name.
func Meant(services []*Service, namespace string) *Service {
	var first *Service
	for _, svc := range services {
		if !svc.Visible(namespace) {
			continue
		}
		if svc.Name.Namespace == namespace {
			return svc
		}
		if first == nil {
			first = svc
		}
	}
	return first
}

// Where the addresses of hosts that have none of their own are from, as Istio takes them; nothing else has them.
var (
	Allocated4 = netip.MustParsePrefix("240.240.0.0/16")
	Allocated6 = netip.MustParsePrefix("2001:2::/48")
)

// Allocated reports whether an address is of those ranges: it leads nowhere but by the mesh.
func Allocated(a netip.Addr) bool { return Allocated4.Contains(a) || Allocated6.Contains(a) }

// DNSCapture says whether the node answers a pod's questions for hosts of ServiceEntries.
type DNSCapture uint8

const (
	DNSCaptureUnsaid DNSCapture = iota // as the node is set
	DNSCaptureOff
	DNSCaptureOn
)

// On reports whether it does, where the node is set to that or not.
func (c DNSCapture) On(node bool) bool {
	return c == DNSCaptureOn || node && c != DNSCaptureOff
}

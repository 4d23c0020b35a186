package datapath

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// The kernel answers captured pods that ask DNS for a host of a ServiceEntry (bpf/dns.h): whoever connects by that name comes to
// the address that the mesh knows it by. What stands here is
//
//	dns_names    the hosts, each with its addresses: for all pods, and beside that for those of a namespace that mean
//	             another service by it, or alone know one
//	dns_clients  the pods whose questions are looked at: none where there is no host that they know
//
// No agent is in the way of a question, and rows that an earlier process wrote hold until its successor knows the mesh and its pods.

// resolver is what the agent knows of it, and what that depends on.
type resolver struct {
	names   *table[bpf.MeshDnsKey, bpf.MeshDnsAnswer]
	clients *table[uint32, bpf.MeshDnsClient] // by the node's interface

	at      *mesh.Snapshot             // of the last SetNames; nil before
	known   map[string][]*mesh.Service // its hosts: pods come more often than those change
	network string
	read    bool   // the tables know what an earlier process left
	told    string // the problem that was logged
}

func newResolver(k *bpf.MeshObjects) resolver {
	return resolver{
		names:   newTable[bpf.MeshDnsKey, bpf.MeshDnsAnswer]("dns_names", k.DnsNames),
		clients: newTable[uint32, bpf.MeshDnsClient]("dns_clients", k.DnsClients),
	}
}

// everyone is the scope of the rows for all pods.
const everyone = 0

// scopeOf is the number of a namespace in the kernel, which is the same in any process.
func scopeOf(namespace string) uint64 {
	sum := sha256.Sum256([]byte(namespace))
	return max(binary.LittleEndian.Uint64(sum[:]), everyone+1)
}

// answers is what the kernel is to know of names.
type answers struct {
	rows     map[bpf.MeshDnsKey]bpf.MeshDnsAnswer
	problems []error // hosts that pods ask their resolver for, though they have an address
}

// answersOf computes it of the hosts of a Snapshot, for the pods of some namespaces, in a network. to says which addresses are captured.
func answersOf(s *mesh.Snapshot, hosts map[string][]*mesh.Service, network string, to Destinations, namespaces map[string]bool) answers {
	out := answers{rows: map[bpf.MeshDnsKey]bpf.MeshDnsAnswer{}}
	for host, all := range hosts {
		addrs := map[*mesh.Service][]netip.Addr{}
		var services []*mesh.Service
		for _, svc := range all {
			if a := reachedBy(s, svc, network, to); len(a) > 0 {
				addrs[svc] = a
				services = append(services, svc)
			}
		}
		if len(services) == 0 {
			continue
		}
		k, err := kernelName(host)
		if err != nil {
			out.problems = append(out.problems, err)
			continue
		}
		all := mesh.Meant(services, "")
		if all != nil {
			k.Scope = everyone
			out.rows[k] = kernelAnswer(addrs[all])
		}
		for ns := range namespaces {
			if svc := mesh.Meant(services, ns); svc != nil && svc != all {
				k.Scope = scopeOf(ns)
				out.rows[k] = kernelAnswer(addrs[svc])
			}
		}
	}
	return out
}

// reachedBy are the addresses of a service that lead to it: captured ones, those of servers that are called directly, and
// those of its endpoints. An answer with any other would keep pods from what their resolver may know. So would any answer where
// nothing but UDP is declared, which the mesh does not carry: such a service has no ports.
func reachedBy(s *mesh.Snapshot, svc *mesh.Service, network string, to Destinations) (out []netip.Addr) {
	if len(svc.Ports) == 0 {
		return nil
	}
	below := strings.HasPrefix(svc.Name.Hostname, "*")
	for _, vip := range svc.VIPs {
		a := vip.Addr.Unmap()
		if vip.Network != network || slices.Contains(out, a) {
			continue
		}
		captured := to.Captured(a) && (!below || mesh.Allocated(a) || hasEndpoint(s, svc)) // allocated: the waypoint goes on by the name
		direct := svc.LB.Mode == mesh.LBPassthrough && !below                              // all names below are not one server's
		if captured || direct || isEndpoint(s, svc, vip) {
			out = append(out, a)
		}
	}
	return out
}

func hasEndpoint(s *mesh.Snapshot, svc *mesh.Service) bool {
	for range s.Endpoints(svc.Name) {
		return true
	}
	return false
}

func isEndpoint(s *mesh.Snapshot, svc *mesh.Service, at mesh.NetAddr) bool {
	for w := range s.Endpoints(svc.Name) {
		if w.Network == at.Network && slices.ContainsFunc(w.Addrs, func(a netip.Addr) bool { return a.Unmap() == at.Addr.Unmap() }) {
			return true
		}
	}
	return false
}

// kernelName is a host as on the wire, for no scope yet.
func kernelName(host string) (k bpf.MeshDnsKey, err error) {
	at := 0
	for label := range strings.SplitSeq(host, ".") {
		// The zeros of the root and after the name have to fit, too: 255 bytes are the longest name.
		if len(label) == 0 || len(label) > 63 || at+1+len(label) > len(k.Name)-2 {
			return k, fmt.Errorf("%q is no name that DNS knows", host)
		}
		k.Name[at] = byte(len(label))
		copy(k.Name[at+1:], label)
		at += 1 + len(label)
	}
	return k, nil
}

// kernelAnswer takes as many addresses of each family as an answer has room for; each of them leads there.
func kernelAnswer(addrs []netip.Addr) (out bpf.MeshDnsAnswer) {
	for _, a := range addrs {
		if k := kernelAddr(a); a.Is4() && int(out.V4Count) < len(out.V4) {
			out.V4[out.V4Count] = k.W[3]
			out.V4Count++
		} else if a.Is6() && int(out.V6Count) < len(out.V6) {
			out.V6[out.V6Count] = k
			out.V6Count++
		}
	}
	return out
}

// SetNames has the kernel answer for the hosts that a Snapshot has, as seen from a network. It comes after SetDestinations: an
// answer leads to what is captured by then.
func (d *Datapath) SetNames(s *mesh.Snapshot, network string) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	if s.Revision() == 0 {
		return nil // nothing is known: what an earlier process knew holds
	}
	d.hosts.at, d.hosts.known, d.hosts.network = s, s.Hosts(), network
	return d.applyNames()
}

// applyNames brings the kernel's names into line with the last Snapshot and the pods that are enrolled. A pod's row comes after the
// names that it is for, and goes before them.
func (d *Datapath) applyNames() error {
	x := &d.hosts
	if x.at == nil || d.dest == nil {
		return nil
	}
	if !x.read {
		if _, err := x.compare(); err != nil {
			return err
		}
		x.read = true
	}
	clients := map[uint32]bpf.MeshDnsClient{}
	namespaces := map[string]bool{}
	kept := map[uint64]bool{} // scopes of pods that an earlier process enrolled and this one not yet
	for uid, r := range d.pods {
		ifindex := r.pod.Ifindex
		p, given := d.given[uid]
		if row, have := x.clients.have[ifindex]; !given && have {
			clients[ifindex] = row
			kept[row.Scope] = true
		} else if given && p.ResolvesNames {
			namespaces[p.Identity.Namespace] = true
			clients[ifindex] = bpf.MeshDnsClient{Scope: scopeOf(p.Identity.Namespace), Ifindex: ifindex}
		}
	}
	want := answersOf(x.at, x.known, x.network, *d.dest, namespaces)
	for k, v := range x.names.have {
		if _, ok := want.rows[k]; !ok && kept[k.Scope] {
			want.rows[k] = v
		}
	}
	scopes, below := map[uint64]bool{}, map[uint64]bool{}
	for k := range want.rows {
		scopes[k.Scope] = true
		if k.Name[0] == 1 && k.Name[1] == '*' {
			below[k.Scope] = true
		}
	}
	for ifindex, c := range clients {
		if !scopes[everyone] && !scopes[c.Scope] {
			delete(clients, ifindex) // nothing to answer: its datagrams are not looked at
			continue
		}
		c.Below = 0
		if below[everyone] || below[c.Scope] {
			c.Below = 1
		}
		clients[ifindex] = c
	}

	missing, err := x.names.putOrRemove(want.rows)
	if missing > 0 {
		want.problems = append(want.problems, fmt.Errorf("no room for %d names", missing))
	}
	err = errors.Join(err, x.clients.keep(clients), x.clients.putAll(clients), x.names.keep(want.rows))
	d.tellNames(want.problems)
	return err
}

// tellNames logs what is left to the pods' resolvers, once.
func (d *Datapath) tellNames(problems []error) {
	text := ""
	if err := errors.Join(problems...); err != nil {
		text = err.Error()
	}
	if text != d.hosts.told && text != "" {
		d.cfg.Log.Warn("hosts of ServiceEntries are left to the pods' resolvers", "why", text)
	}
	d.hosts.told = text
}

// releaseNames leaves a pod's questions alone.
func (d *Datapath) releaseNames(uid string, r record) error {
	if d.interfaceShared(uid, r.pod.Ifindex) {
		return nil
	}
	return d.hosts.clients.remove(r.pod.Ifindex)
}

// compare reads what the kernel has. It returns how many rows were not as they should be.
func (x *resolver) compare() (drift map[string]int, err error) {
	names, err := x.names.compare()
	if err != nil {
		return nil, err
	}
	clients, err := x.clients.compare()
	return map[string]int{x.names.name: names, x.clients.name: clients}, err
}

// auditNames compares the kernel's names with those of the last SetNames.
func (d *Datapath) auditNames() error {
	if d.hosts.at == nil || !d.hosts.read {
		return nil
	}
	drift, err := d.hosts.compare()
	if err != nil {
		return err
	}
	for name, n := range drift {
		if n > 0 {
			d.drifted(name, n)
		}
	}
	return d.applyNames()
}

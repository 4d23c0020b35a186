package datapath

import (
	"iter"
	"maps"
	"net/netip"
	"slices"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Destinations says of addresses whether connections to them are captured. An address itself counts, then the longest
// prefix around it; what is in neither is left alone.
type Destinations struct {
	Addrs    map[netip.Addr]bool
	Prefixes map[netip.Prefix]bool // of ServiceEntries
}

// Captured reports whether connections to an address are captured.
func (d Destinations) Captured(a netip.Addr) bool {
	if captured, ok := d.Addrs[a]; ok {
		return captured
	}
	bits, captured := -1, false
	for p, c := range d.Prefixes {
		if p.Bits() > bits && p.Contains(a) {
			bits, captured = p.Bits(), c
		}
	}
	return captured
}

// everything is all addresses, for what the mesh does not know.
var everything = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

// View is the part of a snapshot that decides about capture.
type View interface {
	Workloads() iter.Seq[*mesh.Workload]
	Services() iter.Seq[*mesh.Service]
	Config() mesh.Config
	Private(*mesh.Workload) bool
}

// Desired computes which addresses are mesh as seen from a network: those of workloads that are reached by
// HBONE or through a waypoint, and those of services that have such an endpoint or a waypoint of their own.
// A service with none of these is left alone: its connections never touch the agent. An address that was allocated leads
// nowhere but by the agent, though, so that it is captured where the agent knows an endpoint.
//
// Where pods may reach only what the mesh knows, every other address is captured too, and the agent refuses it; what
// the mesh knows and is left alone is entered as that. What is for some namespaces alone (exportTo) is captured then, because
// the agent knows the client's.
func Desired(v View, network string) Destinations {
	d := Destinations{Addrs: map[netip.Addr]bool{}, Prefixes: map[netip.Prefix]bool{}}
	registryOnly := v.Config().RegistryOnly
	if registryOnly {
		for _, p := range everything {
			d.Prefixes[p] = true
		}
	}
	meshed := map[mesh.ServiceName]struct{}{}
	allocated := map[mesh.ServiceName]struct{}{}
	for s := range v.Services() {
		if slices.ContainsFunc(s.VIPs, func(vip mesh.NetAddr) bool { return mesh.Allocated(vip.Addr) }) {
			allocated[s.Name] = struct{}{}
		}
	}
	hosts := map[netip.Addr]struct{}{}
	for w := range v.Workloads() {
		captured := w.Tunnel == mesh.TunnelHBONE || w.Waypoint != nil
		if len(allocated) > 0 && len(w.Addrs) > 0 && w.Network == network {
			for name := range w.Services {
				if _, ok := allocated[name]; ok {
					meshed[name] = struct{}{}
				}
			}
		}
		if !captured && !registryOnly {
			continue
		}
		if captured {
			for name := range w.Services {
				meshed[name] = struct{}{}
			}
		}
		switch {
		case w.Network != network:
		case w.HostNetwork && !captured:
			for _, a := range w.Addrs {
				hosts[a.Unmap()] = struct{}{}
			}
		default:
			for _, a := range w.Addrs {
				d.Addrs[a.Unmap()] = d.Addrs[a.Unmap()] || captured || v.Private(w)
			}
		}
	}
	nets := map[netip.Prefix]bool{}
	for s := range v.Services() {
		_, captured := meshed[s.Name]
		captured = captured || s.Waypoint != nil
		if !captured && !registryOnly {
			continue
		}
		captured = captured || s.Limited()
		for _, vip := range s.VIPs {
			if vip.Network == network {
				d.Addrs[vip.Addr.Unmap()] = d.Addrs[vip.Addr.Unmap()] || captured
			}
		}
		for _, p := range s.VIPNets {
			if p.Network == network {
				nets[p.Prefix.Masked()] = nets[p.Prefix.Masked()] || captured
			}
		}
	}
	maps.Copy(d.Prefixes, nets) // also over everything: it is what a ServiceEntry may declare
	declared := Destinations{Prefixes: nets}
	for a := range hosts { // which come after the prefixes of services, as Resolve has it
		d.Addrs[a] = d.Addrs[a] || declared.Captured(a)
	}
	return d
}

package datapath

import (
	"iter"
	"net/netip"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Destinations are the addresses whose connections are captured.
type Destinations struct {
	Addrs    map[netip.Addr]struct{}
	Prefixes map[netip.Prefix]struct{} // of ServiceEntries
}

// View is the part of a snapshot that decides about capture.
type View interface {
	Workloads() iter.Seq[*mesh.Workload]
	Services() iter.Seq[*mesh.Service]
}

// Desired computes which addresses are mesh as seen from a network: those of workloads that are reached by
// HBONE or through a waypoint, and those of services that have such an endpoint or a waypoint of their own.
// A service with none of these is left alone: its connections never touch the agent.
func Desired(v View, network string) Destinations {
	d := Destinations{Addrs: map[netip.Addr]struct{}{}, Prefixes: map[netip.Prefix]struct{}{}}
	meshed := map[mesh.ServiceName]struct{}{}
	for w := range v.Workloads() {
		if w.Tunnel != mesh.TunnelHBONE && w.Waypoint == nil {
			continue
		}
		for name := range w.Services {
			meshed[name] = struct{}{}
		}
		if w.Network == network {
			for _, a := range w.Addrs {
				d.Addrs[a.Unmap()] = struct{}{}
			}
		}
	}
	for s := range v.Services() {
		if _, ok := meshed[s.Name]; !ok && s.Waypoint == nil {
			continue
		}
		for _, vip := range s.VIPs {
			if vip.Network == network {
				d.Addrs[vip.Addr.Unmap()] = struct{}{}
			}
		}
		for _, p := range s.VIPNets {
			if p.Network == network {
				d.Prefixes[p.Prefix.Masked()] = struct{}{}
			}
		}
	}
	return d
}

package datapath

import (
	"fmt"
	"net/netip"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// What the kernel knows of Services is which draws fall to endpoints on this node (bpf/service.h): for these it chooses
// the endpoint at connect, so that connections by a Service's address may go directly too. It decides nothing that the
// agent would decide otherwise: both draw from the same numbers, mesh.Snapshot.Shares.

const (
	// drawShift is where in the mark a draw is, 1 for the number 0.
	drawShift = 12
	// maxDraws is how many numbers the mark has room for, and maxServiceDraws how many rows a port of a Service may take.
	// One that needs more, by the weights of its endpoints, is the agent's.
	maxDraws        = 1<<(32-drawShift) - 2
	maxServiceDraws = 4096
)

// services is what the agent knows of the kernel's Services.
type services struct {
	ports    *table[bpf.MeshTarget, uint32]
	draws    *table[bpf.MeshServiceDraw, bpf.MeshEndpoint]
	names    map[mesh.ServiceName]bool // that have an endpoint here
	problems []error                   // what is left to the agent and why
}

func newServices(k *bpf.MeshObjects) services {
	return services{
		ports: newTable[bpf.MeshTarget, uint32]("services", k.Services),
		draws: newTable[bpf.MeshServiceDraw, bpf.MeshEndpoint]("service_draws", k.ServiceDraws),
	}
}

// unaffected reports whether the endpoints of these Services are the same in two Snapshots whose Services are.
func (x *services) unaffected(old, now *mesh.Snapshot) bool {
	workloads, _, _ := now.Changes(old)
	for c := range workloads {
		for _, w := range []*mesh.Workload{c.Old, c.New} {
			if w == nil {
				continue
			}
			for name := range w.Services {
				if x.names[name] {
					return false
				}
			}
		}
	}
	return true
}

// draws is what the kernel is to know of Services.
type draws struct {
	ports map[bpf.MeshTarget]uint32
	rows  map[bpf.MeshServiceDraw]bpf.MeshEndpoint
	names map[mesh.ServiceName]bool
}

// drawsOf computes it from a Snapshot, for the pods that connections may go to directly. All clients are pods of the
// node; should they be in different places nonetheless, the agent has all of it.
func drawsOf(s *mesh.Snapshot, pods []*mesh.Workload, direct map[*mesh.Workload]bool) draws {
	out := draws{ports: map[bpf.MeshTarget]uint32{}, rows: map[bpf.MeshServiceDraw]bpf.MeshEndpoint{}, names: map[mesh.ServiceName]bool{}}
	for _, w := range pods {
		if o := pods[0]; w.Network != o.Network || w.Cluster != o.Cluster || w.Node != o.Node || w.Locality != o.Locality {
			return out
		}
	}
	for w := range direct {
		for name := range w.Services {
			svc := s.Service(name)
			if svc == nil || out.names[name] {
				continue
			}
			out.names[name] = true
			for _, vip := range svc.VIPs {
				if vip.Network != w.Network {
					continue
				}
				for _, p := range svc.Ports {
					out.port(s, w, netip.AddrPortFrom(vip.Addr.Unmap(), p.Port), direct)
				}
			}
		}
	}
	return out
}

func (d *draws) port(s *mesh.Snapshot, src *mesh.Workload, at netip.AddrPort, direct map[*mesh.Workload]bool) {
	total, shares := s.Shares(src, at)
	rows := 0
	for _, x := range shares {
		if direct[x.Workload] {
			rows += x.Count
		}
	}
	if total > maxDraws || rows == 0 || rows > maxServiceDraws {
		return
	}
	service := kernelTarget(at)
	d.ports[service] = uint32(total)
	for _, x := range shares {
		if !direct[x.Workload] || x.At.Addr().Is4() != at.Addr().Is4() {
			continue
		}
		for i := range x.Count {
			d.rows[bpf.MeshServiceDraw{Service: service, Draw: uint32(x.First + i)}] = bpf.MeshEndpoint{Service: service, At: kernelTarget(x.At)}
		}
	}
}

func kernelTarget(a netip.AddrPort) bpf.MeshTarget {
	return bpf.MeshTarget{Addr: kernelAddr(a.Addr()), Port: uint32(a.Port())}
}

// applyServices writes the draws of the last Snapshot. What is not wanted any more goes first: a connection that is begun
// when it returns is not sent to an endpoint that has left. What there is no room for is the agent's.
func (d *Datapath) applyServices() error {
	g := d.gates
	var pods []*mesh.Workload
	direct := map[*mesh.Workload]bool{}
	for uid, p := range d.given {
		w := g.compiler.s.Workload(p.Workload)
		if w == nil {
			continue
		}
		pods = append(pods, w)
		if g.wanted.pods[uid].flags&bpf.MeshGateFlagsGATE_DIRECT != 0 {
			direct[w] = true
		}
	}
	want := drawsOf(g.compiler.s, pods, direct)
	x := &g.services
	x.names, x.problems = want.names, nil
	if err := x.ports.keep(want.ports); err != nil {
		return err
	}
	if err := x.draws.keep(want.rows); err != nil {
		return err
	}
	full, err := x.draws.putOrRemove(want.rows)
	if err != nil {
		return err
	}
	fullPorts, err := x.ports.putOrRemove(want.ports)
	if err != nil {
		return err
	}
	if n := full + fullPorts; n > 0 {
		x.problems = append(x.problems, fmt.Errorf("endpoints of Services: no room for %d rows", n))
	}
	return nil
}

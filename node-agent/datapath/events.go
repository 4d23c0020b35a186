package datapath

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// EventKind is what an Event tells of.
type EventKind uint8

const (
	Denied   EventKind = iota // the kernel refused a connection by policy
	Opened                    // a direct connection between two pods of this node
	Closed                    // its end
	Datagram                  // the kernel dropped a UDP datagram by policy
)

// Event is something that the kernel decided without the agent.
type Event struct {
	Kind      EventKind
	Time      time.Time
	Client    netip.AddrPort // the port is 0 where the connection was refused before it had one
	Server    netip.AddrPort // of the pod
	Service   netip.AddrPort // of the Service that the application asked for; zero: of the pod itself
	ClientPod string         // Kubernetes' UID of a captured pod of this node; "" for a client from elsewhere
	ServerPod string
	Source    mesh.Identity // the client's, asserted by the kernel; zero for plaintext from elsewhere
	Verdict   mesh.Verdict  // Denied, Datagram: by which policy and why. AUDIT and dry runs are not in it: ask Snapshot.Authorize

	// Of Closed.
	Opened         time.Time
	Sent, Received uint64 // bytes, as the client sees it
}

// eventIndex turns the kernel's numbers back into names.
type eventIndex struct {
	pods       map[uint32]string // UID by slot
	rules      map[uint64]*mesh.Compiled
	identities map[uint64]mesh.Identity
}

// newEventIndex keeps what the index before it knew for as long as the kernel may still speak of it.
func newEventIndex(d *Datapath, g *gatekeeper) *eventIndex {
	x := &eventIndex{pods: map[uint32]string{}, rules: map[uint64]*mesh.Compiled{}, identities: map[uint64]mesh.Identity{}}
	if old := d.index.Load(); old != nil {
		for id, c := range old.rules {
			if _, ok := g.rulesets.have[id]; ok {
				x.rules[id] = c
			}
		}
		for k := range g.identities.have {
			if who, ok := old.identities[k.Identity]; ok {
				x.identities[k.Identity] = who
			}
		}
	}
	for uid, r := range d.pods {
		x.pods[r.pod.Slot] = uid
	}
	for id, set := range g.wanted.sets {
		x.rules[id] = set.compiled
	}
	for _, known := range []map[uint64]mesh.Identity{g.wanted.identities, g.wanted.remote} {
		for id, who := range known {
			x.identities[id] = who
		}
	}
	return x
}

// eventsEvery is how often events are read for which the kernel wakes nobody: beginnings and ends of direct
// connections, which at thousands a second would cost more to hear of than to make. Where none come that grows to
// eventsIdle: to look ten times a second would be most of what an agent at rest does. When many wait, the kernel wakes.
const (
	eventsEvery = 100 * time.Millisecond
	eventsIdle  = time.Second
)

// Events yields what the kernel decides without the agent, as it happens, until ctx ends or another process is the
// writer. One caller at a time. Denials are told up to 100 a second and pod; how many were left out, and how many
// events came while nobody read, are the outcomes event_limited and event_lost.
func (d *Datapath) Events(ctx context.Context) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		ended := make(chan struct{})
		defer close(ended)
		d.mu.Lock()
		yielded := d.lock == nil
		d.stopEvents, d.eventsEnded = cancel, ended
		d.mu.Unlock()
		if yielded {
			return
		}
		r, err := ringbuf.NewReader(d.kernel.Events)
		if err != nil {
			yield(Event{}, fmt.Errorf("read the kernel's events: %w", err))
			return
		}
		stop := context.AfterFunc(ctx, func() { r.Close() })
		defer stop()
		defer r.Close()
		var rec ringbuf.Record
		r.SetDeadline(time.Now())
		boot := bootTime()
		var late uint64
		every, came := eventsEvery, false
		for {
			err := r.ReadInto(&rec)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				if every = min(2*every, eventsIdle); came {
					every, came = eventsEvery, false
				}
				r.SetDeadline(time.Now().Add(every))
				boot = bootTime() // the clock may have been set
				if n, err := d.counter(uint32(bpf.MeshOutcomeEVENT_LATE)); err == nil && n != late {
					late = n
					for _, e := range d.lateEvents() {
						if !yield(d.event(&e, boot), nil) {
							return
						}
					}
				}
				continue
			}
			if errors.Is(err, ringbuf.ErrClosed) {
				return
			} else if err != nil {
				yield(Event{}, fmt.Errorf("read the kernel's events: %w", err))
				return
			}
			came = true
			if len(rec.RawSample) < int(unsafe.Sizeof(bpf.MeshEvent{})) {
				continue
			}
			raw := *(*bpf.MeshEvent)(unsafe.Pointer(&rec.RawSample[0]))
			if !yield(d.event(&raw, boot), nil) {
				return
			}
		}
	}
}

// lateEvents takes the ends of connections out of the map of direct connections that the kernel could not tell.
func (d *Datapath) lateEvents() (out []bpf.MeshEvent) {
	var f bpf.MeshFlow
	var v bpf.MeshDirect
	for it := d.kernel.Directs.Iterate(); it.Next(&f, &v); {
		if v.Closed != 0 {
			out = append(out, bpf.MeshEvent{At: v.Closed, Born: v.Established, Rules: v.Rules, Identity: v.Identity, Sent: v.Sent, Received: v.Received,
				Kind: bpf.MeshEventKindEVENT_CLOSED, ClientSlot: v.ClientSlot, ServerSlot: v.ServerSlot, Flow: f, Service: v.Service})
		}
	}
	for i := range out { // one that is not there any more has been told, or another connection has its ports
		if err := d.kernel.Directs.Delete(out[i].Flow); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			d.cfg.Log.Warn("forgetting a connection that has ended", "error", err)
		}
	}
	return out
}

func (d *Datapath) event(e *bpf.MeshEvent, boot time.Time) Event {
	out := Event{
		Time:   boot.Add(time.Duration(e.At)),
		Client: netip.AddrPortFrom(goAddr(e.Flow.Client), e.Flow.ClientPort),
		Server: netip.AddrPortFrom(goAddr(e.Flow.Server), e.Flow.ServerPort),
	}
	if e.Service.Port != 0 {
		out.Service = netip.AddrPortFrom(goAddr(e.Service.Addr), uint16(e.Service.Port))
	}
	x := d.index.Load()
	if x == nil {
		x = &eventIndex{}
	}
	out.ClientPod, out.ServerPod, out.Source = x.pods[e.ClientSlot], x.pods[e.ServerSlot], x.identities[e.Identity]
	switch e.Kind {
	case bpf.MeshEventKindEVENT_DENIED, bpf.MeshEventKindEVENT_DENIED_UDP:
		if out.Kind = Denied; e.Kind == bpf.MeshEventKindEVENT_DENIED_UDP {
			out.Kind = Datagram
		}
		out.Verdict = mesh.Verdict{Why: mesh.WhyDenied} // by a policy that is not in force any more
		if c := x.rules[e.Rules]; c != nil {
			term := -1
			if e.Word < uint32(len(bpf.MeshWords{}.W)) {
				term = int(e.Word)*64 + bits.TrailingZeros64(e.Hit)
			}
			out.Verdict = c.Because(term)
		}
	case bpf.MeshEventKindEVENT_OPENED:
		out.Kind = Opened
	case bpf.MeshEventKindEVENT_CLOSED:
		out.Kind, out.Opened, out.Sent, out.Received = Closed, boot.Add(time.Duration(e.Born)), e.Sent, e.Received
	}
	return out
}

// bootTime is when the kernel's monotonic clock began.
func bootTime() time.Time {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return time.Now()
	}
	return time.Now().Add(-time.Duration(now.Nano()))
}

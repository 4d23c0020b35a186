package datapath

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

var catalogService = mesh.ServiceName{Namespace: "shop", Hostname: "catalog.shop.svc.cluster.local"}

// service is a mesh in which the catalog is behind a Service, with as many endpoints elsewhere.
func (l *lab) service(mode mesh.SameNode, elsewhere int, policies ...*mesh.Policy) *mesh.Builder {
	b := mesh.NewBuilder(l.snapshot(mode, policies...))
	b.PutService(&mesh.Service{Name: catalogService, Short: "catalog", VIPs: []mesh.NetAddr{{Addr: vip4}, {Addr: vip6}},
		Ports: []mesh.ServicePort{{Port: servicePort, Target: appPort}, {Port: 81}}})
	backs := map[mesh.ServiceName][]mesh.ServicePort{catalogService: {{Port: servicePort, Target: appPort}, {Port: 81, Target: appPort}}}
	w := l.cat.workload()
	for _, p := range policies {
		w.Policies = append(w.Policies, p.Name)
	}
	w.Services = backs
	b.PutWorkload(w)
	for i := range elsewhere {
		b.PutWorkload(&mesh.Workload{UID: fmt.Sprintf("cluster//Pod/shop/far-%d", i), Name: fmt.Sprint("far-", i), Namespace: "shop", Node: "elsewhere",
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)})}, Identity: l.cat.identity(), Tunnel: mesh.TunnelHBONE, Healthy: true, Services: backs})
	}
	return b
}

var vips = []netip.AddrPort{netip.AddrPortFrom(vip4, servicePort), netip.AddrPortFrom(vip6, servicePort), netip.AddrPortFrom(vip4, 81)}

// endpointOf is where the catalog serves a Service's address.
func (l *lab) endpointOf(vip netip.AddrPort) netip.AddrPort {
	if vip.Addr().Is6() {
		return netip.AddrPortFrom(l.cat.v6, appPort)
	}
	return netip.AddrPortFrom(l.cat.v4, appPort)
}

// A connection to a Service goes directly to an endpoint on this node, from veth to veth, and the application sees the
// Service's address.
func TestServiceGoesDirectly(t *testing.T) {
	l := near(t)
	check(t, l.dp.SetPolicies(l.service(mesh.SameNodeKernel, 0).Commit(2)))
	ctx, cancel := context.WithCancel(t.Context())
	events := make(chan Event, 1000)
	defer func() { // nothing reads from the kernel when it is closed
		cancel()
		for range events {
		}
	}()
	go func() {
		defer close(events)
		for e := range l.dp.Events(ctx) {
			events <- e
		}
	}()
	for _, vip := range vips {
		before := l.forwarded()
		l.counted(map[string]int{"service_near": 1, "connect_direct": 1, "near_redirected": 1, "connect_captured": 0, "service_agent": 0}, func() {
			c, err := l.ui.dial(vip)
			check(t, err)
			defer c.Close()
			if peer := addrOf(c.RemoteAddr()); peer != vip {
				t.Errorf("getpeername says %s, want %s", peer, vip)
			}
			if local, remote, err := seen(c); err != nil || local != l.endpointOf(vip) || remote != addrOf(c.LocalAddr()) {
				t.Errorf("the server sees %s and itself as %s (%v), want %s and %s", remote, local, err, addrOf(c.LocalAddr()), l.endpointOf(vip))
			}
			echoes(t, c)
		})
		if n := l.forwarded() - before; n > 2 { // solicitations for a neighbour aside
			t.Errorf("%s: the node's stack passed on %d packets", vip, n)
		}
		for _, kind := range []EventKind{Opened, Closed} {
			select {
			case e := <-events:
				if e.Kind != kind || e.Service != vip || e.Server != l.endpointOf(vip) {
					t.Errorf("event %+v, want kind %d of %s at %s", e, kind, vip, l.endpointOf(vip))
				}
			case <-time.After(plenty):
				t.Fatal("no event")
			}
		}
	}
	// By the pod's own address nothing is said of a Service.
	c, err := l.ui.dial(l.endpointOf(vips[0]))
	check(t, err)
	c.Close()
	if e := <-events; e.Service.IsValid() {
		t.Errorf("event %+v, want no Service", e)
	}
}

// However an application connects to a Service, it and its server see what they would without a mesh.
func TestEveryKindOfClientOfAService(t *testing.T) {
	l := near(t)
	check(t, l.dp.SetPolicies(l.service(mesh.SameNodeKernel, 0).Commit(2)))
	for _, c := range clients {
		for _, vip := range vips[:2] {
			t.Run(c.name+"/"+vip.Addr().String(), func(t *testing.T) {
				l := l.in(t)
				want := map[string]int{"service_near": 1, "connect_captured": 0}
				forged := strings.Contains(c.name, "forged")
				if c.name == "MPTCP" { // its subflows' peer is not what it says its own is
					want = map[string]int{"service_near": 0, "connect_captured": 1}
				}
				l.counted(want, func() {
					fd, err := c.run(l.ui, vip)
					if fd > 0 {
						defer unix.Close(fd)
					}
					if errors.Is(err, unix.EPROTONOSUPPORT) {
						want["connect_captured"] = 0
						t.Skip("this kernel has no such protocol")
					}
					if err != nil {
						t.Fatalf("connect: %v", err)
					}
					local, remote, err := told(fd)
					check(t, err)
					me, _ := unix.Getsockname(fd)
					peer, _ := unix.Getpeername(fd)
					if fromSockaddr(peer) != vip {
						t.Errorf("getpeername says %s, want %s", fromSockaddr(peer), vip)
					}
					if local != l.endpointOf(vip) || remote != fromSockaddr(me) && !forged {
						t.Errorf("the server sees %s and itself as %s, want %s and %s", remote, local, fromSockaddr(me), l.endpointOf(vip))
					}
				})
			})
		}
	}
}

// One socket, one destination after the other: what getpeername says is always that of the last one.
func TestServiceOnAReusedSocket(t *testing.T) {
	l := near(t)
	check(t, l.dp.SetPolicies(l.service(mesh.SameNodeKernel, 0).Commit(2)))
	check(t, l.ui.as(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, dst := range []netip.AddrPort{vips[0], netip.AddrPortFrom(l.cat.v4, appPort), vips[2], netip.AddrPortFrom(l.outside.v4, appPort), vips[0]} {
			if err := connected(fd, unix.Connect(fd, sockaddr(dst))); err != nil {
				return fmt.Errorf("connect to %s: %w", dst, err)
			}
			peer, err := unix.Getpeername(fd)
			if err != nil || fromSockaddr(peer) != dst {
				t.Errorf("getpeername says %v (%v), want %s", fromSockaddr(peer), err, dst)
			}
			if err := disconnect(fd); err != nil {
				return err
			}
		}
		return nil
	}))
}

// What the kernel cannot carry, or what is not for it to choose, the agent does.
func TestServiceIsLeftToTheAgent(t *testing.T) {
	l := near(t)
	workload := func(edit func(*mesh.Workload)) func(*mesh.Builder) {
		return func(b *mesh.Builder) {
			w := *l.service(mesh.SameNodeKernel, 0).Commit(9).Workload("cluster//Pod/shop/catalog")
			edit(&w)
			b.PutWorkload(&w)
		}
	}
	svc := func(edit func(*mesh.Service)) func(*mesh.Builder) {
		return func(b *mesh.Builder) {
			s := *l.service(mesh.SameNodeKernel, 0).Commit(9).Service(catalogService)
			edit(&s)
			b.PutService(&s)
		}
	}
	revision := uint64(10)
	for _, c := range []struct {
		name   string
		mode   mesh.SameNode
		policy *mesh.Policy
		edit   func(*mesh.Builder)
		want   string
	}{
		{"all is well", mesh.SameNodeKernel, nil, nil, "service_near"},
		{"encrypt", mesh.SameNodeEncrypt, nil, nil, "connect_captured"},
		{"STRICT", mesh.SameNodeAuto, strictRule, nil, "connect_captured"},
		{"STRICT, kernel", mesh.SameNodeKernel, strictRule, nil, "service_near"},
		{"denied", mesh.SameNodeKernel, rule(mesh.Deny, "d", account("ui")), nil, "connect_denied"},
		{"denied at the endpoint's port", mesh.SameNodeKernel, rule(mesh.Deny, "d", mesh.Match{DestinationPorts: []uint16{appPort}}), nil, "connect_denied"},
		{"denied at the Service's port", mesh.SameNodeKernel, rule(mesh.Deny, "d", mesh.Match{DestinationPorts: []uint16{servicePort}}), nil, "service_near"},
		{"the endpoint is not ready", mesh.SameNodeKernel, nil, workload(func(w *mesh.Workload) { w.Healthy = false }), "connect_captured"},
		{"not ready, and published", mesh.SameNodeKernel, nil, func(b *mesh.Builder) {
			workload(func(w *mesh.Workload) { w.Healthy = false })(b)
			svc(func(s *mesh.Service) { s.LB.AllowUnhealthy = true })(b)
		}, "service_near"},
		{"on another node, and the policy is Local", mesh.SameNodeKernel, nil, func(b *mesh.Builder) {
			svc(func(s *mesh.Service) {
				s.LB = mesh.LoadBalancing{Mode: mesh.LBStrict, Prefer: []mesh.LBScope{mesh.ScopeNode}}
			})(b)
			workload(func(w *mesh.Workload) { w.Node = "elsewhere" })(b)
		}, "connect_captured"},
		{"a waypoint of the Service", mesh.SameNodeKernel, nil, svc(func(s *mesh.Service) { s.Waypoint = &mesh.Gateway{Addr: mesh.NetAddr{Addr: vip6}} }), "connect_captured"},
		{"the endpoint has a tunnel of its own", mesh.SameNodeKernel, nil, workload(func(w *mesh.Workload) { w.NativeTunnel = true }), "connect_captured"},
		{"no endpoint", mesh.SameNodeKernel, nil, workload(func(w *mesh.Workload) { w.Services = nil }), "connect_captured"},
		{"the address itself", mesh.SameNodeKernel, nil, svc(func(s *mesh.Service) { s.LB.Mode = mesh.LBPassthrough }), "connect_captured"},
		{"in its namespace only", mesh.SameNodeKernel, nil, svc(func(s *mesh.Service) { s.VisibleIn = []string{s.Name.Namespace} }), "connect_captured"},
		{"two Services at one address", mesh.SameNodeKernel, nil, func(b *mesh.Builder) {
			svc(func(s *mesh.Service) { s.Name.Hostname, s.Name.Namespace = "other.example", "other" })(b)
		}, "connect_captured"},
		{"no such port", mesh.SameNodeKernel, nil, svc(func(s *mesh.Service) { s.Ports = s.Ports[1:] }), "connect_captured"},
		{"it is gone", mesh.SameNodeKernel, nil, func(b *mesh.Builder) { b.DeleteService(catalogService) }, "connect_captured"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			var policies []*mesh.Policy
			if c.policy != nil {
				policies = append(policies, c.policy)
			}
			b := l.service(c.mode, 0, policies...)
			if c.edit != nil {
				c.edit(b)
			}
			revision++
			check(t, l.dp.SetPolicies(b.Commit(revision)))
			for _, vip := range vips[:2] {
				l.counted(map[string]int{c.want: 1}, func() {
					refused, err := false, error(nil)
					check(t, l.ui.as(func() error { refused, err = try(netip.Addr{}, vip, false); return err }))
					if refused != (c.want == "connect_denied") {
						t.Errorf("refused: %v", refused)
					}
				})
			}
		})
	}
	// A pod that is released has no direct connections, whatever is known of it.
	check(t, l.dp.SetPolicies(l.service(mesh.SameNodeKernel, 0).Commit(100)))
	check(t, l.dp.Release("uid-catalog"))
	l.counted(map[string]int{"service_near": 0, "connect_captured": 1}, func() {
		check(t, l.ui.as(func() error { _, err := try(netip.Addr{}, vips[0], false); return err }))
	})
}

// Endpoints here and elsewhere get the share that the agent alone would give them, also by weight: what is not for an
// endpoint here comes to the agent with the number that was drawn.
func TestServiceSharesAreTheAgents(t *testing.T) {
	l := enrolled(t)
	const weight, elsewhere = 3, 4
	b := l.service(mesh.SameNodeKernel, elsewhere)
	w := *b.Commit(2).Workload("cluster//Pod/shop/catalog")
	w.Capacity = weight
	b.PutWorkload(&w)
	s := b.Commit(3)
	check(t, l.dp.SetPolicies(s))
	vip := vips[0]
	total, shares := s.Shares(s.Workload("cluster//Pod/shop/ui"), vip)
	if total != weight+elsewhere || len(shares) != 1+elsewhere {
		t.Fatalf("%d in all, %+v", total, shares)
	}

	tries := 3500
	drawn := make([]int, total)
	check(t, l.ui.as(func() error {
		for range tries {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
				return err
			}
			if err := unix.Connect(fd, sockaddr(vip)); err != nil && err != unix.EINPROGRESS && err != unix.EINTR {
				return err
			}
			mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
			if err != nil {
				return err
			}
			if n := mark >> drawShift; n > total || n > 0 && mark&markMask != Mark {
				return fmt.Errorf("mark %#x", mark)
			} else if n > 0 {
				drawn[n-1]++
			}
			unix.Close(fd)
		}
		return nil
	}))
	agents := 0
	for _, x := range shares {
		n := 0
		for i := range x.Count {
			n += drawn[x.First+i]
			if r := s.Resolve(s.Workload("cluster//Pod/shop/ui"), vip, func(int) int { return x.First + i }); r.Workload != x.Workload {
				t.Errorf("number %d is for %s to Resolve, and for %s by Shares", x.First+i, r.Workload.Name, x.Workload.Name)
			}
		}
		agents += n
		if x.Workload.Name == "catalog" && n > tries/100 { // but where its handshakes are at their bound
			t.Errorf("%d of the near endpoint's came to the agent", n)
		} else if want := float64(tries) / float64(total); x.Workload.Name != "catalog" && math.Abs(float64(n)-want) > 6*math.Sqrt(want) {
			t.Errorf("%s has %d of %d connections, want about %.0f", x.Workload.Name, n, tries, want)
		}
	}
	if want := float64(tries) * weight / float64(total); math.Abs(float64(tries-agents)-want) > 6*math.Sqrt(want) {
		t.Errorf("the near endpoint has %d of %d connections, want about %.0f", tries-agents, tries, want)
	}
}

// The agent reads the number from the connection that it accepts.
func TestDrawnReachesTheAgent(t *testing.T) {
	l := enrolled(t)
	b := l.service(mesh.SameNodeEncrypt, 0)
	check(t, l.dp.SetPolicies(b.Commit(2)))
	for _, vip := range vips[:2] {
		service := kernelTarget(vip)
		check(t, l.dp.kernel.Services.Put(service, uint32(1000)))
		drawn := make(chan int, 1)
		l.drawn.Store(&drawn)
		c, err := l.ui.dial(vip)
		check(t, err)
		if n := <-drawn; n < 1 || n > 1000 {
			t.Errorf("%s: drawn %d", vip, n)
		}
		mark := 0
		raw, err := c.SyscallConn()
		check(t, err)
		raw.Control(func(fd uintptr) { mark, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK) })
		if mark>>drawShift == 0 {
			t.Errorf("%s: mark %#x", vip, mark)
		}
		c.Close()
	}
}

// An audit finds and repairs what is wrong with the kernel's Services.
func TestAuditOfServices(t *testing.T) {
	l := near(t)
	check(t, l.dp.SetPolicies(l.service(mesh.SameNodeKernel, 1).Commit(2)))
	x := &l.dp.gates.services
	if len(x.ports.have) != 4 || len(x.draws.have) != 4 {
		t.Fatalf("%d ports and %d rows, want 4 of each", len(x.ports.have), len(x.draws.have))
	}
	foreign := bpf.MeshTarget{Addr: kernelAddr(l.outside.v4), Port: 1}
	check(t, l.dp.kernel.Services.Put(foreign, uint32(1)))
	for k := range x.draws.have {
		check(t, l.dp.kernel.ServiceDraws.Delete(k))
		break
	}
	must(l.dp.Audit())
	if d := l.dp.Drift(); d["services"] != 1 || d["service_draws"] != 1 {
		t.Errorf("drift %v", d)
	}
	if rows := must(x.ports.read()); len(rows) != 4 {
		t.Errorf("%d ports, want 4", len(rows))
	}
	if rows := must(x.draws.read()); len(rows) != 4 {
		t.Errorf("%d rows, want 4", len(rows))
	}
}

// The rule of an earlier version, which holds for the mark alone, is completed by one for all draws, and both go.
func TestRuleOfAnEarlierVersion(t *testing.T) {
	l := newLab(t)
	old := markRule(netlink.FAMILY_V4)
	old.Mask = nil
	check(t, l.ui.ns.Do(func() error { return netlink.RuleAdd(old) }))
	l.ui.enroll()
	count := func() (n int) {
		check(t, l.ui.ns.Do(func() error {
			rules, err := netlink.RuleListFiltered(netlink.FAMILY_V4, old, netlink.RT_FILTER_TABLE)
			n = len(rules)
			return err
		}))
		return n
	}
	if n := count(); n != 2 {
		t.Errorf("%d rules, want 2", n)
	}
	check(t, l.ui.ns.Do(func() error { return clearRouting("/proc") }))
	if n := count(); n != 0 {
		t.Errorf("%d rules are left", n)
	}
}

package datapath

import (
	"encoding/binary"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/warrenmesh/warren/internal/mesh"
)

// balancer sends connections to one address to another, as a CNI in kube-proxy's place does at the cgroup root.
func (l *lab) balancer(vip, endpoint netip.Addr) link.Link {
	l.t.Helper()
	at, field, words := ebpf.AttachCGroupInet4Connect, int16(4), 1 // bpf_sock_addr.user_ip4
	if vip.Is6() {
		at, field, words = ebpf.AttachCGroupInet6Connect, 8, 4 // user_ip6
	}
	var code asm.Instructions
	each := func(a netip.Addr, f func(offset int16, word int32)) {
		b := a.AsSlice()
		for i := range words {
			f(field+int16(4*i), int32(binary.NativeEndian.Uint32(b[4*i:])))
		}
	}
	each(vip, func(offset int16, word int32) {
		code = append(code, asm.LoadMem(asm.R2, asm.R1, offset, asm.Word), asm.LoadImm(asm.R3, int64(uint32(word)), asm.DWord), asm.JNE.Reg(asm.R2, asm.R3, "out"))
	})
	each(endpoint, func(offset int16, word int32) {
		code = append(code, asm.LoadImm(asm.R2, int64(uint32(word)), asm.DWord), asm.StoreMem(asm.R1, offset, asm.R2, asm.Word))
	})
	code = append(code, asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: at, Instructions: code, License: "GPL"})
	check(l.t, err)
	defer p.Close()
	on, err := link.AttachCgroup(link.CgroupOptions{Path: l.root, Attach: at, Program: p})
	check(l.t, err)
	l.t.Cleanup(func() { on.Close() })
	return on
}

// A CNI that balances Services in connect does not keep the agent from learning what was asked for, whichever of the two was there first.
// What is not captured goes where the CNI sends it, but for what it sends into the mesh.
func TestCNIThatBalancesInConnect(t *testing.T) {
	l := near(t)
	check(t, l.dp.SetPolicies(l.service(mesh.SameNodeEncrypt, 0).Commit(2)))
	restores := func() (n int) {
		for _, name := range []string{"restore4", "restore6"} {
			if _, err := os.Stat(filepath.Join(l.dp.dir, name)); err == nil {
				n++
			}
		}
		return n
	}
	inForce := func() bool {
		states, err := l.dp.Enrolled()
		check(t, err)
		for _, s := range states {
			if !s.InForce() {
				return false
			}
		}
		return len(states) > 0
	}
	asked := func(when string) {
		t.Helper()
		for _, vip := range vips[:2] {
			c, err := l.ui.dial(vip)
			check(t, err)
			if peer := addrOf(c.RemoteAddr()); peer != vip {
				t.Errorf("%s: getpeername says %s, want %s", when, peer, vip)
			}
			if local, _, err := seen(c); err != nil || local != l.endpointOf(vip) {
				t.Errorf("%s: %s is served by %s (%v), want %s", when, vip, local, err, l.endpointOf(vip))
			}
			c.Close()
		}
	}
	audit := func() {
		t.Helper()
		_, err := l.dp.Audit()
		check(t, err)
	}
	audit()
	if n := restores(); n != 0 || !inForce() {
		t.Errorf("nobody else is at the root: %d programs behind them, in force: %v", n, inForce())
	}
	wrong := func() []link.Link {
		return []link.Link{l.balancer(vip4, l.outside.v4), l.balancer(vip6, l.outside.v6)}
	}
	first := wrong()
	if inForce() {
		t.Error("it is not said that a program at the root is not accounted for")
	}
	audit()
	if n := restores(); n != 2 || !inForce() {
		t.Errorf("%d programs behind those at the root, in force: %v", n, inForce())
	}
	asked("one that came after Warren")

	second := wrong()
	audit()
	asked("one more")
	l.dp.Close()
	l.open()
	asked("another agent")

	// An address that is not the mesh's is the CNI's to balance.
	free := netip.MustParseAddr("10.96.0.99")
	l.balancer(free, l.outside.v4)
	audit()
	c, err := l.ui.dial(netip.AddrPortFrom(free, appPort))
	check(t, err)
	if local, _, err := seen(c); err != nil || local.Addr() != l.outside.v4 {
		t.Errorf("what is not captured went to %s (%v), want %s", local, err, l.outside.v4)
	}
	c.Close()
	// A port of a node, say, which the CNI leads into the mesh: that is captured, and not dropped.
	port := netip.MustParseAddr("10.96.0.98")
	l.balancer(port, l.cat.v4)
	audit()
	l.counted(map[string]int{"connect_vouched": 1, "connect_captured": 1, "guard_drop_mesh": 0}, func() {
		c, err := l.ui.dial(netip.AddrPortFrom(port, appPort))
		check(t, err)
		defer c.Close()
		if local, remote, err := seen(c); err != nil || local.Addr() != l.cat.v4 || remote != addrOf(c.LocalAddr()) {
			t.Errorf("what leads into the mesh is served by %s for %s (%v)", local, remote, err)
		}
	})

	for _, on := range append(first, second...) {
		on.Close()
	}
	audit()
	if n := restores(); n != 1 { // those of IPv4 alone are left
		t.Errorf("%d programs behind those that are left, want 1", n)
	}
	asked("they are gone")
}

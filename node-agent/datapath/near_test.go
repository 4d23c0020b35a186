package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/mesh"
)

// near has the pods' direct connections take the short way.
func near(t *testing.T) *lab {
	l := enrolled(t)
	l.setPolicies(mesh.SameNodeKernel)
	check(t, l.dp.SetSelected(map[string]bool{"uid-ui": false, "uid-catalog": false}))
	for uid, why := range l.dp.Detours() {
		if why != NoDetour {
			t.Fatalf("%s takes a detour: %s", uid, why)
		}
	}
	return l
}

// forwarded counts the packets that the node's stack has passed on.
func (l *lab) forwarded() (n int) {
	l.t.Helper()
	check(l.t, l.node.Do(func() error {
		v4, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		lines := strings.Split(string(v4), "\n")
		names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
		for i, name := range names {
			if name == "ForwDatagrams" {
				k, err := strconv.Atoi(values[i])
				if err != nil {
					return err
				}
				n += k
			}
		}
		v6, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(v6)) {
			if f := strings.Fields(line); f[0] == "Ip6OutForwDatagrams" {
				k, err := strconv.Atoi(f[1])
				if err != nil {
					return err
				}
				n += k
			}
		}
		return nil
	}))
	return n
}

// whole opens a connection to the catalog, uses it and closes it in order.
func (l *lab) whole(dst netip.AddrPort) {
	l.t.Helper()
	c, err := l.ui.dial(dst)
	check(l.t, err)
	local, remote, err := seen(c)
	check(l.t, err)
	if local != dst || remote != addrOf(c.LocalAddr()) || addrOf(c.RemoteAddr()) != dst {
		l.t.Errorf("server: %s from %s; client: %s to %s", local, remote, c.LocalAddr(), c.RemoteAddr())
	}
	echoes(l.t, c)
	check(l.t, c.CloseWrite())
	io.Copy(io.Discard, c)
	c.Close()
}

// From the SYN to the last FIN, in both directions, the node's stack sees nothing of a connection.
func TestShortWay(t *testing.T) {
	l := near(t)
	for _, dst := range l.cat.addrs(appPort) {
		l.whole(dst) // neighbours are known from here on
		before := l.forwarded()
		l.counted(map[string]int{"near_redirected": 10, "near_elsewhere": 0, "guard_direct": 10}, func() {
			for range 10 {
				l.whole(dst)
			}
		})
		if n := l.forwarded() - before; n != 0 {
			t.Errorf("%s: the node's stack passed on %d packets", dst, n)
		}
	}
	eventually(t, "no connection is open any more", func() bool { return len(must(l.dp.directs())) == 0 })
	check(t, l.dp.Release("uid-catalog"))
	if n := l.nears(); n != 0 {
		t.Errorf("%d connections are remembered of a pod that is released", n)
	}
}

func (l *lab) nears() (n int) {
	var f, next = new([40]byte), error(nil)
	for next = l.dp.kernel.Nears.NextKey(nil, f); next == nil; next = l.dp.kernel.Nears.NextKey(f, f) {
		n++
	}
	if !errors.Is(next, ebpf.ErrKeyNotExist) {
		l.t.Error(next)
	}
	return n
}

// Whatever has to see packets on the node has them, and says so.
func TestDetours(t *testing.T) {
	l := near(t)
	dst := l.cat.addrs(appPort)[0]
	veth := func() netlink.Link { return must(netlink.LinkByIndex(l.cat.nodeIndex)) }
	l.whole(dst)
	for _, c := range []struct {
		name string
		want Detour
		set  func() (undo func(), err error)
	}{
		{"a capture on the veth", DetourCapture, func() (func(), error) { return packetSocket(l.cat.nodeIndex) }},
		{"a capture on all interfaces", DetourCapture, func() (func(), error) { return packetSocket(0) }},
		{"a bandwidth limit", DetourShaping, func() (func(), error) {
			q := &netlink.Tbf{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.cat.nodeIndex, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
				Rate: 1 << 30, Limit: 1 << 20, Buffer: 1 << 20}
			return func() { l.node.Do(func() error { return netlink.QdiscDel(q) }) }, netlink.QdiscAdd(q)
		}},
		{"a filter at the egress", DetourProgram, func() (func(), error) {
			if err := netlink.QdiscAdd(clsact(l.cat.nodeIndex)); err != nil && !errors.Is(err, unix.EEXIST) {
				return nil, err
			}
			p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
			if err != nil {
				return nil, err
			}
			defer p.Close()
			f := &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: l.cat.nodeIndex, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Priority: 7, Protocol: unix.ETH_P_ALL},
				Fd: p.FD(), Name: "somebody", DirectAction: true}
			return func() { l.node.Do(func() error { return netlink.FilterDel(f) }) }, netlink.FilterAdd(f)
		}},
		{"a tcx program", DetourProgram, func() (func(), error) {
			p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
			if err != nil {
				return nil, err
			}
			defer p.Close()
			k, err := link.AttachTCX(link.TCXOptions{Interface: l.cat.nodeIndex, Program: p, Attach: ebpf.AttachTCXEgress})
			return func() { k.Close() }, err
		}},
		{"an XDP program", DetourProgram, func() (func(), error) {
			p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}})
			if err != nil {
				return nil, err
			}
			defer p.Close()
			return func() {
				l.node.Do(func() error { return netlink.LinkSetXdpFdWithFlags(veth(), -1, unix.XDP_FLAGS_SKB_MODE) })
			}, netlink.LinkSetXdpFdWithFlags(veth(), p.FD(), unix.XDP_FLAGS_SKB_MODE)
		}},
		{"a rule of somebody in the firewall", DetourEngine, func() (func(), error) {
			return firewall(`add table inet somebody; add chain inet somebody f { type filter hook forward priority 0; }; add rule inet somebody f counter accept`, `delete table inet somebody`)
		}},
		{"a chain for the interface", DetourEngine, func() (func(), error) {
			return firewall(`add table netdev somebody; add chain netdev somebody f { type filter hook ingress device vcatalog priority 0; }`, `delete table netdev somebody`)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			open, err := l.ui.dial(dst)
			check(t, err)
			_, _, err = seen(open)
			check(t, err)
			for range 20 { // its sockets know the way by heart
				echoes(t, open)
			}
			defer open.Close()
			var undo func()
			err = l.node.Do(func() (err error) { undo, err = c.set(); return err })
			if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, errNoNft) || errors.Is(err, unix.ENOENT) { // the kernel has none
				t.Skip(err)
			}
			check(t, err)
			if undo != nil {
				t.Cleanup(func() {
					l.node.Do(func() error { undo(); return nil })
					check(t, l.dp.CheckWays(true))
					l.counted(map[string]int{"near_redirected": 1, "near_detour": 0}, func() { l.whole(dst) })
				})
			}
			check(t, l.dp.CheckWays(c.want != DetourCapture))
			if why := l.dp.Detours()["uid-catalog"]; why != c.want {
				t.Errorf("the catalog's detour is %q, want %q", why, c.want)
			}
			before := l.forwarded()
			l.counted(map[string]int{"near_redirected": 0, "near_detour": 1}, func() { l.whole(dst) })
			if l.forwarded() == before {
				t.Error("the node's stack saw nothing of it")
			}
			open.SetDeadline(time.Now().Add(plenty))
			if c.want.cuts() {
				if _, err := open.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
					t.Errorf("the open connection: %v, want a reset", err)
				}
				return
			}
			before = l.forwarded()
			echoes(t, open)
			if l.forwarded() == before {
				t.Error("the node's stack saw nothing of the open connection")
			}
		})
	}
}

var errNoNft = errors.New("there is no nft")

func packetSocket(index int) (undo func(), err error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return func() { unix.Close(fd) }, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: index})
}

// A NetworkPolicy that selects either end, or that nobody speaks of, keeps connections on the node's path.
func TestNetworkPolicyKeepsTheNodesPath(t *testing.T) {
	l := near(t)
	dst := l.cat.addrs(appPort)[0]
	for _, c := range []struct {
		name     string
		selected map[string]bool
		want     map[string]Detour
		cut      bool
	}{
		{"the server", map[string]bool{"uid-ui": false, "uid-catalog": true}, map[string]Detour{"uid-ui": NoDetour, "uid-catalog": DetourPolicy}, true},
		{"the client", map[string]bool{"uid-ui": true, "uid-catalog": false}, map[string]Detour{"uid-ui": DetourPolicy, "uid-catalog": NoDetour}, true},
		{"nobody knows", map[string]bool{}, map[string]Detour{"uid-ui": DetourUntold, "uid-catalog": DetourUntold}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := l.in(t)
			check(t, l.dp.SetSelected(map[string]bool{"uid-ui": false, "uid-catalog": false}))
			var open *net.TCPConn
			l.counted(map[string]int{"near_redirected": 1}, func() {
				var err error
				open, err = l.ui.dial(dst)
				check(t, err)
				_, _, err = seen(open)
				check(t, err)
			})
			defer open.Close()
			check(t, l.dp.SetSelected(c.selected))
			if got := l.dp.Detours(); fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
			l.counted(map[string]int{"near_redirected": 0, "near_detour": 1}, func() { l.whole(dst) })
			open.SetDeadline(time.Now().Add(plenty))
			if !c.cut {
				echoes(t, open)
			} else if _, err := open.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.ECONNABORTED) {
				t.Errorf("the open connection: %v, want a reset", err)
			}
		})
	}
}

// firewall has commands of nft undone later. It runs in the namespace that it is called in.
func firewall(do, undo string) (func(), error) {
	if _, err := exec.LookPath("nft"); err != nil {
		return nil, errNoNft
	}
	return func() { nft(undo) }, nft(do)
}

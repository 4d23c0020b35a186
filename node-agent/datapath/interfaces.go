package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// wiring is how a pod hangs on its node.
type wiring struct {
	podIndex  int // the pod's end of the veth
	nodeIndex int // the node's end, where the guard sits
	nodeName  string
	v4, v6    netip.Addr
}

// unsupported is an UnsupportedError that does not know its pod yet.
func unsupported(why Unsupported, format string, args ...any) error {
	return &UnsupportedError{Reason: why, Detail: fmt.Sprintf(format, args...)}
}

// inspect finds the pod's veth and refuses what no socket hook sees whole. It changes nothing.
func (d *Datapath) inspect(p Pod) (wiring, error) {
	var w wiring
	for _, a := range p.Addrs {
		switch a = a.Unmap(); {
		case a.Is4() && !w.v4.IsValid():
			w.v4 = a
		case a.Is6() && !w.v6.IsValid():
			w.v6 = a
		default:
			return w, fmt.Errorf("pod %s: addresses %v: want at most one of each family", p.UID, p.Addrs)
		}
	}
	if len(p.Addrs) == 0 {
		return w, fmt.Errorf("pod %s has no address", p.UID)
	}

	err := p.NetNS.Do(func() (err error) {
		w.podIndex, w.nodeIndex, err = inspectPod(p.Addrs)
		return err
	})
	if err == nil {
		err = d.node.Do(func() (err error) {
			w.nodeName, err = inspectNode(p.NetNS, w.podIndex, w.nodeIndex)
			return err
		})
	}
	var u *UnsupportedError
	if errors.As(err, &u) {
		u.UID = p.UID
	}
	return w, err
}

// inspectPod runs in the pod's namespace.
func inspectPod(addrs []netip.Addr) (index, peer int, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return 0, 0, fmt.Errorf("list the pod's interfaces: %w", err)
	}
	var pod netlink.Link
	for _, l := range links {
		held, err := holds(l, addrs)
		if err != nil {
			return 0, 0, err
		}
		if held {
			pod = l
			break
		}
	}
	if pod == nil {
		return 0, 0, unsupported(NoAddress, "no interface has %v", addrs)
	}
	if pod.Type() != "veth" {
		return 0, 0, unsupported(NoVeth, "interface %s is of type %s", pod.Attrs().Name, pod.Type())
	}
	for _, l := range links {
		a := l.Attrs()
		if a.Index == pod.Attrs().Index || a.RawFlags&unix.IFF_UP == 0 || a.RawFlags&unix.IFF_LOOPBACK != 0 {
			continue
		}
		switch l.Type() {
		case "bridge":
			return 0, 0, unsupported(NestedNetwork, "bridge %s", a.Name)
		case "dummy", "ipip", "sit", "ip6tnl", "gre", "gretap", "erspan", "vti", "vti6", "ip6gre", "ip6gretap":
			// Nothing leaves a dummy, and what a tunnel wraps leaves by the veth.
		default:
			return 0, 0, unsupported(SecondInterface, "interface %s of type %s", a.Name, l.Type())
		}
	}
	return pod.Attrs().Index, pod.Attrs().ParentIndex, nil
}

// holds reports whether an interface has all the addresses.
func holds(l netlink.Link, want []netip.Addr) (bool, error) {
	list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return false, fmt.Errorf("list the addresses of %s: %w", l.Attrs().Name, err)
	}
	for _, w := range want {
		if !slices.ContainsFunc(list, func(a netlink.Addr) bool {
			have, ok := netip.AddrFromSlice(a.IP)
			return ok && have.Unmap() == w.Unmap()
		}) {
			return false, nil
		}
	}
	return true, nil
}

// inspectNode runs in the node's namespace: the peer must be here, and be the peer.
func inspectNode(pod *netns.Handle, podIndex, nodeIndex int) (name string, err error) {
	l, err := netlink.LinkByIndex(nodeIndex)
	if err != nil {
		return "", unsupported(NoPeer, "interface %d, the other end of the pod's veth, is not in the node's namespace: %v", nodeIndex, err)
	}
	a := l.Attrs()
	if l.Type() != "veth" || a.ParentIndex != podIndex {
		return "", unsupported(NoPeer, "interface %s has the number of the other end but is not it", a.Name)
	}
	err = pod.WithFD(func(fd int) error {
		id, err := netlink.GetNetNsIdByFd(fd)
		if err != nil {
			return fmt.Errorf("find the pod's namespace from the node's: %w", err)
		}
		if id != a.NetNsID {
			return unsupported(NoPeer, "interface %s leads to another namespace", a.Name)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if x := a.Xdp; x != nil && x.Attached && x.AttachMode != netlinkXDPGeneric {
		return "", unsupported(NativeXDP, "interface %s runs a native XDP program", a.Name)
	}
	return a.Name, nil
}

// netlinkXDPGeneric is XDP_ATTACHED_SKB of linux/if_link.h: such a program runs after the socket is known.
const netlinkXDPGeneric = 2

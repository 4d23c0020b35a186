package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
)

// The guard is a tcx link at the head, before any other program of the interface could let a packet pass. A
// kernel before 6.6 has no tcx: there it is a clsact filter of the highest priority, which has no pin and lasts
// as long as the interface.

// clsact filter: its name is how it is found again.
const (
	filterName     = "warren_guard"
	filterPriority = 1
)

func guardPin(podDir string) string { return filepath.Join(podDir, "guard") }

// ensureGuard attaches the guard, or points what is attached at this process's program.
func (d *Datapath) ensureGuard(podDir string, ifindex int) error {
	pin := guardPin(podDir)
	program := d.kernel.MeshGuard
	return d.node.Do(func() error {
		old, err := link.LoadPinnedLink(pin, nil)
		if err == nil {
			defer old.Close()
			if at, err := tcxIfindex(old); err == nil && at == ifindex {
				if firstAtTCX(old, ifindex) {
					return old.Update(program)
				}
				// Somebody attached before us. The kernel moves no link and takes no program twice: another
				// instance goes to the head, and then the old one goes.
				if program, err = d.loadAnother(bpf.MeshProgMeshGuard, nil); err != nil {
					return err
				}
				defer program.Close()
			}
		}
		l, err := link.AttachTCX(link.TCXOptions{
			Interface: ifindex, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
		})
		if errors.Is(err, ebpf.ErrNotSupported) {
			return d.replaceFilter(ifindex)
		}
		if err != nil {
			return fmt.Errorf("attach the guard to interface %d: %w", ifindex, err)
		}
		defer l.Close()
		if err := repin(l, pin); err != nil {
			return err
		}
		if old != nil {
			if err := old.Detach(); err != nil && !linkDead(err) {
				return fmt.Errorf("detach the guard that was not first: %w", err)
			}
		}
		return nil
	})
}

// tcxIfindex is the interface a link is attached to, 0 once it has gone.
func tcxIfindex(l link.Link) (int, error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	if t := info.TCX(); t != nil {
		return int(t.Ifindex), nil
	}
	return 0, errors.New("not a tcx link")
}

// guardInForce runs in the node's namespace.
func guardInForce(podDir string, ifindex int) bool {
	if l, err := link.LoadPinnedLink(guardPin(podDir), nil); err == nil {
		defer l.Close()
		at, err := tcxIfindex(l)
		return err == nil && at == ifindex && firstAtTCX(l, ifindex)
	}
	return findFilter(ifindex) != nil
}

// firstAtTCX reports whether no other program runs before ours: one that returns TC_ACT_OK would pass packets
// that the guard never sees.
func firstAtTCX(l link.Link, ifindex int) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
	return err == nil && len(q.Programs) > 0 && q.Programs[0].ID == info.Program
}

// removeGuard detaches the guard. An interface that is gone took it along.
func (d *Datapath) removeGuard(podDir string, ifindex int) error {
	if err := unpin(guardPin(podDir)); err != nil {
		return err
	}
	return d.node.Do(func() error {
		f := findFilter(ifindex)
		if f == nil {
			return nil
		}
		if err := netlink.FilterDel(f); err != nil && !gone(err) {
			return fmt.Errorf("remove the guard from interface %d: %w", ifindex, err)
		}
		return removeIdleClsact(ifindex)
	})
}

// unpin detaches a pinned link and removes the pin. Removing the pin alone detaches too, but some time later:
// the kernel ends a link in the background.
func unpin(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = l.Detach()
		l.Close()
		if err != nil && !linkDead(err) && !errors.Is(err, ebpf.ErrNotSupported) {
			return fmt.Errorf("detach %s: %w", filepath.Base(pin), err)
		}
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin: %w", err)
	}
	return nil
}

func clsact(ifindex int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

func (d *Datapath) replaceFilter(ifindex int) error {
	if err := netlink.QdiscAdd(clsact(ifindex)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to interface %d: %w", ifindex, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority,
		},
		Fd: d.kernel.MeshGuard.FD(), Name: filterName, DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("attach the guard to interface %d: %w", ifindex, err)
	}
	return nil
}

func findFilter(ifindex int) netlink.Filter {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil
	}
	list, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return nil
	}
	for _, f := range list {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == filterName {
			return b
		}
	}
	return nil
}

// removeIdleClsact removes the qdisc unless somebody else's filters hang on it.
func removeIdleClsact(ifindex int) error {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if list, err := netlink.FilterList(l, parent); err != nil || len(list) > 0 {
			return err
		}
	}
	if err := netlink.QdiscDel(clsact(ifindex)); err != nil && !gone(err) {
		return fmt.Errorf("remove clsact from interface %d: %w", ifindex, err)
	}
	return nil
}

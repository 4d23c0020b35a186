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

// vethHook is a program at the node side of a pod's veth: a tcx link at the head, before any other program of the
// interface could let a packet pass. A kernel before 6.6 has no tcx: there it is a clsact filter of the highest
// priority, which has no pin and lasts as long as the interface.
type vethHook struct {
	name    string // of the pin, and in errors
	program string
	attach  ebpf.AttachType
	parent  uint32 // of the clsact filter
	filter  string // its name, by which it is found again
}

var guardHook = vethHook{"guard", bpf.MeshProgMeshGuard, ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS, "warren_guard"}

const filterPriority = 1

func (h vethHook) pin(podDir string) string { return filepath.Join(podDir, h.name) }

// loaded is this process's instance of a hook's program.
func (d *Datapath) loaded(h vethHook) *ebpf.Program {
	if h.program == bpf.MeshProgMeshUdp {
		return d.kernel.MeshUdp
	}
	return d.kernel.MeshGuard
}

// ensureHook attaches a hook, or points what is attached at this process's program.
func (d *Datapath) ensureHook(h vethHook, podDir string, ifindex int) error {
	pin := h.pin(podDir)
	program := d.loaded(h)
	return d.node.Do(func() error {
		old, err := link.LoadPinnedLink(pin, nil)
		if err == nil {
			defer old.Close()
			if at, err := tcxIfindex(old); err == nil && at == ifindex {
				if h.first(old, ifindex) {
					return old.Update(program)
				}
				// Somebody attached before us. The kernel moves no link and takes no program twice: another
				// instance goes to the head, and then the old one goes.
				if program, err = d.loadAnother(h.program); err != nil {
					return err
				}
				defer program.Close()
			}
		}
		l, err := link.AttachTCX(link.TCXOptions{
			Interface: ifindex, Program: program, Attach: h.attach, Anchor: link.Head(),
		})
		if errors.Is(err, ebpf.ErrNotSupported) {
			return d.replaceFilter(h, ifindex)
		}
		if err != nil {
			return fmt.Errorf("attach the %s to interface %d: %w", h.name, ifindex, err)
		}
		defer l.Close()
		if err := repin(l, pin); err != nil {
			return err
		}
		if old != nil {
			if err := old.Detach(); err != nil && !linkDead(err) {
				return fmt.Errorf("detach the %s that was not first: %w", h.name, err)
			}
		}
		return nil
	})
}

// updateHook points what an earlier process attached at this process's program.
func (d *Datapath) updateHook(h vethHook, podDir string, ifindex int) error {
	if l, err := link.LoadPinnedLink(h.pin(podDir), nil); err == nil {
		err = l.Update(d.loaded(h))
		l.Close()
		if err != nil && !linkDead(err) {
			return err
		}
		return nil
	}
	return d.node.Do(func() error {
		if h.find(ifindex) == nil {
			return nil
		}
		return d.replaceFilter(h, ifindex)
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

// inForce runs in the node's namespace.
func (h vethHook) inForce(podDir string, ifindex int) bool {
	if l, err := link.LoadPinnedLink(h.pin(podDir), nil); err == nil {
		defer l.Close()
		at, err := tcxIfindex(l)
		return err == nil && at == ifindex && h.first(l, ifindex)
	}
	return h.find(ifindex) != nil
}

// first reports whether no other program runs before ours: one that returns TC_ACT_OK would pass packets
// that the hook never sees.
func (h vethHook) first(l link.Link, ifindex int) bool {
	info, err := l.Info()
	if err != nil {
		return false
	}
	q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: h.attach})
	return err == nil && len(q.Programs) > 0 && q.Programs[0].ID == info.Program
}

// removeHook detaches a hook. An interface that is gone took it along.
func (d *Datapath) removeHook(h vethHook, podDir string, ifindex int) error {
	if err := unpin(h.pin(podDir)); err != nil {
		return err
	}
	return d.node.Do(func() error {
		f := h.find(ifindex)
		if f == nil {
			return nil
		}
		if err := netlink.FilterDel(f); err != nil && !gone(err) {
			return fmt.Errorf("remove the %s from interface %d: %w", h.name, ifindex, err)
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

func (d *Datapath) replaceFilter(h vethHook, ifindex int) error {
	if err := netlink.QdiscAdd(clsact(ifindex)); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact to interface %d: %w", ifindex, err)
	}
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: h.parent, Handle: 1,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority,
		},
		Fd: d.loaded(h).FD(), Name: h.filter, DirectAction: true,
	}
	if err := netlink.FilterReplace(f); err != nil {
		return fmt.Errorf("attach the %s to interface %d: %w", h.name, ifindex, err)
	}
	return nil
}

func (h vethHook) find(ifindex int) netlink.Filter {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil
	}
	list, err := netlink.FilterList(l, h.parent)
	if err != nil {
		return nil
	}
	for _, f := range list {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == h.filter {
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

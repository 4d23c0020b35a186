package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// An audit asks each pod's namespace for its interfaces, addresses, rules and routes only where the kernel has told of a
// change to any of them since they were last found right. To visit a namespace and list them takes half a millisecond, to
// hear that nothing has changed a microsecond, and nearly always nothing has.

// watchedGroups are the multicast groups of rtnetlink (linux/rtnetlink.h) that tell of all that inspect and
// routingProblems look at in a pod's namespace. An interface that goes down takes routes along of which nobody is told;
// of the interface everybody is.
var watchedGroups = []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE}

// watch is where the kernel tells of changes in a namespace. What is not read in time is lost, and then something has
// changed too.
type watch struct {
	fd  int
	buf [4096]byte
}

func newWatch(ns *netns.Handle, groups ...uint32) (*watch, error) {
	fd, err := ns.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	w := &watch{fd: fd}
	addr := unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	for _, g := range groups {
		addr.Groups |= 1 << (g - 1)
	}
	// A namespace where much changes does not hold the kernel's memory with it.
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10)
	if err = errors.Join(err, unix.Bind(fd, &addr)); err != nil {
		w.close()
		return nil, fmt.Errorf("hear of changes in network namespace %s: %w", ns, err)
	}
	return w, nil
}

func (w *watch) close() { unix.Close(w.fd) }

// read hands what has been told since the last time to each, message by message. It reports whether that is all there
// was to tell.
func (w *watch) read(each func(kind uint16, body []byte)) (all bool) {
	for all = true; ; {
		n, _, err := unix.Recvfrom(w.fd, w.buf[:], unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case err == unix.EAGAIN:
			return all
		case err == unix.EINTR:
			continue
		case err == unix.ENOBUFS:
			all = false
			continue
		case err != nil:
			return false
		case n > len(w.buf):
			all = false
			continue
		}
		told, err := syscall.ParseNetlinkMessage(w.buf[:n])
		if err != nil {
			all = false
		}
		for _, m := range told {
			each(m.Header.Type, m.Data)
		}
	}
}

// podWatch is what is known of a pod's namespace without going there.
type podWatch struct {
	changes *watch
	accept  int    // /proc/sys/net/ipv4/tcp_fwmark_accept of the namespace, which no message tells of
	right   bool   // all was in order, and nothing has changed since
	wiring  wiring // as it was found then

	guarded uint64         // the revision of the programs at the veth at which the guard was found in force, 0 for none
	lookup  ebpf.ProgramID // of the pod's sk_lookup link, 0 where that is not known
}

func (w *podWatch) close() {
	w.changes.close()
	unix.Close(w.accept)
}

// watchPod returns the watch of a pod that this process knows, and makes it.
func (d *Datapath) watchPod(uid string, p Pod) (*podWatch, error) {
	if w := d.watches[uid]; w != nil {
		return w, nil
	}
	changes, err := newWatch(p.NetNS, watchedGroups...)
	if err != nil {
		return nil, err
	}
	w := &podWatch{changes: changes, accept: -1}
	err = p.NetNS.Do(func() (err error) {
		w.accept, err = unix.Open(filepath.Join(d.cfg.Proc, "sys", sysctls[0].path), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		changes.close()
		return nil, fmt.Errorf("open %s of network namespace %s: %w", sysctls[0].path, p.NetNS, err)
	}
	d.watches[uid] = w
	return w, nil
}

// unwatch forgets a pod's watch.
func (d *Datapath) unwatch(uid string) {
	if w := d.watches[uid]; w != nil {
		w.close()
		delete(d.watches, uid)
	}
}

func (d *Datapath) unwatchAll() {
	for uid := range d.watches {
		d.unwatch(uid)
	}
	if d.nodeWatch != nil {
		d.nodeWatch.close()
		d.nodeWatch = nil
	}
}

// hear takes note of what has changed at the node's ends of the pods' veths.
func (d *Datapath) hear() {
	changed, all := map[int]bool{}, false
	if d.nodeWatch != nil {
		all = d.nodeWatch.read(func(_ uint16, body []byte) {
			if len(body) >= unix.SizeofIfInfomsg {
				changed[int(int32(binary.NativeEndian.Uint32(body[4:])))] = true
			}
		})
	} else if w, err := newWatch(d.node, unix.RTNLGRP_LINK); err == nil {
		d.nodeWatch = w
	}
	for _, w := range d.watches {
		if !all || changed[w.wiring.nodeIndex] {
			w.right = false
		}
	}
}

// namespaceProblems says what is wrong with a pod's veth, rules, routes and sysctls, after hear.
func (d *Datapath) namespaceProblems(uid string, p Pod) []string {
	w, err := d.watchPod(uid, p)
	if err != nil {
		return []string{err.Error()}
	}
	quiet := true
	all := w.changes.read(func(uint16, []byte) { quiet = false })
	w.right = w.right && quiet && all
	var problems []string
	var on [1]byte
	if n, err := unix.Pread(w.accept, on[:], 0); err != nil || n != 1 || on[0] != '1' {
		problems = append(problems, "tcp_fwmark_accept is off")
	}
	if w.right {
		return problems
	}
	if w.wiring, err = d.inspect(p); err != nil {
		return append(problems, err.Error())
	}
	var wrong []string
	err = p.NetNS.Do(func() error {
		wrong = routingProblems(w.wiring)
		return nil
	})
	if err != nil {
		wrong = append(wrong, err.Error())
	}
	w.right = len(wrong) == 0
	return append(problems, wrong...)
}

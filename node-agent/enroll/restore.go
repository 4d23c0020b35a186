package enroll

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/holder"
)

// heldKind is the holder's kind of items of this package.
const heldKind = "pod"

// heldVersion is that of record. Items of another version are let go of: the pod is enrolled anew.
const heldVersion = 1

// Names of the files of an item.
const (
	fileNetNS    = "netns"
	fileOutbound = "outbound"
	fileInbound  = "inbound"
	fileHBONE    = "hbone"
)

// record is what the holder keeps about a pod beside its files.
type record struct {
	Version     int          `json:"version"`
	Pod         LocalPod     `json:"pod"`
	Addrs       []netip.Addr `json:"addrs"`
	ContainerID string       `json:"containerID,omitempty"`
	NetNSPath   string       `json:"netns,omitempty"`
	Captured    bool         `json:"captured"`
	Open        int          `json:"openConnections,omitempty"`
}

// hold gives the pod's namespace and listeners to the holder. Without a holder the keeper puts them later.
func (r *Registry) hold(ctx context.Context, p *pod, d LocalPod) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	failed := r.holdCookies(ctx, p) // it is held later, as what follows
	r.mu.Lock()
	rec := record{Version: heldVersion, Pod: d, Addrs: p.addrs, ContainerID: p.containerID, NetNSPath: p.nsPath, Captured: p.captured, Open: p.open}
	r.mu.Unlock()
	meta, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	ns, err := p.ns.File()
	if err != nil {
		return err
	}
	defer ns.Close()
	return errors.Join(failed, r.cfg.Keeper.Put(ctx, holder.Item{
		Key:   holder.Key{Kind: heldKind, Name: d.UID},
		Meta:  meta,
		Names: []string{fileNetNS, fileOutbound, fileInbound, fileHBONE},
		Files: []*os.File{ns, p.listeners.Outbound, p.listeners.Inbound, p.listeners.HBONE},
	}))
}

func (r *Registry) unhold(uid string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return errors.Join(r.cfg.Keeper.DeleteBlob(ctx, cookiesOf(uid)), r.cfg.Keeper.Delete(ctx, holder.Key{Kind: heldKind, Name: uid}))
}

// restore accepts again on the listeners that an earlier agent left, all pods at once: their clients wait.
func (r *Registry) restore(items []holder.Item) {
	began := time.Now()
	var wg sync.WaitGroup
	for i := range items {
		it := &items[i]
		if it.Key.Kind != heldKind {
			it.Close()
			continue
		}
		wg.Go(func() {
			if err := r.restorePod(it); err != nil {
				r.log.Warn("a held pod is of no use and will be enrolled anew", "uid", it.Key.Name, "err", err)
			}
		})
	}
	wg.Wait()
	if len(items) > 0 {
		r.log.Info("restored from the holder", "pods", len(r.pods), "took", time.Since(began))
	}
}

// restorePod takes the item's files. A captured pod stays Enabled: its links are pinned and the kernel goes on
// capturing. The first reconciliation asks the kernel and reports what it finds.
func (r *Registry) restorePod(it *holder.Item) (err error) {
	p := &pod{uid: it.Key.Name}
	defer func() {
		if err != nil {
			it.Close()
			if p.ns != nil {
				p.ns.Close()
			}
			r.unhold(p.uid)
		}
	}()
	var rec record
	if err := json.Unmarshal(it.Meta, &rec); err != nil {
		return fmt.Errorf("read its record: %w", err)
	}
	if rec.Version != heldVersion || rec.Pod.UID != p.uid {
		return fmt.Errorf("its record has version %d and is of pod %q", rec.Version, rec.Pod.UID)
	}
	l := datapath.Listeners{Outbound: it.File(fileOutbound), Inbound: it.File(fileInbound), HBONE: it.File(fileHBONE)}
	ns := it.File(fileNetNS)
	if ns == nil || l.Outbound == nil || l.Inbound == nil || l.HBONE == nil {
		return errors.New("its files are incomplete")
	}
	if err := control(ns, func(fd int) error { p.ns, err = netns.FromFD(fd); return err }); err != nil {
		return err
	}
	p.addrs, p.listeners, p.captured = rec.Addrs, &l, rec.Captured
	p.open = rec.Open
	if p.preexisting, err = r.restoreCookies(p.uid); err != nil {
		return err
	}
	p.hasOld.Store(len(p.preexisting) > 0)
	if p.accepting, err = r.cfg.Acceptor.AddPod(p.served(rec.Pod), l); err != nil {
		return err
	}
	ns.Close()
	p.local, p.containerID, p.nsPath = rec.Pod, rec.ContainerID, rec.NetNSPath
	p.status = PodStatus{UID: p.uid, Namespace: rec.Pod.Namespace, Name: rec.Pod.Name, OpenConnections: rec.Open, Since: time.Now()}
	if rec.Captured {
		// Saying less would have every other node send to the pod in clear for a moment.
		p.status.Redirection, p.restored = Enabled, true
	} else {
		p.status.Redirection, p.status.Reason = Pending, "the agent has restarted"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pods[p.uid] = p
	r.desired[p.uid] = rec.Pod // until the control plane speaks
	return nil
}

// control calls f with the descriptor of file, leaving O_NONBLOCK as it is, unlike file.Fd.
func control(file *os.File, f func(fd int) error) error {
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := rc.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

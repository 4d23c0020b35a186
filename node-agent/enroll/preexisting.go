package enroll

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/holder"
)

// Connections from before a pod's enrolment go on uncaptured, in plaintext and with nobody's identity. They are
// known by their sockets' cookies, also to the agents after this one. Policies hold for them nonetheless: what is
// inbound is decided again whenever policies change, and under STRICT the outbound ones end too.

// cookiesOf names the holder's blob with the cookies of a pod's connections.
func cookiesOf(uid string) string { return "connections/" + uid }

// encodeCookies writes cookies in order, each as the distance from the one before, which is one or two bytes for
// sockets of about the same age.
func encodeCookies(cookies map[uint64]bool) []byte {
	var raw []byte
	var last uint64
	for _, c := range slices.Sorted(maps.Keys(cookies)) {
		raw = binary.AppendUvarint(raw, c-last)
		last = c
	}
	return raw
}

func decodeCookies(raw []byte) (map[uint64]bool, error) {
	out := map[uint64]bool{}
	var last uint64
	for len(raw) > 0 {
		d, n := binary.Uvarint(raw)
		if n <= 0 {
			return nil, errors.New("read the cookies of its connections: they end early")
		}
		raw, last = raw[n:], last+d
		out[last] = true
	}
	return out, nil
}

// holdCookies has the agents after this one know the pod's connections from before its enrolment.
func (r *Registry) holdCookies(ctx context.Context, p *pod) error {
	if len(p.preexisting) > 0 {
		return r.cfg.Keeper.PutBlob(ctx, cookiesOf(p.uid), encodeCookies(p.preexisting))
	}
	if _, err := r.cfg.Keeper.Blob(cookiesOf(p.uid)); err == nil {
		return r.cfg.Keeper.DeleteBlob(ctx, cookiesOf(p.uid))
	}
	return nil
}

// restoreCookies is what the agent before this one knew of them.
func (r *Registry) restoreCookies(uid string) (map[uint64]bool, error) {
	raw, err := r.cfg.Keeper.Blob(cookiesOf(uid))
	if errors.Is(err, holder.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return decodeCookies(raw)
}

// Recheck resets the connections from before enrolment that policies do not allow any more. It returns when that is
// done for all pods.
func (r *Registry) Recheck() error {
	if r.cfg.Allowed == nil {
		return nil
	}
	r.mu.Lock()
	var todo []*pod
	for _, p := range r.pods {
		if p.hasOld.Load() {
			todo = append(todo, p)
		}
	}
	r.mu.Unlock()
	var failed error
	for _, p := range todo {
		p.work.Lock()
		r.mu.Lock()
		d := p.local
		r.mu.Unlock()
		if err := r.resetDenied(p, d); err != nil && failed == nil {
			failed = fmt.Errorf("connections of pod %s from before its enrolment: %w", d, err)
		}
		p.work.Unlock()
	}
	return failed
}

// resetDenied resets the inbound connections from before enrolment that policies do not allow. The caller holds
// p.work.
func (r *Registry) resetDenied(p *pod, d LocalPod) error {
	if r.cfg.Allowed == nil || len(p.preexisting) == 0 || p.ns == nil {
		p.hasOld.Store(len(p.preexisting) > 0)
		return nil
	}
	dg, err := netns.OpenDiag(p.ns)
	if err != nil {
		return err
	}
	defer dg.Close()
	ports, err := listening(dg)
	if err != nil {
		return err
	}
	open, err := remaining(dg, p.preexisting)
	if err != nil {
		return err
	}
	still := make(map[uint64]bool, len(open))
	var denied []netns.TCPSocket
	why := map[string]int{}
	for i := range open {
		s := &open[i]
		if ports[s.Local.Port()] {
			if by, ok := r.cfg.Allowed(d.WorkloadUID, s.Remote, s.Local); !ok {
				denied = append(denied, *s)
				why[by]++
				continue
			}
		}
		still[s.Cookie()] = true
	}
	_, err = dg.Destroy(denied)
	if err != nil {
		return err
	}
	p.preexisting = still
	p.hasOld.Store(len(still) > 0)
	for by, n := range why {
		r.log.Info("connections from before enrolment reset", "namespace", d.Namespace, "pod", d.Name, "count", n, "because", by)
	}
	return nil
}

// listening are the ports that somebody in the namespace listens on.
func listening(d *netns.Diag) (map[uint16]bool, error) {
	listeners, err := d.List(1 << netns.TCPListen)
	if err != nil {
		return nil, err
	}
	ports := map[uint16]bool{}
	for i := range listeners {
		ports[listeners[i].Local.Port()] = true
	}
	return ports, nil
}

// Allowed decides about a plaintext connection to a workload, by the policies of now, and says why not.
type Allowed func(workload string, client, server netip.AddrPort) (why string, ok bool)

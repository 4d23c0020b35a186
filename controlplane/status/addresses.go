package status

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Addresses gives hosts of ServiceEntries that have none an address, by which captured pods can ask for them: in the
// status of the object, from the ranges that Istio takes them of.
type Addresses struct {
	Istio   istio.Interface
	Entries func() []*networkingv1.ServiceEntry // as the watch has them now
	Log     *slog.Logger
}

// labelAllocate on a ServiceEntry, "false", has it do without.
const labelAllocate = "networking.istio.io/enable-autoallocate-ip"

// most is how many hosts there are addresses for: all of mesh.Allocated4 but the first and the last.
const most = 1<<16 - 2

// addressesEvery is how often it is looked for hosts without an address.
const addressesEvery = time.Second

// Run writes until ctx ends. It is the leader's.
func (a *Addresses) Run(ctx context.Context) {
	tick := time.NewTicker(addressesEvery)
	defer tick.Stop()
	exhausted := false
	for {
		todo, without := allocate(a.Entries())
		for _, t := range todo {
			a.write(ctx, t)
		}
		if len(without) > 0 && !exhausted {
			a.Log.Error("no address is left for hosts of ServiceEntries", "range", mesh.Allocated4, "hosts", len(without), "first", without[0])
		}
		exhausted = len(without) > 0
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// allocation is what the status of a ServiceEntry is to say.
type allocation struct {
	entry     *networkingv1.ServiceEntry
	addresses []*networkingv1alpha3.ServiceEntryAddress
}

func (a *Addresses) write(ctx context.Context, t allocation) {
	e := t.entry
	list := []map[string]string{}
	for _, x := range t.addresses {
		list = append(list, map[string]string{"value": x.Value, "host": x.Host})
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": e.UID, "resourceVersion": e.ResourceVersion}, "status": map[string]any{"addresses": list},
	})
	if err == nil {
		_, err = a.Istio.NetworkingV1().ServiceEntries(e.Namespace).Patch(ctx, e.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager}, "status")
	}
	if err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) { // gone, or the watch lags
		a.Log.Warn("addresses not written to the ServiceEntry, trying again", "namespace", e.Namespace, "name", e.Name, "error", err)
	}
}

// nameless are the hosts of a ServiceEntry that are to have an address. One that goes to whatever was asked for can have none, nor a
// wildcard but where all names below it lead to the same place, from where each goes on by its name.
func nameless(e *networkingv1.ServiceEntry) (hosts []string) {
	if len(e.Spec.Addresses) > 0 || e.Spec.Resolution == networkingv1alpha3.ServiceEntry_NONE || e.Labels[labelAllocate] == "false" {
		return nil
	}
	for _, h := range e.Spec.Hosts {
		if (!strings.HasPrefix(h, "*") || e.Spec.Resolution == networkingv1alpha3.ServiceEntry_DYNAMIC_DNS) && !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	return hosts
}

// allocate finds which ServiceEntries lack addresses, and which those are. Who has one keeps it; of several that have the same
// the oldest does. without are the hosts for which none is left.
func allocate(entries []*networkingv1.ServiceEntry) (todo []allocation, without []string) {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b *networkingv1.ServiceEntry) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	taken := map[netip.Addr]bool{}
	type need struct {
		e    *networkingv1.ServiceEntry
		host string
	}
	var needs []need
	kept := map[*networkingv1.ServiceEntry][]*networkingv1alpha3.ServiceEntryAddress{}
	for _, e := range entries {
		have := map[string]bool{}
		hosts := nameless(e)
		for _, x := range e.Status.Addresses {
			at, err := netip.ParseAddr(x.Value)
			if err != nil || taken[at] || !slices.Contains(hosts, x.Host) || !mesh.Allocated(at) {
				continue
			}
			taken[at], have[x.Host] = true, true
			kept[e] = append(kept[e], x)
		}
		for _, h := range hosts {
			if !have[h] {
				needs = append(needs, need{e, h})
			}
		}
	}
	changed := map[*networkingv1.ServiceEntry]bool{}
	for _, n := range needs {
		v4, v6, ok := free(n.e.Namespace+"/"+n.e.Name+"/"+n.host, taken)
		if !ok {
			without = append(without, n.host)
			continue
		}
		taken[v4], taken[v6] = true, true
		kept[n.e] = append(kept[n.e], &networkingv1alpha3.ServiceEntryAddress{Value: v4.String(), Host: n.host},
			&networkingv1alpha3.ServiceEntryAddress{Value: v6.String(), Host: n.host})
		changed[n.e] = true
	}
	for _, e := range entries {
		if changed[e] {
			todo = append(todo, allocation{e, kept[e]})
		}
	}
	return todo, without
}

// free is a pair of addresses that nobody has. It begins where the name leads, so that replicas and restarts come to the same.
func free(name string, taken map[netip.Addr]bool) (v4, v6 netip.Addr, ok bool) {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name)) // never fails
	at := h.Sum32()
	for i := range uint32(most) {
		n := uint16((at+i)%most + 1)
		b4, b6 := mesh.Allocated4.Addr().As4(), mesh.Allocated6.Addr().As16()
		binary.BigEndian.PutUint16(b4[2:], n)
		binary.BigEndian.PutUint16(b6[14:], n)
		v4, v6 = netip.AddrFrom4(b4), netip.AddrFrom16(b6)
		if !taken[v4] && !taken[v6] {
			return v4, v6, true
		}
	}
	return v4, v6, false
}

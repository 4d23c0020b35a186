package datapath

import (
	"fmt"

	"github.com/vishvananda/netlink"
)

// What Istio's CNI plugin puts into the network namespace of a pod of the ambient mode, beside iptables rules that redirect to ztunnel
// (cni/pkg/iptables and cni/pkg/config of istio/istio): ip rule add fwmark 0x111/0xfff pref 32764 lookup 100.
const (
	istioMark  = 0x111
	istioMask  = 0xfff
	istioTable = 100
)

// otherMesh runs in the pod's namespace. It refuses one in which Istio's rules are: they would redirect what the agent sends and
// accepts, to a ztunnel that is not there any more. They go with the pod alone.
func otherMesh(uid string) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			if gone(err) {
				continue
			}
			return fmt.Errorf("list rules: %w", err)
		}
		for _, r := range rules {
			if r.Table == istioTable && r.Mark == istioMark && r.Mask != nil && *r.Mask == istioMask {
				return &UnsupportedError{UID: uid, Reason: OtherMesh,
					Detail: fmt.Sprintf("Istio's ztunnel captured it: its rules are in the pod's network namespace (fwmark %#x/%#x, table %d); restart the pod", istioMark, istioMask, istioTable)}
			}
		}
	}
	return nil
}

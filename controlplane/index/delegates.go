package index

import (
	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
)

// delegateAPI is what the index has of VirtualServices that delegate, and of those that may be delegates.
type delegateAPI struct {
	spoken     map[key]*networkingv1.VirtualService
	delegators map[key]map[key]struct{} // delegate → who leaves routes to it
}

func newDelegateAPI() delegateAPI {
	return delegateAPI{spoken: map[key]*networkingv1.VirtualService{}, delegators: map[key]map[key]struct{}{}}
}

// setVirtualService records a VirtualService, nil for none, and makes anew those that leave routes to it.
func (x *Index) setVirtualService(k key, v *networkingv1.VirtualService) {
	if old := x.spoken[k]; old != nil {
		for _, d := range routing.Delegates(old.Namespace, &old.Spec) {
			unlink(x.delegators, key(d), k)
		}
		delete(x.spoken, k)
	}
	var f *routeFact
	if v != nil {
		to := routing.Delegates(v.Namespace, &v.Spec)
		for _, d := range to {
			link(x.delegators, key(d), k)
		}
		if len(to) > 0 || len(v.Spec.Hosts) == 0 {
			x.spoken[k] = v
		}
		f = x.virtualServiceFactOf(v)
	}
	x.setRoutes(VirtualService, x.virtuals, k, f)
	for root := range x.delegators[k] {
		if root != k {
			x.setRoutes(VirtualService, x.virtuals, root, x.virtualServiceFactOf(x.spoken[root]))
		}
	}
}

// virtualServiceFactOf is what a VirtualService says together with its delegates.
func (x *Index) virtualServiceFactOf(v *networkingv1.VirtualService) *routeFact {
	if len(routing.Delegates(v.Namespace, &v.Spec)) == 0 {
		return x.c.virtualServiceFactOf(v)
	}
	whole, problems := routing.Delegated(v.Namespace, &v.Spec, func(d routing.Delegate) *networkingv1alpha3.VirtualService {
		other := x.spoken[key(d)]
		if other == nil || !visible(other.Spec.ExportTo, other.Namespace, v.Namespace) {
			return nil
		}
		return &other.Spec
	}, x.c.ResolveHost)
	with := &networkingv1.VirtualService{ObjectMeta: v.ObjectMeta}
	whole.DeepCopyInto(&with.Spec)
	f := x.c.virtualServiceFactOf(with)
	f.problems = append(problems, f.problems...)
	return f
}

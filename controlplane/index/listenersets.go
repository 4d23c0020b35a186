package index

import (
	"fmt"
	"slices"
	"strconv"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
)

// Listeners that others add to a Gateway which lets them. To everything that follows they are the Gateway's own, after those
// that it has itself, but for who may attach routes and whose certificates they are.

// ListenerSetState is what has become of a ListenerSet at its Gateway.
type ListenerSetState struct {
	Namespace, Name, UID string
	Generation           int64
	Accepted             routing.Verdict
	Listeners            []ListenerState // as many as it has; none where the Gateway does not let it
}

// Served reports whether a listener of the set is.
func (s *ListenerSetState) Served() bool {
	return slices.ContainsFunc(s.Listeners, ListenerState.Programmed)
}

func (s *ListenerSetState) equal(o *ListenerSetState) bool {
	return s.Namespace == o.Namespace && s.Name == o.Name && s.UID == o.UID && s.Generation == o.Generation && s.Accepted == o.Accepted &&
		slices.EqualFunc(s.Listeners, o.Listeners, ListenerState.equal)
}

// listenerSetFact is a ListenerSet.
type listenerSetFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	gateway    key
	listeners  []ingressListener
}

// older orders the sets of a Gateway: where two want the same, the older has it.
func (f *listenerSetFact) older(o *listenerSetFact) int {
	if !f.created.Equal(&o.created) {
		return f.created.Compare(o.created.Time)
	}
	return compareKeys(f.key, o.key)
}

func listenerSetFactOf(s *gatewayv1.ListenerSet) *listenerSetFact {
	p := s.Spec.ParentRef
	if deref(p.Group, gatewayv1.GroupName) != gatewayv1.GroupName || deref(p.Kind, "Gateway") != "Gateway" {
		return nil
	}
	f := &listenerSetFact{
		key: keyOf(s), uid: string(s.UID), generation: s.Generation, created: s.CreationTimestamp,
		gateway: key{string(deref(p.Namespace, gatewayv1.Namespace(s.Namespace))), string(p.Name)},
	}
	for _, entry := range s.Spec.Listeners {
		l := gatewayv1.Listener(entry)
		f.listeners = append(f.listeners, listenerOf(ref{ListenerSet, f.key}, &l))
	}
	return f
}

// setPlace is where a Gateway has the listeners of a set.
type setPlace struct {
	fact    *listenerSetFact
	first   int
	refused routing.Verdict
}

// admission is which namespaces' objects may be attached to something.
type admission struct {
	from       gatewayv1.FromNamespaces
	namespaces labels.Selector
}

func admissionOf(from *gatewayv1.FromNamespaces, otherwise gatewayv1.FromNamespaces, selector *metav1.LabelSelector) admission {
	a := admission{deref(from, otherwise), labels.Nothing()}
	if selector != nil {
		if s, err := metav1.LabelSelectorAsSelector(selector); err == nil {
			a.namespaces = s
		}
	}
	return a
}

// setsAdmitted are those whose ListenerSets a Gateway takes.
func setsAdmitted(a *gatewayv1.AllowedListeners) admission {
	if a == nil || a.Namespaces == nil {
		return admissionOf(nil, gatewayv1.NamespacesFromNone, nil)
	}
	return admissionOf(a.Namespaces.From, gatewayv1.NamespacesFromNone, a.Namespaces.Selector)
}

// admits reports whether what is in a namespace may be attached to what is in another.
func (x *Index) admits(a admission, own, ns string) bool {
	switch a.from {
	case gatewayv1.NamespacesFromAll:
		return true
	case gatewayv1.NamespacesFromSame:
		return ns == own
	case gatewayv1.NamespacesFromSelector:
		n := x.namespaces[ns]
		return n != nil && a.namespaces.Matches(labels.Set(n.labels))
	}
	return false
}

func (x *Index) setListenerSet(k key, f *listenerSetFact) {
	old := put(x.listenerSets, k, f)
	if old == nil && f == nil || old != nil && f != nil && f.generation != 0 && old.generation == f.generation && old.uid == f.uid {
		return
	}
	for r := range x.routesOf[ref{ListenerSet, k}] {
		x.dirtyGatewayRoutes[r] = struct{}{}
	}
	x.dirtySets[k] = struct{}{}
	if old != nil {
		unlink(x.setsOf, old.gateway, k)
		x.arrange(old.gateway)
	}
	if f != nil {
		link(x.setsOf, f.gateway, k)
		x.arrange(f.gateway)
	}
}

// touchSetsFrom has Gateways look again whether they take the sets of a namespace, whose labels have changed.
func (x *Index) touchSetsFrom(ns string) {
	for _, s := range x.listenerSets[ns] {
		x.arrange(s.gateway)
	}
}

// arrange puts the listeners of a Gateway together.
func (x *Index) arrange(k key) {
	own := x.declared[k.Namespace][k.Name]
	if own == nil {
		put(x.ingresses, k, nil)
		x.touchIngress(k)
		return
	}
	f := *own
	f.listeners = slices.Clone(own.listeners)
	var sets []*listenerSetFact
	for s := range x.setsOf[k] {
		sets = append(sets, x.listenerSets[s.Namespace][s.Name])
	}
	slices.SortFunc(sets, (*listenerSetFact).older)
	for _, s := range sets {
		at := setPlace{fact: s, first: len(f.listeners)}
		switch {
		case !x.admits(f.admits, f.Namespace, s.Namespace):
			at.refused = verdict(gatewayv1.ListenerSetReasonNotAllowed, "Gateway "+k.String()+" takes no ListenerSets of namespace "+s.Namespace+" (allowedListeners)")
		case !f.accepted.OK():
			at.refused = verdict(gatewayv1.ListenerSetReasonParentNotAccepted, "Gateway "+k.String()+": "+f.accepted.Message)
		default:
			f.listeners = append(f.listeners, s.listeners...)
		}
		f.sets = append(f.sets, at)
	}
	for i := range f.listeners {
		f.listeners[i].clients = checksOf(f.frontend, &f.listeners[i])
	}
	conflicts(f.listeners)
	put(x.ingresses, k, &f)
	x.touchIngress(k)
}

// conflicts finds the listeners that others before them are in the way of.
func conflicts(listeners []ingressListener) {
	type at struct {
		port uint16
		host string
	}
	taken, protocols := map[at]*ingressListener{}, map[uint16]*ingressListener{}
	for i := range listeners {
		l := &listeners[i]
		if !l.accepted.OK() {
			continue
		}
		first, k := protocols[l.port], at{l.port, l.host}
		other := taken[k]
		switch {
		case first != nil && family(first) != family(l):
			l.conflicted = verdict(gatewayv1.ListenerReasonProtocolConflict, fmt.Sprintf("%s has port %d with protocol %s", first.called(l), l.port, first.protocol))
		case other != nil && l.protocol == gatewayv1.TCPProtocolType:
			l.conflicted = verdict(gatewayv1.ListenerReasonProtocolConflict, fmt.Sprintf("%s has port %d, and connections without TLS tell no host", other.called(l), l.port))
		case other != nil:
			l.conflicted = verdict(gatewayv1.ListenerReasonHostnameConflict, fmt.Sprintf("%s has port %d and the same hostname", other.called(l), l.port))
		default:
			taken[k] = l
			if first == nil {
				protocols[l.port] = l
			}
		}
	}
}

// called is what a listener is called to another.
func (l *ingressListener) called(to *ingressListener) string {
	if l.of == to.of {
		return "listener " + string(l.name)
	}
	return "listener " + string(l.name) + " of " + l.of.kind.String() + " " + l.of.key.String()
}

// tellSets moves what was found of the listeners of a Gateway's sets to where the sets' are.
func (x *Index) tellSets(u *Update, f *ingressFact, s *GatewayState) {
	for _, p := range f.sets {
		set := ListenerSetState{Namespace: p.fact.Namespace, Name: p.fact.Name, UID: p.fact.uid, Generation: p.fact.generation, Accepted: p.refused}
		worst := p.refused
		if p.refused.OK() {
			set.Listeners = s.Listeners[p.first : p.first+len(p.fact.listeners)]
			worst = firstProblem(set.Listeners)
			if !set.Served() {
				set.Accepted = verdict(gatewayv1.ListenerSetReasonListenersNotValid, "none of its listeners can be served: "+worst.Message)
			}
		}
		x.notice(u, NoticeKey{Kind: ListenerSet, Namespace: set.Namespace, Name: set.Name}, set.UID, worst.Reason, worst.Message)
		s.Sets = append(s.Sets, set)
	}
	s.Listeners = s.Listeners[:f.own]
}

// firstProblem is what is wrong with the first of some listeners with which something is.
func firstProblem(listeners []ListenerState) routing.Verdict {
	for i, l := range listeners {
		for _, v := range []routing.Verdict{l.Conflicted, l.Accepted, l.Resolved} {
			if !v.OK() {
				return routing.Verdict{Reason: v.Reason, Message: "listeners[" + strconv.Itoa(i) + "]: " + v.Message}
			}
		}
	}
	return routing.Verdict{}
}

// commitSets forgets what was said of sets that no Gateway of ours has any more.
func (x *Index) commitSets(u *Update) {
	for k := range x.dirtySets {
		if s := x.listenerSets[k.Namespace][k.Name]; s == nil || x.ingress(s.gateway) == nil {
			x.notice(u, NoticeKey{Kind: ListenerSet, Namespace: k.Namespace, Name: k.Name}, "", "", "")
		}
	}
	x.dirtySets = emptied(x.dirtySets)
}

package status

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	metav1alpha1 "istio.io/api/meta/v1alpha1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Conditions that are written on policies. The last two are Istio's own words for what it accepts; RateLimits and
// EnvoyFilters have the Gateway API's.
const (
	ConditionEnforced         = "Enforced"
	ConditionAccepted         = "Accepted"
	ConditionZtunnelAccepted  = "ZtunnelAccepted"
	ConditionWaypointAccepted = "WaypointAccepted"
)

// partPrefix and a revision are the type of the condition in which that revision's control plane says what its waypoints and
// gateways do about a policy. The default one, which writes the others, counts it.
const partPrefix = "warren.io/Enforced-"

var ownConditions = []string{ConditionEnforced, ConditionAccepted, ConditionZtunnelAccepted, ConditionWaypointAccepted}

// Reasons of the condition Enforced, beside those with which package policy says what nodes do instead.
const (
	reasonEnforced     = "Enforced"          // every node that has to does
	reasonNoWorkloads  = "NoWorkloads"       // no node has to
	reasonPending      = "NodesPending"      // some have not yet
	reasonRefused      = "NodesRefuse"       // some have said that they cannot
	reasonDisconnected = "NodesDisconnected" // some have never said anything to this control plane
)

// condition is one in the making. Its times are known when it is written.
type condition struct {
	Type, Status, Reason, Message string
}

// atRevision is the part of a message that alone is no reason to write it again.
var atRevision = regexp.MustCompile(` at revision \d+`)

func (c condition) same(o *metav1alpha1.IstioCondition, generation int64) bool {
	return o != nil && o.Type == c.Type && o.Status == c.Status && o.Reason == c.Reason && o.ObservedGeneration == generation &&
		atRevision.ReplaceAllString(o.Message, "") == atRevision.ReplaceAllString(c.Message, "")
}

func find(list []*metav1alpha1.IstioCondition, kind string) *metav1alpha1.IstioCondition {
	for _, c := range list {
		if c != nil && c.Type == kind {
			return c
		}
	}
	return nil
}

// unchanged reports whether the object has just these of those conditions that are ours.
func unchanged(have []*metav1alpha1.IstioCondition, want []condition, generation int64, ours func(kind string) bool) bool {
	n := 0
	for _, c := range have {
		if c != nil && ours(c.Type) {
			n++
		}
	}
	return n == len(want) && !slices.ContainsFunc(want, func(c condition) bool { return !c.same(find(have, c.Type), generation) })
}

// wireCondition is a condition as it is written. A generation is a number there: kubectl wait reads no other.
type wireCondition struct {
	Type               string      `json:"type"`
	Status             string      `json:"status"`
	Reason             string      `json:"reason"`
	Message            string      `json:"message"`
	ObservedGeneration int64       `json:"observedGeneration"`
	LastTransitionTime metav1.Time `json:"lastTransitionTime"`
}

// statusPatch is the merge patch that makes want those conditions of an object that are ours. It leaves those of others, and
// holds for the object only as it was read: the list has no keys, so a patch replaces it as a whole.
func statusPatch(o Object, want []condition, now time.Time, ours func(kind string) bool) ([]byte, error) {
	list := []any{}
	for _, c := range o.Conditions {
		switch {
		case c == nil || ours(c.Type):
		case slices.Contains(ownConditions, c.Type) || strings.HasPrefix(c.Type, partPrefix): // another control plane's
			list = append(list, wireCondition{c.Type, c.Status, c.Reason, c.Message, c.ObservedGeneration, metav1.NewTime(c.LastTransitionTime.AsTime())})
		default:
			list = append(list, c)
		}
	}
	for _, c := range want {
		w := wireCondition{c.Type, c.Status, c.Reason, c.Message, o.Generation, metav1.NewTime(now.UTC())}
		if was := find(o.Conditions, c.Type); was != nil && was.Status == c.Status && was.LastTransitionTime != nil {
			w.LastTransitionTime = metav1.NewTime(was.LastTransitionTime.AsTime())
		}
		list = append(list, w)
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": o.UID, "resourceVersion": o.ResourceVersion},
		"status":   map[string]any{"conditions": list},
	})
}

// lack has a condition say who does not do what it is about.
func (c *condition) lack(reason, word string, who []string) {
	if len(who) > 0 {
		c.Status, c.Reason = string(metav1.ConditionFalse), reason
		c.Message += "; " + word + " " + few(who)
	}
}

// few names the first of many.
func few(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// short keeps a node's words from filling an object.
func short(s string) string {
	const most = 300
	if r := []rune(s); len(r) > most {
		return string(r[:most]) + "…"
	}
	return s
}

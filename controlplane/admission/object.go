package admission

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// Object is what somebody wants to store.
type Object struct {
	Kind, Namespace, Name string
	Annotations           map[string]string
	// Spec is as it was written: a typed object no longer tells an empty list from none.
	Spec json.RawMessage

	deleted bool
}

// Parse reads an object as the API server writes it, or as a user does, in JSON.
func Parse(raw []byte) (*Object, error) {
	var in struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name              string            `json:"name"`
			Namespace         string            `json:"namespace"`
			Annotations       map[string]string `json:"annotations"`
			DeletionTimestamp *string           `json:"deletionTimestamp"`
		} `json:"metadata"`
		Spec json.RawMessage `json:"spec"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return nil, fmt.Errorf("the object cannot be read: %w", err)
	}
	return &Object{
		Kind: in.Kind, Namespace: in.Metadata.Namespace, Name: in.Metadata.Name, Annotations: in.Metadata.Annotations, Spec: in.Spec, deleted: in.Metadata.DeletionTimestamp != nil,
	}, nil
}

// sameMeaning reports whether nothing that is judged differs. The API server writes both in one order.
func (o *Object) sameMeaning(other *Object) bool {
	dry, was := o.Annotations[policy.AnnotationDryRun]
	otherDry, otherWas := other.Annotations[policy.AnnotationDryRun]
	return bytes.Equal(o.Spec, other.Spec) && dry == otherDry && was == otherWas
}

// typed returns the object as its Go type; nil for a kind that is not judged.
func (o *Object) typed() (any, error) {
	meta := metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Name, Annotations: o.Annotations}
	spec := o.Spec
	if len(spec) == 0 {
		spec = []byte("{}")
	}
	var out any
	var err error
	switch o.Kind {
	case "AuthorizationPolicy":
		p := &securityv1.AuthorizationPolicy{ObjectMeta: meta}
		out, err = p, p.Spec.UnmarshalJSON(spec)
	case "PeerAuthentication":
		p := &securityv1.PeerAuthentication{ObjectMeta: meta}
		out, err = p, p.Spec.UnmarshalJSON(spec)
	case "RequestAuthentication":
		p := &securityv1.RequestAuthentication{ObjectMeta: meta}
		out, err = p, p.Spec.UnmarshalJSON(spec)
	case "Telemetry":
		p := &telemetryv1.Telemetry{ObjectMeta: meta}
		out, err = p, p.Spec.UnmarshalJSON(spec)
	case "Gateway": // of networking.istio.io: no other is asked about
		g := &networkingv1.Gateway{ObjectMeta: meta}
		out, err = g, g.Spec.UnmarshalJSON(spec)
	}
	if err != nil {
		return nil, fmt.Errorf("it is not of the form that a spec of kind %s has: %w", o.Kind, err)
	}
	return out, nil
}

// emptyClauses yields the paths of empty lists of sources or operations: a typed rule would be one for any.
func emptyClauses(spec []byte, yield func(path string)) {
	var in struct {
		Rules []struct {
			From json.RawMessage `json:"from"`
			To   json.RawMessage `json:"to"`
		} `json:"rules"`
	}
	if json.Unmarshal(spec, &in) != nil {
		return
	}
	for i, r := range in.Rules {
		if isEmpty(r.From) {
			yield(fmt.Sprintf("spec.rules[%d].from", i))
		}
		if isEmpty(r.To) {
			yield(fmt.Sprintf("spec.rules[%d].to", i))
		}
	}
}

func isEmpty(v json.RawMessage) bool {
	switch string(bytes.TrimSpace(v)) {
	case "[]", "null":
		return true
	}
	return false
}

// emptyLists yields the paths of lists and of nulls in a list's place that say nothing beside lists that do: the
// author may think that they mean "none". A source or operation of which all lists are empty is an error of its own.
func emptyLists(spec []byte, yield func(path string)) {
	type entry struct {
		Source    map[string]json.RawMessage `json:"source"`
		Operation map[string]json.RawMessage `json:"operation"`
	}
	var in struct {
		Rules []struct {
			From []entry `json:"from"`
			To   []entry `json:"to"`
		} `json:"rules"`
	}
	if json.Unmarshal(spec, &in) != nil {
		return
	}
	look := func(at string, lists map[string]json.RawMessage) {
		var empty []string
		for name, v := range lists {
			if isEmpty(v) {
				empty = append(empty, name)
			}
		}
		if len(empty) == len(lists) {
			return
		}
		slices.Sort(empty)
		for _, name := range empty {
			yield(at + "." + name)
		}
	}
	for i, r := range in.Rules {
		at := "spec.rules[" + strconv.Itoa(i) + "]"
		for j, f := range r.From {
			look(at+".from["+strconv.Itoa(j)+"].source", f.Source)
		}
		for j, t := range r.To {
			look(at+".to["+strconv.Itoa(j)+"].operation", t.Operation)
		}
	}
}

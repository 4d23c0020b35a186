package analysis

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/charts"
	"github.com/warrenmesh/warren/controlplane/admission"
	"github.com/warrenmesh/warren/controlplane/index"
)

// definitions are the texts of the CustomResourceDefinitions in the chart, by group/kind; they are read when they are asked for.
var definitions = sync.OnceValue(func() map[string]string {
	out := map[string]string{}
	files, err := fs.Glob(charts.Files, "warren/files/crds/*.yaml")
	if err != nil {
		panic(err) // the pattern is constant
	}
	for _, f := range files {
		b, err := charts.Files.ReadFile(f)
		if err != nil {
			panic(err) // it is part of the program
		}
		for doc := range strings.SplitSeq(string(b), "\n---\n") {
			kind, group := after(doc, "\n    kind: "), after(doc, "\n  group: ")
			if kind != "" && group != "" {
				out[group+"/"+kind] = doc
			}
		}
	}
	return out
})

func after(text, mark string) string {
	_, rest, _ := strings.Cut(text, mark)
	word, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(word)
}

// schema is what says which fields there are.
type schema struct {
	Type       string             `json:"type"`
	Properties map[string]*schema `json:"properties"`
	Items      *schema            `json:"items"`
	Additional *additional        `json:"additionalProperties"`
	Any        bool               `json:"x-kubernetes-preserve-unknown-fields"`
}

// additional is the schema of values under names that are the author's; nil within where they are of any form.
type additional struct{ *schema }

func (a *additional) UnmarshalJSON(b []byte) error {
	if string(b) == "true" || string(b) == "false" {
		return nil
	}
	return json.Unmarshal(b, &a.schema)
}

var schemas sync.Map // group/version/kind → *schema

// schemaOf is nil for a kind or version that the chart does not define.
func schemaOf(o *unstructured.Unstructured) *schema {
	group, version, _ := strings.Cut(o.GetAPIVersion(), "/")
	key := o.GetAPIVersion() + "/" + o.GetKind()
	if s, ok := schemas.Load(key); ok {
		return s.(*schema)
	}
	var found *schema
	if text := definitions()[group+"/"+o.GetKind()]; text != "" {
		var crd struct {
			Spec struct {
				Versions []struct {
					Name   string
					Schema struct{ OpenAPIV3Schema *schema }
				}
			}
		}
		if err := yaml.Unmarshal([]byte(text), &crd); err != nil {
			panic(fmt.Sprintf("the chart's definition of %s: %v", o.GetKind(), err)) // it is part of the program
		}
		for _, v := range crd.Spec.Versions {
			if v.Name == version {
				found = v.Schema.OpenAPIV3Schema
			}
		}
	}
	schemas.Store(key, found)
	return found
}

// unknownFields reports fields that the object's kind does not have, and whether there are any.
func (r *run) unknownFields(o Object) bool {
	s := schemaOf(o.Unstructured)
	if s == nil {
		return false
	}
	of := idOf(o.Unstructured)
	r.source[of] = o.From
	n := len(r.found)
	for _, k := range slices.Sorted(maps.Keys(o.Object)) {
		switch sub, ok := s.Properties[k]; {
		case k == "apiVersion" || k == "kind" || k == "metadata" || k == "status":
		case !ok:
			r.unknownField(of, k, k, s.Properties)
		default:
			r.walk(of, k, o.Object[k], sub)
		}
	}
	return len(r.found) > n
}

func (r *run) walk(of id, at string, v any, s *schema) {
	if s.Any {
		return
	}
	switch v := v.(type) {
	case map[string]any:
		if s.Type != "object" {
			return // of the wrong type, which is said by who reads it
		}
		for _, k := range slices.Sorted(maps.Keys(v)) {
			sub, ok := s.Properties[k]
			switch {
			case ok:
				r.walk(of, at+"."+k, v[k], sub)
			case s.Additional == nil:
				r.unknownField(of, at+"."+k, k, s.Properties)
			case s.Additional.schema != nil:
				r.walk(of, at+"."+k, v[k], s.Additional.schema)
			}
		}
	case []any:
		if s.Items == nil {
			return
		}
		for i, e := range v {
			r.walk(of, fmt.Sprintf("%s[%d]", at, i), e, s.Items)
		}
	}
}

func (r *run) unknownField(of id, at, name string, there map[string]*schema) {
	names := slices.Sorted(maps.Keys(there))
	hint := "there are " + strings.Join(names, ", ")
	if near := admission.Nearest(name, names); near != "" {
		hint = "is " + near + " meant?"
	} else if len(names) == 0 {
		hint = "it has none"
	}
	r.add(of, Error, string(UnknownField), at, of.kind+" has no such field; "+hint)
}

// notFollowed warns of a kind that means something to Istio and nothing here.
func (r *run) notFollowed(o *unstructured.Unstructured) {
	group, _, _ := strings.Cut(o.GetAPIVersion(), "/")
	if !strings.HasSuffix(group, ".istio.io") || index.Follows(group, o.GetKind()) {
		return
	}
	r.add(idOf(o), Warning, string(NotFollowed), "", "Warren does not follow objects of kind "+o.GetKind()+" of "+group+": it has no effect")
}

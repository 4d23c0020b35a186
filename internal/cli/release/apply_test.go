package release

import (
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	kinds "k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
)

// A definition whose end has failed is touched, so that the API server tries again; one that only takes its time is not.
func TestDefinitionsWhoseEndHasFailedAreTouched(t *testing.T) {
	gvk := kinds.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"}
	definition := func(name, reason, message string) *unstructured.Unstructured {
		o := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": []any{
			map[string]any{"type": "Terminating", "status": "True", "reason": reason, "message": message},
		}}}}
		o.SetGroupVersionKind(gvk)
		o.SetName(name)
		return o
	}
	failed := definition("a.example.com", "InstanceDeletionFailed", "could not list instances")
	slow := definition("b.example.com", "InstanceDeletionInProgress", "deletion is in progress")
	mapper := meta.NewDefaultRESTMapper(nil)
	mapper.Add(gvk, meta.RESTScopeRoot)
	client := dynamicfake.NewSimpleDynamicClient(runtime.NewScheme(), failed, slow)
	left, err := Cluster{Client: client, Mapper: mapper}.Ending(t.Context(), []*unstructured.Unstructured{failed, slow})
	want := []string{"CustomResourceDefinition a.example.com (could not list instances)", "CustomResourceDefinition b.example.com (deletion is in progress)"}
	if err != nil || !slices.Equal(left, want) {
		t.Errorf("%q, %v", left, err)
	}
	for _, o := range []*unstructured.Unstructured{failed, slow} {
		got, err := client.Resource(gvk.GroupVersion().WithResource("customresourcedefinitions")).Get(t.Context(), o.GetName(), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if touched := got.GetAnnotations()["warren.io/awaited"] != ""; touched != (o == failed) {
			t.Errorf("%s: touched %v", o.GetName(), touched)
		}
	}
}

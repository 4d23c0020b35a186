package status

import (
	"google.golang.org/protobuf/types/known/timestamppb"
	metav1alpha1 "istio.io/api/meta/v1alpha1"
	typev1beta1 "istio.io/api/type/v1beta1"
	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
)

// Objects is Object of PoliciesConfig on what the index reads.
func Objects(s *index.Source) func(index.PolicyKey) (Object, bool) {
	return func(k index.PolicyKey) (Object, bool) {
		o, ok := s.Object(k.Kind, k.Namespace, k.Name)
		if !ok {
			return Object{}, false
		}
		return objectOf(o)
	}
}

func objectOf(o any) (Object, bool) {
	switch p := o.(type) {
	case *securityv1.AuthorizationPolicy:
		out := object(p, &p.Status)
		out.Targets = targets(p.Namespace, p.Spec.TargetRefs, p.Spec.TargetRef)
		return out, true
	case *securityv1.PeerAuthentication:
		return object(p, &p.Status), true
	case *securityv1.RequestAuthentication:
		out := object(p, &p.Status)
		out.Targets = targets(p.Namespace, p.Spec.TargetRefs, p.Spec.TargetRef)
		return out, true
	case *telemetryv1.Telemetry:
		out := object(p, &p.Status)
		out.Targets = targets(p.Namespace, p.Spec.TargetRefs, p.Spec.TargetRef)
		return out, true
	case *networkingv1alpha3.EnvoyFilter:
		out := object(p, &p.Status)
		out.Targets = targets(p.Namespace, p.Spec.TargetRefs, nil)
		return out, true
	case *extensionsv1alpha1.WasmPlugin:
		return object(p, &p.Status), true
	case *policy.RateLimit:
		out := Object{UID: string(p.UID), ResourceVersion: p.ResourceVersion, Generation: p.Generation}
		for _, c := range p.Status.Conditions {
			out.Conditions = append(out.Conditions, &metav1alpha1.IstioCondition{
				Type: c.Type, Status: string(c.Status), Reason: c.Reason, Message: c.Message, ObservedGeneration: c.ObservedGeneration,
				LastTransitionTime: timestamppb.New(c.LastTransitionTime.Time),
			})
		}
		for _, t := range p.Spec.TargetRefs {
			out.Targets = append(out.Targets, t.Kind+" "+p.Namespace+"/"+t.Name)
		}
		return out, true
	}
	return Object{}, false
}

func targets(namespace string, refs []*typev1beta1.PolicyTargetReference, single *typev1beta1.PolicyTargetReference) []string {
	if len(refs) == 0 && single != nil {
		refs = []*typev1beta1.PolicyTargetReference{single}
	}
	var out []string
	for _, r := range refs {
		out = append(out, r.GetKind()+" "+namespace+"/"+r.GetName())
	}
	return out
}

func object(m metav1.Object, s *metav1alpha1.IstioStatus) Object {
	return Object{UID: string(m.GetUID()), ResourceVersion: m.GetResourceVersion(), Generation: m.GetGeneration(), Conditions: s.GetConditions()}
}

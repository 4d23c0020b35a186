package index

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// BenchmarkOnePodOf changes one pod of a large mesh: the cost must not follow the mesh's size.
func BenchmarkOnePodOf(b *testing.B) {
	for _, n := range []int{1_000, 50_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			x, err := New(testConfig)
			if err != nil {
				b.Fatal(err)
			}
			pod := func(i int, ready bool) *corev1.Pod {
				ns := fmt.Sprintf("ns%d", i/100)
				p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("p%d", i), UID: "u", Labels: map[string]string{"app": fmt.Sprint(i % 10)}}}
				p.Spec.NodeName = fmt.Sprintf("n%d", i%500)
				p.Status.PodIP = fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)
				p.Status.Phase = corev1.PodRunning
				if ready {
					p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
				}
				return p
			}
			for i := range n {
				x.Set(pod(i, true))
				if i%100 == 0 {
					for s := range 10 {
						v := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprintf("ns%d", i/100), Name: fmt.Sprintf("s%d", s)}}
						v.Spec.Selector = map[string]string{"app": fmt.Sprint(s)}
						v.Spec.ClusterIP = fmt.Sprintf("10.200.%d.%d", i/100, s)
						v.Spec.Ports = []corev1.ServicePort{{Port: 80}}
						x.Set(v)
					}
				}
			}
			x.Commit()
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				x.Set(pod(i*7919%n, i%2 == 0))
				x.Commit()
			}
		})
	}
}

package index

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What a pod's annotation says of DNS capture is read from what the watch keeps of the pod. What is neither true nor false says nothing.
func TestDNSCaptureOfAPod(t *testing.T) {
	for value, want := range map[string]mesh.DNSCapture{
		"true": mesh.DNSCaptureOn, "false": mesh.DNSCaptureOff, "": mesh.DNSCaptureUnsaid, "yes": mesh.DNSCaptureUnsaid,
	} {
		kept, err := strip(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "ui", Annotations: map[string]string{annotationDNSCapture: value}}})
		if err != nil {
			t.Fatal(err)
		}
		if got := podFactOf(kept.(*corev1.Pod)).dnsCapture; got != want {
			t.Errorf("%q: %d, want %d", value, got, want)
		}
	}
}

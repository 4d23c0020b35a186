package status

import (
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/warrenmesh/warren/controlplane/index"
)

func TestServicesAreToldThatTheirWaypointIsNotThere(t *testing.T) {
	kube := fake.NewClientset(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "ui", UID: "u1"}})
	way := struct{ Namespace, Name string }{"shop", "way"}
	wishes := []index.WaypointWish{{Namespace: "shop", Name: "ui", UID: "u1", Waypoint: way}, {Namespace: "shop", Name: "gone", UID: "u2", Waypoint: way}}
	w := &Waypoints{Kube: kube, Wishes: func() []index.WaypointWish { return wishes }, Log: slog.New(slog.DiscardHandler)}
	says := func() string {
		s, err := kube.CoreV1().Services("shop").Get(t.Context(), "ui", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range s.Status.Conditions {
			if c.Type == ConditionWaypointBound {
				return string(c.Status) + " " + c.Reason + ": " + c.Message
			}
		}
		return ""
	}
	said := map[string]told{}
	w.reconcile(t.Context(), said)
	if got := says(); got != `False WaypointIsNotReady: waypoint "shop/way" is not ready` {
		t.Errorf("%q", got)
	}
	kube.ClearActions()
	w.reconcile(t.Context(), said)
	if n := len(kube.Actions()); n != 0 {
		t.Errorf("%d writes of what is there", n)
	}
	// The next leader knows what was said.
	said = map[string]told{}
	if !w.recall(t.Context(), said) || len(said) != 1 || !strings.Contains(said["u1"].message, "shop/way") {
		t.Errorf("recalled %+v", said)
	}
	wishes = nil
	w.reconcile(t.Context(), said)
	if got := says(); got != "" || len(said) != 0 {
		t.Errorf("nothing is asked for, and still %q", got)
	}
}

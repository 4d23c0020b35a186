package enroll

import (
	"testing"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

func TestWhoMayStart(t *testing.T) {
	pod := func(enrolled, hostNetwork bool) *LocalPod {
		return &LocalPod{UID: "u", Enrolled: enrolled, HostNetwork: hostNetwork, Reason: "r"}
	}
	on, off := map[string]bool{"shop": true}, map[string]bool{"shop": false}
	for _, tc := range []struct {
		name      string
		namespace string
		k         known
		want      answer
		brief     bool
	}{
		{"the mesh's own pods start though nothing is known", "istio-system", known{}, answerStart, false},
		{"the mesh's own pods start though somebody enrolled them", "istio-system", known{pod: pod(true, false), namespaces: on, synced: true}, answerStart, false},
		{"an exempt pod starts though nothing is known", "kube-system", known{}, answerStart, false},
		{"an exempt pod that is enrolled is captured", "kube-system", known{pod: pod(true, false)}, answerCapture, false},
		{"nothing is known: wait", "shop", known{}, answerWait, false},
		{"enrolled namespace, pod not known yet: wait", "shop", known{namespaces: on, synced: true}, answerWait, false},
		{"enrolled namespace, control plane away: wait", "shop", known{namespaces: on}, answerWait, false},
		{"enrolled pod: capture", "shop", known{namespaces: on, synced: true, pod: pod(true, false)}, answerCapture, false},
		{"enrolled by its own label: capture", "shop", known{namespaces: off, synced: true, pod: pod(true, false)}, answerCapture, false},
		{"opted out of an enrolled namespace: start", "shop", known{namespaces: on, synced: true, pod: pod(false, false)}, answerStart, false},
		{"host network: start", "shop", known{namespaces: on, synced: true, pod: pod(true, true)}, answerStart, false},
		{"not enrolled, pod not known yet: a moment", "shop", known{namespaces: off, synced: true}, answerWait, true},
		{"not enrolled at the last known state, control plane away: start", "shop", known{namespaces: off}, answerStart, false},
		{"a namespace never heard of, control plane away: start", "new", known{namespaces: on}, answerStart, false},
	} {
		tc.k.system, tc.k.exempt = "istio-system", []string{"kube-system"}
		got := admit(cni.Request{UID: "u", Namespace: tc.namespace, Name: "p"}, tc.k)
		if got.answer != tc.want || got.brief != tc.brief {
			t.Errorf("%s: got %d (brief %v), want %d (%v): %s", tc.name, got.answer, got.brief, tc.want, tc.brief, got.why)
		}
		if got.why == "" {
			t.Errorf("%s: no reason", tc.name)
		}
	}
}

func TestPodUIDInCgroup(t *testing.T) {
	const uid = "1f7d5b5e-0c3a-4a2e-9d0b-0123456789ab"
	for cgroup, want := range map[string]string{
		"0::/kubepods/burstable/pod1f7d5b5e-0c3a-4a2e-9d0b-0123456789ab/abc\n":                                                                  uid,
		"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1f7d5b5e_0c3a_4a2e_9d0b_0123456789ab.slice/cri-containerd-x.scope\n": uid,
		"12:memory:/kubepods/pod1f7d5b5e-0c3a-4a2e-9d0b-0123456789ab/x\n0::/\n":                                                                 uid,
		"0::/kubepods/pod1f7d5b5e-0c3a-4a2e-9d0b-0123456789ab/x/kubepods/pod2f7d5b5e-0c3a-4a2e-9d0b-0123456789ab/y\n":                           uid,
		"0::/system.slice/kubelet.service\n":                   "",
		"0::/kubepods/podinfo/x\n":                             "",
		"0::/kubepods/pod1f7d5b5e-0c3a-4a2e-9d0b-0123456789\n": "",
		"0::/mypod1f7d5b5e-0c3a-4a2e-9d0b-0123456789ab\n":      "",
		"": "",
	} {
		if got := podUID([]byte(cgroup)); got != want {
			t.Errorf("%q: got %q, want %q", cgroup, got, want)
		}
	}
}

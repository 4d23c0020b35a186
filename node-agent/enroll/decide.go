package enroll

import (
	"slices"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// answer is what becomes of a CNI ADD.
type answer uint8

const (
	answerWait    answer = iota // for the control plane; the zero value never lets a pod start
	answerStart                 // uncaptured
	answerCapture               // then start
)

// admission is the answer to a CNI ADD, and why.
type admission struct {
	answer answer
	// Of answerWait: the pod starts when the wait has been in vain. Its namespace is not enrolled; only a label on
	// the pod itself could say otherwise.
	brief bool
	// A failure does not keep the pod from starting.
	exempt bool
	pod    LocalPod // of answerCapture
	why    string
}

// known is the state that an admission is decided on.
type known struct {
	system     string
	exempt     []string
	namespaces map[string]bool // pods of it are enrolled or not; nil: never heard of
	synced     bool            // the control plane has named this node's pods
	pod        *LocalPod       // its record of the pod
}

// admit decides about a new pod. Agent and control plane must be able to start whatever the state is, so their
// namespace comes first.
func admit(req cni.Request, k known) admission {
	exempt := slices.Contains(k.exempt, req.Namespace)
	switch {
	case req.Namespace == k.system:
		return admission{answer: answerStart, why: "the mesh's own namespace"}
	case k.pod != nil && k.pod.Enrolled && !k.pod.HostNetwork:
		return admission{answer: answerCapture, pod: *k.pod, exempt: exempt, why: k.pod.Reason}
	case k.pod != nil:
		return admission{answer: answerStart, why: "not enrolled: " + k.pod.Reason}
	case exempt:
		return admission{answer: answerStart, why: "exempt namespace"}
	case k.namespaces == nil:
		return admission{answer: answerWait, why: "it is not known yet which namespaces are enrolled: the control plane has not been reached since this node's state was lost"}
	case k.namespaces[req.Namespace]:
		return admission{answer: answerWait, why: "pods of namespace " + req.Namespace + " are enrolled, and the control plane has not told this node about this one yet"}
	case k.synced:
		return admission{answer: answerWait, brief: true, why: "namespace not enrolled"}
	default:
		return admission{answer: answerStart, why: "namespace not enrolled at the last known state"}
	}
}

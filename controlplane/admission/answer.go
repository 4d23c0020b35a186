package admission

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// What the API server hands on: 4 KiB of warnings, or 256 bytes of each; more problems than these do not help
// anybody either.
const (
	maxWarnings   = 12
	maxWarningLen = 1000
	maxErrors     = 10
)

func respond(r *admissionv1.AdmissionResponse) *admissionv1.AdmissionReview {
	return &admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{Kind: "AdmissionReview", APIVersion: admissionv1.SchemeGroupVersion.String()},
		Response: r,
	}
}

func refuse(uid types.UID, code int32, reason metav1.StatusReason, message string) *admissionv1.AdmissionReview {
	return respond(&admissionv1.AdmissionResponse{UID: uid, Result: &metav1.Status{
		Status: metav1.StatusFailure, Code: code, Reason: reason, Message: message,
	}})
}

// refuseProblems names every error, and warns of the rest.
func refuseProblems(uid types.UID, problems []policy.Problem) *admissionv1.AdmissionReview {
	var lines []string
	n := 0
	for _, p := range problems {
		if p.Severity != policy.Error {
			continue
		}
		if n++; n <= maxErrors {
			lines = append(lines, p.String())
		}
	}
	if n > maxErrors {
		lines = append(lines, fmt.Sprintf("and %d more like these", n-maxErrors))
	}
	a := refuse(uid, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, strings.Join(lines, "\n"))
	a.Response.Warnings = warnings(problems)
	return a
}

// warnings are the words for the author of an object that is let pass, or that is refused for something else.
func warnings(problems []policy.Problem) []string {
	var out []string
	n := 0
	for _, p := range problems {
		if p.Severity != policy.Warning {
			continue
		}
		if n++; n <= maxWarnings {
			w := p.String()
			if len(w) > maxWarningLen {
				w = strings.ToValidUTF8(w[:maxWarningLen], "") + "…"
			}
			out = append(out, w)
		}
	}
	if n > maxWarnings {
		out = append(out, fmt.Sprintf("and %d more warnings", n-maxWarnings))
	}
	return out
}

func anyError(problems []policy.Problem) bool {
	for _, p := range problems {
		if p.Severity == policy.Error {
			return true
		}
	}
	return false
}

func tooLarge(body io.Reader) *admissionv1.AdmissionReview {
	return refuse(uidOf(body), http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge,
		fmt.Sprintf("the object is too large to be checked: its review is above %d MiB. Make several objects of it", maxBody>>20))
}

func busy(uid types.UID) *admissionv1.AdmissionReview {
	return refuse(uid, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests,
		"Warren is busy with other large objects; apply this one again in a moment, or make several small ones of it")
}

// uidOf finds the uid near the beginning of a review that is not held in memory, and reads the rest away: a
// client that cannot send all of it does not read the answer.
func uidOf(body io.Reader) types.UID {
	rest := io.LimitReader(body, maxDrain)
	defer func() { _, _ = io.Copy(io.Discard, rest) }()
	dec := json.NewDecoder(io.LimitReader(rest, 64<<10))
	// {"kind":…,"apiVersion":…,"request":{"uid":"…"
	depth, key, inRequest := 0, true, false
	var last string
	for {
		t, err := dec.Token()
		if err != nil {
			return ""
		}
		switch v := t.(type) {
		case json.Delim:
			switch v {
			case '{', '[':
				inRequest = inRequest || depth == 1 && last == "request"
				depth++
				key = true
			default:
				depth--
			}
			if depth > 2 || depth == 0 {
				return ""
			}
			key = true
			continue
		case string:
			if key {
				last, key = v, false
				continue
			}
			if inRequest && depth == 2 && last == "uid" {
				return types.UID(v)
			}
		}
		key = true
	}
}

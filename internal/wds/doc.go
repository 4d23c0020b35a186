// Package wds turns domain values into what workload xDS carries and back, both directions in one place: the
// control plane encodes, a node decodes.
//
// It owns resource names, type URLs and the strictness of decoding: what cannot be understood is an error of
// that one resource, never a guess. It must not know streams, versions or subscriptions.
package wds

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/warrenmesh/warren/internal/mesh"
)

// The types a node subscribes to. A control plane other than Warren's knows the first two.
const (
	AddressType       = "type.googleapis.com/istio.workload.Address"
	AuthorizationType = "type.googleapis.com/istio.security.Authorization"
	LocalPodType      = "type.googleapis.com/warren.node.v1.LocalPod"
	AuditType         = "type.googleapis.com/warren.node.v1.AuditPolicy"
	NamespaceType     = "type.googleapis.com/warren.node.v1.Namespace"
	MeshConfigType    = "type.googleapis.com/warren.node.v1.MeshConfig"
	TrustBundleType   = "type.googleapis.com/warren.node.v1.TrustBundle"
)

// ErrResource is wrapped by every decoding error.
var ErrResource = errors.New("not a usable resource")

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrResource}, args...)...)
}

// ParseServiceName reads "namespace/hostname".
func ParseServiceName(s string) (mesh.ServiceName, error) {
	ns, host, ok := strings.Cut(s, "/")
	if !ok || ns == "" || host == "" || strings.Contains(host, "/") {
		return mesh.ServiceName{}, bad("%q is not namespace/hostname", s)
	}
	return mesh.ServiceName{Namespace: ns, Hostname: host}, nil
}

// ParsePolicyName reads "namespace/name". Istio's own converted policies may have no namespace.
func ParsePolicyName(s string) (mesh.PolicyName, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok || name == "" || strings.Contains(name, "/") {
		return mesh.PolicyName{}, bad("%q is not namespace/name", s)
	}
	return mesh.PolicyName{Namespace: ns, Name: name}, nil
}

func encodeAddr(a netip.Addr) []byte { return a.AsSlice() }

func decodeAddr(b []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return netip.Addr{}, bad("an address of %d bytes", len(b))
	}
	return a.Unmap(), nil
}

func decodePort(p uint32) (uint16, error) {
	if p > 65535 {
		return 0, bad("the port %d", p)
	}
	return uint16(p), nil
}

// decodeAll decodes a list; an empty one is nil.
func decodeAll[W, D any](list []W, one func(W) (D, error)) ([]D, error) {
	if len(list) == 0 {
		return nil, nil
	}
	out := make([]D, 0, len(list))
	for _, w := range list {
		d, err := one(w)
		if err != nil {
			return nil, err
		}
		out = append(out, d)
	}
	return out, nil
}

func encodeAll[D, W any](list []D, one func(D) W) []W {
	if len(list) == 0 {
		return nil
	}
	out := make([]W, 0, len(list))
	for _, d := range list {
		out = append(out, one(d))
	}
	return out
}

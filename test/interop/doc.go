// Package interop holds tests against the real thing: Envoy as HBONE server and as HBONE client, and Istio's
// control plane driving our node agent's xDS client and certificates. It owns no product code.
package interop

// Package interop holds tests that put real Envoy on the other side of the wire, as HBONE server and as
// HBONE client. It owns no product code.
package interop

// Package envoy reads what a waypoint's Envoy says of its configuration at its admin endpoint, and tells what that does to
// a request.
//
// It owns the reading of that JSON. It must not know how the control plane came to the configuration, and it shows no key.
package envoy

// Package conformance runs the conformance suite of the Gateway API against Warren on a real Kubernetes, as that project
// publishes it. It claims what is listed here, and what the suite reports is in mesh-report.yaml and
// gateway-report.yaml, as the suite wrote it.
package conformance

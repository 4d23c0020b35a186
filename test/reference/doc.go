// Package reference decides connections by Istio's security API as its documentation reads: on the Kubernetes
// objects themselves, one after the other, without regard to speed. It is what everything that is fast is
// compared with, so it shares no code with any of that.
//
// Beside the API's documentation it knows what nodes decide where they have no waypoints to leave it to, and where Istio would not
// look at a policy at all:
//
//   - Attributes of HTTP cannot be known. An ALLOW rule that mentions one matches nothing, a DENY or CUSTOM rule
//     matches as if it were not mentioned. So it is with trust domains that are matched by their end.
//   - CUSTOM denies what it matches.
//   - What a policy's targetRefs lead to accepts its waypoints alone on the ports behind their services, and nothing where
//     no waypoint is asked for, but for policies that decide nothing (AUDIT, dry run).
//
// [Draw] makes random worlds in which few names meet often.
package reference

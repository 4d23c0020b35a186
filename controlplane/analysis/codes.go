package analysis

import (
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
)

// Code names a kind of finding beside those of policies: stable, and where docs/analyze.md explains it.
type Code string

// What is found beside what policies have.
const (
	NotAWaypoint         Code = "not-a-waypoint"
	NotFollowed          Code = "not-followed"
	SubsetSelectsNothing Code = "subset-selects-nothing"
	UnknownField         Code = "unknown-field"
	UnknownHost          Code = "unknown-host"
	UnknownPort          Code = "unknown-port"
	UnknownRevision      Code = "unknown-revision"
	UnknownSubset        Code = "unknown-subset"
	UnknownWaypoint      Code = "unknown-waypoint"
)

// Explanation is what is said of a kind of finding once and for all.
type Explanation struct {
	Code     string
	Severity string
	About    string
}

// Explanations has every code but those of policies, in the order in which they are documented.
var Explanations = []Explanation{
	{string(UnknownField), Error, "A field that the kind does not have, in a file. The API server drops it or refuses the object."},
	{string(policy.Unreadable), Error, "The object is not of the form that its kind has."},
	{string(UnknownWaypoint), Error, "The label `istio.io/use-waypoint` names a Gateway that is not there. Connections to what asks for it are refused."},
	{string(NotAWaypoint), Error, "The label names a Gateway of another class than `istio-waypoint`."},
	{string(UnknownRevision), Error, "The label `istio.io/rev` of a Gateway, or of a namespace (a warning), is neither a revision that has a control plane nor a tag: [nobody makes or configures](install.md#a-second-control-plane) what asks for it."},
	{string(UnknownHost), Error, "A host of a VirtualService or DestinationRule that no Service and no ServiceEntry has."},
	{string(UnknownPort), Error, "A route's destination names a port that the Service does not have."},
	{string(UnknownSubset), Error, "A route's destination names a subset that no DestinationRule of the Service declares."},
	{string(SubsetSelectsNothing), Warning, "No pod of the Service has a subset's labels."},
	{string(NotFollowed), Warning, "A kind of Istio's that Warren does not follow."},
	{"partly-ignored", Warning, "What an object asks for and is not followed, or is another object's to decide."},
	{"unknown-gateway", Error, "A VirtualService names a Gateway that is not there, or none of whose servers is for its hosts."},
	{"no-pods", Error, "No pod of a gateway (`warren.io/gateway: true`) has the labels that a Gateway (`networking.istio.io`) selects, so that nothing serves it."},
	{"conflicted", Warning, "Another object holds in the place of this one."},
	{"unknown-dataplane-mode", Error, "The value of `istio.io/dataplane-mode` is neither `ambient` nor `none`."},
	{"unknown-udp-policy", Error, "The value of `warren.io/udp-policy` is neither `enforce` nor `none`."},
	{"injection-label-ignored", Warning, "A namespace asks for sidecars, and is not in the mesh."},
	{kebab(policy.ReasonNoWaypoint), Error, "What can be decided, routed or resolved by a waypoint alone, where none is in front of the Service or ServiceEntry. For policies, [it is refused meanwhile](policies.md#for-a-waypoint)."},
	{kebab(index.ReasonNoProxy), Warning, "A Telemetry, a RateLimit, an EnvoyFilter or a WasmPlugin is for waypoints and gateways, and there is none that it is for."},
	{kebab(index.ReasonNoCounter), Error, "A RateLimit is counted by a Service that is not there, has not that port, or may not be asked."},
	{kebab(index.ReasonNoRequests), Error, "A RateLimit is for a Service of which no port is for HTTP."},
	{kebab(index.ReasonForeignProxy), Error, "An EnvoyFilter or a WasmPlugin is for a Service whose waypoint is another namespace's: [docs/tasks/envoyfilter.md](tasks/envoyfilter.md#who-may-change-what)."},
	{kebab(index.ReasonNoPatches), Error, "An EnvoyFilter has no patch for waypoints or gateways, or the match of a WasmPlugin is for none of their ports."},
	{kebab(index.ReasonTargetNotFound), Error, "A `targetRef` names what is not there."},
	{kebab(policy.ReasonUnsupported), Error, "Values that mean nothing. What is enforced instead is stricter."},
	{kebab(policy.ReasonIgnored), Error, "The object cannot apply to anything where it is."},
	{"no-matching-parent, not-allowed-by-parent", Error, "A route is attached to a Service or a port that is not there."},
	{"not-allowed, parent-not-accepted", Error, "A ListenerSet is for a Gateway that takes none of its namespace, or that cannot be made."},
	{"hostname-conflict, protocol-conflict", Error, "Another listener of the Gateway, or of an older ListenerSet, has the port and hostname."},
	{"unsupported-protocol, unsupported-address, port-unavailable, invalid-parameters", Error, "What a Gateway or a listener asks for is not to be had."},
	{"invalid-route-kinds", Error, "A listener is to take routes of a kind that is not for its protocol."},
	{"invalid-certificate-ref, invalid-client-certificate-ref, invalid-ca-certificate-ref, invalid-ca-certificate-kind", Error, "A certificate or roots that a listener or a Gateway names are not there, or are none. The listener is not served."},
	{"backend-not-found, invalid-kind, ref-not-permitted", Error, "A route sends to what is not there, cannot be sent to, or needs a ReferenceGrant. Such requests are answered with 500."},
}

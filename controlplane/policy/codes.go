package policy

// Code names a kind of problem: stable, and where docs/policy-messages.md explains it.
type Code string

// What is refused.
const (
	BadAddress            Code = "bad-address"
	BadDryRun             Code = "bad-dry-run"
	BadFilter             Code = "bad-filter"
	BadKey                Code = "bad-key"
	BadPath               Code = "bad-path"
	BadPattern            Code = "bad-pattern"
	BadPort               Code = "bad-port"
	BadSelector           Code = "bad-selector"
	BadServer             Code = "bad-server"
	BadServiceAccount     Code = "bad-service-account"
	BadTarget             Code = "bad-target"
	BadTelemetry          Code = "bad-telemetry"
	BadTokenRule          Code = "bad-token-rule"
	BadTrustDomain        Code = "bad-trust-domain"
	CustomCannotSee       Code = "custom-cannot-see"
	EmptyClause           Code = "empty-clause"
	EmptyCondition        Code = "empty-condition"
	EmptyOperation        Code = "empty-operation"
	EmptyPorts            Code = "empty-ports"
	EmptySource           Code = "empty-source"
	EmptyValue            Code = "empty-value"
	MixedSource           Code = "mixed-source"
	NoProvider            Code = "no-provider"
	NoRules               Code = "no-rules"
	PortsWithoutSelector  Code = "ports-without-selector"
	ProviderWithoutCustom Code = "provider-without-custom"
	SelectorAndTargets    Code = "selector-and-targets"
	TooLarge              Code = "too-large"
	TooManyAccounts       Code = "too-many-accounts"
	Unreadable            Code = "unreadable"
)

// What is legal and will surprise.
const (
	AllowsNothing         Code = "allows-nothing"
	AppliesToNothing      Code = "applies-to-nothing"
	Conflict              Code = "conflict"
	DeniedWithoutWaypoint Code = "denied-without-waypoint"
	DisableIsPermissive   Code = "disable-is-permissive"
	EmptyList             Code = "empty-list"
	EmptySelector         Code = "empty-selector"
	LiteralWildcard       Code = "literal-wildcard"
	NeedsWaypoint         Code = "needs-waypoint"
	NotANamespace         Code = "not-a-namespace"
	NotCaptured           Code = "not-captured"
	PartlyFollowed        Code = "partly-followed"
	PortZero              Code = "port-zero"
	PrivateKey            Code = "private-key"
	SelectsNothing        Code = "selects-nothing"
	SpiffePrefix          Code = "spiffe-prefix"
	UnknownNamespace      Code = "unknown-namespace"
	UnknownProvider       Code = "unknown-provider"
	UnknownTarget         Code = "unknown-target"
	UnusedServiceAccount  Code = "unused-service-account"
)

// More stands for what is beyond MaxProblems.
const More Code = "more"

// Explanation is what is said of a kind of problem once and for all.
type Explanation struct {
	Code     Code
	Severity Severity
	About    string
}

// Explanations has every Code, in the order in which they are documented.
var Explanations = []Explanation{
	{EmptySource, Error, "A source whose lists all are empty or missing names nobody and everybody: Istio refuses it, and so does Warren."},
	{EmptyOperation, Error, "An operation whose lists all are empty or missing. Istio refuses it as well."},
	{EmptyClause, Error, "`from: []` or `to: []`. Without the line a rule is for any source or operation; with an empty list nobody can tell what was meant."},
	{EmptyCondition, Error, "A `when` condition without values."},
	{EmptyValue, Error, "An empty string in a list."},
	{NoRules, Error, "A DENY or CUSTOM policy without rules would never do anything."},
	{BadPort, Error, "Ports of policies are numbers from 1 to 65535; the names of ports cannot be used."},
	{BadAddress, Error, "`ipBlocks` are addresses or CIDR ranges."},
	{BadServiceAccount, Error, "`serviceAccounts` are written `name`, for one of the policy's own namespace, or `namespace/name`, without wildcards."},
	{TooManyAccounts, Error, "A list of service accounts may have 16."},
	{MixedSource, Error, "A service account has its namespace with it, so that namespaces and principals beside it can only contradict."},
	{BadTrustDomain, Error, "A trust domain is the part of an identity before the first `/`."},
	{BadPattern, Error, "A trust domain may have one `*`, at its start or its end."},
	{BadPath, Error, "Path templates know `{*}` for one segment and `{**}` for the rest."},
	{BadKey, Error, "The attributes that a `when` condition can be about are fixed; those with an argument have it in brackets."},
	{BadSelector, Error, "Selectors compare labels as they are."},
	{SelectorAndTargets, Error, "A policy is for workloads (`selector`) or for a waypoint (`targetRefs`)."},
	{BadServer, Error, "A server of a Gateway (`networking.istio.io`) that gateways cannot serve: [docs/gateways.md](gateways.md#istios-own-gateway)."},
	{BadTarget, Error, "What `targetRefs` may name: a Service, ServiceEntry or Gateway of the policy's own namespace, or in the root namespace a GatewayClass."},
	{NoProvider, Error, "Action CUSTOM hands the decision to an extension provider of the mesh configuration."},
	{ProviderWithoutCustom, Error, "A provider means nothing to the other actions."},
	{CustomCannotSee, Error, "A provider is asked before identities are looked at."},
	{BadDryRun, Error, "`istio.io/dry-run` is `\"true\"` or `\"false\"`, on an AuthorizationPolicy that allows or denies."},
	{PortsWithoutSelector, Error, "Only a PeerAuthentication for selected workloads can make exceptions for ports."},
	{EmptyPorts, Error, "`portLevelMtls: {}` says nothing."},
	{BadTokenRule, Error, "A rule on tokens needs an issuer or the address of its keys, and keys that can be read."},
	{BadTelemetry, Error, "A value of a Telemetry that means nothing: a percentage beyond 100, a tag without a value, a name that is none."},
	{BadFilter, Error, "The filter of an access log is an expression in CEL about Envoy's attributes, as in `response.code >= 400`."},
	{TooLarge, Error, "Every node gets every policy. One policy may have 512 rules, 8192 values and 256 KiB of values; larger ones are refused, and where they were stored without this check they allow nothing or deny everything."},
	{Unreadable, Error, "The object is not of the form that its kind has."},

	{NeedsWaypoint, Warning, "Hosts, methods, paths, headers and tokens are HTTP, which the nodes do not read: they decide when a connection is opened. In a policy for workloads an ALLOW rule that needs HTTP matches nothing and a DENY rule matches without it. " + Waypoints},
	{DeniedWithoutWaypoint, Warning, "How many captured workloads a rule on HTTP concerns that have no waypoint, by namespace."},
	{NotCaptured, Warning, "The nodes enforce policies for the pods that they capture. Pods outside the mesh accept everything."},
	{SelectsNothing, Warning, "No pod has the labels. Often a mistake of typing; the pods may also come later."},
	{UnknownNamespace, Warning, "A source namespace that does not exist. An ALLOW rule lets nobody in from it, a DENY rule keeps nobody out."},
	{UnknownTarget, Warning, "A target that does not exist. The policy is for it alone, and does nothing until it is there."},
	{UnknownProvider, Warning, "A Telemetry names a provider that the mesh configuration does not have, or has and cannot be sent to: nothing is. One that takes something else than it is named for is refused."},
	{PartlyFollowed, Warning, "What a Telemetry asks for and waypoints and gateways do not do."},
	{UnusedServiceAccount, Warning, "No pod runs as the service account."},
	{EmptyList, Warning, "An empty list beside others that have values restricts nothing."},
	{AllowsNothing, Warning, "An ALLOW policy without rules is the way to deny everything by default. Write it knowingly."},
	{EmptySelector, Warning, "A selector without labels selects every workload of the namespace."},
	{AppliesToNothing, Warning, "In the root namespace a PeerAuthentication is for the mesh; one with a selector is for nothing. So is, elsewhere, an AuthorizationPolicy for a GatewayClass."},
	{Conflict, Warning, "Of two PeerAuthentications for the same workloads the older one holds."},
	{DisableIsPermissive, Warning, "To the nodes DISABLE is PERMISSIVE: plaintext is accepted, and captured clients still encrypt."},
	{LiteralWildcard, Warning, "A `*` is a wildcard at one end of a value. Elsewhere it is a letter that no name has."},
	{SpiffePrefix, Warning, "Principals are written as Istio writes them, without `spiffe://`."},
	{NotANamespace, Warning, "The value of a namespace has a `/`, which no namespace's name has."},
	{PortZero, Warning, "No connection has the port 0."},
	{PrivateKey, Warning, "Tokens are verified with public keys. A private one in a policy is one that everybody can read who reads policies."},
}

// Waypoints says what there is to be had of them.
const Waypoints = "A waypoint is an HTTP proxy, asked for with a Gateway of class istio-waypoint; a policy for it has targetRefs and no selector"

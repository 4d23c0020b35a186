package controlplane

import rbacv1 "k8s.io/api/rbac/v1"

// Rules is what the control plane needs in the whole cluster, no more.
var Rules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"pods", "namespaces", "services", "nodes"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"security.istio.io"}, Resources: []string{"authorizationpolicies", "peerauthentications", "requestauthentications"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"telemetry.istio.io"}, Resources: []string{"telemetries"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"extensions.istio.io"}, Resources: []string{"wasmplugins"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"policy.warren.io"}, Resources: []string{"ratelimits"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"networking.istio.io"}, Resources: []string{"serviceentries", "workloadentries", "virtualservices", "destinationrules", "gateways", "envoyfilters"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"gatewayclasses", "gateways", "listenersets", "httproutes", "grpcroutes", "tlsroutes", "tcproutes", "backendtlspolicies", "referencegrants"}, Verbs: []string{"get", "list", "watch"}},
	// Waypoints and gateways are made where a Gateway asks for one, in any namespace.
	{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"gatewayclasses"}, Verbs: []string{"create"}},
	{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"gatewayclasses"}, ResourceNames: []string{"istio-waypoint", "istio"}, Verbs: []string{"patch"}},
	{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"gatewayclasses/status"}, Verbs: []string{"patch"}},
	// Certificates that gateways show, and passwords of registries: those Secrets alone that a Gateway or a WasmPlugin refers to, and may, are read, each by its name.
	{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"get", "list", "watch"}},
	{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"gateways/status", "listenersets/status", "httproutes/status", "grpcroutes/status", "tlsroutes/status", "tcproutes/status", "backendtlspolicies/status"},
		Verbs: []string{"patch"}},
	{APIGroups: []string{""}, Resources: []string{"services", "serviceaccounts"}, Verbs: []string{"create", "patch"}},
	{APIGroups: []string{"apps"}, Resources: []string{"deployments"}, Verbs: []string{"create", "patch"}},
	{APIGroups: []string{"policy"}, Resources: []string{"poddisruptionbudgets"}, Verbs: []string{"create", "patch"}},
	// One that was made is deleted where parameters ask for none any more.
	{APIGroups: []string{"autoscaling"}, Resources: []string{"horizontalpodautoscalers"}, Verbs: []string{"get", "create", "patch", "delete"}},
	// Connections of pods that they select stay on the network plugin's path.
	{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"networkpolicies"}, Verbs: []string{"list", "watch"}},
	// Which ports the API server calls, so that STRICT lets it.
	{APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"validatingwebhookconfigurations", "mutatingwebhookconfigurations"}, Verbs: []string{"list", "watch"}},
	{APIGroups: []string{"apiregistration.k8s.io"}, Resources: []string{"apiservices"}, Verbs: []string{"list", "watch"}},
	{APIGroups: []string{"apiextensions.k8s.io"}, Resources: []string{"customresourcedefinitions"}, Verbs: []string{"list", "watch"}},
	// Which nodes enforce a policy is written on it.
	{APIGroups: []string{"security.istio.io"}, Resources: []string{"authorizationpolicies/status", "peerauthentications/status", "requestauthentications/status"},
		Verbs: []string{"patch"}},
	{APIGroups: []string{"telemetry.istio.io"}, Resources: []string{"telemetries/status"}, Verbs: []string{"patch"}},
	{APIGroups: []string{"policy.warren.io"}, Resources: []string{"ratelimits/status"}, Verbs: []string{"patch"}},
	{APIGroups: []string{"networking.istio.io"}, Resources: []string{"envoyfilters/status"}, Verbs: []string{"patch"}},
	{APIGroups: []string{"extensions.istio.io"}, Resources: []string{"wasmplugins/status"}, Verbs: []string{"patch"}},
	// The addresses of hosts of ServiceEntries that have none.
	{APIGroups: []string{"networking.istio.io"}, Resources: []string{"serviceentries/status"}, Verbs: []string{"patch"}},
	{APIGroups: []string{""}, Resources: []string{"services/status"}, Verbs: []string{"patch"}},
	// The annotation ambient.istio.io/redirection.
	{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"patch"}},
	{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create", "patch"}},
	// istio-ca-root-cert, and istio-ca-crl, in every namespace. A create cannot be bound to a name.
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"create", "get", "list", "watch"}},
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"istio-ca-root-cert", "istio-ca-crl"}, Verbs: []string{"update"}},
	// Callers present service account tokens.
	{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}},
	// The webhook that judges policies trusts the mesh's root.
	{APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"validatingwebhookconfigurations"},
		ResourceNames: []string{"warren-validator"}, Verbs: []string{"get", "patch"}},
}

// NamespaceRules is what it needs in its own namespace besides.
var NamespaceRules = []rbacv1.PolicyRule{
	{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"create"}},
	{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"istio-ca-secret", "cacerts"}, Verbs: []string{"get"}},
	// A root is exchanged before it ends: the new one in the Secret, how far it has come in the ConfigMap.
	{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"istio-ca-secret"}, Verbs: []string{"update"}},
	{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{"warren-trust"}, Verbs: []string{"update"}},
	{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"create"}},
	{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, ResourceNames: []string{"warren-control-leader"}, Verbs: []string{"get", "update"}},
}

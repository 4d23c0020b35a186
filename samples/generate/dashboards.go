package main

import "strings"

// Where something is reported by both ends it is counted where it arrives: at the waypoint, the gateway or the server's node.
const (
	requests = `istio_requests_total{reporter=~"waypoint|source"}`
	arriving = `reporter="destination"`
)

// rate is the sum of a counter's rates, by labels.
func rate(counter, by string) string {
	return sum("rate("+counter+"[$__rate_interval])", by)
}

func sum(expr, by string) string {
	if by == "" {
		return "sum(" + expr + ")"
	}
	return "sum by (" + by + ") (" + expr + ")"
}

// quantiles are diagrams of a histogram's median, 90th and 99th percentile, by labels.
func quantiles(bucket, by, legend string) []query {
	var out []query
	if by != "" {
		by = ", " + by
	}
	for _, q := range []struct{ q, name string }{{"0.5", "p50"}, {"0.9", "p90"}, {"0.99", "p99"}} {
		out = append(out, query{"histogram_quantile(" + q.q + ", " + rate(bucket, "le"+by) + ")", strings.TrimSpace(q.name + " " + legend)})
	}
	return out
}

func one(expr, legend string) []query { return []query{{expr, legend}} }

// process are the panels of a program of ours; which are its series.
func process(which, legend string) row {
	return row{"Resources", []panel{
		{title: "CPU", unit: "none", about: "Cores.", queries: one("rate(process_cpu_seconds_total{"+which+"}[$__rate_interval])", legend)},
		{title: "Memory", unit: "bytes", about: "Resident.", queries: one("process_resident_memory_bytes{"+which+"}", legend)},
		{title: "Goroutines", unit: "short", queries: one("go_goroutines{"+which+"}", legend)},
		{title: "Descriptors", unit: "short", queries: one("process_open_fds{"+which+"}", legend)},
	}}
}

var namespaceOf = variable{"namespace", "Namespace", "label_values(istio_tcp_connections_opened_total, destination_workload_namespace)"}

var dashboards = []dashboard{
	{
		uid: "warren-mesh", title: "Warren: mesh", about: "Requests and connections of the whole mesh.",
		rows: []row{
			{"Now", []panel{
				{title: "Requests", unit: "reqps", stat: true, about: "Seen by waypoints and gateways.", queries: one(rate(requests, ""), "")},
				{title: "Answered without 5xx", unit: "percentunit", stat: true,
					queries: one("sum(rate(istio_requests_total{reporter=~\"waypoint|source\",response_code!~\"5..\"}[$__rate_interval])) / "+rate(requests, ""), "")},
				{title: "New connections", unit: "cps", stat: true, about: "At the servers' nodes.", queries: one(rate("istio_tcp_connections_opened_total{"+arriving+"}", ""), "")},
				{title: "Open connections", unit: "short", stat: true, queries: one(`sum(istio_tcp_sockets_open{reporter="destination"})`, "")},
				{title: "In mutual TLS", unit: "percentunit", stat: true, about: "Of the connections that arrive; those that the kernel carries within a node are not encrypted.",
					queries: one(rate("istio_tcp_connections_opened_total{"+arriving+`,connection_security_policy="mutual_tls"}`, "")+" / "+rate("istio_tcp_connections_opened_total{"+arriving+"}", ""), "")},
				{title: "Captured pods", unit: "short", stat: true, queries: one("sum(workload_manager_active_proxy_count)", "")},
			}},
			{"Requests", []panel{
				{title: "Requests by service", unit: "reqps", queries: one(rate(requests, "destination_service_name, destination_service_namespace"), "{{destination_service_name}}.{{destination_service_namespace}}")},
				{title: "Answers", unit: "reqps", queries: one(rate(requests, "response_code"), "{{response_code}}")},
				{title: "Duration", unit: "ms", queries: quantiles(`istio_request_duration_milliseconds_bucket{reporter=~"waypoint|source"}`, "", "")},
			}},
			{"Connections", []panel{
				{title: "New connections by server", unit: "cps", queries: one(rate("istio_tcp_connections_opened_total{"+arriving+"}", "destination_workload, destination_workload_namespace"), "{{destination_workload}}.{{destination_workload_namespace}}")},
				{title: "Received by servers", unit: "Bps", queries: one(rate("istio_tcp_received_bytes_total{"+arriving+"}", "destination_workload, destination_workload_namespace"), "{{destination_workload}}.{{destination_workload_namespace}}")},
				{title: "Sent by servers", unit: "Bps", queries: one(rate("istio_tcp_sent_bytes_total{"+arriving+"}", "destination_workload, destination_workload_namespace"), "{{destination_workload}}.{{destination_workload_namespace}}")},
				{title: "How they ended", unit: "cps", about: "docs/telemetry.md explains the words.", queries: one(rate("warren_connections_total", "reporter, outcome"), "{{reporter}}: {{outcome}}")},
			}},
		},
	},
	{
		uid: "warren-workload", title: "Warren: workload", about: "What arrives at workloads, and what they ask of others.",
		variables: []variable{namespaceOf,
			{"workload", "Workload", `label_values(istio_tcp_connections_opened_total{destination_workload_namespace=~"$namespace"}, destination_workload)`}},
		rows: []row{
			{"Requests that arrive", []panel{
				{title: "By client and answer", unit: "reqps", queries: one(rate(`istio_requests_total{reporter=~"waypoint|source",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}`, "source_workload, source_workload_namespace, response_code"), "{{source_workload}}.{{source_workload_namespace}} {{response_code}}")},
				{title: "Duration", unit: "ms", queries: quantiles(`istio_request_duration_milliseconds_bucket{reporter=~"waypoint|source",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}`, "destination_workload", "{{destination_workload}}")},
			}},
			{"Connections that arrive", []panel{
				{title: "New, by client", unit: "cps", queries: one(rate(`istio_tcp_connections_opened_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}`, "source_workload, source_workload_namespace, connection_security_policy"), "{{source_workload}}.{{source_workload_namespace}} {{connection_security_policy}}")},
				{title: "Received", unit: "Bps", queries: one(rate(`istio_tcp_received_bytes_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}`, "destination_workload"), "{{destination_workload}}")},
				{title: "Sent", unit: "Bps", queries: one(rate(`istio_tcp_sent_bytes_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}`, "destination_workload"), "{{destination_workload}}")},
				{title: "Failed", unit: "cps", about: "Refused or ended by the agent, or by the application.", queries: one(rate(`istio_tcp_connections_failed_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}`, "source_workload, destination_workload, response_flags"), "{{source_workload}} to {{destination_workload}}: {{response_flags}}")},
			}},
			{"What they ask of others", []panel{
				{title: "Requests", unit: "reqps", queries: one(rate(`istio_requests_total{reporter=~"waypoint|source",source_workload_namespace=~"$namespace",source_workload=~"$workload"}`, "destination_service, response_code"), "{{destination_service}} {{response_code}}")},
				{title: "New connections", unit: "cps", queries: one(rate(`istio_tcp_connections_opened_total{reporter="source",source_workload_namespace=~"$namespace",source_workload=~"$workload"}`, "destination_workload, destination_workload_namespace"), "{{destination_workload}}.{{destination_workload_namespace}}")},
			}},
		},
	},
	{
		uid: "warren-service", title: "Warren: service", about: "What clients get from Services.",
		variables: []variable{
			{"service", "Service", `label_values(istio_tcp_connections_opened_total, destination_service)`}},
		rows: []row{
			{"Requests", []panel{
				{title: "By client", unit: "reqps", queries: one(rate(`istio_requests_total{reporter=~"waypoint|source",destination_service=~"$service"}`, "source_workload, source_workload_namespace"), "{{source_workload}}.{{source_workload_namespace}}")},
				{title: "By answer", unit: "reqps", queries: one(rate(`istio_requests_total{reporter=~"waypoint|source",destination_service=~"$service"}`, "response_code, response_flags"), "{{response_code}} {{response_flags}}")},
				{title: "Duration", unit: "ms", queries: quantiles(`istio_request_duration_milliseconds_bucket{reporter=~"waypoint|source",destination_service=~"$service"}`, "", "")},
				{title: "Size of answers", unit: "bytes", queries: quantiles(`istio_response_bytes_bucket{reporter=~"waypoint|source",destination_service=~"$service"}`, "", "")},
			}},
			{"By version", []panel{
				{title: "Requests", unit: "reqps", queries: one(rate(`istio_requests_total{reporter=~"waypoint|source",destination_service=~"$service"}`, "destination_workload, destination_version"), "{{destination_workload}} {{destination_version}}")},
				{title: "Duration", unit: "ms", queries: quantiles(`istio_request_duration_milliseconds_bucket{reporter=~"waypoint|source",destination_service=~"$service"}`, "destination_workload", "{{destination_workload}}")},
			}},
			{"Connections", []panel{
				{title: "New, by client", unit: "cps", queries: one(rate(`istio_tcp_connections_opened_total{reporter="source",destination_service=~"$service"}`, "source_workload, source_workload_namespace"), "{{source_workload}}.{{source_workload_namespace}}")},
				{title: "Bytes, both ways", unit: "Bps", queries: []query{
					{rate(`istio_tcp_received_bytes_total{reporter="source",destination_service=~"$service"}`, ""), "from clients"},
					{rate(`istio_tcp_sent_bytes_total{reporter="source",destination_service=~"$service"}`, ""), "to clients"},
				}},
			}},
		},
	},
	{
		uid: "warren-nodes", title: "Warren: nodes", about: "The agents, and what they do in the kernel.",
		rows: []row{
			{"Now", []panel{
				{title: "Agents", unit: "short", stat: true, queries: one(`sum(up{job="warren",app="ztunnel"})`, "")},
				{title: "With the control plane", unit: "short", stat: true, queries: one("sum(warren_xds_connected)", "")},
				{title: "With a holder", unit: "short", stat: true, queries: one("sum(warren_holder_connected)", "")},
				{title: "Pending pods", unit: "short", stat: true, about: "Pods of the mesh that are not captured yet.", queries: one("sum(workload_manager_pending_proxy_count)", "")},
				{title: "Repairs in an hour", unit: "short", stat: true, about: "What audits found wrong in the kernel.", queries: one("sum(increase(warren_datapath_repairs_total[1h]))", "")},
			}},
			{"Pods and tunnels", []panel{
				{title: "Captured pods", unit: "short", queries: one("workload_manager_active_proxy_count", "{{node}}")},
				{title: "Tunnels", unit: "short", queries: []query{{"warren_tunnels_open", "{{node}}: tunnels"}, {"warren_tunnel_streams_open", "{{node}}: connections in them"}}},
				{title: "Open connections", unit: "short", queries: one("sum by (node, reporter) (istio_tcp_sockets_open)", "{{node}} {{reporter}}")},
				{title: "Ways within a node", unit: "short", about: "Captured pods, by the way of their direct connections.", queries: one("sum by (node, way, reason) (warren_same_node_pods)", "{{node}} {{way}} {{reason}}")},
			}},
			{"Decisions", []panel{
				{title: "Outcomes in the kernel", unit: "cps", about: "bpf/README.md has every word.", queries: one(rate("warren_datapath_outcomes_total", "outcome")+" > 0", "{{outcome}}")},
				{title: "Outcomes of connections", unit: "cps", queries: one(rate("warren_connections_total", "node, outcome"), "{{node}} {{outcome}}")},
				{title: "Failed handshakes", unit: "cps", queries: one(rate("warren_tls_failures_total", "node, reason"), "{{node}} {{reason}}")},
			}},
			{"State", []panel{
				{title: "Objects", unit: "short", queries: one("warren_state_objects", "{{node}} {{kind}}")},
				{title: "Messages of the control plane", unit: "cps", queries: []query{{rate("istio_xds_message_total", "node, url"), "{{node}} {{url}}"}, {rate("warren_xds_rejected_total", "node, url"), "{{node}} {{url}}, refused"}}},
				{title: "Certificates", unit: "short", queries: []query{{"warren_identities", "{{node}}: identities"}, {"increase(warren_certificates_failed_total[1h])", "{{node}}: failed in an hour"}}},
			}},
			process(`job="warren",app="ztunnel"`, "{{node}}"),
		},
	},
	{
		uid: "warren-control", title: "Warren: control plane", about: "Configuration on its way, certificates, admission.",
		rows: []row{
			{"Now", []panel{
				{title: "Replicas", unit: "short", stat: true, queries: one(`sum(up{job="warren",app="istiod"})`, "")},
				{title: "Nodes connected", unit: "short", stat: true, queries: one("sum(pilot_xds)", "")},
				{title: "Services", unit: "short", stat: true, queries: one("max(pilot_services)", "")},
				{title: "The signing certificate ends in", unit: "s", stat: true, queries: one("min(citadel_server_root_cert_expiry_timestamp) - time()", "")},
			}},
			{"Configuration", []panel{
				{title: "Responses", unit: "cps", queries: one(rate("pilot_xds_pushes", "type"), "{{type}}")},
				{title: "From a change to its acknowledgement", unit: "s", queries: quantiles("pilot_proxy_convergence_time_bucket", "", "")},
				{title: "Refused", unit: "cps", queries: []query{{rate("pilot_total_xds_rejects", "type"), "nodes: {{type}}"}, {rate("warren_waypoint_rejects_total", "type"), "waypoints: {{type}}"}, {"sum(rate(warren_xds_refused_total[$__rate_interval]))", "callers"}}},
			}},
			{"Certificates and admission", []panel{
				{title: "Signed", unit: "cps", about: "Received by the nodes.", queries: one(rate("warren_certificates_signed_total", "node"), "{{node}}")},
				{title: "Refused by the CA", unit: "cps", queries: one(rate("warren_ca_refused_total", "reason"), "{{reason}}")},
				{title: "Reviews", unit: "s", about: "Time to judge what is applied.", queries: quantiles("warren_admission_review_seconds_bucket", "", "")},
				{title: "Writes", unit: "cps", queries: []query{{rate("warren_policy_status_writes_total", "result"), "policies: {{result}}"}, {rate("warren_redirection_patches_total", "result"), "pods: {{result}}"}, {rate("warren_route_status_writes_total", "result"), "routes: {{result}}"}}},
			}},
			process(`job="warren",app="istiod"`, "{{pod}}"),
		},
	},
	{
		uid: "warren-waypoints", title: "Warren: waypoints and gateways", about: "The Envoys of the mesh.",
		variables: []variable{{"envoy", "Waypoint or gateway", `label_values(envoy_server_live, gateway_networking_k8s_io_gateway_name)`}},
		rows: []row{
			{"Requests", []panel{
				{title: "Requests", unit: "reqps", queries: one(rate(`istio_requests_total{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "pod, response_code"), "{{pod}} {{response_code}}")},
				{title: "Duration", unit: "ms", queries: quantiles(`istio_request_duration_milliseconds_bucket{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "pod", "{{pod}}")},
				{title: "Why requests failed", unit: "reqps", queries: one(rate(`istio_requests_total{gateway_networking_k8s_io_gateway_name=~"$envoy",response_flags!="-"}`, "destination_service, response_flags"), "{{destination_service}} {{response_flags}}")},
			}},
			{"Envoy", []panel{
				{title: "Live", unit: "short", queries: one(`envoy_server_live{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "{{pod}}")},
				{title: "Connections", unit: "short", queries: one(`envoy_server_total_connections{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "{{pod}}")},
				{title: "Memory", unit: "bytes", queries: one(`envoy_server_memory_allocated{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "{{pod}}")},
				{title: "Configuration refused", unit: "cps", queries: []query{
					{rate(`envoy_cluster_manager_cds_update_rejected{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "pod"), "{{pod}} clusters"},
					{rate(`envoy_listener_manager_lds_update_rejected{gateway_networking_k8s_io_gateway_name=~"$envoy"}`, "pod"), "{{pod}} listeners"}}},
			}},
		},
	},
}

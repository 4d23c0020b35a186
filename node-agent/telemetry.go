package nodeagent

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll"
)

// telemetry reports, whenever it is asked, what the parts of the agent count themselves.
type telemetry struct{ agent *agent }

var (
	buildDesc    = prometheus.NewDesc("istio_build", "Istio component build info.", []string{"component", "tag"}, nil)
	activeDesc   = prometheus.NewDesc("workload_manager_active_proxy_count", "The total number current workloads with active proxies (unstable).", nil, nil)
	pendingDesc  = prometheus.NewDesc("workload_manager_pending_proxy_count", "The total number current workloads with pending proxies (unstable).", nil, nil)
	startedDesc  = prometheus.NewDesc("workload_manager_proxies_started_total", "The total number of proxies that were started (unstable).", nil, nil)
	stoppedDesc  = prometheus.NewDesc("workload_manager_proxies_stopped_total", "The total number of proxies that were stopped (unstable).", nil, nil)
	kernelDesc   = prometheus.NewDesc("warren_datapath_outcomes_total", "Outcomes of the BPF programs since they were first loaded.", []string{"outcome"}, nil)
	waysDesc     = prometheus.NewDesc("warren_same_node_pods", "Captured pods of this node, by the way of their direct connections: redirected from veth to veth, or through the node's stack and why.", []string{"way", "reason"}, nil)
	driftDesc    = prometheus.NewDesc("warren_datapath_drift_total", "What audits have found wrong in the kernel, and repaired: rows of its maps, and pods.", []string{"map"}, nil)
	repairsDesc  = prometheus.NewDesc("warren_datapath_repairs_total", "The sum of warren_datapath_drift_total, which is there from the start.", nil, nil)
	identityDesc = prometheus.NewDesc("warren_identities", "Identities that the agent has certificates for.", nil, nil)
	signedDesc   = prometheus.NewDesc("warren_certificates_signed_total", "Certificates received from the CA.", nil, nil)
	unsignedDesc = prometheus.NewDesc("warren_certificates_failed_total", "Requests to the CA that failed.", nil, nil)
	rootsDesc    = prometheus.NewDesc("warren_root_changes_total", "Times that the trusted roots changed.", nil, nil)
	objectsDesc  = prometheus.NewDesc("warren_state_objects", "Objects in the state of the mesh.", []string{"kind"}, nil)
	revisionDesc = prometheus.NewDesc("warren_state_revision", "Revision of the state of the mesh on this node.", nil, nil)
	xdsDesc      = prometheus.NewDesc("istio_xds_message_total", "Total number of messages received (unstable).", []string{"url"}, nil)
	nackDesc     = prometheus.NewDesc("warren_xds_rejected_total", "Messages of the control plane that could not be used (NACK).", []string{"url"}, nil)
	streamsDesc  = prometheus.NewDesc("istio_xds_connection_terminations_total", "The total number of completed connections to xds server (unstable).", []string{"reason"}, nil)
	connectDesc  = prometheus.NewDesc("warren_xds_connected", "Whether the control plane is connected.", nil, nil)
	tunnelsDesc  = prometheus.NewDesc("warren_tunnels_open", "Tunnel connections to peers that are open.", nil, nil)
	streamsNow   = prometheus.NewDesc("warren_tunnel_streams_open", "Connections that these tunnels carry.", nil, nil)
	askedDesc    = prometheus.NewDesc("istio_dns_requests_total", "Total number of DNS requests (unstable): of captured pods that are answered for, by UDP.", nil, nil)
	resolverDesc = prometheus.NewDesc("istio_dns_upstream_requests_total", "Total number of DNS requests forwarded to upstream (unstable): left as they are to the resolver that was asked.", nil, nil)
	holderDesc   = prometheus.NewDesc("warren_holder_connected", "Whether the holder keeps this agent's listeners.", nil, nil)
)

// Describe sends nothing: the collector is unchecked, because some of its parts appear late.
func (t *telemetry) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (t *telemetry) Collect(ch chan<- prometheus.Metric) {
	a := t.agent
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(buildDesc, 1, "ztunnel", a.cfg.Version)

	pending := 0
	for _, s := range a.registry.Statuses() {
		if s.Redirection == enroll.Pending {
			pending++
		}
	}
	started, stopped, active := a.proxy.Served()
	gauge(activeDesc, float64(active))
	gauge(pendingDesc, float64(pending))
	counter(startedDesc, started)
	counter(stoppedDesc, stopped)

	tunnels, streams := a.proxy.Tunnels()
	gauge(tunnelsDesc, float64(tunnels))
	gauge(streamsNow, float64(streams))

	if outcomes, err := a.datapath.Counters(); err == nil {
		for name, n := range outcomes {
			counter(kernelDesc, n, name)
		}
		counter(askedDesc, outcomes["dns_answered"]+outcomes["dns_empty"]+outcomes["dns_left"]+outcomes["dns_drop"])
		counter(resolverDesc, outcomes["dns_left"])
	}
	repairs := uint64(0)
	for name, n := range a.datapath.Drift() {
		counter(driftDesc, n, name)
		repairs += n
	}
	counter(repairsDesc, repairs)
	ways := map[datapath.Detour]int{}
	for _, why := range a.datapath.Detours() {
		ways[why]++
	}
	for why, n := range ways {
		way := "stack"
		if why == datapath.NoDetour {
			way = "redirect"
		}
		gauge(waysDesc, float64(n), way, string(why))
	}
	st := a.manager.Stats()
	gauge(identityDesc, float64(st.Identities))
	counter(signedDesc, st.Signed)
	counter(unsignedDesc, st.Failed)
	counter(rootsDesc, st.RootSwaps)

	s := a.store.Load()
	w, svc, p := s.Len()
	gauge(objectsDesc, float64(w), "workload")
	gauge(objectsDesc, float64(svc), "service")
	gauge(objectsDesc, float64(p), "policy")
	gauge(revisionDesc, float64(s.Revision()))
	gauge(holderDesc, truth(a.keeper.State().Connected))

	x := a.xds.Status()
	for url, t := range x.Types {
		counter(xdsDesc, t.Responses, url)
		counter(nackDesc, t.NACKs, url)
	}
	ended := x.Connects
	if x.Connected {
		ended--
	}
	counter(streamsDesc, ended, "Reconnect")
	gauge(connectDesc, truth(x.Connected))
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

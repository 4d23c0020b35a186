package bootstrap

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// Config is what a waypoint has to be told.
type Config struct {
	PodName, PodNamespace, PodIP string
	ServiceAccount               string
	TrustDomain, ClusterID       string
	Version                      string // of Warren

	ControlAddress string // host:port of xDS and the CA
	ControlName    string // in its certificate; empty: the host of the address
	RootFile       string // PEM
	TokenFile      string

	Envoy       string // the program
	RunDir      string // for the socket and the bootstrap file
	Concurrency int
	Drain       time.Duration // how long connections may go on after SIGTERM
	LogLevel    string        // Envoy's

	StatusAddr, TelemetryAddr string // readiness; metrics
	AdminPort                 int    // Envoy's own, on localhost

	Log *slog.Logger
}

// Validate names everything that is missing.
func (c Config) Validate() error {
	var errs []error
	for name, v := range map[string]string{
		"pod name": c.PodName, "namespace": c.PodNamespace, "service account": c.ServiceAccount, "trust domain": c.TrustDomain,
		"control plane's address": c.ControlAddress, "Envoy program": c.Envoy,
	} {
		if v == "" {
			errs = append(errs, fmt.Errorf("the %s is not set", name))
		}
	}
	return errors.Join(errs...)
}

func (c Config) identity() mesh.Identity {
	return mesh.Identity{TrustDomain: c.TrustDomain, Namespace: c.PodNamespace, ServiceAccount: c.ServiceAccount}
}

func (c Config) socket() string        { return filepath.Join(c.RunDir, "agent.sock") }
func (c Config) workersSocket() string { return filepath.Join(c.RunDir, "workers.sock") }
func (c Config) file() string          { return filepath.Join(c.RunDir, "envoy.json") }

// envoy is Envoy's bootstrap: where its configuration comes from, and nothing else.
func (c Config) envoy() ([]byte, error) {
	type object = map[string]any
	ads := object{"ads": object{}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
	address := func(port int) object {
		return object{"socket_address": object{"address": "127.0.0.1", "port_value": port}}
	}
	return json.MarshalIndent(object{
		"node": object{
			"id": "waypoint~" + c.PodIP + "~" + c.PodName + "." + c.PodNamespace, "cluster": c.ServiceAccount + "." + c.PodNamespace,
			"metadata": object{"NAMESPACE": c.PodNamespace, "NAME": c.PodName, "CLUSTER_ID": c.ClusterID, "WARREN_VERSION": c.Version},
		},
		"admin": object{"address": address(c.AdminPort)},
		// Series of the mesh's metrics that nothing was added to for so long are dropped.
		"stats_flush_interval": "5s", "stats_eviction_interval": "3600s",
		"dynamic_resources": object{
			"ads_config": object{
				"api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
				"grpc_services": []any{object{"envoy_grpc": object{"cluster_name": waypoint.AgentCluster}}},
			},
			"lds_config": ads, "cds_config": ads,
		},
		"static_resources": object{"listeners": []any{object{
			"name": "workers", "address": object{"pipe": object{"path": c.workersSocket()}}, "stat_prefix": "workers", "ignore_global_conn_limit": true,
			"connection_balance_config": object{"exact_balance": object{}},
			"filter_chains": []any{object{"filters": []any{object{"name": "envoy.filters.network.echo", "typed_config": object{
				"@type": "type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo",
			}}}}},
		}}, "clusters": []any{object{
			"name": waypoint.AgentCluster, "type": "STATIC", "connect_timeout": "5s",
			"typed_extension_protocol_options": object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": object{"http2_protocol_options": object{}},
			}},
			"load_assignment": object{"cluster_name": waypoint.AgentCluster, "endpoints": []any{object{"lb_endpoints": []any{
				object{"endpoint": object{"address": object{"pipe": object{"path": c.socket()}}}},
			}}}},
		}}},
		// Where a connection within Envoy is closed its other end would see a reset, and drop what it has not passed on yet:
		// the answer to a request with "Connection: close".
		"layered_runtime": object{"layers": []any{object{"name": "static", "static_layer": object{
			"envoy.reloadable_features.enable_send_rst_on_user_space_socket": false,
			// Beyond 100 Envoy takes no regular expression: paths in which whatever may be a slash is one are longer, and so are the names
			// by which it is asked what it uses (active.go). As in Istio.
			"re2.max_program_size.error_level": 32768,
			// What tells the clients of a limit apart is a formatter (waypoint/limits.go).
			"envoy.reloadable_features.enable_formatter_for_ratelimit_action_descriptor_value": true,
		}}}},
		"bootstrap_extensions": []any{object{"name": "envoy.bootstrap.internal_listener", "typed_config": object{
			"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
		}}},
	}, "", " ")
}

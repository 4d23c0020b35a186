package routing

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	networking "istio.io/api/networking/v1alpha3"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

func TestDestinationRule(t *testing.T) {
	three, twenty := uint32(3), float64(20)
	hour := time.Hour
	for _, c := range []struct {
		name, spec string
		want       []mesh.Traffic
		problems   []string
	}{
		{"nothing", `subsets: [{name: v1, labels: {version: v1}}]`, nil, nil},
		{"balance", `trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}`, []mesh.Traffic{{Balance: mesh.BalanceRoundRobin}}, nil},
		{"pool", `trafficPolicy: {connectionPool: {tcp: {maxConnections: 1, connectTimeout: 1s}, http: {http1MaxPendingRequests: 2, http2MaxRequests: 3, maxRequestsPerConnection: 4, maxRetries: -1, idleTimeout: 5s}}}`,
			[]mesh.Traffic{{ConnectTimeout: time.Second, IdleTimeout: 5 * time.Second, MaxConnections: 1, MaxPending: 2, MaxRequests: 3, MaxRequestsPerConnection: 4}},
			[]string{"trafficPolicy.connectionPool.tcp.connectTimeout is followed for endpoints outside", "maxRetries is negative"}},
		{"outliers", `trafficPolicy: {outlierDetection: {consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: 3600s, maxEjectionPercent: 100}}`,
			[]mesh.Traffic{{Outliers: &mesh.Outliers{Consecutive5xx: &three, Interval: time.Second, Ejection: hour, MaxPercent: 100}}}, nil},
		{"a subset takes what it does not say from the service", `{trafficPolicy: {loadBalancer: {simple: RANDOM}, connectionPool: {tcp: {maxConnections: 1}}, portLevelSettings: [{port: {number: 80}, connectionPool: {tcp: {maxConnections: 2}}}]}, subsets: [{name: v1, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: u, ttl: 3600s}}}}}]}`,
			[]mesh.Traffic{{Balance: mesh.BalanceRandom, MaxConnections: 1}, {Port: 80, MaxConnections: 2},
				{Subset: "v1", MaxConnections: 1, Hash: &mesh.HashKey{Cookie: "u", CookieTTL: &hour}}, {Subset: "v1", Port: 80, MaxConnections: 2}}, nil},
		{"TLS, as subsets and ports have it", `{trafficPolicy: {tls: {mode: SIMPLE, sni: API.example, subjectAltNames: [api.example, "spiffe://d/ns/a/sa/b"]}, portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}, {port: {number: 443}, tls: {mode: MUTUAL, credentialName: shown}}]}, subsets: [{name: v1, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}, {name: v2, trafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true}, portLevelSettings: [{port: {number: 80}}]}}]}`,
			[]mesh.Traffic{
				{TLS: &mesh.BackendTLS{Host: "api.example", PublicRoots: true, Names: []mesh.CertificateName{{Name: "api.example"}, {URI: true, Name: "spiffe://d/ns/a/sa/b"}}}},
				{Port: 80}, {Port: 443, TLS: &mesh.BackendTLS{Mutual: true, Credential: "shown"}},
				{Subset: "v1"}, {Subset: "v1", Port: 80}, {Subset: "v1", Port: 443, TLS: &mesh.BackendTLS{Mutual: true, Credential: "shown"}},
				{Subset: "v2", TLS: &mesh.BackendTLS{Unchecked: true}}, {Subset: "v2", Port: 80},
			}, nil},
		{"TLS that cannot be followed sends nothing", `{trafficPolicy: {tls: {mode: MUTUAL, clientCertificate: /a, privateKey: /b, caCertificates: /c}}, subsets: [{name: v1, trafficPolicy: {tls: {mode: MUTUAL}}}, {name: v2, trafficPolicy: {tls: {mode: SIMPLE, credentialName: a/b}}}]}`,
			[]mesh.Traffic{
				{TLS: &mesh.BackendTLS{Mutual: true, PublicRoots: true, Invalid: "clientCertificate is a file, which is not read; put it into a Secret of the waypoint's or gateway's namespace and write credentialName"}},
				{Subset: "v1", TLS: &mesh.BackendTLS{Mutual: true, PublicRoots: true, Invalid: "credentialName is missing: which Secret has the certificate to show?"}},
				{Subset: "v2", TLS: &mesh.BackendTLS{Credential: "a/b", Invalid: "credentialName is not the name of a Secret"}},
			}, []string{"trafficPolicy.tls.clientCertificate is a file", "privateKey", "caCertificates", "credentialName is missing", "credentialName is not"}},
		{"what is not followed is said", `trafficPolicy: {loadBalancer: {simple: PASSTHROUGH, warmup: {duration: 5s}}, outlierDetection: {consecutiveErrors: 3}, portLevelSettings: [{port: {number: 0}}]}`,
			[]mesh.Traffic{{Outliers: &mesh.Outliers{}}}, []string{"warmup is followed with", "PASSTHROUGH", "consecutiveErrors", "portLevelSettings[0].port.number"}},
		{"a proxy, and the client's address", `{trafficPolicy: {tunnel: {targetHost: DB.example, targetPort: 5432}, proxyProtocol: {}, portLevelSettings: [{port: {number: 80}}]}, subsets: [{name: v1, trafficPolicy: {proxyProtocol: {version: V2}, tunnel: {protocol: POST, targetHost: "2001:db8::1", targetPort: 1}}}]}`,
			[]mesh.Traffic{{Forward: &mesh.Forward{To: "db.example:5432"}, Proxied: 1}, {Port: 80, Forward: &mesh.Forward{To: "db.example:5432"}, Proxied: 1},
				{Subset: "v1", Forward: &mesh.Forward{To: "[2001:db8::1]:1", Post: true}, Proxied: 2}, {Subset: "v1", Port: 80, Forward: &mesh.Forward{To: "[2001:db8::1]:1", Post: true}, Proxied: 2}}, []string{"subsets[0].trafficPolicy.tunnel.protocol POST is followed on ports"}},
		{"a proxy that nothing can be asked for gets nothing", `{trafficPolicy: {tunnel: {targetHost: "a b", targetPort: 1}}, subsets: [{name: v1, trafficPolicy: {tunnel: {targetHost: a, targetPort: 0}}}, {name: v2, trafficPolicy: {tunnel: {targetHost: a, targetPort: 1, protocol: UDP}}}]}`,
			[]mesh.Traffic{{Forward: &mesh.Forward{}}, {Subset: "v1", Forward: &mesh.Forward{}}, {Subset: "v2", Forward: &mesh.Forward{}}}, []string{"targetHost", "targetPort is no port", "neither CONNECT nor POST"}},
		{"which answers are failures", `trafficPolicy: {outlierDetection: {outlierDetectionHttpErrorCodes: [429, 503, 429, 99]}}`,
			[]mesh.Traffic{{Outliers: &mesh.Outliers{Errors: []uint32{429, 503}}}}, []string{"outlierDetectionHttpErrorCodes[3] is no status"}},
		{"zones", `{trafficPolicy: {loadBalancer: {localityLbSetting: {}, zoneAwareLbSetting: {enabled: true, failover: [{from: eu, to: us}, {from: eu}], failoverPriority: [topology.kubernetes.io/zone, pool]}}}, subsets: [{name: v1, trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {minClusterSize: 2}}}}, {name: v2, trafficPolicy: {loadBalancer: {zoneAwareLbSetting: {enabled: false}}}}]}`,
			[]mesh.Traffic{{Locality: &mesh.LocalityLB{Zones: true, Least: 6, Failover: []mesh.RegionFailover{{From: "eu", To: "us"}}, Labels: []string{"pool"}}},
				{Subset: "v1", Locality: &mesh.LocalityLB{Zones: true, Least: 2}}, {Subset: "v2", Locality: &mesh.LocalityLB{Off: true}}},
			[]string{"and not localityLbSetting", "failover[1] does not lead", "is left out"}},
		{"a cookie with attributes", `trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: u, ttl: 3600s, attributes: [{name: SameSite, value: Strict}, {name: Secure}]}}}}`,
			[]mesh.Traffic{{Hash: &mesh.HashKey{Cookie: "u", CookieTTL: &hour, CookieAttributes: []mesh.HTTPHeader{{Name: "SameSite", Value: "Strict"}, {Name: "Secure"}}}}}, nil},
		{"connections", `trafficPolicy: {retryBudget: {percent: 25, budgetInterval: 2s}, connectionPool: {tcp: {maxConnectionDuration: 60s, idleTimeout: 30s, tcpKeepalive: {probes: 3, time: 7200s, interval: 0.5s}}, http: {maxConcurrentStreams: 7, h2UpgradePolicy: UPGRADE, http2KeepAlive: {interval: 10s, timeout: 1s}}}}`,
			[]mesh.Traffic{{RetryBudget: &mesh.RetryBudget{Percent: 25, Over: 2 * time.Second, Least: 3}, ConnectionDuration: time.Minute, TCPIdleTimeout: 30 * time.Second,
				Keepalive: &mesh.Keepalive{Probes: 3, Idle: 2 * time.Hour, Interval: time.Second}, MaxStreams: 7, Speak: mesh.SpeakHTTP2, Ping: 10 * time.Second, PingTimeout: time.Second}},
			[]string{"tcpKeepalive is followed for endpoints outside", "interval is below a second"}},
		{"what the client speaks comes before HTTP/2", `{trafficPolicy: {connectionPool: {http: {useClientProtocol: true, h2UpgradePolicy: UPGRADE, http2KeepAlive: {interval: 10s}}}, retryBudget: {percent: 101}}}`,
			[]mesh.Traffic{{Speak: mesh.SpeakClient}}, []string{"http2KeepAlive needs interval and timeout", "retryBudget.percent"}},
		{"a subset has its own retries", `{trafficPolicy: {retryBudget: {}}, subsets: [{name: v1, trafficPolicy: {loadBalancer: {simple: RANDOM}}}, {name: v2, trafficPolicy: {retryBudget: {minRetryConcurrency: 9}}}]}`,
			[]mesh.Traffic{{RetryBudget: &mesh.RetryBudget{Percent: 20, Least: 3}}, {Subset: "v1", Balance: mesh.BalanceRandom, RetryBudget: &mesh.RetryBudget{Percent: 20, Least: 3}},
				{Subset: "v2", RetryBudget: &mesh.RetryBudget{Percent: 20, Least: 9}}}, nil},
		{"warming up", `trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 30s, minimumPercent: 20, aggression: 0.5}}}`,
			[]mesh.Traffic{{Balance: mesh.BalanceRoundRobin, Warmup: &mesh.Warmup{Over: 30 * time.Second, Percent: &twenty}}}, []string{"aggression is below 1"}},
		{"warming up, as it was written before", `trafficPolicy: {loadBalancer: {warmupDurationSecs: 5s}}`, []mesh.Traffic{{Warmup: &mesh.Warmup{Over: 5 * time.Second}}}, nil},
		{"localities, by regions", `trafficPolicy: {outlierDetection: {}, loadBalancer: {localityLbSetting: {failover: [{from: eu, to: us}, {from: eu, to: eu}]}}}`,
			[]mesh.Traffic{{Outliers: &mesh.Outliers{}, Locality: &mesh.LocalityLB{Failover: []mesh.RegionFailover{{From: "eu", To: "us"}}}}}, []string{"failover[1] does not lead"}},
		{"localities, by shares", `trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: eu/*, to: {us/*: 10, eu/*: 90}}]}}}`,
			[]mesh.Traffic{{Locality: &mesh.LocalityLB{Distribute: []mesh.Distribution{{From: "eu/*", To: []mesh.LocalityShare{{Locality: "eu/*", Percent: 90}, {Locality: "us/*", Percent: 10}}}}}}}, nil},
		{"localities that mean nothing", `{trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: eu/*, to: {us/*: 10}}]}}}, subsets: [{name: v1, trafficPolicy: {loadBalancer: {localityLbSetting: {failoverPriority: [a], enabled: true}}}}, {name: v2, trafficPolicy: {loadBalancer: {localityLbSetting: {enabled: false}}}}]}`,
			[]mesh.Traffic{{}, {Subset: "v1", Locality: &mesh.LocalityLB{Labels: []string{"a"}}}, {Subset: "v2", Locality: &mesh.LocalityLB{Off: true}}}, []string{"do not sum to 100", "no effect without outlierDetection"}},
		{"a hash of nothing", `trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: false}}}`, []mesh.Traffic{{}}, []string{"names nothing"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d networking.DestinationRule
			if err := yaml.Unmarshal([]byte(c.spec), &d); err != nil {
				t.Fatal(err)
			}
			_, got, problems := DestinationRule(&d)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if len(problems) != len(c.problems) {
				t.Fatalf("problems %q, want %d", problems, len(c.problems))
			}
			for i, p := range c.problems {
				if !strings.Contains(problems[i], p) {
					t.Errorf("problem %q, want %q in it", problems[i], p)
				}
			}
		})
	}
}

package controlplane

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// extensionProvider is what is read of one of Istio's extension providers: one that authorizes, or takes telemetry.
type extensionProvider struct {
	Name string        `json:"name"`
	HTTP *authProvider `json:"envoyExtAuthzHttp"`
	GRPC *authProvider `json:"envoyExtAuthzGrpc"`

	policy.TelemetrySource `json:",inline"`
}

type authProvider struct {
	Service  string `json:"service"`
	Port     uint32 `json:"port"`
	Timeout  string `json:"timeout"`
	FailOpen bool   `json:"failOpen"`

	// Which of the request's headers it gets need not be said: it gets them all.
	PathPrefix                      string            `json:"pathPrefix"`
	IncludeAdditionalHeadersInCheck map[string]string `json:"includeAdditionalHeadersInCheck"`
	HeadersToUpstreamOnAllow        []string          `json:"headersToUpstreamOnAllow"`
	HeadersToDownstreamOnAllow      []string          `json:"headersToDownstreamOnAllow"`
	HeadersToDownstreamOnDeny       []string          `json:"headersToDownstreamOnDeny"`

	IncludeRequestBodyInCheck *struct {
		MaxRequestBytes     uint32 `json:"maxRequestBytes"`
		AllowPartialMessage bool   `json:"allowPartialMessage"`
		PackAsBytes         bool   `json:"packAsBytes"`
	} `json:"includeRequestBodyInCheck"`
}

// provider is nil for one that does not authorize.
func (e extensionProvider) provider(clusterDomain string) (*mesh.AuthProvider, error) {
	p := e.HTTP
	if p == nil {
		p = e.GRPC
	}
	if p == nil {
		return nil, nil
	}
	bad := func(format string, args ...any) (*mesh.AuthProvider, error) {
		return nil, fmt.Errorf("%q: %w", e.Name, fmt.Errorf(format, args...))
	}
	switch {
	case e.Name == "":
		return nil, errors.New("a provider has no name")
	case p.Port == 0 || p.Port > 65535:
		return bad("the port %d is none", p.Port)
	case p.FailOpen:
		return bad("failOpen is not supported: what a provider does not answer is denied")
	}
	out := &mesh.AuthProvider{Port: uint16(p.Port), GRPC: e.HTTP == nil, PathPrefix: p.PathPrefix}
	service, err := policy.ProviderService(p.Service, clusterDomain)
	if err != nil {
		return bad("%w", err)
	}
	out.Service = service
	if p.Timeout != "" {
		d, err := time.ParseDuration(p.Timeout)
		if err != nil || d <= 0 {
			return bad("the timeout %q is none", p.Timeout)
		}
		out.Timeout = d
	}
	out.ToApplication, out.ToClientOnAllow, out.ToClientOnDeny = headerPatterns(p.HeadersToUpstreamOnAllow), headerPatterns(p.HeadersToDownstreamOnAllow), headerPatterns(p.HeadersToDownstreamOnDeny)
	for _, k := range slices.Sorted(maps.Keys(p.IncludeAdditionalHeadersInCheck)) {
		out.Add = append(out.Add, mesh.HTTPHeader{Name: k, Value: p.IncludeAdditionalHeadersInCheck[k]})
	}
	if b := p.IncludeRequestBodyInCheck; b != nil {
		out.MaxBody, out.PartOfBody, out.Bytes = b.MaxRequestBytes, b.AllowPartialMessage, b.PackAsBytes
	}
	return out, nil
}

// headerPatterns are names of headers, or patterns of them with a star at one end.
func headerPatterns(names []string) []mesh.TextMatch {
	var out []mesh.TextMatch
	for _, n := range names {
		switch {
		case n == "" || n == "*":
		case strings.HasPrefix(n, "*"):
			out = append(out, mesh.TextMatch{Kind: mesh.TextSuffix, Value: n[1:]})
		case strings.HasSuffix(n, "*"):
			out = append(out, mesh.TextMatch{Kind: mesh.TextPrefix, Value: n[:len(n)-1]})
		default:
			out = append(out, mesh.TextMatch{Kind: mesh.TextExact, Value: n})
		}
	}
	return out
}

// addTelemetry adds a provider that takes telemetry.
func (c *Config) addTelemetry(e extensionProvider) error {
	p, err := e.Provider(e.Name, c.Mesh.ClusterDomain)
	if err != nil {
		return err
	}
	if c.Mesh.Telemetry.ByName == nil {
		c.Mesh.Telemetry.ByName = map[string]*mesh.TelemetryProvider{}
	}
	c.Mesh.Telemetry.ByName[e.Name] = p
	return nil
}

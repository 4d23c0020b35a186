package index

import (
	"maps"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Secrets that DestinationRules name, for TLS to applications. As Istio has it, a waypoint or a gateway reads the Secret of that
// name in its own namespace, whoever wrote the rule.

// credentialAPI is what the index has of them.
type credentialAPI struct {
	credentialed map[key]*routeFact // DestinationRules that name any
	entering     []string           // namespaces of gateways, sorted, as of the last Commit
}

func newCredentialAPI() credentialAPI { return credentialAPI{credentialed: map[key]*routeFact{}} }

// credentials are the Secrets that a rule names.
func (f *routeFact) credentials() (out []string) {
	for _, t := range f.traffic {
		if t.TLS != nil && t.TLS.Credential != "" && t.TLS.Invalid == "" && !slices.Contains(out, t.TLS.Credential) {
			out = append(out, t.TLS.Credential)
		}
	}
	return out
}

func (x *Index) setCredentialed(k key, f *routeFact) {
	if f == nil || len(f.credentials()) == 0 {
		delete(x.credentialed, k)
		return
	}
	x.credentialed[k] = f
}

// readers are the namespaces of the waypoint and the gateways that may send to a service.
func (x *Index) readers(n mesh.ServiceName) []string {
	out := slices.Clone(x.entering)
	if s := x.winners[n]; s != nil && x.waypointFor(s) != nil {
		if at := x.waypointAsked(s).Namespace; !slices.Contains(out, at) {
			out = append(out, at)
		}
	}
	return out
}

// commitReaders finds where gateways are, which is what their credentials are by.
func (x *Index) commitReaders() {
	seen := map[string]bool{}
	for k := range x.entrances {
		seen[k.Namespace] = true
	}
	for ns, all := range x.ingresses {
		for _, f := range all {
			seen[ns] = seen[ns] || x.classes[f.class] == IngressController
		}
	}
	maps.DeleteFunc(seen, func(_ string, is bool) bool { return !is })
	next := slices.Sorted(maps.Keys(seen))
	if slices.Equal(next, x.entering) {
		return
	}
	x.entering = next
	for _, f := range x.credentialed {
		x.touchCredentialed(f)
	}
}

func (x *Index) touchCredentialed(f *routeFact) {
	x.dirtyRoutes[ref{DestinationRule, f.key}] = struct{}{}
	for _, h := range f.hosts {
		x.dirtyHosts[h] = struct{}{}
	}
}

// touchCredential marks what a Secret is for.
func (x *Index) touchCredential(k SecretKey) {
	for _, f := range x.credentialed {
		if names := f.credentials(); slices.Contains(names, k.Name) || slices.Contains(names, strings.TrimSuffix(k.Name, routing.RootsSuffix)) {
			x.touchCredentialed(f)
		}
	}
}

// wantedCredentials are the Secrets that waypoints and gateways may need for TLS to applications.
func (x *Index) wantedCredentials() (out []key) {
	for _, f := range x.credentialed {
		for _, h := range f.hosts {
			for _, ns := range x.readers(h) {
				for _, name := range f.credentials() {
					out = append(out, key{ns, name}, key{ns, name + routing.RootsSuffix})
				}
			}
		}
	}
	return out
}

// credential is what the Secrets of a name hold for the proxies of a namespace. Roots are in one of their own, or beside the
// certificate.
func (x *Index) credential(namespace, name string) (out mesh.Certificate) {
	if s := x.secrets[key{namespace, name}]; s != nil {
		out = s.Certificate
	}
	if s := x.secrets[key{namespace, name + routing.RootsSuffix}]; s != nil && s.Certificate.Roots != "" {
		out.Roots, out.CRL = s.Certificate.Roots, s.Certificate.CRL
	}
	out.Name = namespace + "/" + name
	return out
}

// equipped is how the endpoints of a service are used, with the credentials that are there for it.
func (x *Index) equipped(n mesh.ServiceName, f *routeFact) []mesh.Traffic {
	if x.credentialed[f.key] != f {
		return f.traffic
	}
	out := slices.Clone(f.traffic)
	for i := range out {
		if out[i].TLS == nil || out[i].TLS.Credential == "" {
			continue
		}
		t := *out[i].TLS
		t.Credentials = nil
		for _, ns := range x.readers(n) {
			if c := x.credential(ns, t.Credential); c.Chain != "" || c.Roots != "" {
				t.Credentials = append(t.Credentials, c)
			}
		}
		out[i].TLS = &t
	}
	return out
}

// missing says which credentials of a rule its waypoint has not.
func (x *Index) missing(f *routeFact) (problems []string) {
	if x.credentialed[f.key] != f {
		return nil
	}
	for _, h := range f.hosts {
		s := x.winners[h]
		if s == nil || x.waypointFor(s) == nil {
			continue
		}
		ns := x.waypointAsked(s).Namespace
		for _, t := range x.equipped(h, f) {
			if t.TLS == nil || t.TLS.Credential == "" || t.TLS.Invalid != "" || t.TLS.CredentialOf(ns) != nil {
				continue
			}
			needs := "roots (ca.crt, or those of " + t.TLS.Credential + routing.RootsSuffix + ")"
			if t.TLS.Mutual {
				needs = "a certificate with its key (tls.crt, tls.key) and " + needs
			}
			if p := "Secret " + ns + "/" + t.TLS.Credential + ", of the waypoint's namespace, is not there or has not " + needs + ": nothing is sent to " + h.Hostname; !slices.Contains(problems, p) {
				problems = append(problems, p)
			}
		}
	}
	return problems
}

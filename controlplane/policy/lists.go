package policy

import (
	"fmt"
	"iter"

	securityv1beta1 "istio.io/api/security/v1beta1"
)

// valueKind is what the values of a list are.
type valueKind uint8

const (
	kindString    valueKind = iota
	kindPrefix              // address or CIDR
	kindPort                // number
	kindAccount             // service account
	kindDomain              // trust domain
	kindNamespace           // name of a namespace, or a pattern of it
	kindPrincipal           // <trust domain>/ns/<namespace>/sa/<service account>
	kindPath                // URL path or template
)

// list is one list of values of a rule.
type list struct {
	name   string // of the field, as the API calls it
	path   string // from[0].source, to[1].operation, when[2]
	values []string
	kind   valueKind
	http   bool // nodes do not see the attribute
	custom bool // a CUSTOM policy may have it
}

type field struct {
	name   string
	values []string
	kind   valueKind
	http   bool
	custom bool
}

func sourceFields(s *securityv1beta1.Source) [14]field {
	return [14]field{
		{name: "principals", values: s.GetPrincipals(), kind: kindPrincipal},
		{name: "notPrincipals", values: s.GetNotPrincipals(), kind: kindPrincipal},
		{name: "requestPrincipals", values: s.GetRequestPrincipals(), http: true},
		{name: "notRequestPrincipals", values: s.GetNotRequestPrincipals(), http: true},
		{name: "namespaces", values: s.GetNamespaces(), kind: kindNamespace},
		{name: "notNamespaces", values: s.GetNotNamespaces(), kind: kindNamespace},
		{name: "serviceAccounts", values: s.GetServiceAccounts(), kind: kindAccount},
		{name: "notServiceAccounts", values: s.GetNotServiceAccounts(), kind: kindAccount},
		{name: "trustDomains", values: s.GetTrustDomains(), kind: kindDomain},
		{name: "notTrustDomains", values: s.GetNotTrustDomains(), kind: kindDomain},
		{name: "ipBlocks", values: s.GetIpBlocks(), kind: kindPrefix, custom: true},
		{name: "notIpBlocks", values: s.GetNotIpBlocks(), kind: kindPrefix, custom: true},
		{name: "remoteIpBlocks", values: s.GetRemoteIpBlocks(), kind: kindPrefix, http: true, custom: true},
		{name: "notRemoteIpBlocks", values: s.GetNotRemoteIpBlocks(), kind: kindPrefix, http: true, custom: true},
	}
}

func operationFields(o *securityv1beta1.Operation) [8]field {
	return [8]field{
		{name: "ports", values: o.GetPorts(), kind: kindPort, custom: true},
		{name: "notPorts", values: o.GetNotPorts(), kind: kindPort, custom: true},
		{name: "hosts", values: o.GetHosts(), http: true, custom: true},
		{name: "notHosts", values: o.GetNotHosts(), http: true, custom: true},
		{name: "methods", values: o.GetMethods(), http: true, custom: true},
		{name: "notMethods", values: o.GetNotMethods(), http: true, custom: true},
		{name: "paths", values: o.GetPaths(), kind: kindPath, http: true, custom: true},
		{name: "notPaths", values: o.GetNotPaths(), kind: kindPath, http: true, custom: true},
	}
}

// lists yields every list of a rule, the empty ones too.
func lists(r *securityv1beta1.Rule) iter.Seq[list] {
	return func(yield func(list) bool) {
		for i, f := range r.GetFrom() {
			for _, l := range sourceFields(f.GetSource()) {
				if !yield(list{l.name, fmt.Sprintf("from[%d].source", i), l.values, l.kind, l.http, l.custom}) {
					return
				}
			}
		}
		for i, t := range r.GetTo() {
			for _, l := range operationFields(t.GetOperation()) {
				if !yield(list{l.name, fmt.Sprintf("to[%d].operation", i), l.values, l.kind, l.http, l.custom}) {
					return
				}
			}
		}
		for i, w := range r.GetWhen() {
			a := attributes[w.GetKey()]
			for _, l := range [2]field{{name: "values", values: w.GetValues()}, {name: "notValues", values: w.GetNotValues()}} {
				if !yield(list{l.name, fmt.Sprintf("when[%d]", i), l.values, a.kind, a.http, a.custom}) {
					return
				}
			}
		}
	}
}

// attribute is what a condition may be about.
type attribute struct {
	kind   valueKind
	http   bool
	custom bool
}

// attributes are those without an argument in brackets.
var attributes = map[string]attribute{
	"source.ip":              {kind: kindPrefix, custom: true},
	"source.namespace":       {kind: kindNamespace},
	"source.principal":       {kind: kindPrincipal},
	"source.serviceAccount":  {kind: kindAccount},
	"source.trustDomain":     {kind: kindDomain},
	"destination.ip":         {kind: kindPrefix, custom: true},
	"destination.port":       {kind: kindPort, custom: true},
	"remote.ip":              {kind: kindPrefix, http: true, custom: true},
	"connection.sni":         {http: true, custom: true},
	"request.auth.principal": {http: true},
	"request.auth.audiences": {http: true},
	"request.auth.presenter": {http: true},
}

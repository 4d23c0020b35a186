package main

import (
	"fmt"
	"slices"
	"strings"
)

// rule is a validation that Istio's own webhook makes and its definitions do not: said in CEL, it holds where no
// webhook answers. The words are those of controlplane/policy as far as an expression can have them.
type rule struct {
	crd string
	at  string // path of the schema: properties by name, [] for the items of a list
	cel string
	say string
}

// rules refuse nothing that Istio's webhook lets pass. The API server bounds the cost of an expression by the number of
// objects that it may be evaluated for: a source whose lists all are empty can be told from a good one only by the first
// of them, and an operation not at all. The webhook tells the rest.
var rules = []rule{
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec",
		cel: "!(has(self.action) && self.action in ['DENY', 'CUSTOM']) || (has(self.rules) && size(self.rules) > 0)",
		say: "a policy with action DENY or CUSTOM and without rules matches nothing and does nothing; to match every connection write one empty rule: rules: [{}]",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec",
		cel: "has(self.provider) == (has(self.action) && self.action == 'CUSTOM')",
		say: "action CUSTOM needs a provider, provider: {name: ...}, and no other action has one",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec.rules[]",
		cel: "!has(self.from) || size(self.from) > 0",
		say: "\"from\" is an empty list; remove it for any source, or name one",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec.rules[]",
		cel: "!has(self.to) || size(self.to) > 0",
		say: "\"to\" is an empty list; remove it for any operation, or name one",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec.rules[].from[]",
		cel: "has(self.source)",
		say: "there is no source; remove the entry for any source, or name namespaces, principals, serviceAccounts or ipBlocks",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec.rules[].from[].source",
		cel: "has(self.namespaces) && size(self.namespaces) > 0" + orHas("principals", "notPrincipals", "requestPrincipals",
			"notRequestPrincipals", "notNamespaces", "serviceAccounts", "notServiceAccounts", "trustDomains", "notTrustDomains",
			"ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks"),
		say: "the source says nothing: lists such as namespaces that have no values count as left out, and a source needs at least one value. " +
			"Give one, as in namespaces: [\"shop\"], or remove \"from\" for any source",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec.rules[].to[]",
		cel: "has(self.operation)",
		say: "there is no operation; remove the entry for any operation, or name ports, methods, paths or hosts",
	},
	{
		crd: "authorizationpolicies.security.istio.io", at: "spec.rules[].when[]",
		cel: "has(self.values) && size(self.values) > 0 || has(self.notValues) && size(self.notValues) > 0",
		say: "the condition has neither values nor notValues; give at least one",
	},
}

func orHas(lists ...string) string {
	var b strings.Builder
	for _, l := range lists {
		b.WriteString(" || has(self." + l + ")")
	}
	return b.String()
}

// addRules puts the rules of one definition into each of its versions.
func addRules(name string, spec any) error {
	versions, _ := spec.(map[string]any)["versions"].([]any)
	for _, r := range rules {
		if r.crd != name {
			continue
		}
		for _, v := range versions {
			at := descend(v, "schema", "openAPIV3Schema")
			for _, p := range strings.Split(r.at, ".") {
				field, items := strings.CutSuffix(p, "[]")
				at = descend(at, "properties", field)
				if items {
					at = descend(at, "items")
				}
			}
			if at == nil {
				return fmt.Errorf("%s has no %s", name, r.at)
			}
			have, _ := at["x-kubernetes-validations"].([]any)
			at["x-kubernetes-validations"] = append(have, map[string]any{"rule": r.cel, "message": r.say})
		}
	}
	return nil
}

// addColumn has kubectl get show whether a policy is enforced.
func addColumn(name string, spec any) {
	if !strings.HasSuffix(name, ".security.istio.io") {
		return
	}
	versions, _ := spec.(map[string]any)["versions"].([]any)
	for _, v := range versions {
		v, _ := v.(map[string]any)
		columns, _ := v["additionalPrinterColumns"].([]any)
		if len(columns) == 0 { // the API server shows the age where nothing else is asked for
			columns = []any{map[string]any{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}}
		}
		v["additionalPrinterColumns"] = slices.Insert(slices.Clone(columns), len(columns)-1,
			any(map[string]any{"name": "Enforced", "type": "string", "jsonPath": `.status.conditions[?(@.type=="Enforced")].status`}))
	}
}

func descend(v any, path ...string) map[string]any {
	m, _ := v.(map[string]any)
	for _, p := range path {
		m, _ = m[p].(map[string]any)
	}
	return m
}

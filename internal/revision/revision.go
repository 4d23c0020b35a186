// Package revision decides which of several control planes a Gateway is given to, by the labels that Istio has for it. It
// knows labels and names, and nothing of Kubernetes.
//
// The control plane of revision Default is the one that the agents ask. Those of other revisions make and configure the
// waypoints and gateways that ask for them, and nothing else.
package revision

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"regexp"
)

// Names of Istio's.
const (
	Label    = "istio.io/rev" // of a Gateway or its namespace: a revision or a tag; of a control plane's objects: its revision
	TagLabel = "istio.io/tag" // of a Service in the control plane's namespace: what this revision (Label) may be called too
	// TagService begins the names of Services that are tags.
	TagService = "istiod-revision-tag-"
	// Default is the revision whose control plane the agents ask, and that of Gateways which name none.
	Default = "default"
	// BesideIstio is the revision of Warren's control plane while Istio's is there too and has the name Default for itself.
	BesideIstio = "warren"
)

// most is how long a name may be: names of objects are made of it, and a Service's has no more than 63 characters.
const most = 40

var form = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// Check says what is wrong with the name of a revision or a tag.
func Check(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty")
	case len(name) > most:
		return fmt.Errorf("%q has %d characters, and may have %d: names of objects are made of it", name, len(name), most)
	case !form.MatchString(name):
		return fmt.Errorf("%q is no name: it may have a-z, 0-9 and -, and begins and ends with one of the former", name)
	}
	return nil
}

// Suffix is what the names of a control plane's objects end in.
func Suffix(revision string) string {
	if revision == "" || revision == Default {
		return ""
	}
	return "-" + revision
}

// Lease is the name of the Lease by which the replicas of one revision's control plane elect one.
func Lease(revision string) string { return "warren-control-leader" + Suffix(revision) }

// Service is the labels of one of those Services in the control planes' namespace that have Label.
type Service = map[string]string

// controlApp is the label app of a control plane's Services.
const controlApp = "istiod"

// Known are the control planes that there are, and what they are called besides.
type Known struct {
	Revisions map[string]bool
	Tags      map[string]string // tag → revision, which need not be there
}

// Read finds them among Services. There is always one of revision Default: it may run elsewhere.
func Read(services []Service) Known {
	k := Known{Revisions: map[string]bool{Default: true}, Tags: map[string]string{}}
	for _, labels := range services {
		rev := labels[Label]
		if rev == "" {
			continue
		}
		if tag := labels[TagLabel]; tag != "" {
			k.Tags[tag] = rev
		} else if labels["app"] == controlApp {
			k.Revisions[rev] = true
		}
	}
	return k
}

// Asked is what a Gateway asks for by its labels, or else its namespace by its own; Default where neither does.
func Asked(gateway, namespace map[string]string) string {
	return cmp.Or(gateway[Label], namespace[Label], Default)
}

// Owner is the revision that what is asked for means; problem says why there is none. Of a tag and a revision of one name
// the tag holds: so the tag Default has everything go elsewhere that asks for nothing.
func (k Known) Owner(asked string) (owner, problem string) {
	rev, tagged := k.Tags[asked]
	if !tagged {
		rev = asked
	}
	switch {
	case k.Revisions[rev]:
		return rev, ""
	case tagged:
		return "", fmt.Sprintf("it asks for the tag %q (%s), which is for revision %q, and there is no control plane of that revision", asked, Label, rev)
	}
	return "", fmt.Sprintf("it asks for %q (%s), and there is neither a control plane of that revision nor a tag of that name", asked, Label)
}

// Equal reports whether both are the same.
func (k Known) Equal(o Known) bool {
	return maps.Equal(k.Revisions, o.Revisions) && maps.Equal(k.Tags, o.Tags)
}

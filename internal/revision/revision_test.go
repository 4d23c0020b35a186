package revision

import (
	"strings"
	"testing"
)

func TestOwner(t *testing.T) {
	service := func(rev, tag string) Service {
		if tag != "" {
			return Service{Label: rev, TagLabel: tag}
		}
		return Service{Label: rev, "app": controlApp}
	}
	alone := Read(nil)
	two := Read([]Service{service(Default, ""), service("next", ""), service("next", "prod"), service("gone", "old"), {"app": controlApp}, {Label: "gone", "app": "edge"}})
	moved := Read([]Service{service("next", ""), service("next", Default)})
	for name, c := range map[string]struct {
		known              Known
		gateway, namespace map[string]string
		owner, problem     string
	}{
		"nobody says anything":                {alone, nil, nil, Default, ""},
		"the default by name":                 {alone, map[string]string{Label: Default}, nil, Default, ""},
		"of the Gateway":                      {two, map[string]string{Label: "next"}, nil, "next", ""},
		"of the namespace":                    {two, nil, map[string]string{Label: "next"}, "next", ""},
		"the Gateway's goes first":            {two, map[string]string{Label: Default}, map[string]string{Label: "next"}, Default, ""},
		"a tag":                               {two, map[string]string{Label: "prod"}, nil, "next", ""},
		"a tag of a revision that is gone":    {two, map[string]string{Label: "old"}, nil, "", `revision "gone"`},
		"what nobody has":                     {two, map[string]string{Label: "nxt"}, nil, "", "neither a control plane"},
		"a revision that is not there":        {alone, nil, map[string]string{Label: "next"}, "", "neither a control plane"},
		"the tag default":                     {moved, nil, nil, "next", ""},
		"the tag default, asked for by name":  {moved, map[string]string{Label: Default}, nil, "next", ""},
		"the tag default, and another's name": {moved, map[string]string{Label: "next"}, nil, "next", ""},
	} {
		owner, problem := c.known.Owner(Asked(c.gateway, c.namespace))
		if owner != c.owner || (problem == "") != (c.problem == "") || !strings.Contains(problem, c.problem) {
			t.Errorf("%s: %q, %q; want %q, %q", name, owner, problem, c.owner, c.problem)
		}
	}
}

func TestCheck(t *testing.T) {
	for name, ok := range map[string]bool{"": false, "1-30": true, "next": true, "Next": false, "a.b": false, "-a": false, "a-": false,
		strings.Repeat("a", 40): true, strings.Repeat("a", 41): false, "130": true} {
		if err := Check(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestEqual(t *testing.T) {
	a := Read([]Service{{Label: "next", "app": controlApp}, {Label: "next", TagLabel: "prod"}})
	for name, c := range map[string]struct {
		of   []Service
		want bool
	}{
		"the same":        {[]Service{{Label: "next", TagLabel: "prod"}, {Label: "next", "app": controlApp}, {Label: Default, "app": controlApp}}, true},
		"another tag":     {[]Service{{Label: "next", "app": controlApp}, {Label: "next", TagLabel: "test"}}, false},
		"a tag moved":     {[]Service{{Label: "next", "app": controlApp}, {Label: Default, TagLabel: "prod"}}, false},
		"another control": {[]Service{{Label: "last", "app": controlApp}, {Label: "next", TagLabel: "prod"}}, false},
		"fewer":           {nil, false},
	} {
		if got := a.Equal(Read(c.of)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if s := Suffix(Default) + Suffix("") + Suffix("x"); s != "-x" {
		t.Error(s)
	}
}

package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/results"
)

// Every example earns the message of its name, with the severity that is documented, and every code has one.
func TestEveryMessage(t *testing.T) {
	severity := map[policy.Code]policy.Severity{}
	for _, e := range policy.Explanations {
		if _, twice := severity[e.Code]; twice {
			t.Errorf("%s is explained twice", e.Code)
		}
		severity[e.Code] = e.Severity
	}
	seen := map[policy.Code]bool{}
	for _, f := range txtar.Parse(examples).Files {
		problems, err := judge(f.Data)
		if err != nil {
			t.Errorf("%s: %v", f.Name, err)
		}
		for _, p := range problems {
			if want, ok := severity[p.Code]; !ok || p.Severity != want {
				t.Errorf("%s: %v: explained %v, severity %d", f.Name, p, ok, p.Severity)
			}
			if p.Field == "" || p.Message == "" || strings.Contains(p.Message, "%!") {
				t.Errorf("%s: a message without a place or with a hole: %+v", f.Name, p)
			}
			seen[p.Code] = true
		}
		if code := policy.Code(f.Name); !strings.Contains(f.Name, " ") &&
			!slices.ContainsFunc(problems, func(p policy.Problem) bool { return p.Code == code }) {
			t.Errorf("the example of %s earns %v", code, problems)
		}
	}
	for code := range severity {
		if !seen[code] {
			t.Errorf("%s has no example", code)
		}
	}
}

func TestPageIsCurrent(t *testing.T) {
	want, err := page()
	if err != nil {
		t.Fatal(err)
	}
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, "docs", "policy-messages.md"))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/policy-messages.md is not what the code says: go generate ./controlplane/admission/messages")
	}
}

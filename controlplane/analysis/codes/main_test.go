package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/warrenmesh/warren/results"
)

func TestPageIsGenerated(t *testing.T) {
	root, err := results.Root()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "docs", "analyze.md"))
	if err != nil {
		t.Fatal(err)
	}
	if string(b) != page() {
		t.Error("docs/analyze.md is not what the code says: go generate ./controlplane/analysis/codes")
	}
}

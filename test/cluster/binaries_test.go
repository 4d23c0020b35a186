package cluster

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestCacheForgetsWhatNobodyAsksFor(t *testing.T) {
	top := t.TempDir()
	built := 0
	get := func(kind, key string) string {
		t.Helper()
		dir, err := cachedIn(top, kind, key, func(string) error { built++; return nil })
		if err != nil {
			t.Fatal(err)
		}
		return dir
	}
	old := time.Now().Add(-2 * cacheLife)
	forgotten, other, used := get("bin", "1"), get("images", "1"), get("bin", "2")
	for _, d := range []string{forgotten, other, used} {
		if err := os.Chtimes(d, old, old); err != nil {
			t.Fatal(err)
		}
	}
	if get("bin", "2"); built != 3 {
		t.Errorf("%d builds, want 3: what is there is not built again", built)
	}
	get("bin", "3")
	for d, want := range map[string]bool{forgotten: false, other: true, used: true} {
		if _, err := os.Stat(d); (err == nil) != want {
			t.Errorf("%s is there: %t, want %t", filepath.Base(d), err == nil, want)
		}
	}
}

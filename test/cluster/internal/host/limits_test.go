package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLimitsAreRaisedOrNamed(t *testing.T) {
	dir := t.TempDir()
	low, high := filepath.Join(dir, "low"), filepath.Join(dir, "high")
	for f, v := range map[string]string{low: "128\n", high: "9000\n"} {
		if err := os.WriteFile(f, []byte(v), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var said []string
	say := func(s string) { said = append(said, s) }
	if err := raise([]limit{{low, 512}, {high, 512}}, say); err != nil {
		t.Fatal(err)
	}
	for f, want := range map[string]string{low: "512", high: "9000\n"} {
		if got, _ := os.ReadFile(f); string(got) != want {
			t.Errorf("%s is %q, want %q", filepath.Base(f), got, want)
		}
	}
	if len(said) != 1 || !strings.Contains(said[0], "from 128 to 512") {
		t.Errorf("it said %q", said)
	}
	// A setting that this machine does not let us change.
	if err := raise([]limit{{"/proc/sys/kernel/ngroups_max", 1 << 30}}, say); err == nil || !strings.Contains(err.Error(), "sysctl -w kernel.ngroups_max=") {
		t.Errorf("a setting that cannot be raised: %v", err)
	}
}

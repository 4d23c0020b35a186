package mesh

import (
	"fmt"
	"maps"
	"testing"

	"pgregory.net/rapid"
)

// A persistent map is held against Go's own, and every earlier version against what it was.
func TestPersistentMapAgainstMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var m pmap[string, *int]
		want := map[string]*int{}
		type version struct {
			m    pmap[string, *int]
			want map[string]*int
		}
		history := []version{{m, maps.Clone(want)}}
		ed := new(edit)
		for range rapid.IntRange(0, 300).Draw(t, "steps") {
			key := fmt.Sprint(rapid.IntRange(0, 80).Draw(t, "key"))
			switch rapid.IntRange(0, 5).Draw(t, "op") {
			case 0, 1, 2:
				v := new(int)
				m.set(ed, key, v)
				want[key] = v
			case 3, 4:
				m.delete(ed, key)
				delete(want, key)
			case 5: // commit
				history = append(history, version{m, maps.Clone(want)})
				ed = new(edit)
			}
		}
		history = append(history, version{m, maps.Clone(want)})
		for i, v := range history {
			if v.m.len != len(v.want) {
				t.Fatalf("version %d has %d entries, want %d", i, v.m.len, len(v.want))
			}
			if got := maps.Collect(v.m.all()); !maps.Equal(got, v.want) {
				t.Fatalf("version %d is %v, want %v", i, got, v.want)
			}
			for k, p := range v.want {
				if got, ok := v.m.get(k); !ok || got != p {
					t.Fatalf("version %d does not find %q", i, k)
				}
			}
		}
		// What differs between any two versions.
		a, b := history[rapid.IntRange(0, len(history)-1).Draw(t, "a")], history[rapid.IntRange(0, len(history)-1).Draw(t, "b")]
		got := map[string][2]*int{}
		for k, d := range diff(a.m, b.m) {
			if _, twice := got[k]; twice {
				t.Fatalf("%q is reported twice", k)
			}
			got[k] = d
		}
		differs := map[string][2]*int{}
		for k := range a.want {
			if a.want[k] != b.want[k] {
				differs[k] = [2]*int{a.want[k], b.want[k]}
			}
		}
		for k := range b.want {
			if a.want[k] != b.want[k] {
				differs[k] = [2]*int{a.want[k], b.want[k]}
			}
		}
		if !maps.Equal(got, differs) {
			t.Fatalf("the difference is %v, want %v", got, differs)
		}
	})
}

// Keys whose whole hash is the same share a list at the bottom.
func TestPersistentMapCollisions(t *testing.T) {
	ed := new(edit)
	root := &pnode[int, int]{owner: ed}
	for k := range 5 {
		root, _ = root.set(ed, 42, trieDepth, k, k*k)
	}
	frozen := root
	ed = new(edit)
	root, removed := root.delete(ed, 42, trieDepth, 2)
	if !removed || len(root.data) != 4 || len(frozen.data) != 5 {
		t.Fatalf("after the removal %d entries, the earlier version %d", len(root.data), len(frozen.data))
	}
	if _, removed := root.delete(ed, 42, trieDepth, 99); removed {
		t.Fatal("a key that was never there was removed")
	}
	var diffs int
	diffNodes(frozen, root, trieDepth, func(k int, d [2]int) bool {
		diffs++
		if k != 2 || d != [2]int{4, 0} {
			t.Fatalf("the key %d changed: %v", k, d)
		}
		return true
	})
	if diffs != 1 {
		t.Fatalf("%d differences", diffs)
	}
}

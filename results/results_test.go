package results

import (
	"path/filepath"
	"reflect"
	"sync"
	"testing"
)

func TestUpdate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "suite.json")
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b", "c", "d"} {
		wg.Go(func() {
			for i := range 20 {
				if err := update(file, []Row{{Name: name, Inputs: i}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	rows, err := Read(file)
	if err != nil || len(rows) != 4 {
		t.Fatalf("%v, %v", rows, err)
	}
	for _, r := range rows {
		if r.Inputs != 19 {
			t.Errorf("%+v is not the last", r)
		}
	}
	if err := update(file, []Row{{Name: "b", Failures: 1}}); err != nil {
		t.Fatal(err)
	}
	again, err := Read(file)
	for i := range rows {
		if rows[i].Name == "b" {
			rows[i] = Row{Name: "b", Failures: 1}
		}
	}
	if err != nil || !reflect.DeepEqual(again, rows) {
		t.Errorf("%+v, %v, want %+v", again, err, rows)
	}
}

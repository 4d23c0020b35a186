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
	if err != nil || len(rows) != 5 {
		t.Fatalf("%v, %v", rows, err)
	}
	if rows[0] != (Row{Name: "suite", Inputs: 4 * 19, Unit: Summed}) {
		t.Errorf("%+v is not the sum", rows[0])
	}
	for _, r := range rows[1:] {
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
	rows[0] = Row{Name: "suite", Inputs: 3 * 19, Failures: 1, Figure: 1, Unit: Summed}
	if err != nil || !reflect.DeepEqual(again, rows) {
		t.Errorf("%+v, %v, want %+v", again, err, rows)
	}
	headline := Row{Name: "suite", Inputs: 7, Figure: 0.5, Unit: "ms"}
	if err := update(file, []Row{headline}); err != nil {
		t.Fatal(err)
	}
	if err := update(file, []Row{{Name: "b"}}); err != nil {
		t.Fatal(err)
	}
	if again, err := Read(file); err != nil || again[0] != headline {
		t.Errorf("%+v, %v: a sum took the place of the suite's own row", again, err)
	}
}

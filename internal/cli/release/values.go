package release

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/charts"
)

// Sources are where values come from; the later ones win: the profiles, files in order, Set, SetString. A file may be an
// IstioOperator, and profiles that it names go over Profile.
type Sources struct {
	Profile   string // one, or several with commas between them
	Files     []File
	Set       []string // path=value, as Helm reads them
	SetString []string
	Warn      func(string) // of what is given and means nothing here; may be nil
}

// File is a file of values and its name for messages.
type File struct {
	Name string
	Data []byte
}

// Profiles lists the names of the profiles.
func Profiles() []string {
	entries, err := fs.ReadDir(charts.Files, "profiles")
	if err != nil {
		panic(err) // they are part of the program
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	return names
}

// ProfileAbout is the profile's first comment.
func ProfileAbout(name string) string {
	b, err := charts.Files.ReadFile(path.Join("profiles", name+".yaml"))
	if err != nil {
		return ""
	}
	first, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimPrefix(first, "# ")
}

// Profile returns what a profile changes.
func Profile(name string) (map[string]any, error) {
	b, err := charts.Files.ReadFile(path.Join("profiles", name+".yaml"))
	if err != nil {
		if near := nearest(name, Profiles()); near != "" {
			return nil, fmt.Errorf("there is no profile %q; did you mean %s?", name, near)
		}
		return nil, fmt.Errorf("there is no profile %q; there are %s", name, strings.Join(Profiles(), ", "))
	}
	v := map[string]any{}
	return v, yaml.Unmarshal(b, &v)
}

// Values merges the sources over base, which may be nil, and checks them against the chart's schema. What comes
// back holds only what differs from the chart's own values.
func (s Sources) Values(base map[string]any) (map[string]any, error) {
	out := clone(base)
	files := make([]map[string]any, len(s.Files))
	profile := s.Profile
	for i, f := range s.Files {
		if err := yaml.Unmarshal(f.Data, &files[i]); err != nil {
			return nil, fmt.Errorf("reading values from %s: %w", f.Name, err)
		}
		if files[i]["kind"] != "IstioOperator" {
			continue
		}
		o, err := readOperator(files[i])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
		for _, w := range o.ignored {
			if s.Warn != nil {
				s.Warn(f.Name + ": " + w)
			}
		}
		files[i] = o.values
		if len(o.profiles) > 0 {
			profile = strings.TrimPrefix(profile+","+strings.Join(o.profiles, ","), ",")
		}
	}
	if profile != "" {
		for name := range strings.SplitSeq(profile, ",") {
			p, err := Profile(name)
			if err != nil {
				return nil, err
			}
			out = merge(out, p)
		}
	}
	for i, f := range s.Files {
		v := files[i]
		if err := known(v); err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
		out = merge(out, v)
	}
	for _, set := range s.Set {
		if err := strvals.ParseInto(set, out); err != nil {
			return nil, fmt.Errorf("--set %s: %w", set, err)
		}
	}
	for _, set := range s.SetString {
		if err := strvals.ParseIntoString(set, out); err != nil {
			return nil, fmt.Errorf("--set-string %s: %w", set, err)
		}
	}
	if err := known(out); err != nil {
		return nil, err
	}
	return out, check(out)
}

// Over is b over a; neither is changed.
func Over(a, b map[string]any) map[string]any { return merge(clone(a), clone(b)) }

// merge puts b over a; maps go into maps. a is changed.
func merge(a, b map[string]any) map[string]any {
	for k, v := range b {
		into, isMap := a[k].(map[string]any)
		if from, ok := v.(map[string]any); ok && isMap {
			a[k] = merge(into, from)
			continue
		}
		a[k] = v
	}
	return a
}

// clone copies maps, so that merge changes no one else's.
func clone(m map[string]any) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		if inner, ok := v.(map[string]any); ok {
			v = clone(inner)
		}
		out[k] = v
	}
	return out
}

// schema is the part of values.schema.json that names values.
type schema struct {
	Properties map[string]*schema `json:"properties"`
	Additional any                `json:"additionalProperties"`
	Enum       []any              `json:"enum"`
}

func chartSchema() ([]byte, error) { return charts.Files.ReadFile("warren/values.schema.json") }

// known finds a value that the chart does not have, and names the one that was meant.
func known(values map[string]any) error {
	b, err := chartSchema()
	if err != nil {
		return err
	}
	var s schema
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("reading the chart's schema: %w", err)
	}
	return s.known(values, "", leaves(&s, ""))
}

func (s *schema) known(values map[string]any, at string, all []string) error {
	var errs []error
	for _, k := range slices.Sorted(maps.Keys(values)) {
		here := join(at, k)
		sub, ok := s.Properties[k]
		if !ok {
			if s.Additional != false { // free keys
				continue
			}
			errs = append(errs, unknown(here, slices.Collect(maps.Keys(s.Properties)), at, all))
			continue
		}
		switch v := values[k].(type) {
		case map[string]any:
			errs = append(errs, sub.known(v, here, all))
		case string:
			if len(sub.Enum) == 0 || slices.Contains(sub.Enum, any(v)) {
				continue
			}
			var names []string
			for _, e := range sub.Enum {
				names = append(names, fmt.Sprint(e))
			}
			errs = append(errs, fmt.Errorf("%s: %q is none of %s%s", here, v, strings.Join(names, ", "), ask(nearest(v, names))))
		}
	}
	return errors.Join(errs...)
}

// unknown prefers a name at the same place, then the same word elsewhere, then the nearest path.
func unknown(path string, here []string, at string, all []string) error {
	word := path[strings.LastIndexByte(path, '.')+1:]
	meant := ""
	if n := nearest(word, here); n != "" {
		meant = join(at, n)
	}
	for _, p := range all {
		if meant == "" && strings.HasSuffix(p, "."+word) {
			meant = p
		}
	}
	if meant == "" {
		meant = nearest(path, all)
	}
	if meant == "" {
		slices.Sort(here)
		if at == "" {
			at = "the chart"
		}
		return fmt.Errorf("there is no value %s; %s has %s", path, at, strings.Join(here, ", "))
	}
	return fmt.Errorf("there is no value %s%s", path, ask(meant))
}

func ask(meant string) string {
	if meant == "" {
		return ""
	}
	return "; did you mean " + meant + "?"
}

func join(at, k string) string {
	if at == "" {
		return k
	}
	return at + "." + k
}

// leaves are the paths of all values.
func leaves(s *schema, at string) []string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(s.Properties)) {
		out = append(out, join(at, k))
		out = append(out, leaves(s.Properties[k], join(at, k))...)
	}
	return out
}

// check holds the values against the schema, the way Helm does.
func check(values map[string]any) error {
	c, err := chart()
	if err != nil {
		return err
	}
	all, err := util.CoalesceValues(c, clone(values))
	if err != nil {
		return fmt.Errorf("merging the values: %w", err)
	}
	err = util.ValidateAgainstSchema(c, all)
	if err == nil {
		return nil
	}
	// The first line names the chart, and places are written /a/b.
	var said []string
	for line := range strings.Lines(err.Error()) {
		line = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "-"))
		if rest, ok := strings.CutPrefix(line, "at '/"); ok {
			place, what, _ := strings.Cut(rest, "': ")
			said = append(said, strings.ReplaceAll(place, "/", ".")+": "+what)
		}
	}
	if len(said) == 0 {
		return err
	}
	return errors.New(strings.Join(said, "; "))
}

// nearest returns the candidate that differs least, or "" where none is near.
func nearest(word string, candidates []string) string {
	best, far := "", min(len(word), 1+max(2, len(word)/3))
	slices.Sort(candidates)
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < far {
			best, far = c, d
		}
	}
	return best
}

// distance counts insertions, deletions and replacements between a and b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		left := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := left
			if a[i] != b[j] {
				cost++
			}
			left = row[j+1]
			row[j+1] = min(cost, left+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// Complete returns all values of the chart with the given ones over them.
func Complete(values map[string]any) (map[string]any, error) {
	c, err := chart()
	if err != nil {
		return nil, err
	}
	return util.CoalesceValues(c, clone(values))
}

// Difference is a value that two sets of values do not share; as JSON, "" where one does not have it.
type Difference struct {
	Path  string `json:"path"`
	Left  string `json:"left"`
	Right string `json:"right"`
}

// Diff compares two sets of values, by path.
func Diff(left, right map[string]any) []Difference {
	return diff(left, right, "")
}

func diff(left, right map[string]any, at string) []Difference {
	keys := slices.AppendSeq(slices.Collect(maps.Keys(left)), maps.Keys(right))
	slices.Sort(keys)
	out := []Difference{}
	for _, k := range slices.Compact(keys) {
		l, hasLeft := left[k]
		r, hasRight := right[k]
		lm, lok := l.(map[string]any)
		rm, rok := r.(map[string]any)
		if lok && rok {
			out = append(out, diff(lm, rm, join(at, k))...)
			continue
		}
		show := func(v any, has bool) string {
			if !has {
				return ""
			}
			b, err := json.Marshal(v)
			if err != nil {
				return fmt.Sprint(v)
			}
			return string(b)
		}
		if ls, rs := show(l, hasLeft), show(r, hasRight); ls != rs {
			out = append(out, Difference{join(at, k), ls, rs})
		}
	}
	return out
}

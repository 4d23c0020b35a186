package sysdump

import (
	"archive/tar"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// Gone stands where something secret was.
const Gone = "[taken out]"

// secrets are what no file may have, wherever it comes from.
var secrets = []struct {
	what *regexp.Regexp
	with string
}{
	// A key, with line ends as they are or written as \n in a string.
	{regexp.MustCompile(`(?s)-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?-----END [A-Z0-9 ]*PRIVATE KEY-----`), Gone},
	{regexp.MustCompile(`-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----[^"]*`), Gone},            // one whose end is missing
	{regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/]*UFJJVkFURS[A-Za-z0-9+/=]*`), Gone}, // keys in base64, which depends on where
	{regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/]*BSSVZBVEUg[A-Za-z0-9+/=]*`), Gone}, // "PRIVATE" begins
	{regexp.MustCompile(`LS0tLS1CRUdJTi[A-Za-z0-9+/]*QUklWQVRFI[A-Za-z0-9+/=]*`), Gone},
	{regexp.MustCompile(`eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]*`), Gone}, // a token
	{regexp.MustCompile(`(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}`), "${1}" + Gone},
	{regexp.MustCompile(`([a-z][a-z0-9+.-]*://)[^\s/@:"']+:[^\s/@"']+@`), "${1}" + Gone + "@"}, // a password in an address
}

// Clean takes out of a text what is secret.
func Clean(b []byte) []byte {
	for _, s := range secrets {
		b = s.what.ReplaceAll(b, []byte(s.with))
	}
	return b
}

// secretName are names of settings whose values are not shown.
var secretName = regexp.MustCompile(`(?i)(password|passwd|secret|token|api[-_]?key|private[-_]?key|credential|authorization)`)

// CleanObject takes out of an object what is secret or only of use to the API server.
func CleanObject(o *unstructured.Unstructured) *unstructured.Unstructured {
	o = o.DeepCopy()
	o.SetManagedFields(nil)
	a := o.GetAnnotations()
	maps.DeleteFunc(a, func(k, _ string) bool { return k == "kubectl.kubernetes.io/last-applied-configuration" })
	o.SetAnnotations(a)
	if o.GetKind() == "Secret" && o.GetAPIVersion() == "v1" { // nobody asks for one; should somebody, its names are enough
		for _, field := range []string{"data", "stringData"} {
			m, _, _ := unstructured.NestedMap(o.Object, field)
			for k := range m {
				m[k] = Gone
			}
			if m != nil {
				o.Object[field] = m
			}
		}
	}
	cleanValue(o.Object)
	return o
}

// cleanValue hides the values of settings by their name: of environment variables, and of fields that hold text.
func cleanValue(v any) {
	switch x := v.(type) {
	case map[string]any:
		if name, ok := x["name"].(string); ok && secretName.MatchString(name) {
			if _, ok := x["value"].(string); ok {
				x["value"] = Gone
			}
		}
		for k, y := range x {
			if _, text := y.(string); text && sensitive(k) {
				x[k] = Gone
				continue
			}
			cleanValue(y)
		}
	case []any:
		for _, y := range x {
			cleanValue(y)
		}
	}
}

// sensitive reports whether text of this name is a secret itself, and not the name or the path of one.
func sensitive(field string) bool {
	f := strings.ToLower(field)
	for _, suffix := range []string{"name", "path", "file", "ref", "policy", "type", "version", "uid"} {
		if strings.HasSuffix(f, suffix) {
			return false
		}
	}
	return secretName.MatchString(f)
}

// Archive is a gzipped tar of files below one directory.
type Archive struct {
	dir string
	at  time.Time

	mu    sync.Mutex
	gz    *gzip.Writer
	tar   *tar.Writer
	names map[string]bool
	notes []string
	err   error
}

// New begins an archive.
func New(w io.Writer, dir string, at time.Time) *Archive {
	gz := gzip.NewWriter(w)
	return &Archive{dir: dir, at: at, gz: gz, tar: tar.NewWriter(gz), names: map[string]bool{}}
}

// Add puts a file in, cleaned.
func (a *Archive) Add(name string, b []byte) {
	b = Clean(b)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil || a.names[name] {
		return
	}
	a.names[name] = true
	a.err = a.tar.WriteHeader(&tar.Header{Name: path.Join(a.dir, name), Mode: 0o600, Size: int64(len(b)), ModTime: a.at, Format: tar.FormatPAX})
	if a.err == nil {
		_, a.err = a.tar.Write(b)
	}
}

// AddObjects puts objects in as YAML, cleaned; none is no file.
func (a *Archive) AddObjects(name string, objects []*unstructured.Unstructured) {
	if len(objects) == 0 {
		return
	}
	var out strings.Builder
	for _, o := range objects {
		b, err := yaml.Marshal(CleanObject(o).Object)
		if err != nil {
			a.Missing(name, err)
			continue
		}
		out.WriteString("---\n")
		out.Write(b)
	}
	a.Add(name, []byte(out.String()))
}

// Missing notes what could not be had.
func (a *Archive) Missing(what string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.notes = append(a.notes, fmt.Sprintf("%s: %v", what, err))
}

// Count says how many files there are and how many are missing.
func (a *Archive) Count() (files, missing int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.names), len(a.notes)
}

// Close writes the notes and ends the archive.
func (a *Archive) Close() error {
	if len(a.notes) > 0 {
		slices.Sort(a.notes)
		a.Add("missing.txt", []byte(strings.Join(a.notes, "\n")+"\n"))
	}
	if a.err != nil {
		return a.err
	}
	if err := a.tar.Close(); err != nil {
		return err
	}
	return a.gz.Close()
}

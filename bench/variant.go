package bench

import (
	"bytes"
	"cmp"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"sigs.k8s.io/yaml"
)

//go:embed variants
var builtin embed.FS

// Baseline is the variant that the ratios are to; those of variants on one node are to the same on one node.
const (
	Baseline     = "none"
	baselineNear = "none-same-node"
)

// order is that of the built-in variants in reports; others come after them by name.
var order = []string{baselineNear, "same-node", "same-node-encrypt", Baseline, "cross-node", "waypoint", "envoy-tcp", "envoy-http", "relay", "relay-encrypt"}

// Variant is one way from a client to a server, read from a folder: variant.yaml, and what it refers to.
type Variant struct {
	Name  string `json:"-"` // of the folder
	About string `json:"about"`
	// SameNode puts the server on the client's node.
	SameNode bool `json:"sameNode"`
	// Where the client connects, as templates of Place; empty is the server's own address.
	HTTP string `json:"http"` // "-": only the TCP workloads go through this variant
	TCP  string `json:"tcp"`  // "-": only HTTP does
	// What makes Kubernetes put the pods into the mesh.
	NamespaceLabels map[string]string `json:"namespaceLabels"`
	PodLabels       map[string]string `json:"podLabels"`
	PodAnnotations  map[string]string `json:"podAnnotations"`
	// Annotations that the pods have once they are in.
	Await map[string]string `json:"await"`
	// Whose processor time and memory is the mesh's, besides the sidecar's.
	Proxies Proxies `json:"proxies"`
	// Between are more of them, in pods of the variant's own namespace that its objects bring about: what they do is the mesh's
	// too, and nothing is measured before one is ready. Only Kubernetes has them.
	Between *Proxies `json:"between"`
	Sidecar *Sidecar `json:"sidecar"`
	// Idle says whether a proxy process here may hold 15,000 connections at a time on a machine that gives it
	// 20,000 descriptors: it needs no more than one for each.
	Idle bool `json:"idle"`
	// Rest says that it is measured with many pods that do nothing.
	Rest bool `json:"rest"`

	files map[string]string // by name
}

// Proxies are processes: on Kubernetes those of a container in pods, elsewhere those of a name.
type Proxies struct {
	Namespace string `json:"namespace"`
	Selector  string `json:"selector"`
	Container string `json:"container"`
	Process   string `json:"process"`
}

// Sidecar is a program beside the client and beside the server.
type Sidecar struct {
	Image   string   `json:"image"`   // empty: that of the load program
	Command []string `json:"command"` // templates of Place
	// Files that the command finds in Place.Dir: their names, and by role the template in the folder.
	Files map[string]map[string]string `json:"files"`
	// Certificates: ca.pem, cert.pem and key.pem are in Place.Dir too.
	Certificates bool `json:"certificates"`
}

// Place is what templates may use.
type Place struct {
	Role      string // client or server
	Server    string // address of the server
	Service   string // address of the Service "server", if the variant's objects have one
	Dir       string // where the sidecar finds its files
	Namespace string
}

// Objects are what is to be applied to the namespace.
const objectsFile = "objects.yaml"

// Builtin returns the variants that come with this program.
func Builtin() ([]*Variant, error) {
	dirs, err := fs.ReadDir(builtin, "variants")
	if err != nil {
		return nil, err
	}
	var all []*Variant
	for _, d := range dirs {
		sub, err := fs.Sub(builtin, "variants/"+d.Name())
		if err != nil {
			return nil, err
		}
		v, err := read(d.Name(), sub)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	slices.SortFunc(all, compareVariants)
	return all, nil
}

// baseline is the variant that this one's ratios are to.
func (v *Variant) baseline() string {
	if v.SameNode {
		return baselineNear
	}
	return Baseline
}

func compareVariants(a, b *Variant) int {
	return cmp.Or(cmp.Compare(variantRank(a.Name), variantRank(b.Name)), strings.Compare(a.Name, b.Name))
}

func variantRank(name string) int {
	if i := slices.Index(order, name); i >= 0 {
		return i
	}
	return len(order)
}

// SelectVariants finds variants by name, and adds what they are compared with; no names are all.
func SelectVariants(all []*Variant, names []string) ([]*Variant, error) {
	if len(names) == 0 {
		return all, nil
	}
	var out []*Variant
	add := func(name string) bool {
		i := slices.IndexFunc(all, func(v *Variant) bool { return v.Name == name })
		if i >= 0 && !slices.Contains(out, all[i]) {
			out = append(out, all[i])
		}
		return i >= 0
	}
	for _, n := range names {
		if !add(n) {
			var known []string
			for _, v := range all {
				known = append(known, v.Name)
			}
			return nil, fmt.Errorf("no variant is called %q; there are %s", n, strings.Join(known, ", "))
		}
	}
	for _, v := range slices.Clone(out) {
		add(v.baseline())
	}
	slices.SortFunc(out, compareVariants)
	return out, nil
}

// ReadVariant reads a folder.
func ReadVariant(dir string) (*Variant, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(abs); err != nil {
		return nil, fmt.Errorf("the variant's folder: %w", err)
	}
	return read(filepath.Base(abs), os.DirFS(abs))
}

func read(name string, dir fs.FS) (*Variant, error) {
	v := &Variant{Name: name, files: map[string]string{}}
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, fmt.Errorf("variant %s: %w", name, err)
	}
	for _, e := range entries {
		if e.IsDir() {
			continue
		}
		b, err := fs.ReadFile(dir, e.Name())
		if err != nil {
			return nil, fmt.Errorf("variant %s: %w", name, err)
		}
		v.files[e.Name()] = string(b)
	}
	main, ok := v.files["variant.yaml"]
	if !ok {
		return nil, fmt.Errorf("variant %s: the folder has no variant.yaml", name)
	}
	if err := yaml.UnmarshalStrict([]byte(main), v); err != nil {
		return nil, fmt.Errorf("variant %s: variant.yaml: %w", name, err)
	}
	if err := v.validate(); err != nil {
		return nil, fmt.Errorf("variant %s: %w", name, err)
	}
	return v, nil
}

// validate renders everything once, so that a mistake is found before anything is set up.
func (v *Variant) validate() error {
	if strings.Trim(v.Name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || len(v.Name) > 40 {
		return errors.New("its name may have lower-case letters, digits and dashes, 40 at most")
	}
	if v.About == "" {
		return errors.New("variant.yaml does not say what it is about")
	}
	p := Place{Role: "client", Server: "192.0.2.1", Service: "192.0.2.2", Dir: "/", Namespace: "bench"}
	_, _, err := v.Targets(p)
	if _, e := v.Objects(p); e != nil {
		err = errors.Join(err, e)
	}
	if v.Sidecar == nil {
		return err
	}
	for _, role := range []string{"client", "server"} {
		p.Role = role
		_, e := v.SidecarFiles(p)
		_, c := v.SidecarCommand(p)
		err = errors.Join(err, e, c)
	}
	return err
}

// Targets are where a client connects for HTTP and for the TCP workloads; empty is where those do not go.
func (v *Variant) Targets(p Place) (http, tcp string, err error) {
	if v.HTTP != "-" {
		if http, err = render(cmp.Or(v.HTTP, "{{.Server}}:8080"), p); err != nil {
			return "", "", fmt.Errorf("http: %w", err)
		}
	}
	if v.TCP == "-" {
		return http, "", nil
	}
	if tcp, err = render(cmp.Or(v.TCP, "{{.Server}}:8081"), p); err != nil {
		return "", "", fmt.Errorf("tcp: %w", err)
	}
	return http, tcp, nil
}

// Objects is the manifest that belongs to the variant, or nothing.
func (v *Variant) Objects(p Place) (string, error) { return render(v.files[objectsFile], p) }

// SidecarFiles are the files of one role by name.
func (v *Variant) SidecarFiles(p Place) (map[string]string, error) {
	out := map[string]string{}
	for name, by := range v.Sidecar.Files {
		src, ok := v.files[by[p.Role]]
		if !ok {
			return nil, fmt.Errorf("sidecar file %s of the %s: the folder has no %q", name, p.Role, by[p.Role])
		}
		text, err := render(src, p)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", by[p.Role], err)
		}
		out[name] = text
	}
	return out, nil
}

// SidecarCommand is the command of one role.
func (v *Variant) SidecarCommand(p Place) ([]string, error) {
	if len(v.Sidecar.Command) == 0 {
		return nil, errors.New("the sidecar has no command")
	}
	var out []string
	for _, c := range v.Sidecar.Command {
		s, err := render(c, p)
		if err != nil {
			return nil, fmt.Errorf("command: %w", err)
		}
		out = append(out, s)
	}
	return out, nil
}

func render(text string, p Place) (string, error) {
	t, err := template.New("").Option("missingkey=error").Parse(text)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	err = t.Execute(&b, p)
	return b.String(), err
}

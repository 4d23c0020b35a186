package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// newest names the newest cloud kernel of a series that apt offers, "" if there is none.
func newest(series string) (string, error) {
	pattern := `^linux-image-` + regexp.QuoteMeta(series) + `\.[0-9].*-cloud-amd64$`
	out, err := exec.Command("apt-cache", "search", "--names-only", pattern).Output()
	if err != nil {
		return "", fmt.Errorf("ask apt for kernels: %w", err)
	}
	best := ""
	for line := range strings.Lines(string(out)) {
		if name, _, _ := strings.Cut(line, " "); slices.Compare(numbers(name), numbers(best)) > 0 {
			best = name
		}
	}
	return best, nil
}

// numbers are the numbers in a package name, in order: enough to compare two of one series.
func numbers(name string) (out []int) {
	for _, digits := range regexp.MustCompile(`[0-9]+`).FindAllString(name, -1) {
		n, _ := strconv.Atoi(digits)
		out = append(out, n)
	}
	return out
}

// download fetches a package into a directory, unless it is there.
func download(name, dir string) (string, error) {
	for try := 0; ; try++ {
		found, err := filepath.Glob(filepath.Join(dir, name+"_*.deb"))
		if err != nil || len(found) > 0 {
			return found[len(found)-1], err
		}
		if try > 0 {
			return "", fmt.Errorf("apt downloaded no %s", name)
		}
		cmd := exec.Command("apt-get", "download", "-q", name)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("download %s: %w\n%s", name, err, out)
		}
	}
}

// kernel is what a package holds.
type kernel struct {
	image   []byte
	modules map[string]module // by name, "-" as "_"
}

type module struct {
	name, file string
	body       []byte
}

func readPackage(pkg string) (*kernel, error) {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", pkg)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("open %s: %w", pkg, err)
	}
	k := &kernel{modules: map[string]module{}}
	for r := tar.NewReader(out); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", pkg, err)
		}
		base := path.Base(h.Name)
		name, _, isModule := strings.Cut(base, ".ko")
		if h.Typeflag != tar.TypeReg || !isModule && !strings.HasPrefix(base, "vmlinuz-") {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		if !isModule {
			k.image = b
			continue
		}
		name = strings.ReplaceAll(name, "-", "_")
		k.modules[name] = module{name, base, b}
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("open %s: %w", pkg, err)
	}
	if k.image == nil {
		return nil, fmt.Errorf("%s holds no kernel", pkg)
	}
	return k, nil
}

// closure lists the wanted modules and what they depend on, dependencies first. What is not a module is taken
// to be built in; the tests tell if it is not.
func (k *kernel) closure(want []string) (order []module, err error) {
	done := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		m, ok := k.modules[name]
		if done[name] || !ok {
			return nil
		}
		done[name] = true
		if strings.HasSuffix(m.file, ".xz") {
			cmd := exec.Command("xz", "-dc")
			cmd.Stdin = bytes.NewReader(m.body)
			if m.body, err = cmd.Output(); err != nil {
				return fmt.Errorf("decompress %s: %w", m.file, err)
			}
		}
		needs, err := dependencies(m.body)
		if err != nil {
			return fmt.Errorf("read %s: %w", m.file, err)
		}
		for _, n := range needs {
			if err := visit(n); err != nil {
				return err
			}
		}
		order = append(order, m)
		return nil
	}
	for _, name := range want {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func dependencies(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(info), "\x00") {
		if names, ok := strings.CutPrefix(field, "depends="); ok && names != "" {
			return strings.Split(strings.ReplaceAll(names, "-", "_"), ","), nil
		}
	}
	return nil, nil
}

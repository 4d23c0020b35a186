// Command kernels runs test binaries on other kernels: it takes a Debian kernel package apart, packs the
// modules and the tests into an initramfs, and boots it in QEMU without KVM.
//
//	go run ./test/kernels [-package PATH.deb] [-modules a,b] TEST-BINARY...
//
// Needs dpkg-deb, xz and qemu-system-x86_64. The exit status is that of the tests.
package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	pkg := flag.String("package", "", "Debian kernel package (linux-image-*-cloud-amd64)")
	modules := flag.String("modules", "veth,sch_ingress,cls_bpf,bridge,tcp_diag,nf_tables,nft_chain_nat,nft_nat", "kernel modules to load, with what they depend on")
	guest := flag.String("guest", "", "the static binary of test/kernels/guest")
	timeout := flag.Duration("timeout", 12*time.Minute, "how long the machine may run")
	verbose := flag.Bool("v", false, "print passing tests too")
	flag.Parse()
	if err := run(*pkg, *guest, strings.Split(*modules, ","), flag.Args(), *timeout, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(pkg, guest string, modules, tests []string, timeout time.Duration, verbose bool) error {
	if pkg == "" || guest == "" || len(tests) == 0 {
		return errors.New("want -package, -guest and at least one test binary")
	}
	k, err := readPackage(pkg)
	if err != nil {
		return err
	}
	fs := newInitramfs()
	order, err := k.closure(modules)
	if err != nil {
		return err
	}
	var list []string
	for _, m := range order {
		fs.file("modules/"+m.name, 0o644, m.body)
		list = append(list, m.name)
	}
	fs.file("modules.list", 0o644, []byte(strings.Join(list, "\n")))
	if err := fs.copy("init", guest); err != nil {
		return err
	}
	for _, t := range tests {
		if err := fs.copy("tests/"+filepath.Base(t), t); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp("", "kernels-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	vmlinuz, initrd := filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	if err := errors.Join(os.WriteFile(vmlinuz, k.image, 0o600), os.WriteFile(initrd, fs.end(), 0o600)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return boot(ctx, vmlinuz, initrd, verbose)
}

// boot runs the machine and follows its serial line.
func boot(ctx context.Context, vmlinuz, initrd string, verbose bool) error {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", vmlinuz, "-initrd", initrd,
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the virtual machine: %w", err)
	}
	last := ""
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		if strings.HasPrefix(line, "guest: done") {
			last = line
		}
		if passing := strings.HasPrefix(strings.TrimSpace(line), "--- PASS") || strings.HasPrefix(line, "==="); verbose || !passing {
			fmt.Println(line)
		}
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return errors.New("the virtual machine took too long")
	}
	if last != "guest: done, 0 failed" {
		return fmt.Errorf("tests failed (%q; the machine ended with %v)", last, err)
	}
	return nil
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

// initramfs is a cpio archive in the "newc" format.
type initramfs struct {
	b    bytes.Buffer
	n    int
	dirs map[string]bool
}

func newInitramfs() *initramfs { return &initramfs{dirs: map[string]bool{}} }

func (a *initramfs) entry(name string, mode int, body []byte) {
	a.n++
	fmt.Fprintf(&a.b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.n, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name)+1, 0)
	a.b.WriteString(name)
	a.b.WriteByte(0)
	a.pad()
	a.b.Write(body)
	a.pad()
}

func (a *initramfs) pad() {
	for a.b.Len()%4 != 0 {
		a.b.WriteByte(0)
	}
}

func (a *initramfs) file(name string, mode int, body []byte) {
	const directory, regular = 0o040000, 0o100000
	if dir := path.Dir(name); dir != "." && !a.dirs[dir] {
		a.dirs[dir] = true
		a.entry(dir, directory|0o755, nil)
	}
	a.entry(name, regular|mode, body)
}

func (a *initramfs) copy(name, from string) error {
	b, err := os.ReadFile(from)
	if err == nil {
		a.file(name, 0o755, b)
	}
	return err
}

func (a *initramfs) end() []byte {
	for _, dir := range []string{"dev", "proc", "sys", "tmp"} {
		a.entry(dir, 0o040755, nil)
	}
	a.entry("TRAILER!!!", 0, nil)
	return a.b.Bytes()
}

// Command kernels runs the kernel tests on Debian's kernels: for each it takes the package apart, packs modules
// and static test binaries into an initramfs, and boots that in QEMU without KVM.
//
//	go run ./test/kernels [-series 6.1,6.12] [-package FILE.deb] [-v] [PACKAGE-TO-TEST...]
//	go run ./test/kernels -pack DIR [-series 6.12] NAME=FILE...
//
// The second form boots nothing: it writes vmlinuz and initrd, with the named files in it, into a directory.
//
// Needs apt, dpkg-deb, xz and qemu-system-x86_64. A series that apt does not offer is left out, saying so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// modules that the tests need; what they depend on is added, and what is built in is not missed.
var modules = []string{"veth", "sch_ingress", "cls_bpf", "bridge", "dummy", "tcp_diag", "virtio_pci", "virtio_net"}

func main() {
	series := flag.String("series", "6.1,6.12", "kernel series to test, the newest package of each")
	pkg := flag.String("package", "", "test this kernel package instead")
	timeout := flag.Duration("timeout", time.Hour, "how long one machine may run")
	verbose := flag.Bool("v", false, "print passing tests too")
	packTo := flag.String("pack", "", "write kernel and initramfs into this directory and boot nothing")
	flag.Parse()
	if *packTo != "" {
		if err := packOnly(*packTo, strings.Split(*series, ","), *pkg, flag.Args()); err != nil {
			fmt.Fprintln(os.Stderr, "kernels:", err)
			os.Exit(1)
		}
		return
	}
	tests := flag.Args()
	if len(tests) == 0 {
		tests = []string{"./internal/netns", "./node-agent/datapath"}
	}
	if err := run(strings.Split(*series, ","), *pkg, tests, *timeout, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(series []string, pkg string, tests []string, timeout time.Duration, verbose bool) error {
	packages, err := choose(series, pkg)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kernels-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	guest, binaries, err := build(dir, tests)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range packages {
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		err := testOn(ctx, dir, p, guest, binaries, verbose)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", filepath.Base(p), err))
			continue
		}
		fmt.Printf("kernels: %s ok in %.0f s\n", filepath.Base(p), time.Since(start).Seconds())
	}
	return errors.Join(errs...)
}

// choose finds the packages; what is downloaded is kept in the user's cache.
func choose(series []string, pkg string) ([]string, error) {
	if pkg != "" {
		return []string{pkg}, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	cache = filepath.Join(cache, "warren", "kernels")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	var found []string
	for _, s := range series {
		name, err := newest(s)
		if err != nil {
			return nil, err
		}
		if name == "" {
			fmt.Printf("kernels: apt offers no kernel %s here; left out\n", s)
			continue
		}
		file, err := download(name, cache)
		if err != nil {
			return nil, err
		}
		found = append(found, file)
	}
	if len(found) == 0 {
		return nil, errors.New("no kernel to test on; run apt-get update first")
	}
	return found, nil
}

// build makes static binaries: the guest has no library.
func build(dir string, tests []string) (guest string, binaries []string, err error) {
	guest = filepath.Join(dir, "guest")
	if err := static("build", "-o", guest, "./test/kernels/guest"); err != nil {
		return "", nil, err
	}
	for _, t := range tests {
		out := filepath.Join(dir, path.Base(t)+".test")
		if err := static("test", "-c", "-ldflags=-s -w", "-o", out, t); err != nil {
			return "", nil, err
		}
		binaries = append(binaries, out)
	}
	return guest, binaries, nil
}

func static(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func testOn(ctx context.Context, dir, pkg, guest string, binaries []string, verbose bool) error {
	files := map[string]string{"init": guest}
	for _, b := range binaries {
		files["tests/"+filepath.Base(b)] = b
	}
	vmlinuz, initrd, err := pack(dir, pkg, files)
	if err != nil {
		return err
	}
	return boot(ctx, vmlinuz, initrd, verbose)
}

// packOnly packs the first of the kernels with files that are given as NAME=FILE.
func packOnly(dir string, series []string, pkg string, args []string) error {
	files := map[string]string{}
	for _, a := range args {
		name, file, ok := strings.Cut(a, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=FILE", a)
		}
		files[name] = file
	}
	packages, err := choose(series[:1], pkg)
	if err != nil {
		return err
	}
	_, _, err = pack(dir, packages[0], files)
	return err
}

// pack writes a package's kernel and an initramfs with its modules and the named files.
func pack(dir, pkg string, files map[string]string) (vmlinuz, initrd string, err error) {
	k, err := readPackage(pkg)
	if err != nil {
		return "", "", err
	}
	order, err := k.closure(modules)
	if err != nil {
		return "", "", err
	}
	fs := newInitramfs()
	var list []string
	for _, m := range order {
		fs.file("modules/"+m.name, 0o644, m.body)
		list = append(list, m.name)
	}
	fs.file("modules.list", 0o644, []byte(strings.Join(list, "\n")))
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := fs.copy(name, files[name]); err != nil {
			return "", "", err
		}
	}
	vmlinuz, initrd = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	return vmlinuz, initrd, errors.Join(os.WriteFile(vmlinuz, k.image, 0o600), os.WriteFile(initrd, fs.end(), 0o600))
}

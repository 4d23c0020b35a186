package main

import (
	"bytes"
	"fmt"
	"os"
	"path"
)

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

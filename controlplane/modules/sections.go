package modules

import (
	"encoding/binary"
	"errors"
	"strings"
)

// exports is the section of what a module shows to whoever runs it (WebAssembly Core Specification 1.0, 5.5.10).
const exports = 7

// abi begins the name by which a module says for which proxies it is made (github.com/proxy-wasm/spec).
const abi = "proxy_abi_version_0_"

var (
	errShort = errors.New("it ends before its end, or is no Wasm module")
	errABI   = errors.New("it is not made for proxies: it has no " + abi + "1_0, 2_0 or 2_1")
)

// check reads the sections of a module as far as is needed to tell that all of it is there and that it is made for proxies.
func check(b []byte) error {
	proxy := false
	for len(b) > 0 {
		id := b[0]
		body, rest, ok := counted(b[1:])
		if !ok {
			return errShort
		}
		if id == exports {
			names, ok := exported(body)
			if !ok {
				return errShort
			}
			for _, n := range names {
				proxy = proxy || strings.HasPrefix(n, abi)
			}
		}
		b = rest
	}
	if !proxy {
		return errABI
	}
	return nil
}

// exported are the names in a section of exports.
func exported(b []byte) (names []string, ok bool) {
	n, size := binary.Uvarint(b)
	if size <= 0 {
		return nil, false
	}
	b = b[size:]
	for range n {
		name, rest, ok := counted(b)
		if !ok || len(rest) < 2 {
			return nil, false
		}
		_, size := binary.Uvarint(rest[1:]) // after the kind, which one
		if size <= 0 {
			return nil, false
		}
		names, b = append(names, string(name)), rest[1+size:]
	}
	return names, true
}

// counted takes what is preceded by how many bytes it has.
func counted(b []byte) (body, rest []byte, ok bool) {
	n, size := binary.Uvarint(b)
	if size <= 0 || n > uint64(len(b)-size) {
		return nil, nil, false
	}
	return b[size : size+int(n)], b[size+int(n):], true
}

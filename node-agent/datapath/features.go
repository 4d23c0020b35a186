package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
)

// needed is what the programs cannot do without, oldest kernel last: the error names the newest one missing.
var needed = []struct {
	name, kernel string
	probe        func() error
}{
	{"bpf_redirect_peer", "5.10", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectPeer) }},
	{"BTF (CONFIG_DEBUG_INFO_BTF)", "5.4", func() error {
		if _, err := btf.LoadKernelSpec(); err != nil {
			return ebpf.ErrNotSupported
		}
		return nil
	}},
	{"bpf_sk_storage_get in tc programs", "5.2", func() error {
		return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnSkStorageGet)
	}},
	{"bpf_get_netns_cookie in sock_ops programs", "5.15", func() error {
		return features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie)
	}},
	{"bpf_get_netns_cookie in connect programs", "5.7", func() error {
		return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie)
	}},
	{"BPF_PROG_TYPE_SK_LOOKUP", "5.9", func() error { return features.HaveProgramType(ebpf.SkLookup) }},
	{"BPF_MAP_TYPE_SK_STORAGE", "5.2", func() error { return features.HaveMapType(ebpf.SkStorage) }},
	{"BPF_MAP_TYPE_SOCKMAP", "4.14", func() error { return features.HaveMapType(ebpf.SockMap) }},
	{"BPF atomic operations (v3 instruction set)", "5.12", features.HaveV3ISA},
	{"BPF_PROG_TYPE_CGROUP_SOCK_ADDR", "4.17", func() error { return features.HaveProgramType(ebpf.CGroupSockAddr) }},
}

// explain turns the kernel's refusal into the name of what it lacks, where something is lacking.
func explain(err error) error {
	if err == nil {
		return nil
	}
	for _, n := range needed {
		if p := n.probe(); errors.Is(p, ebpf.ErrNotSupported) {
			return &MissingFeatureError{Feature: n.name, Kernel: n.kernel, Err: err}
		}
	}
	var v *ebpf.VerifierError
	if errors.As(err, &v) {
		return fmt.Errorf("the kernel's verifier refuses a program: %+v", v)
	}
	return err
}

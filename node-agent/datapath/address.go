package datapath

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
)

// kernelAddr is an address as the maps have it: 16 bytes in network order, IPv4 mapped; zero for none.
func kernelAddr(a netip.Addr) (k bpf.MeshAddr) {
	if !a.IsValid() {
		return k
	}
	b := a.As16()
	for i := range k.W {
		k.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return k
}

func goAddr(k bpf.MeshAddr) netip.Addr {
	var b [16]byte
	for i, w := range k.W {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

func addrsOf(p *bpf.MeshPod) (out []netip.Addr) {
	for _, k := range []bpf.MeshAddr{p.V4, p.V6} {
		if k != (bpf.MeshAddr{}) {
			out = append(out, goAddr(k))
		}
	}
	return out
}

// kernelPrefix is a prefix as the trie has it.
func kernelPrefix(p netip.Prefix) bpf.MeshPrefix {
	bits := p.Bits()
	if p.Addr().Is4() {
		bits += 96
	}
	return bpf.MeshPrefix{Bits: uint32(bits), Addr: kernelAddr(p.Masked().Addr())}
}

func goPrefix(k bpf.MeshPrefix) netip.Prefix {
	a, bits := goAddr(k.Addr), int(k.Bits)
	if a.Is4() && bits >= 96 {
		bits -= 96
	}
	return netip.PrefixFrom(a, bits)
}

// sameNetNS reports whether a netns link is attached to the namespace of a descriptor.
func sameNetNS(l link.Link, fd int) (bool, error) {
	info, err := l.Info()
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	n := info.NetNs()
	return n != nil && uint64(n.NetnsInode) == st.Ino, nil
}

// linkDead: what the link was attached to is gone.
func linkDead(err error) bool { return errors.Is(err, unix.ENOLINK) }

// noSocket: a sockmap answers EINVAL for an entry that is empty.
func noSocket(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) }

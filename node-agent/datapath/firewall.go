package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What the node's firewall would do with a packet between two of its pods is for the firewall to know. Known not to
// matter are kube-proxy's rules and those for host ports: they are about Services and ports of the node, which direct
// connections do not go to. Anything else in a chain that such a packet passes is somebody's policy.

// knownTables are nftables tables whose rules are known, whole.
var knownTables = map[string]bool{"kube-proxy": true}

// knownChains are prefixes of chains that a rule may lead to.
var knownChains = []string{"KUBE-", "CNI-HOSTPORT-", "CNI-DN-"}

// Of linux/netfilter.h, linux/netfilter/nf_tables.h and x_tables.h.
const (
	nfInet   = 1
	nfNetdev = 5
	nfBridge = 7

	hookPrerouting  = 0
	hookForward     = 2
	hookPostrouting = 4
	hookIngress     = 5 // of inet

	nftGetChain = 4
	nftGetRule  = 7

	nfDrop = 0

	iptGetInfo = 64 // IPT_SO_GET_INFO, and of IPv6
)

type chain struct {
	family           uint8
	table, name, typ string
	base             bool
	hook             uint32
	devices          []string
	drops            bool // its policy
}

func (c *chain) String() string {
	family := map[uint8]string{unix.AF_INET: "ip", unix.AF_INET6: "ip6", nfInet: "inet", nfNetdev: "netdev", nfBridge: "bridge"}[c.family]
	return fmt.Sprintf("chain %s of nftables table %s %s", c.name, family, c.table)
}

// passed reports whether a packet from pod to pod goes through it.
func (c *chain) passed() bool {
	if !c.base || knownTables[c.table] {
		return false
	}
	switch c.family {
	case unix.AF_INET, unix.AF_INET6, nfInet:
		if c.typ == "nat" {
			return c.hook == hookPrerouting // source addresses are nobody's policy
		}
		return c.hook == hookPrerouting || c.hook == hookForward || c.hook == hookPostrouting
	case nfBridge:
		return c.hook == hookPrerouting || c.hook == hookForward || c.hook == hookPostrouting
	}
	return false
}

// unknownEngine runs in the node's namespace. It names a chain with rules that nobody knows, and the interfaces that
// have chains of their own.
func unknownEngine(proc string) (engine string, hooked map[string]bool, err error) {
	chains, err := listChains()
	if err != nil {
		return "", nil, err
	}
	hooked = map[string]bool{}
	for i := range chains {
		c := &chains[i]
		for _, dev := range c.devices {
			hooked[dev] = true
		}
		if engine != "" || !c.passed() {
			continue
		}
		if c.drops {
			engine = c.String() + " drops what no rule accepts"
			continue
		}
		known, err := knownRules(c)
		if err != nil {
			return "", nil, err
		}
		if !known {
			engine = c.String()
		}
	}
	if engine == "" {
		engine, err = legacyTables(proc)
	}
	return engine, hooked, err
}

func nftRequest(typ int, family uint8, attrs ...*nl.RtAttr) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|typ, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: unix.NFNETLINK_V0})
	for _, a := range attrs {
		req.AddData(a)
	}
	return req.Execute(unix.NETLINK_NETFILTER, 0)
}

func listChains() ([]chain, error) {
	msgs, err := nftRequest(nftGetChain, unix.AF_UNSPEC)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) { // no netfilter, no nftables in this kernel
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the firewall's chains: %w", err)
	}
	var out []chain
	for _, m := range msgs {
		if len(m) < 4 {
			continue
		}
		c := chain{family: m[0]}
		attrs, err := nl.ParseRouteAttr(m[4:])
		if err != nil {
			return nil, fmt.Errorf("list the firewall's chains: %w", err)
		}
		for _, a := range attrs {
			switch a.Attr.Type &^ unix.NLA_F_NESTED {
			case 1:
				c.table = zstring(a.Value)
			case 3:
				c.name = zstring(a.Value)
			case 4:
				c.base = true
				if err := c.parseHook(a.Value); err != nil {
					return nil, err
				}
			case 5:
				c.drops = len(a.Value) >= 4 && binary.BigEndian.Uint32(a.Value) == nfDrop
			case 7:
				c.typ = zstring(a.Value)
			}
		}
		out = append(out, c)
	}
	return out, nil
}

func (c *chain) parseHook(b []byte) error {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return fmt.Errorf("the hook of %s: %w", c, err)
	}
	for _, a := range attrs {
		switch a.Attr.Type &^ unix.NLA_F_NESTED {
		case 1:
			if len(a.Value) >= 4 {
				c.hook = binary.BigEndian.Uint32(a.Value)
			}
		case 3:
			c.devices = append(c.devices, zstring(a.Value))
		case 4:
			devices, err := nl.ParseRouteAttr(a.Value)
			if err != nil {
				return fmt.Errorf("the devices of %s: %w", c, err)
			}
			for _, d := range devices {
				c.devices = append(c.devices, zstring(d.Value))
			}
		}
	}
	return nil
}

// knownRules reports whether every rule of a chain leads to a known chain, and nowhere else.
func knownRules(c *chain) (bool, error) {
	msgs, err := nftRequest(nftGetRule, c.family, nl.NewRtAttr(1, nl.ZeroTerminated(c.table)), nl.NewRtAttr(2, nl.ZeroTerminated(c.name)))
	if err != nil {
		return false, fmt.Errorf("list the rules of %s: %w", c, err)
	}
	for _, m := range msgs {
		if len(m) < 4 {
			return false, nil
		}
		attrs, err := nl.ParseRouteAttr(m[4:])
		if err != nil {
			return false, fmt.Errorf("list the rules of %s: %w", c, err)
		}
		var table, name string
		known := false
		for _, a := range attrs {
			switch a.Attr.Type &^ unix.NLA_F_NESTED {
			case 1:
				table = zstring(a.Value)
			case 2:
				name = zstring(a.Value)
			case 4:
				known = leadsToKnown(a.Value)
			}
		}
		if table == c.table && name == c.name && !known { // an older kernel dumps more than was asked for
			return false, nil
		}
	}
	return true, nil
}

// leadsToKnown reads the expressions of a rule: conditions, counters, and at the end a jump.
func leadsToKnown(b []byte) bool {
	list, err := nl.ParseRouteAttr(b)
	if err != nil {
		return false
	}
	known := false
	for _, e := range list {
		var name string
		var data []byte
		attrs, err := nl.ParseRouteAttr(e.Value)
		if err != nil {
			return false
		}
		for _, a := range attrs {
			switch a.Attr.Type &^ unix.NLA_F_NESTED {
			case 1:
				name = zstring(a.Value)
			case 2:
				data = a.Value
			}
		}
		switch name {
		case "immediate":
			target := attrAt(data, 2, 2, 2) // data, verdict, chain
			for _, prefix := range knownChains {
				known = known || target != nil && strings.HasPrefix(zstring(target), prefix)
			}
			if !known {
				return false
			}
		case "match", "counter", "meta", "cmp", "payload", "bitwise", "ct", "fib", "lookup", "range":
		default: // a target of iptables, or what may do anything
			return false
		}
	}
	return known
}

func attrAt(b []byte, path ...uint16) []byte {
	for _, want := range path {
		attrs, err := nl.ParseRouteAttr(b)
		if err != nil {
			return nil
		}
		b = nil
		for _, a := range attrs {
			if a.Attr.Type&^unix.NLA_F_NESTED == want {
				b = a.Value
			}
		}
	}
	return b
}

func zstring(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

// iptInfo is struct ipt_getinfo, and ip6t_getinfo.
type iptInfo struct {
	name       [32]byte
	validHooks uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	numEntries uint32
	size       uint32
}

// legacyTables names a table of the older iptables that has rules; whose they are it does not look into.
func legacyTables(proc string) (string, error) {
	for _, f := range []struct {
		file          string
		family, level int
	}{{"ip_tables_names", unix.AF_INET, unix.SOL_IP}, {"ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6}} {
		b, err := os.ReadFile(filepath.Join(proc, "thread-self/net", f.file))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("list the tables of iptables: %w", err)
		}
		for _, table := range strings.Fields(string(b)) {
			n, hooks, err := legacyRules(f.family, f.level, table)
			if err != nil {
				return "", err
			}
			if n > hooks+1 { // a policy per hook, and the end
				return fmt.Sprintf("table %s of iptables (legacy) has rules", table), nil
			}
		}
	}
	return "", nil
}

func legacyRules(family, level int, table string) (entries, hooks int, err error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, 0, fmt.Errorf("ask for the rules of iptables: %w", err)
	}
	defer unix.Close(fd)
	var info iptInfo
	copy(info.name[:], table)
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), iptGetInfo, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno == unix.ENOENT || errno == unix.ENOPROTOOPT {
		return 0, 0, nil
	}
	if errno != 0 {
		return 0, 0, fmt.Errorf("ask for the rules of table %s of iptables: %w", table, errno)
	}
	for h := range 5 {
		if info.validHooks&(1<<h) != 0 {
			hooks++
		}
	}
	return int(info.numEntries), hooks, nil
}

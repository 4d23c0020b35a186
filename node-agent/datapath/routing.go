package datapath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A pod's namespace gets, per family,
//
//	ip rule add pref 1337 fwmark 0x539/0xfff lookup 1337
//	ip route add local default dev eth0 src POD-IP table 1337
//
// and four sysctls. The route is on eth0, not lo: local delivery goes over lo either way, and so it also holds
// for a socket that is bound to eth0 (SO_BINDTODEVICE), which a route on lo would not match. src: without it a
// local route takes the destination for the source. The rule comes after the local table, so that the pod's
// own addresses stay what they are.
//
// tcp_fwmark_accept hands the mark of the agent's SYN to the socket that the application accepts, so that its
// answers stay in the pod. fwmark_reflect does the same for answers that have no socket: without it the RST of
// a closed port leaves for the real client, and the agent's dial times out instead of being refused.
//
// tcp_tw_reuse lets the inbound leg have a client's port again that it had less than a minute ago: the client has
// it from its own kernel, which is done with it a little before the agent's socket is.
var sysctls = []struct {
	family  int // 0: both
	path    string
	on, off string
}{
	{0, "net/ipv4/tcp_fwmark_accept", "1", "0"},
	{netlink.FAMILY_V4, "net/ipv4/fwmark_reflect", "1", "0"},
	{netlink.FAMILY_V6, "net/ipv6/fwmark_reflect", "1", "0"},
	{0, "net/ipv4/tcp_tw_reuse", "1", "2"},
}

// families calls f for each family the pod has, with the route's source.
func (w wiring) families(f func(family int, src netip.Addr) error) error {
	if w.v4.IsValid() {
		if err := f(netlink.FAMILY_V4, w.v4); err != nil {
			return err
		}
	}
	if w.v6.IsValid() {
		return f(netlink.FAMILY_V6, w.v6)
	}
	return nil
}

// setRouting runs in the pod's namespace. While nothing is marked none of it has an effect.
func (d *Datapath) setRouting(w wiring) error {
	for _, s := range sysctls {
		if s.family != 0 && !w.has(s.family) {
			continue
		}
		if err := writeSysctl(d.cfg.Proc, s.path, s.on); err != nil {
			return err
		}
	}
	return w.families(func(family int, src netip.Addr) error {
		if err := netlink.RouteReplace(localRoute(family, w.podIndex, src)); err != nil {
			return fmt.Errorf("add the local route for marked packets: %w", err)
		}
		rules, err := netlink.RuleListFiltered(family, markRule(family), thisRule)
		if err != nil {
			return fmt.Errorf("list rules: %w", err)
		}
		if len(rules) > 0 {
			return nil
		}
		if err := netlink.RuleAdd(markRule(family)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add the rule for marked packets: %w", err)
		}
		return nil
	})
}

// routingProblems runs in the pod's namespace.
func routingProblems(w wiring) (problems []string) {
	err := w.families(func(family int, src netip.Addr) error {
		rules, err := netlink.RuleListFiltered(family, markRule(family), thisRule)
		if err != nil {
			return err
		}
		if len(rules) == 0 {
			problems = append(problems, fmt.Sprintf("the rule for marked packets is missing (%s)", familyName(family)))
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: Table, Type: unix.RTN_LOCAL},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if have, _ := netip.AddrFromSlice(r.Src); r.LinkIndex == w.podIndex && have.Unmap() == src {
				return nil
			}
		}
		problems = append(problems, fmt.Sprintf("the local route is missing (%s)", familyName(family)))
		return nil
	})
	if err != nil {
		problems = append(problems, "routing cannot be read: "+err.Error())
	}
	return problems
}

// clearRouting runs in the pod's namespace and leaves it as it was before capture.
func clearRouting(proc string) error {
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleListFiltered(family, markRule(family), netlink.RT_FILTER_MARK|netlink.RT_FILTER_TABLE)
		if err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("list rules: %w", err))
		}
		for _, r := range rules {
			r.Family = family
			if err := netlink.RuleDel(&r); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("delete the rule for marked packets: %w", err))
			}
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: Table}, netlink.RT_FILTER_TABLE)
		if err != nil {
			errs = append(errs, err)
		}
		for _, r := range routes {
			if err := netlink.RouteDel(&r); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("delete the local route: %w", err))
			}
		}
	}
	for _, s := range sysctls {
		if err := writeSysctl(proc, s.path, s.off); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EAFNOSUPPORT)
}

func markRule(family int) *netlink.Rule {
	mask := uint32(markMask)
	r := netlink.NewRule()
	r.Family = family
	r.Priority = Table
	r.Mark = Mark
	r.Mask = &mask
	r.Table = Table
	return r
}

// thisRule is what tells markRule from others, such as that of an earlier version, which has no mask.
const thisRule = netlink.RT_FILTER_MARK | netlink.RT_FILTER_MASK | netlink.RT_FILTER_TABLE

func localRoute(family, index int, src netip.Addr) *netlink.Route {
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if family == netlink.FAMILY_V6 {
		all = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &netlink.Route{
		Family: family, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: Table,
		Dst: all, LinkIndex: index, Src: src.AsSlice(),
	}
}

func (w wiring) has(family int) bool {
	if family == netlink.FAMILY_V4 {
		return w.v4.IsValid()
	}
	return w.v6.IsValid()
}

func familyName(family int) string {
	if family == netlink.FAMILY_V4 {
		return "IPv4"
	}
	return "IPv6"
}

// writeSysctl writes below proc/sys; net/ there is the calling thread's namespace, whichever proc it is.
func writeSysctl(proc, path, value string) error {
	if err := os.WriteFile(filepath.Join(proc, "sys", path), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s: %w", path, err)
	}
	return nil
}

package fetch

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"
)

// forbidden are addresses that are nobody's who serves others: this machine, its neighbours on the link, and where clouds tell a machine
// its secrets. Private networks are not among them: what is fetched is
// served in clusters, too.
var forbidden = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("192.0.0.0/24"),                                                  // of protocols; Oracle's metadata
	netip.MustParsePrefix("224.0.0.0/3"),                                                   // multicast, reserved, broadcast
	netip.MustParsePrefix("100.100.100.200/32"), netip.MustParsePrefix("168.63.129.16/32"), // metadata at Alibaba and Azure
	netip.MustParsePrefix("::/127"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("fec0::/10"), netip.MustParsePrefix("ff00::/8"),
	netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2001::/32"), // local NAT64 and Teredo, which mean IPv4 addresses too
	netip.MustParsePrefix("fd00:ec2::/32"), netip.MustParsePrefix("fd20:ce::254/128"), // metadata at AWS and Google
}

// embedding are the prefixes of IPv6 addresses that mean an IPv4 one, and at which byte that begins.
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12}, // NAT64
	{netip.MustParsePrefix("::/96"), 12},        // IPv4-compatible
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12},
	{netip.MustParsePrefix("2002::/16"), 2}, // 6to4
}

// Judge refuses an address that must not be called.
func Judge(a netip.Addr) error {
	a = a.WithZone("").Unmap()
	for _, e := range embedding {
		if e.prefix.Contains(a) {
			b := a.As16()
			if err := Judge(netip.AddrFrom4([4]byte(b[e.at : e.at+4]))); err != nil {
				return err
			}
		}
	}
	if slices.ContainsFunc(forbidden, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return fmt.Errorf("%w: %s", errForbidden, a)
	}
	return nil
}

var errForbidden = errors.New("its address is loopback, link-local, of a cloud's metadata or of no host, and is not called")

// Dialer connects to hosts whose addresses may be called.
type Dialer struct {
	Lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	Dial   func(ctx context.Context, network, address string) (net.Conn, error)
}

// NewDialer asks the system's resolver, and connects within 5 s.
func NewDialer() Dialer {
	d := net.Dialer{Timeout: 5 * time.Second}
	return Dialer{
		Lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		Dial: d.DialContext,
	}
}

// DialContext resolves the host once. A name that has one forbidden address is not called at any: it may be about to
// have others.
func (d Dialer) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addrs := []netip.Addr{}
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = append(addrs, a)
	} else if addrs, err = d.Lookup(ctx, host); err != nil {
		return nil, fmt.Errorf("resolve %s: %w", host, err)
	}
	for _, a := range addrs {
		if err := Judge(a); err != nil {
			return nil, fmt.Errorf("%s: %w", host, err)
		}
	}
	err = fmt.Errorf("%s has no address", host)
	for _, a := range addrs {
		var c net.Conn
		if c, err = d.Dial(ctx, "tcp", net.JoinHostPort(a.Unmap().String(), port)); err == nil {
			return c, nil
		}
	}
	return nil, err
}

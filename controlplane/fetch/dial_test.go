package fetch

import (
	"net/netip"
	"testing"
)

func TestJudge(t *testing.T) {
	for _, a := range []string{"127.0.0.1", "127.9.9.9", "::1", "::", "0.0.0.0", "169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:127.0.0.1",
		"::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192",
		"224.0.0.1", "255.255.255.255", "ff02::1", "::127.0.0.1", "64:ff9b:1::7f00:1", "2001::1"} {
		if Judge(netip.MustParseAddr(a)) == nil {
			t.Errorf("%s may be called", a)
		}
	}
	for _, a := range []string{"10.96.0.1", "192.168.1.1", "8.8.8.8", "2606:4700::1", "fd12::1", "64:ff9b::808:808"} {
		if err := Judge(netip.MustParseAddr(a)); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
}

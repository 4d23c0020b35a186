package lab

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/warrenmesh/warren/test/cluster"
)

// describe prints a frame's addresses for a failure message.
func describe(f cluster.Frame) string {
	src, dst, payload := tcp(f.Data)
	var from, to netip.Addr
	switch p := f.Data[14:]; binary.BigEndian.Uint16(f.Data[12:]) {
	case 0x0800:
		from, _ = netip.AddrFromSlice(p[12:16])
		to, _ = netip.AddrFromSlice(p[16:20])
	case 0x86dd:
		from, _ = netip.AddrFromSlice(p[8:24])
		to, _ = netip.AddrFromSlice(p[24:40])
	}
	return fmt.Sprintf("%s at %s: %s > %s, %d bytes", f.Node, f.Time.Format("15:04:05.000"),
		netip.AddrPortFrom(from, src), netip.AddrPortFrom(to, dst), len(payload))
}

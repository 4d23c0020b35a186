package lab

import (
	"testing"

	"github.com/warrenmesh/warren/test/cluster"
)

func TestParseMetrics(t *testing.T) {
	page := "# HELP a b\nplain 3\nx_total{a=\"1\",b=\"with \\\"quotes\\\", comma\"} 4.5 1700000000\nx_total{a=\"2\",b=\"\"} 1\n"
	got, err := parseMetrics(page)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0].Name != "plain" || got[1].Labels["b"] != `with "quotes", comma` {
		t.Errorf("got %+v", got)
	}
	if s := Sum(got, "x_total", map[string]string{"a": "1"}); s != 4.5 {
		t.Errorf("sum of a=1 is %v", s)
	}
}

func TestWireCounts(t *testing.T) {
	// Ethernet, IPv4 10.0.0.1 > 10.0.0.2, TCP 40000 > 15008, payload "x".
	frame := make([]byte, 14)
	frame[12] = 8
	ip := make([]byte, 20)
	ip[0], ip[3], ip[9] = 0x45, 20+20+1, 6
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	seg := make([]byte, 20)
	seg[0], seg[1], seg[2], seg[3], seg[12] = 0x9c, 0x40, 0x3a, 0xa0, 5<<4
	frame = append(append(append(frame, ip...), seg...), 'x')
	var w Wire
	w.count(cluster.Frame{Data: frame})
	if w.TCP != 1 || w.Tunnel != 1 || w.Clear != 0 {
		t.Errorf("a tunnel frame counts as %+v", w)
	}
	clear := append(append([]byte{}, frame[:54]...), Marker...)
	clear[17] = byte(40 + len(Marker))
	w.count(cluster.Frame{Data: clear})
	if w.Clear != 1 || w.Sample == "" {
		t.Errorf("a clear frame counts as %+v", w)
	}
	// Ethernet pads short frames: an ACK with padding has no payload.
	ack := append(append([]byte{}, frame[:54]...), make([]byte, 6)...)
	ack[17] = 40
	before := w.TCP
	w.count(cluster.Frame{Data: ack})
	if w.TCP != before {
		t.Error("padding was taken for payload")
	}
}

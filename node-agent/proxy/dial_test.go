package proxy

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/netns"
)

// A client that is cut off and tried again has the port that it had: the leg of its first attempt may not have ended.
func TestTheClientsPortIsWaitedFor(t *testing.T) {
	l := newLab(t)
	cat := l.pods["catalog-1"]
	cat.listen(appPort, cat.greet)
	conn := func(s *netns.Sock, err error) (*net.TCPConn, error) {
		check(t, err)
		return s.TCPConn()
	}
	client, app := netip.AddrPortFrom(l.pods["ui"].v4, 41000), netip.AddrPortFrom(cat.v4, appPort)
	first, err := conn(cat.node.dp.DialInbound(context.Background(), cat.ns, client, app))
	check(t, err)
	time.AfterFunc(60*time.Millisecond, func() { abort(first) })
	second, err := conn(cat.node.dp.DialInbound(context.Background(), cat.ns, client, app))
	check(t, err)
	defer second.Close()
	_, _, remote, err := seen(second)
	check(t, err)
	if remote != client {
		t.Errorf("the application sees %s, want %s", remote, client)
	}
	// One that does not end does not hold the next up for long.
	third, err := conn(cat.node.dp.DialInbound(context.Background(), cat.ns, client, app))
	check(t, err)
	defer third.Close()
	if _, _, remote, err := seen(third); err != nil || remote.Addr() != client.Addr() || remote.Port() == client.Port() {
		t.Errorf("beside one that stays open the application sees %s: %v", remote, err)
	}
}

package enroll

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
	"github.com/warrenmesh/warren/node-agent/holder"
)

var shopEnrolled = map[string]bool{"shop": true, "other": false}

func TestARunningPodIsCapturedWithoutRestart(t *testing.T) {
	l := newLab(t)
	n := l.start()
	d, h, path := l.pod(1)
	l.process(100, d, path)
	began := time.Now()
	n.SetPods([]LocalPod{d}, true)
	l.becomes(n, d.UID, Enabled)
	took := time.Since(began)
	t.Logf("captured in %v", took)
	if !l.plumber.has(d.UID) || !l.served.has(d.UID) {
		t.Fatal("enabled, but not in the kernel or not served")
	}
	if u := l.holder.Usage(); u.Items != 1 || u.Files != 4 {
		t.Fatalf("the holder has %+v", u)
	}
	for _, port := range []int{15001, 15006, 15008} {
		c, err := dial(t, h, fmt.Sprintf("10.77.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := io.ReadAll(c); string(b) != d.Name {
			t.Errorf("port %d answered %q", port, b)
		}
		c.Close()
	}
}

// A pod that is about to be captured is no warning to anybody.
func TestPodsThatHaveNotBeenTriedHaveNothingWrong(t *testing.T) {
	l := newLab(t)
	var mu sync.Mutex
	var said []PodStatus
	n := l.start(func(c *Config) {
		c.Report = func(s []PodStatus) { mu.Lock(); defer mu.Unlock(); said = append(said, s...) }
	})
	d, _, path := l.pod(1)
	l.process(100, d, path)
	created, _, _ := l.pod(2) // its sandbox is being made
	n.SetPods([]LocalPod{d, created}, true)
	l.becomes(n, d.UID, Enabled)
	if s := l.becomes(n, created.UID, Pending); s.Reason != "" {
		t.Errorf("a pod that waits for its CNI ADD: %+v", s)
	}
	l.eventually("both are reported", func() bool { mu.Lock(); defer mu.Unlock(); return len(said) > 1 })
	mu.Lock()
	defer mu.Unlock()
	for _, s := range said {
		if s.Reason != "" {
			t.Errorf("reported: %+v", s)
		}
	}
}

func TestPodsThatAreNotToBeCapturedAreLeftAlone(t *testing.T) {
	l := newLab(t)
	n := l.start()
	out, _, path := l.pod(1)
	out.Enrolled, out.Reason = false, "opted out"
	l.process(100, out, path)
	host, _, _ := l.pod(2)
	l.process(101, host, "/proc/self/ns/net")
	declared, _, path3 := l.pod(3)
	declared.HostNetwork = true
	l.process(102, declared, path3)
	n.SetPods([]LocalPod{out, host, declared}, true)

	if s := l.becomes(n, out.UID, Disabled); s.Reason != "opted out" {
		t.Errorf("%+v", s)
	}
	if s := l.becomes(n, declared.UID, Disabled); s.Reason != errHostNetwork.Error() {
		t.Errorf("%+v", s)
	}
	l.eventually("a pod found in the node's namespace says so", func() bool { return n.status(host.UID).Reason == errHostNetwork.Error() })
	if len(l.plumber.enrolled) != 0 {
		t.Errorf("captured %v", l.plumber.enrolled)
	}
}

func TestANewPodIsCapturedBeforeItStarts(t *testing.T) {
	l := newLab(t)
	n := l.start()
	if err := n.SetNamespaces(shopEnrolled); err != nil {
		t.Fatal(err)
	}
	d, _, path := l.pod(1)
	n.SetPods([]LocalPod{d}, true)
	began := time.Now()
	resp, err := add(n, d, path, "sandbox1")
	if err != nil || !resp.Captured {
		t.Fatalf("%+v, %v", resp, err)
	}
	t.Logf("ADD took %v", time.Since(began))
	if !l.plumber.has(d.UID) {
		t.Fatal("ADD answered before capture was on")
	}
	// containerd asks again about an old sandbox when the pod has a new one.
	del(t, n, d, path, "sandbox0")
	if !l.plumber.has(d.UID) {
		t.Fatal("a DEL of another sandbox ended capture")
	}
	del(t, n, d, path, "sandbox1")
	if l.plumber.has(d.UID) || l.served.has(d.UID) || l.holder.Usage().Items != 0 {
		t.Fatal("something is left after DEL")
	}
	del(t, n, d, path, "sandbox1")
}

// A pod's network goes with the answer to DEL: before it, those at the other end of connections hear that they have ended.
func TestADELWaitsForConnectionsToEnd(t *testing.T) {
	l := newLab(t)
	l.served.hold = make(chan struct{})
	n := l.start()
	if err := n.SetNamespaces(shopEnrolled); err != nil {
		t.Fatal(err)
	}
	d, _, path := l.pod(1)
	n.SetPods([]LocalPod{d}, true)
	if resp, err := add(n, d, path, "sandbox1"); err != nil || !resp.Captured {
		t.Fatalf("%+v, %v", resp, err)
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		del(t, n, d, path, "sandbox1")
	}()
	l.eventually("the pod is served no more", func() bool { return !l.served.has(d.UID) })
	select {
	case <-answered:
		t.Error("DEL was answered while connections were open")
	case <-time.After(delWait / 10):
	}
	close(l.served.hold)
	<-answered
}

// What does not end before a pod's network goes is reset, so that those at its other end hear of it.
func TestADELLeavesNoConnectionOpen(t *testing.T) {
	l := newLab(t)
	n := l.start()
	if err := n.SetNamespaces(shopEnrolled); err != nil {
		t.Fatal(err)
	}
	d, ns, path := l.pod(1)
	n.SetPods([]LocalPod{d}, true)
	if resp, err := add(n, d, path, "sandbox1"); err != nil || !resp.Captured {
		t.Fatalf("%+v, %v", resp, err)
	}
	ln := listen(t, ns, netip.AddrPortFrom(d.Addrs[0], 9000))
	var stays, goes net.Conn
	if err := ns.Do(func() (err error) {
		if stays, err = net.Dial("tcp", ln.Addr().String()); err == nil {
			goes, err = net.Dial("tcp", ln.Addr().String())
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer stays.Close()
	for range 2 {
		served, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer served.Close()
	}
	goes.Close() // its other end has heard, and has not closed
	del(t, n, d, path, "sandbox1")
	if err := stays.SetReadDeadline(time.Now().Add(plenty)); err != nil {
		t.Fatal(err)
	}
	// Both ends are in the namespace here, and one of them is told by the other (sock_diag(7), SOCK_DESTROY).
	if _, err := stays.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("a connection of a pod that is gone: %v, want a reset", err)
	}
}

func TestAPodOfAnEnrolledNamespaceWaitsUntilItIsKnown(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	n.SetPods(nil, true)
	d, _, path := l.pod(1)
	_, err := add(n, d, path, "c")
	if err == nil || !strings.Contains(err.Error(), "pods of namespace shop are enrolled") {
		t.Fatalf("got %v", err)
	}
	time.AfterFunc(100*time.Millisecond, func() { n.SetPods([]LocalPod{d}, true) })
	resp, err := add(n, d, path, "c")
	if err != nil || !resp.Captured {
		t.Fatalf("%+v, %v", resp, err)
	}
	other := LocalPod{UID: "x", Namespace: "other", Name: "p"}
	if resp, err := add(n, other, path, "d"); err != nil || resp.Captured {
		t.Fatalf("pod of a namespace that is not enrolled: %+v, %v", resp, err)
	}
}

func TestNobodyStartsWhileNothingIsKnown(t *testing.T) {
	l := newLab(t)
	n := l.start()
	for ns, starts := range map[string]bool{"shop": false, "istio-system": true, "kube-system": true} {
		_, err := add(n, LocalPod{UID: "u", Namespace: ns, Name: "p"}, "/nowhere", "c")
		if (err == nil) != starts {
			t.Errorf("namespace %s: %v", ns, err)
		}
	}
	if n.Ready() == nil {
		t.Error("ready without knowing anything")
	}
	n.SetNamespaces(nil)
	if _, err := add(n, LocalPod{UID: "u", Namespace: "shop", Name: "p"}, "/nowhere", "c"); err != nil {
		t.Errorf("nothing is enrolled: %v", err)
	}
	if err := n.Ready(); err != nil {
		t.Error(err)
	}
}

// The heart of it: the agent is gone, a client connects, and the next agent answers.
func TestTheNextAgentAnswersConnectionsThatWaited(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	d, h, path := l.pod(1)
	l.process(100, d, path)
	n.SetPods([]LocalPod{d}, true)
	l.becomes(n, d.UID, Enabled)
	n.stop()

	const clients = 100
	var failed atomic.Int64
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			c, err := dial(t, h, "10.77.0.1:15001")
			if err != nil {
				failed.Add(1)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(plenty))
			if b, err := io.ReadAll(c); err != nil || string(b) != d.Name {
				failed.Add(1)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	n = l.start() // the control plane is away
	wg.Wait()
	if failed.Load() != 0 {
		t.Errorf("%d of %d connections failed over the restart", failed.Load(), clients)
	}
	s := l.becomes(n, d.UID, Enabled)
	if s.OpenConnections != 0 {
		t.Errorf("captured connections count as open before enrolment: %+v", s)
	}
	if _, err := add(n, LocalPod{UID: "u", Namespace: "shop", Name: "p"}, path, "c"); err == nil {
		t.Error("the restarted agent has forgotten that the namespace is enrolled")
	}
}

func TestPodsThatWentWhileTheAgentWasAwayAreCleanedUp(t *testing.T) {
	l := newLab(t)
	n := l.start()
	gone, _, path1 := l.pod(1)
	stays, _, path2 := l.pod(2)
	l.process(100, gone, path1)
	l.process(101, stays, path2)
	n.SetPods([]LocalPod{gone, stays}, true)
	l.becomes(n, gone.UID, Enabled)
	l.becomes(n, stays.UID, Enabled)
	n.stop()

	os.RemoveAll(l.proc + "/100")
	l.plumber.Enroll(datapath.Pod{UID: "left by an agent whose holder died"})
	n = l.start()
	n.goneAfter = 50 * time.Millisecond
	l.becomes(n, stays.UID, Enabled)
	time.Sleep(250 * time.Millisecond)
	if !l.plumber.has(gone.UID) || !l.plumber.has("left by an agent whose holder died") {
		t.Fatal("capture ended before the control plane has said a word")
	}
	n.SetPods([]LocalPod{stays}, true)
	l.eventually("what is gone is cleaned up", func() bool {
		return !l.plumber.has(gone.UID) && !l.served.has(gone.UID) && !l.plumber.has("left by an agent whose holder died") && l.holder.Usage().Items == 1
	})
	// A control plane that lost its state says that there are no pods.
	n.SetPods(nil, true)
	time.Sleep(300 * time.Millisecond)
	if !l.plumber.has(stays.UID) {
		t.Fatal("a pod with processes was let go of because its record vanished")
	}
}

func TestALabelRemovedEndsCaptureAndServesTheLatecomers(t *testing.T) {
	l := newLab(t)
	n := l.start(func(c *Config) { c.Linger = 3 * time.Second })
	d, h, path := l.pod(1)
	l.process(100, d, path)
	n.SetPods([]LocalPod{d}, true)
	l.becomes(n, d.UID, Enabled)
	out := d
	out.Enrolled, out.Reason = false, "namespace not enrolled"
	n.SetPods([]LocalPod{out}, true)
	if s := l.becomes(n, d.UID, Disabled); s.Reason != out.Reason {
		t.Errorf("%+v", s)
	}
	if l.plumber.has(d.UID) {
		t.Fatal("disabled but captured")
	}
	c, err := dial(t, h, "10.77.0.1:15008")
	if err != nil {
		t.Fatalf("a peer that has not heard yet is refused: %v", err)
	}
	c.Close()
	n.SetPods([]LocalPod{d}, true)
	l.becomes(n, d.UID, Enabled)
	n.SetPods([]LocalPod{out}, true)
	l.eventually("all is gone", func() bool { return !l.served.has(d.UID) && l.holder.Usage().Items == 0 })
	if c, err := dial(t, h, "10.77.0.1:15008"); err == nil {
		c.Close()
		t.Error("still listening")
	}
}

func TestWhatCannotBeCapturedIsPendingWithItsReason(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	l.plumber.set(&datapath.UnsupportedError{UID: "u", Reason: datapath.NoVeth, Detail: "eth0 is an ipvlan"})
	running, _, path1 := l.pod(1)
	l.process(100, running, path1)
	fresh, _, path2 := l.pod(2)
	n.SetPods([]LocalPod{running, fresh}, true)
	l.eventually("the reason is told", func() bool { return strings.Contains(n.status(running.UID).Reason, "NoVeth") })
	if resp, err := add(n, fresh, path2, "c"); err != nil || resp.Captured || resp.Why != "NoVeth" {
		t.Errorf("%+v, %v", resp, err)
	}
	if s := n.status(fresh.UID); s.Redirection != Pending {
		t.Errorf("%+v", s)
	}
	if l.served.has(running.UID) {
		t.Error("half captured")
	}

	l.plumber.set(errors.New("the kernel is out of memory"))
	again, _, path3 := l.pod(3)
	n.SetPods([]LocalPod{running, fresh, again}, true)
	if _, err := add(n, again, path3, "c"); err == nil {
		t.Error("a pod started uncaptured because of a failure that passes")
	}
	l.plumber.set(nil)
	if resp, err := add(n, again, path3, "c"); err != nil || !resp.Captured {
		t.Errorf("%+v, %v", resp, err)
	}
	l.becomes(n, running.UID, Enabled)
}

func TestAnAddressBelongsToThePodThatHasItNow(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	old, _, path1 := l.pod(1)
	next, _, path2 := l.pod(2)
	next.Addrs = old.Addrs
	n.SetPods([]LocalPod{old, next}, true)
	if _, err := add(n, old, path1, "c1"); err != nil {
		t.Fatal(err)
	}
	if _, err := add(n, next, path2, "c2"); err != nil {
		t.Fatal(err)
	}
	if l.plumber.has(old.UID) || l.served.has(old.UID) || !l.plumber.has(next.UID) {
		t.Fatal("the address is served for the pod that had it before")
	}
}

func TestASecondSandboxOfAPodStartsAnew(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	d, _, path1 := l.pod(1)
	_, _, path2 := l.pod(2)
	n.SetPods([]LocalPod{d}, true)
	for i, path := range []string{path1, path2, path2} {
		if _, err := add(n, d, path, fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := l.plumber.count("release " + d.UID); got != 1 {
		t.Errorf("released %d times, want once: when the namespace changed", got)
	}
	if l.holder.Usage().Items != 1 || !l.served.has(d.UID) {
		t.Error("not served")
	}
}

func TestCaptureThatTheKernelLostIsSetUpAgain(t *testing.T) {
	l := newLab(t)
	n := l.start()
	d, _, path := l.pod(1)
	l.process(100, d, path)
	n.SetPods([]LocalPod{d}, true)
	l.becomes(n, d.UID, Enabled)
	l.plumber.Release(d.UID)
	l.eventually("it is back", func() bool { return l.plumber.has(d.UID) && n.status(d.UID).Redirection == Enabled })
}

func TestAnAgentThatWasTakenOverChangesNothing(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	d, _, path := l.pod(1)
	n.SetPods([]LocalPod{d}, true)
	if _, err := add(n, d, path, "c"); err != nil {
		t.Fatal(err)
	}
	n.Yield()
	del(t, n, d, path, "c")
	n.SetPods(nil, true)
	time.Sleep(200 * time.Millisecond)
	if !l.plumber.has(d.UID) || !l.served.has(d.UID) {
		t.Fatal("the old agent ended capture")
	}
	if _, err := add(n, d, path, "c"); err == nil {
		t.Error("the old agent answers")
	}
}

func TestAPodWithoutACertificateIsCapturedAllTheSame(t *testing.T) {
	l := newLab(t)
	l.certs.away = true
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	d, _, path := l.pod(1)
	n.SetPods([]LocalPod{d}, true)
	if resp, err := add(n, d, path, "c"); err != nil || !resp.Captured {
		t.Fatalf("%+v, %v", resp, err)
	}
	del(t, n, d, path, "c")
	if len(l.certs.forgotten) != 1 || l.certs.forgotten[0] != d.Identity {
		t.Errorf("forgotten: %v", l.certs.forgotten)
	}
}

func TestPodsOfAControlPlaneWithoutRecordsAreFoundByAddress(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	running, _, path := l.pod(1)
	l.process(100, running, path)
	fresh, _, path2 := l.pod(2)
	a, b := running, fresh
	a.UID, b.UID = "", ""
	n.SetPods([]LocalPod{a, b}, true)
	l.becomes(n, running.UID, Enabled)
	if resp, err := add(n, fresh, path2, "c"); err != nil || !resp.Captured {
		t.Fatalf("%+v, %v", resp, err)
	}
	n.SetPods([]LocalPod{a, b}, true)
	time.Sleep(200 * time.Millisecond)
	l.becomes(n, running.UID, Enabled)
	l.becomes(n, fresh.UID, Enabled)
}

func TestManyPodsAreRestoredQuickly(t *testing.T) {
	l := newLab(t)
	n := l.start()
	const pods = 30
	var all []LocalPod
	for i := range pods {
		d, _, path := l.pod(i + 1)
		d.Identity = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: fmt.Sprint(i)}
		l.process(100+i, d, path)
		all = append(all, d)
	}
	n.SetPods(all, true)
	for _, d := range all {
		l.becomes(n, d.UID, Enabled)
	}
	n.stop()
	began := time.Now()
	n = l.start()
	for _, d := range all {
		l.becomes(n, d.UID, Enabled)
	}
	t.Logf("%d pods restored and confirmed in %v", pods, time.Since(began))
}

func TestOpenConnectionsAreCountedAndUnderStrictReset(t *testing.T) {
	l := newLab(t)
	d, h, path := l.pod(1)
	_, peer, path2 := l.pod(2)
	name, name2 := path[len("/run/netns/"):], path2[len("/run/netns/"):]
	run(t, "ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", name2)
	for i, ns := range []string{name, name2} {
		run(t, "ip", "-n", ns, "link", "set", "eth0", "up")
		run(t, "ip", "-n", ns, "addr", "add", fmt.Sprintf("10.78.0.%d/24", i+1), "dev", "eth0")
	}
	d.Addrs = []netip.Addr{netip.MustParseAddr("10.78.0.1")}
	server := listen(t, h, netip.MustParseAddrPort("0.0.0.0:8080"))
	away := listen(t, peer, netip.MustParseAddrPort("0.0.0.0:9090"))
	outside := listen(t, peer, netip.MustParseAddrPort("0.0.0.0:9091"))
	for _, x := range []net.Listener{server, away, outside} {
		go func() {
			for {
				c, err := x.Accept()
				if err != nil {
					return
				}
				t.Cleanup(func() { c.Close() })
			}
		}()
	}
	connect := func(from string, addr string) net.Conn {
		ns := h
		if from == "peer" {
			ns = peer
		}
		c, err := dial(t, ns, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	inbound := []net.Conn{connect("peer", "10.78.0.1:8080"), connect("peer", "10.78.0.1:8080"), connect("peer", "10.78.0.1:8080")}
	own := connect("pod", "10.78.0.1:8080") // within the pod
	out := connect("pod", "10.78.0.2:9090")

	n := l.start(func(c *Config) {
		c.Captured = func() func(netip.Addr) bool {
			return func(a netip.Addr) bool { return a == netip.MustParseAddr("10.78.0.2") }
		}
	})
	l.process(100, d, path)
	n.SetPods([]LocalPod{d}, true)
	l.eventually("four connections are counted", func() bool { s := n.status(d.UID); return s.Redirection == Enabled && s.OpenConnections == 4 })
	for _, c := range append(inbound, own, out) {
		if gone(c) {
			t.Fatal("a connection was reset though the pod is not STRICT")
		}
	}
	later := connect("peer", "10.78.0.1:8080")

	d.Strict = true
	began := time.Now()
	n.SetPods([]LocalPod{d}, true)
	for _, c := range append(inbound, out) {
		l.eventually("the connection is reset", func() bool { return gone(c) })
	}
	t.Logf("reset within %v", time.Since(began))
	if gone(own) || gone(later) {
		t.Error("a connection was reset that is within the pod or newer than its enrolment")
	}
}

// gone reports whether the connection has ended, within a millisecond.
func gone(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(time.Millisecond))
	_, err := c.Read(make([]byte, 1))
	return err != nil && !errors.Is(err, os.ErrDeadlineExceeded)
}

// A reboot leaves the disk and nothing else: no holder, no pins, no processes. The kubelet makes new sandboxes for
// the pods before the agent is up.
func TestAfterARebootNoPodOfTheMeshStartsBeforeTheAgent(t *testing.T) {
	l := newLab(t)
	n := l.start()
	n.SetNamespaces(shopEnrolled)
	d, _, path := l.pod(1)
	n.SetPods([]LocalPod{d}, true)
	if _, err := add(n, d, path, "before"); err != nil {
		t.Fatal(err)
	}
	n.stop()
	os.Remove(n.cfg.Socket)
	reader := holder.NewKeeper(holder.KeeperConfig{Path: l.dir + "/holder.sock"})
	held, err := reader.Restore(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i := range held {
		reader.Delete(t.Context(), held[i].Key)
		held[i].Close()
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	reader.Run(gone)
	l.plumber.Release(d.UID)

	_, _, path2 := l.pod(2)
	kubelet := func(namespace string) error {
		conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","type":"warren-cni","socket":%q,"stateFile":%q,"exemptNamespaces":["kube-system"],
			"prevResult":{"cniVersion":"1.0.0","ips":[{"address":"%s/24"}]}}`, n.cfg.Socket, n.cfg.StateFile, d.Addrs[0])
		return cni.Plugin{Stdout: io.Discard, Stderr: io.Discard}.Add(&skel.CmdArgs{
			ContainerID: "after", Netns: path2, IfName: "eth0", StdinData: []byte(conf),
			Args: "K8S_POD_NAMESPACE=" + namespace + ";K8S_POD_NAME=" + d.Name + ";K8S_POD_UID=" + d.UID,
		})
	}
	for namespace, starts := range map[string]bool{"shop": false, "other": true, "istio-system": true, "kube-system": true} {
		if err := kubelet(namespace); (err == nil) != starts {
			t.Errorf("without the agent, namespace %s: %v", namespace, err)
		}
	}
	n = l.start()
	if err := kubelet("shop"); err == nil || l.plumber.has(d.UID) {
		t.Errorf("with an agent that knows only the namespace: %v", err)
	}
	n.SetPods([]LocalPod{d}, true)
	if err := kubelet("shop"); err != nil || !l.plumber.has(d.UID) {
		t.Errorf("with an agent that knows the pod: %v", err)
	}
}

func TestTheStateFileSaysWhatIsEnrolled(t *testing.T) {
	l := newLab(t)
	n := l.start()
	if n.Synced() {
		t.Error("synced before a word")
	}
	if err := n.SetNamespaces(shopEnrolled); err != nil {
		t.Fatal(err)
	}
	known, err := cni.ReadLastKnown(n.cfg.StateFile)
	if err != nil || !known.Enrolled("shop") || known.Enrolled("other") {
		t.Fatalf("%+v, %v", known, err)
	}
	os.Remove(n.cfg.StateFile)
	if err := n.SetNamespaces(shopEnrolled); err != nil {
		t.Fatal(err)
	}
	if _, err := cni.ReadLastKnown(n.cfg.StateFile); err != nil {
		t.Error("a state file that was lost is not written again:", err)
	}
	n.SetPods(nil, true)
	if !n.Synced() {
		t.Error("not synced")
	}
}

package holder

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// toyAgent in the environment makes the test binary an agent that has one listener: from the holder, or else a
// new one that it gives to the holder. It answers each connection with one byte and prints the address first.
const toyAgent = "WARREN_TEST_TOY_AGENT"

func runToyAgent(path string) {
	ctx := context.Background()
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "toy agent:", err)
			os.Exit(1)
		}
	}
	k := NewKeeper(KeeperConfig{Path: path})
	items, err := k.Restore(ctx)
	fail(err)
	var l net.Listener
	if len(items) == 1 {
		l, err = net.FileListener(items[0].File("listener"))
		fail(err)
	} else {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		fail(err)
		f, err := l.(*net.TCPListener).File()
		fail(err)
		fail(k.Put(ctx, Item{Key: Key{"pod", "toy"}, Names: []string{"listener"}, Files: []*os.File{f}}))
	}
	json.NewEncoder(os.Stdout).Encode(l.Addr().String())
	for {
		c, err := l.Accept()
		fail(err)
		go func() {
			// A connection that this process has accepted dies with it, so it is taken only as long as it takes to
			// answer: what is counted is refusals by the kernel.
			c.Write([]byte{'.'})
			c.Close()
		}()
	}
}

// The agent is killed again and again; every connection that arrives meanwhile waits in the listener that the
// holder has open. The one that a dying agent had accepted and not answered may be reset, but none is refused.
func TestNoConnectionIsRefusedWhileTheAgentIsKilled(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	startAgent := func() (*exec.Cmd, string) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), toyAgent+"="+s.cfg.Path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		var addr string
		if err := json.Unmarshal([]byte(line), &addr); err != nil {
			t.Fatal(err)
		}
		return cmd, addr
	}
	agent, addr := startAgent()
	kill := func() {
		agent.Process.Kill()
		agent.Wait()
	}
	defer func() { kill() }()

	const connections, workers = 1000, 16
	var refused, cut, slowest atomic.Int64
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for next.Add(1) <= connections {
				began := time.Now()
				c, err := net.DialTimeout("tcp4", addr, 30*time.Second)
				if err != nil {
					refused.Add(1)
					t.Log(err)
					continue
				}
				c.SetDeadline(time.Now().Add(30 * time.Second))
				if _, err := io.ReadAll(c); err != nil {
					cut.Add(1)
				}
				c.Close()
				for took := int64(time.Since(began)); ; {
					old := slowest.Load()
					if took <= old || slowest.CompareAndSwap(old, took) {
						break
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	kills := 0
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(100 * time.Millisecond):
			kill()
			kills++
			time.Sleep(20 * time.Millisecond)
			var now string
			if agent, now = startAgent(); now != addr {
				t.Fatalf("the agent listens on %s, before on %s", now, addr)
			}
		}
	}
	t.Logf("%d connections over %d kills: %d refused, %d cut after they were accepted, the slowest took %v",
		connections, kills, refused.Load(), cut.Load(), time.Duration(slowest.Load()))
	if refused.Load() != 0 {
		t.Errorf("%d of %d connections refused", refused.Load(), connections)
	}
	if kills < 3 {
		t.Errorf("only %d kills: the test proves little", kills)
	}
	if cut.Load() > int64(kills*workers) {
		t.Errorf("%d connections cut", cut.Load())
	}
}

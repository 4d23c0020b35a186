package hbone

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

const relayProcess = "HBONE_TEST_RELAY_TO"

// A process that relays and is killed resets what it relayed: an application must not read the end of a file
// that is not complete.
func TestKilledProcessResets(t *testing.T) {
	if to := os.Getenv(relayProcess); to != "" {
		relayOne(to)
	}
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledProcessResets$")
	cmd.Env = append(os.Environ(), relayProcess+"="+server.Addr().String())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	var addr string
	if _, err := fmt.Fscanln(bufio.NewReader(out), &addr); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	deadline := time.Now().Add(30 * time.Second)
	c.SetDeadline(deadline)
	s.SetDeadline(deadline)
	if _, err := io.WriteString(s, "half of it"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "half of it" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	for name, end := range map[string]net.Conn{"client": c, "server": s} {
		if _, err := end.Read(b); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the %s reads %v, want a reset", name, err)
		}
	}
}

// relayOne is the other process: it relays one connection until it is killed.
func relayOne(to string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		os.Exit(1)
	}
	fmt.Println(l.Addr())
	down, err := l.Accept()
	if err != nil {
		os.Exit(1)
	}
	up, err := net.Dial("tcp", to)
	if err != nil {
		os.Exit(1)
	}
	Relay(down, up, &RelayStats{})
	os.Exit(1)
}

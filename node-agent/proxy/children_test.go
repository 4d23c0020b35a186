package proxy

import (
	"crypto/tls"
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

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/node-agent/hbone/attack"
)

// child is what this program is told to be when a test starts it once more: what attackers and crowds of clients
// use is not to be counted as the agents'.
const child = "WARREN_PROXY_TEST_CHILD"

// Every goroutine of a Proxy ends with it.
func TestMain(m *testing.M) {
	if orders := os.Getenv(child); orders != "" {
		var o order
		if err := json.Unmarshal([]byte(orders), &o); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_ = json.NewEncoder(os.Stdout).Encode(o.run())
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// order is what a child does until its standard input ends.
type order struct {
	To string // address and port

	// Attackers: each of so many connects, attacks, and connects again after the pause when it was cut.
	Attack      string // attack.Kind, or one of those below
	Attackers   int
	Pause       time.Duration
	Authorities attack.Addresses
	Cert, Key   []byte // PEM; none: attacks without a certificate

	// Clients: so many connections of which each waits for a line and stays open.
	Clients int
}

// Attacks that are none of HTTP/2.
const (
	halfOpen  = "connections that say nothing"
	brokenOff = "handshakes that are broken off"
	garbage   = "garbage instead of TLS"
)

// account is what a child has to say.
type account struct {
	Connections int
	Cut         int // by the agent
	GoAways     int
	Refused     int           // connections that did not get as far as TLS
	Slowest     time.Duration // until a connection was cut
	Frames      int
	Served      int // clients that got their line
	Error       string
}

func (o order) run() (a account) {
	stop := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	var lim unix.Rlimit // the test may have lowered its own
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &lim)
	lim.Cur = lim.Max
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)
	if o.Clients > 0 {
		return o.crowd(stop)
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range o.Attackers {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				r, err := o.attackOnce(stop)
				mu.Lock()
				a.Connections++
				a.Frames += r.Frames
				if r.GoAway {
					a.GoAways++
				}
				if err != nil {
					a.Refused++
					a.Error = err.Error()
				} else if r.Ended {
					if a.Cut++; a.Cut == 1 {
						_ = json.NewEncoder(os.Stdout).Encode(a)
					}
					a.Slowest = max(a.Slowest, r.Took)
				}
				mu.Unlock()
				select {
				case <-stop:
				case <-time.After(o.Pause):
				}
			}
		})
	}
	wg.Wait()
	return a
}

func (o order) attackOnce(stop <-chan struct{}) (r attack.Report, err error) {
	c, err := net.DialTimeout("tcp", o.To, plenty)
	if err != nil {
		return r, err
	}
	defer c.Close()
	began := time.Now()
	switch o.Attack {
	case halfOpen:
		go func() { <-stop; c.Close() }()
		_, err := c.Read(make([]byte, 1))
		select {
		case <-stop:
		default:
			r.Ended, r.Took = err != nil, time.Since(began)
		}
		return r, nil
	case garbage:
		for err == nil {
			_, err = c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		}
		return attack.Report{Ended: true, Took: time.Since(began)}, nil
	}
	cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
	if len(o.Cert) > 0 {
		pair, err := tls.X509KeyPair(o.Cert, o.Key)
		if err != nil {
			return r, err
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	c.SetDeadline(time.Now().Add(plenty))
	tc := tls.Client(c, cfg)
	if o.Attack == brokenOff {
		cfg.VerifyConnection = func(tls.ConnectionState) error { return errBrokenOff }
		_ = tc.Handshake()
		return attack.Report{Ended: true, Took: time.Since(began)}, nil
	}
	if err := tc.Handshake(); err != nil {
		return r, err
	}
	c.SetDeadline(time.Time{})
	for _, k := range attack.Kinds() {
		if k.Name == o.Attack {
			return k.Run(tc, o.Authorities, stop), nil
		}
	}
	return r, fmt.Errorf("unknown attack %q", o.Attack)
}

var errBrokenOff = fmt.Errorf("broken off")

func (o order) crowd(stop <-chan struct{}) (a account) {
	var wg sync.WaitGroup
	var served, refused atomic.Int64
	var slowest atomic.Int64
	slots := make(chan struct{}, 32)
	for range o.Clients {
		slots <- struct{}{}
		wg.Go(func() {
			began := time.Now()
			c, err := net.DialTimeout("tcp", o.To, 2*plenty)
			if err == nil {
				defer c.Close()
				c.SetReadDeadline(time.Now().Add(2 * plenty))
				_, err = c.Read(make([]byte, 1))
			}
			if took := int64(time.Since(began)); took > slowest.Load() {
				slowest.Store(took)
			}
			<-slots
			if err != nil {
				refused.Add(1)
				return
			}
			served.Add(1)
			<-stop
		})
	}
	for range cap(slots) {
		slots <- struct{}{}
	}
	a = account{Connections: o.Clients, Served: int(served.Load()), Refused: int(refused.Load()), Slowest: time.Duration(slowest.Load())}
	_ = json.NewEncoder(os.Stdout).Encode(a)
	wg.Wait()
	return a
}

// echo answers what it gets. It does without splice(2), for which Go keeps pipes in store.
func echo(c *net.TCPConn) {
	io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, make([]byte, 4<<10)) // of which an attacker has us make many
}

// process is a child that runs.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *json.Decoder
}

// start starts a child in the pod's network namespace.
func (p *labPod) start(o order) (*process, error) {
	orders, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), child+"="+string(orders))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.as(cmd.Start); err != nil {
		return nil, err
	}
	return &process{cmd, in, json.NewDecoder(out)}, nil
}

// report waits for the next account.
func (c *process) report() (a account, err error) {
	err = c.out.Decode(&a)
	return a, err
}

// end has the child end and returns its last account.
func (c *process) end() (account, error) {
	c.stdin.Close()
	kill := time.AfterFunc(2*plenty, func() { c.cmd.Process.Kill() })
	defer kill.Stop()
	a, err := c.report()
	for err == nil {
		last := a
		if a, err = c.report(); err == io.EOF {
			return last, c.cmd.Wait()
		}
	}
	c.cmd.Wait()
	return a, err
}

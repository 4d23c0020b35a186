package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// talk is one connection between two applications that both know what is to be said and how it ends: all of it
// follows from its number.
type talk struct {
	number   uint64
	bytes    [2]int // by the client, by the server
	waits    int    // the side that ends its half only when it has read the other's; 2: neither
	aborts   int    // the side that resets the connection; 2: neither
	abortsAt int    // bytes it has sent by then
	slow     [2]bool
}

const (
	theClient = 0
	theServer = 1
	nobody    = 2
)

// newTalk invents one whose sides say up to most bytes.
func newTalk(number uint64, most int) talk {
	r := rand.New(rand.NewPCG(number, 1))
	size := func() int {
		switch n := r.IntN(20); {
		case n == 0:
			return 0
		case n == 1:
			return 1
		case n < 10:
			return r.IntN(2000)
		case n < 16:
			return r.IntN(min(70_000, most))
		case n < 19:
			return r.IntN(min(1<<20, most))
		default:
			return r.IntN(most)
		}
	}
	k := talk{number: number, bytes: [2]int{size(), size()}, waits: r.IntN(3), aborts: nobody, slow: [2]bool{r.IntN(8) == 0, r.IntN(8) == 0}}
	if r.IntN(4) == 0 {
		k.aborts = r.IntN(2)
		k.abortsAt = r.IntN(k.bytes[k.aborts] + 1)
	}
	return k
}

// words is what a side says.
func (k talk) words(side int) io.Reader {
	var seed [32]byte
	binary.BigEndian.PutUint64(seed[:], k.number)
	seed[8] = byte(side)
	return io.LimitReader(rand.NewChaCha8(seed), int64(k.bytes[side]))
}

// errAbort is the end of a side that resets.
var errAbort = errors.New("reset, as agreed")

var errEarly = errors.New("an end in order")

// hold plays one side until both halves have ended, and says what was not as agreed. progress, if any, counts bytes.
func (k talk) hold(c *net.TCPConn, side int, progress *atomic.Int64) error {
	defer c.Close()
	heard, said := make(chan error, 1), make(chan error, 1)
	read := make(chan struct{}) // closed when the other half has ended
	go func() {
		defer close(read)
		heard <- k.listen(c, side, progress)
	}()
	go func() { said <- k.speak(c, side, read) }()
	first := <-said
	if errors.Is(first, errAbort) {
		<-heard // whatever it was interrupted in
		return nil
	}
	err := <-heard
	broken := first != nil && k.aborts == 1-side
	switch {
	case broken && errors.Is(err, errEarly): // a socket tells of its reset once, and it has told the writer
		return nil
	case err != nil:
		return err
	case broken:
		return nil
	}
	return first
}

func (k talk) speak(c *net.TCPConn, side int, read <-chan struct{}) error {
	r := rand.New(rand.NewPCG(k.number, uint64(2+side)))
	words := k.words(side)
	left := k.bytes[side]
	if k.aborts == side {
		left = k.abortsAt
	}
	buf := make([]byte, 64<<10)
	for left > 0 {
		p := buf[:min(1+r.IntN(len(buf)), left)]
		if r.IntN(4) == 0 {
			p = p[:min(1+r.IntN(100), left)]
		}
		if _, err := io.ReadFull(words, p); err != nil {
			return err
		}
		if _, err := c.Write(p); err != nil {
			return fmt.Errorf("%s says, %d bytes before its end: %w", sideNames[side], left, err)
		}
		left -= len(p)
		if r.IntN(40) == 0 {
			time.Sleep(rand.N(5 * time.Millisecond))
		}
	}
	if k.aborts == side {
		abort(c)
		return errAbort
	}
	if k.waits == side {
		<-read
	}
	if err := c.CloseWrite(); err != nil {
		return fmt.Errorf("%s ends its half: %w", sideNames[side], err)
	}
	return nil
}

var sideNames = [2]string{"the client", "the server"}

// listen compares what comes with what the other side says. An end that is in order has to come after all of it.
func (k talk) listen(c *net.TCPConn, side int, progress *atomic.Int64) error {
	other := 1 - side
	words := k.words(other)
	got := 0
	buf, want := make([]byte, 64<<10), make([]byte, 64<<10)
	r := rand.New(rand.NewPCG(k.number, uint64(4+side)))
	for {
		n, err := c.Read(buf)
		if n > 0 {
			if m, _ := io.ReadFull(words, want[:n]); m < n || !bytes.Equal(buf[:n], want[:n]) {
				return fmt.Errorf("%s hears something else than was said, after %d bytes of %d", sideNames[side], got, k.bytes[other])
			}
			got += n
			if progress != nil {
				progress.Add(int64(n))
			}
			if k.slow[side] && r.IntN(8) == 0 {
				time.Sleep(rand.N(10 * time.Millisecond))
			}
		}
		switch {
		case err == io.EOF && got < k.bytes[other]:
			return fmt.Errorf("%s hears %w after %d bytes of %d", sideNames[side], errEarly, got, k.bytes[other])
		case err == io.EOF || err != nil && k.aborts != nobody && !isTimeout(err):
			return nil
		case err != nil:
			return fmt.Errorf("%s hears, after %d bytes of %d: %w", sideNames[side], got, k.bytes[other], err)
		}
	}
}

// parlour is where talks are held: the server's side listens in a pod, the client's dials from others.
type parlour struct {
	most     int           // bytes
	patience time.Duration // with one talk: longer is a hang
	bytes    atomic.Int64

	mu      sync.Mutex
	servers map[uint64]chan error // by number, of talks that go on
}

func newParlour(most int, patience time.Duration) *parlour {
	return &parlour{most: most, patience: patience, servers: map[uint64]chan error{}}
}

// host is the server's side.
func (p *parlour) host(c *net.TCPConn) {
	c.SetDeadline(time.Now().Add(p.patience))
	var header [8]byte
	if _, err := io.ReadFull(c, header[:]); err != nil {
		return // the client has reset already
	}
	k := newTalk(binary.BigEndian.Uint64(header[:]), p.most)
	p.mu.Lock()
	report := p.servers[k.number]
	p.mu.Unlock()
	if report != nil {
		report <- k.hold(c, theServer, &p.bytes)
	}
}

// converse holds one talk and says what was not as agreed.
func (p *parlour) converse(from *labPod, to netip.AddrPort, number uint64) error {
	k := newTalk(number, p.most)
	report := make(chan error, 1)
	p.mu.Lock()
	p.servers[number] = report
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.servers, number)
		p.mu.Unlock()
	}()
	c, err := from.dial(to)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	c.SetDeadline(time.Now().Add(p.patience))
	if _, err := c.Write(binary.BigEndian.AppendUint64(nil, number)); err != nil {
		c.Close()
		return fmt.Errorf("first bytes: %w", err)
	}
	err = k.hold(c, theClient, &p.bytes)
	if k.aborts == theClient {
		select { // the server may never have heard of it
		case e := <-report:
			err = errors.Join(err, e)
		case <-time.After(200 * time.Millisecond):
		}
	} else {
		err = errors.Join(err, <-report)
	}
	if err != nil {
		return fmt.Errorf("%+v: %w", k, err)
	}
	return nil
}

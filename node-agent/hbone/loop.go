package hbone

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Loops are the threads that wait for the sockets of tunnels and of the applications behind them. Each looks at all
// that has become ready before it sends what comes of it: what many applications say at once leaves a tunnel's end
// in one write.
type Loops struct {
	all  []*loop
	next atomic.Uint32
}

// NewLoops starts one loop less than there are processors for Go, one at least: somebody has to be left for everything
// else. Close ends them.
func NewLoops() (*Loops, error) {
	ls := &Loops{}
	for range max(1, runtime.GOMAXPROCS(0)-1) {
		l, err := newLoop()
		if err != nil {
			ls.Close()
			return nil, err
		}
		ls.all = append(ls.all, l)
	}
	return ls, nil
}

// Close ends each loop once its last socket has been closed, and waits for that.
func (ls *Loops) Close() {
	for _, l := range ls.all {
		l.release()
	}
	for _, l := range ls.all {
		<-l.done
	}
}

// take returns a loop for a connection, nil if there can be none. It is to be released. Without Loops the connection has
// one of its own.
func (ls *Loops) take() *loop {
	if ls == nil {
		l, _ := newLoop()
		return l
	}
	l := ls.all[int(ls.next.Add(1)-1)%len(ls.all)]
	if !l.retain() {
		return nil
	}
	return l
}

// loop waits for sockets with epoll, edge-triggered, and calls their owners. It never waits for anything else.
//
// Go's own poller waits for the epoll descriptor. To block in epoll_wait(2) costs a tenth more for a new connection: where
// goroutines come and go beside it, the scheduler keeps taking the processor from the thread that sleeps and giving it
// back.
type loop struct {
	ep, wakeup int
	file       *os.File        // of ep
	parked     syscall.RawConn // of file
	one        [8]byte         // what is written to wakeup
	done       chan struct{}

	// The loop's own.
	buf    [relayBuffer + 1]byte // the last is for the record layer
	events [64]unix.EpollEvent
	n      int                // of events
	look   func(uintptr) bool // poll
	batch  []ready
	sends  []*conn // those that have something to send when the batch is over

	mu     sync.Mutex // guards what follows; a leaf
	users  int        // sockets, connections and the Loops
	ended  bool
	asleep bool
	slots  []slot
	free   []int32
	posted []*sock // to be looked at although the kernel has no news of them
	over   []*sink // to be ended
}

type slot struct {
	s   *sock
	gen int32
}

// ready is a socket that has become so.
type ready struct {
	s      *sock
	events uint32
	last   bool // s has been closed
}

const allEvents = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET

var errLoopEnded = errors.New("the loop has ended")

// newLoop starts a loop that ends with its last user, of whom the caller is the first.
func newLoop() (*loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	_ = unix.SetNonblock(ep, true) // or os.NewFile would not ask Go's poller
	l := &loop{ep: ep, file: os.NewFile(uintptr(ep), "epoll"), done: make(chan struct{}), users: 1}
	if l.parked, err = l.file.SyscallConn(); err == nil {
		err = l.file.SetDeadline(time.Time{}) // fails where Go's poller does not have it
	}
	if err == nil {
		l.wakeup, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		err = os.NewSyscallError("eventfd", err)
	}
	if err == nil {
		err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, l.wakeup, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: -1})
		if err != nil {
			unix.Close(l.wakeup)
		}
	}
	if err != nil {
		l.file.Close()
		return nil, fmt.Errorf("wait for sockets: %w", err)
	}
	l.look = l.poll
	binary.NativeEndian.PutUint64(l.one[:], 1)
	go l.run()
	return l, nil
}

func (l *loop) retain() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.users++
	}
	return !l.ended
}

func (l *loop) release() {
	l.mu.Lock()
	l.releaseLocked()
	l.mu.Unlock()
}

func (l *loop) releaseLocked() {
	if l.users--; l.users == 0 {
		l.ended = true
		l.wakeLocked()
	}
}

// wakeLocked makes a loop that sleeps look at what was posted.
func (l *loop) wakeLocked() {
	if l.asleep {
		l.asleep = false
		_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(l.wakeup), uintptr(unsafe.Pointer(&l.one[0])), uintptr(len(l.one))) // fails only where it is awake anyway
	}
}

// post has s looked at.
func (l *loop) post(s *sock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.postLocked(s)
}

func (l *loop) postLocked(s *sock) {
	if !s.posted {
		s.posted = true
		l.posted = append(l.posted, s)
		l.wakeLocked()
	}
}

// finish has k ended, when those that are ready have had their turn and before anything is sent.
func (l *loop) finish(k *sink) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.over = append(l.over, k)
	l.wakeLocked()
}

// takeOver returns what is to be ended, in place of spare, which is empty.
func (l *loop) takeOver(spare []*sink) []*sink {
	l.mu.Lock()
	defer l.mu.Unlock()
	over := l.over
	l.over = spare
	return over
}

// add makes the loop wait for s.
func (l *loop) add(s *sock, fd int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return errLoopEnded
	}
	n := len(l.free)
	if n == 0 {
		l.free = append(l.free, int32(len(l.slots)))
		l.slots = append(l.slots, slot{})
		n = 1
	}
	i := l.free[n-1]
	if errno := l.control(unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: allEvents, Fd: i, Pad: l.slots[i].gen}); errno != 0 {
		return os.NewSyscallError("epoll_ctl", errno)
	}
	l.free = l.free[:n-1]
	l.slots[i].s, s.slot = s, i
	return nil
}

// control tells Go's scheduler nothing of the call, as internal/netns does not of its own.
func (l *loop) control(op, fd int, e *unix.EpollEvent) syscall.Errno {
	_, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.ep), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(e)), 0, 0)
	return errno
}

// remove forgets s, whose descriptor is closed next; where tell is set, its owner is called once more.
func (l *loop) remove(s *sock, tell bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.slot < 0 {
		l.releaseLocked()
		return
	}
	l.slots[s.slot] = slot{gen: l.slots[s.slot].gen + 1}
	l.free = append(l.free, s.slot)
	s.slot = -1
	if !tell {
		l.releaseLocked()
		return
	}
	s.leaving = true
	l.postLocked(s)
}

// run is the loop's goroutine.
func (l *loop) run() {
	defer close(l.done)
	var over []*sink
	for {
		if !l.wait() {
			l.file.Close()
			unix.Close(l.wakeup)
			return
		}
		for _, r := range l.batch {
			r.s.happened(r.events)
			again := r.s.owner.ready(l, r.events)
			switch {
			case r.last:
				l.release()
			case again:
				l.post(r.s)
			}
		}
		clear(l.batch)
		over = l.takeOver(over[:0])
		for _, k := range over {
			k.end(l)
		}
		clear(over)
		for i, c := range l.sends {
			l.sends[i] = nil
			c.endBatch()
		}
		l.sends = l.sends[:0]
	}
}

// poll takes the events that there are, into events.
func (l *loop) poll(uintptr) bool {
	n, _, errno := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.ep), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), 0, 0, 0)
	if l.n = int(n); errno != 0 {
		l.n = 0
	}
	return l.n > 0
}

// wait fills the batch; it returns false at the end.
func (l *loop) wait() bool {
	l.batch = l.batch[:0]
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		return false
	}
	busy := len(l.posted)+len(l.over) > 0
	l.asleep = !busy
	l.mu.Unlock()
	if l.n = 0; busy {
		l.poll(0)
	} else {
		_ = l.parked.Read(l.look)
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	l.asleep = false
	for _, s := range l.posted {
		l.batch = append(l.batch, ready{s, 0, s.leaving})
		s.posted, s.leaving = false, false
	}
	clear(l.posted)
	l.posted = l.posted[:0]
	for i := range l.n {
		e := &l.events[i]
		if e.Fd < 0 { // edge-triggered: the counter need not be read
			continue
		}
		if at := l.slots[e.Fd]; at.s != nil && at.gen == e.Pad {
			l.batch = append(l.batch, ready{at.s, e.Events, false})
		}
	}
	return true
}

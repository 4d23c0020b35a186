package hbone

import "time"

// flood counts what an honest peer seldom does. Each such frame costs points; the budget refills with time,
// so that a long-lived connection with an odd frame now and then is never cut, and an attack is within a
// second. DATA with payload, WINDOW_UPDATEs that answer our DATA, and resets of answered streams cost nothing:
// a database that sends ten million one-byte packets is not an attacker.
type flood struct {
	points  int // left
	refill  int64
	updates int // WINDOW_UPDATEs that the DATA frames we sent account for
	now     func() int64
}

const (
	floodBudget = 20_000
	floodRate   = 4_000 // points a second

	costPing            = 4
	costSettings        = 40
	costPriority        = 2
	costEmptyData       = 4
	costUnknownFrame    = 2
	costWindowUpdate    = 2
	costUnansweredReset = 10
	costRefused         = 10
	costStreamError     = 40
	costTooLarge        = 1000 // a header list of more than 64 KiB

	updatesPerData = 10
	updatesBase    = 64

	crumb = 256 // bytes: DATA shorter than that pays for no WINDOW_UPDATE if the peer's window was the reason
)

var processStart = time.Now()

func monotonic() int64 { return int64(time.Since(processStart)) }

func (f *flood) init() {
	f.points = floodBudget
	f.updates = updatesBase
	f.now = monotonic
	f.refill = f.now()
}

func (f *flood) glitch(cost int) *ConnError {
	if f.points -= cost; f.points >= 0 {
		return nil
	}
	now := f.now()
	f.points += int(min(now-f.refill, 10*int64(time.Second)) * floodRate / int64(time.Second))
	f.points = min(f.points, floodBudget)
	f.refill = now
	if f.points >= 0 {
		return nil
	}
	return &ConnError{Code: CodeEnhanceYourCalm, Reason: "too many control frames or resets"}
}

// dataSent accounts for a DATA frame of n bytes that leaves the peer's window with left. A window that grows by a byte
// at a time must not pay for itself: each byte would cost a read of the application's socket, a record and a write.
func (f *flood) dataSent(n int, left int64) {
	if f.updates < 1<<20 && (left > 0 || n >= crumb) {
		f.updates += updatesPerData
	}
}

func (f *flood) windowUpdateReceived() *ConnError {
	if f.updates > 0 {
		f.updates--
		return nil
	}
	return f.glitch(costWindowUpdate)
}

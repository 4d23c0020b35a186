package admission

import "context"

// lane bounds how many reviews are held in memory, and how many of them are worked on at once.
type lane struct {
	held, worked chan struct{}
}

func newLane(worked, held int) lane {
	return lane{make(chan struct{}, held), make(chan struct{}, worked)}
}

// queue returns false when too many are held already.
func (l lane) queue() bool {
	select {
	case l.held <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l lane) unqueue() { <-l.held }

// enter returns false when ctx ends before there is room.
func (l lane) enter(ctx context.Context) bool {
	select {
	case l.worked <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (l lane) leave() { <-l.worked }

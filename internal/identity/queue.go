package identity

import (
	"container/heap"
	"time"
)

// taskHeap orders tasks by when they are due.
type taskHeap []*task

func (h taskHeap) Len() int           { return len(h) }
func (h taskHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }

func (h taskHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *taskHeap) Push(x any) {
	t := x.(*task)
	t.index = len(*h)
	*h = append(*h, t)
}

func (h *taskHeap) Pop() any {
	last := len(*h) - 1
	t := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	t.index = -1
	return t
}

// next takes the most urgent of the tasks that are due, the longest due of equals; nil when none is.
func (h *taskHeap) next(now time.Time) *task {
	var best *task
	h.due(0, now, func(t *task) {
		if best == nil || t.urgent > best.urgent || t.urgent == best.urgent && t.due.Before(best.due) {
			best = t
		}
	})
	if best != nil {
		heap.Remove(h, best.index)
	}
	return best
}

// due calls f for what is due below i; a parent that is not due has no child that is.
func (h taskHeap) due(i int, now time.Time, f func(*task)) {
	if i >= len(h) || h[i].due.After(now) {
		return
	}
	f(h[i])
	h.due(2*i+1, now, f)
	h.due(2*i+2, now, f)
}

// wait is how long there is nothing to do.
func (h taskHeap) wait(now time.Time, free bool) time.Duration {
	if len(h) == 0 || !free {
		return time.Hour
	}
	return max(h[0].due.Sub(now), 0)
}

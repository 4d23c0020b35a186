package index

import "slices"

// fetched is what comes from addresses that objects name: how many of them need it, and what came of fetching it.
type fetched[K, V comparable] struct {
	users map[K]int
	state map[K]V
}

func newFetched[K, V comparable]() fetched[K, V] { return fetched[K, V]{map[K]int{}, map[K]V{}} }

// use counts what an object needs in the place of what it needed.
func (f *fetched[K, V]) use(old, next []K) {
	for _, k := range next {
		f.users[k]++
	}
	for _, k := range old {
		if f.users[k]--; f.users[k] == 0 {
			delete(f.users, k)
			delete(f.state, k)
		}
	}
}

// set records what came of fetching; it reports whether that is news to somebody.
func (f *fetched[K, V]) set(k K, v V) bool {
	if f.users[k] == 0 || f.state[k] == v {
		return false
	}
	f.state[k] = v
	return true
}

// wanted is what is needed, sorted.
func (f *fetched[K, V]) wanted(compare func(a, b K) int) []K {
	out := make([]K, 0, len(f.users))
	for k := range f.users {
		out = append(out, k)
	}
	slices.SortFunc(out, compare)
	return out
}

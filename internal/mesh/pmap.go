package mesh

import (
	"hash/maphash"
	"iter"
	"math/bits"
)

// pmap is a persistent hash map: a copy is one pointer, and a change to one key copies the few nodes on the
// way to it. A Builder edits its own nodes in place; whatever a Snapshot can reach is never written again.
//
// It is a hash array mapped trie, 32 ways a level, entries and children held apart (Steindorfer and Vinju,
// "Optimizing hash-array mapped tries", 2015).
type pmap[K comparable, V any] struct {
	root *pnode[K, V]
	len  int
}

// edit is the right to write the nodes that carry it. A Builder gives it up at Commit.
type edit struct{ _ byte }

type pentry[K comparable, V any] struct {
	key K
	val V
}

type pnode[K comparable, V any] struct {
	owner   *edit
	dataMap uint32 // which of the 32 slots hold an entry
	kidMap  uint32 // which hold a child
	data    []pentry[K, V]
	kids    []*pnode[K, V]
}

const (
	trieBits  = 5
	trieMask  = 1<<trieBits - 1
	trieDepth = 64 / trieBits * trieBits // below this shift the hash is used up: entries in a plain list
)

var hashSeed = maphash.MakeSeed()

func slot(hash uint64, shift uint) uint32 { return 1 << (hash >> shift & trieMask) }

func below(bitmap, bit uint32) int { return bits.OnesCount32(bitmap & (bit - 1)) }

func (m pmap[K, V]) get(key K) (val V, ok bool) {
	n := m.root
	if n == nil {
		return val, false
	}
	hash := maphash.Comparable(hashSeed, key)
	for shift := uint(0); shift < trieDepth; shift += trieBits {
		bit := slot(hash, shift)
		switch {
		case n.dataMap&bit != 0:
			e := &n.data[below(n.dataMap, bit)]
			if e.key == key {
				return e.val, true
			}
			return val, false
		case n.kidMap&bit != 0:
			n = n.kids[below(n.kidMap, bit)]
		default:
			return val, false
		}
	}
	for i := range n.data {
		if n.data[i].key == key {
			return n.data[i].val, true
		}
	}
	return val, false
}

// set stores val. Nodes that do not carry ed are copied first.
func (m *pmap[K, V]) set(ed *edit, key K, val V) {
	hash := maphash.Comparable(hashSeed, key)
	if m.root == nil {
		m.root = &pnode[K, V]{owner: ed}
	}
	root, added := m.root.set(ed, hash, 0, key, val)
	m.root = root
	if added {
		m.len++
	}
}

// delete removes key; a missing one is fine.
func (m *pmap[K, V]) delete(ed *edit, key K) {
	if m.root == nil {
		return
	}
	root, removed := m.root.delete(ed, maphash.Comparable(hashSeed, key), 0, key)
	if !removed {
		return
	}
	m.len--
	m.root = root
	if m.len == 0 {
		m.root = nil
	}
}

// all yields every entry, in no particular order.
func (m pmap[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		if m.root != nil {
			m.root.each(yield)
		}
	}
}

func (n *pnode[K, V]) each(yield func(K, V) bool) bool {
	for i := range n.data {
		if !yield(n.data[i].key, n.data[i].val) {
			return false
		}
	}
	for _, kid := range n.kids {
		if !kid.each(yield) {
			return false
		}
	}
	return true
}

// writable returns n itself where ed owns it, a copy otherwise.
func (n *pnode[K, V]) writable(ed *edit) *pnode[K, V] {
	if n.owner == ed {
		return n
	}
	c := &pnode[K, V]{owner: ed, dataMap: n.dataMap, kidMap: n.kidMap}
	c.data = append(make([]pentry[K, V], 0, len(n.data)+1), n.data...)
	if len(n.kids) > 0 {
		c.kids = append([]*pnode[K, V](nil), n.kids...)
	}
	return c
}

func (n *pnode[K, V]) set(ed *edit, hash uint64, shift uint, key K, val V) (_ *pnode[K, V], added bool) {
	n = n.writable(ed)
	if shift >= trieDepth {
		for i := range n.data {
			if n.data[i].key == key {
				n.data[i].val = val
				return n, false
			}
		}
		n.data = append(n.data, pentry[K, V]{key, val})
		return n, true
	}
	bit := slot(hash, shift)
	switch {
	case n.kidMap&bit != 0:
		i := below(n.kidMap, bit)
		n.kids[i], added = n.kids[i].set(ed, hash, shift+trieBits, key, val)
		return n, added
	case n.dataMap&bit != 0:
		i := below(n.dataMap, bit)
		old := n.data[i]
		if old.key == key {
			n.data[i].val = val
			return n, false
		}
		// Two keys in one slot: both move into a new child.
		kid := &pnode[K, V]{owner: ed}
		kid, _ = kid.set(ed, maphash.Comparable(hashSeed, old.key), shift+trieBits, old.key, old.val)
		kid, _ = kid.set(ed, hash, shift+trieBits, key, val)
		n.data = removeAt(n.data, i)
		n.dataMap &^= bit
		n.kids = insertAt(n.kids, below(n.kidMap, bit), kid)
		n.kidMap |= bit
		return n, true
	default:
		n.data = insertAt(n.data, below(n.dataMap, bit), pentry[K, V]{key, val})
		n.dataMap |= bit
		return n, true
	}
}

func (n *pnode[K, V]) delete(ed *edit, hash uint64, shift uint, key K) (_ *pnode[K, V], removed bool) {
	if shift >= trieDepth {
		for i := range n.data {
			if n.data[i].key == key {
				n = n.writable(ed)
				n.data = removeAt(n.data, i)
				return n, true
			}
		}
		return n, false
	}
	bit := slot(hash, shift)
	switch {
	case n.dataMap&bit != 0:
		i := below(n.dataMap, bit)
		if n.data[i].key != key {
			return n, false
		}
		n = n.writable(ed)
		n.data = removeAt(n.data, i)
		n.dataMap &^= bit
		return n, true
	case n.kidMap&bit != 0:
		i := below(n.kidMap, bit)
		kid, removed := n.kids[i].delete(ed, hash, shift+trieBits, key)
		if !removed {
			return n, false
		}
		n = n.writable(ed)
		switch {
		case len(kid.kids) == 0 && len(kid.data) == 0:
			n.kids = removeAt(n.kids, i)
			n.kidMap &^= bit
		case len(kid.kids) == 0 && len(kid.data) == 1:
			// A child of one entry is pulled up, so that the shape does not remember what was deleted.
			n.kids = removeAt(n.kids, i)
			n.kidMap &^= bit
			n.data = insertAt(n.data, below(n.dataMap, bit), kid.data[0])
			n.dataMap |= bit
		default:
			n.kids[i] = kid
		}
		return n, true
	default:
		return n, false
	}
}

// diff yields every key whose value differs between a and b (by the == of same), with both values; the zero V
// stands for a missing one. Subtrees that a and b share are skipped, so that it costs what has changed.
func diff[K comparable, V comparable](a, b pmap[K, V]) iter.Seq2[K, [2]V] {
	return func(yield func(K, [2]V) bool) { diffNodes(a.root, b.root, 0, yield) }
}

func diffNodes[K comparable, V comparable](a, b *pnode[K, V], shift uint, yield func(K, [2]V) bool) bool {
	var none V
	switch {
	case a == b:
		return true
	case a == nil:
		return b.each(func(k K, v V) bool { return yield(k, [2]V{none, v}) })
	case b == nil:
		return a.each(func(k K, v V) bool { return yield(k, [2]V{v, none}) })
	}
	if shift >= trieDepth {
		return diffLists(a.data, b.data, yield)
	}
	for rest := a.dataMap | a.kidMap | b.dataMap | b.kidMap; rest != 0; rest &= rest - 1 {
		bit := rest & -rest
		if a.kidMap&bit != 0 || b.kidMap&bit != 0 {
			if !diffNodes(a.under(bit, shift), b.under(bit, shift), shift+trieBits, yield) {
				return false
			}
			continue
		}
		var ea, eb []pentry[K, V]
		if a.dataMap&bit != 0 {
			i := below(a.dataMap, bit)
			ea = a.data[i : i+1]
		}
		if b.dataMap&bit != 0 {
			i := below(b.dataMap, bit)
			eb = b.data[i : i+1]
		}
		if !diffLists(ea, eb, yield) {
			return false
		}
	}
	return true
}

// under returns what hangs in a slot as a node: the child, a node made of the single entry, or nil.
func (n *pnode[K, V]) under(bit uint32, shift uint) *pnode[K, V] {
	switch {
	case n.kidMap&bit != 0:
		return n.kids[below(n.kidMap, bit)]
	case n.dataMap&bit != 0:
		e := n.data[below(n.dataMap, bit)]
		one := &pnode[K, V]{data: []pentry[K, V]{e}}
		if shift+trieBits < trieDepth {
			one.dataMap = slot(maphash.Comparable(hashSeed, e.key), shift+trieBits)
		}
		return one
	default:
		return nil
	}
}

func diffLists[K comparable, V comparable](a, b []pentry[K, V], yield func(K, [2]V) bool) bool {
	var none V
	for _, ea := range a {
		to := none
		for _, eb := range b {
			if eb.key == ea.key {
				to = eb.val
			}
		}
		if to != ea.val && !yield(ea.key, [2]V{ea.val, to}) {
			return false
		}
	}
next:
	for _, eb := range b {
		for _, ea := range a {
			if ea.key == eb.key {
				continue next
			}
		}
		if !yield(eb.key, [2]V{none, eb.val}) {
			return false
		}
	}
	return true
}

func insertAt[T any](s []T, i int, v T) []T {
	s = append(s, v)
	copy(s[i+1:], s[i:])
	s[i] = v
	return s
}

// removeAt edits s in place: only nodes owned by the edit get here.
func removeAt[T any](s []T, i int) []T {
	var zero T
	copy(s[i:], s[i+1:])
	s[len(s)-1] = zero
	return s[:len(s)-1]
}

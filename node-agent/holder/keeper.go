package holder

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// KeeperConfig configures a Keeper.
type KeeperConfig struct {
	Path string // DefaultPath
	Log  *slog.Logger
	// OnSuperseded is called once when another agent has taken over: this one stops changing the node.
	OnSuperseded func()
	// OnVacant is called once when this one was superseded and the agent after it, or the last of those after it, has
	// been gone for Patience: nobody looks after the node.
	OnVacant func()
	// Patience is longer than a writer needs to come back after its connection broke: 5 s.
	Patience time.Duration
	// Interval between two looks at the holder: 1 s.
	Interval time.Duration
}

// Keeper is the agent's side: it knows what should be held and makes it so. Without a holder the agent works on;
// what it puts is put again when the holder comes (back), at the price of its own descriptors of everything.
type Keeper struct {
	cfg  KeeperConfig
	born int64 // when this agent started, ns since boot: of two agents the younger one writes

	kick chan struct{} // one token: Run has something to tell

	mu       sync.Mutex // guards what follows and orders writes to the holder
	want     map[Key]*wanted
	client   *Client // of a superseded one: a reader
	over     bool    // superseded, or left
	left     bool
	restored bool // what is held and not wanted is nobody's
	vacant   vacancy
	last     error
	since    time.Time
}

// vacancy is a time without a writer, as a superseded agent sees it.
type vacancy struct {
	generation uint64 // that went
	since      time.Time
}

type wanted struct {
	held
	fds fdset
}

// State is how a Keeper stands with its holder.
type State struct {
	Connected  bool
	Superseded bool
	Generation uint64
	Items      int
	Since      time.Time // of this state
	Err        error     // why it is not connected
}

// NewKeeper returns a Keeper that has not looked for the holder yet.
func NewKeeper(cfg KeeperConfig) *Keeper {
	cfg.Path = cmp.Or(cfg.Path, DefaultPath)
	cfg.Interval = cmp.Or(cfg.Interval, time.Second)
	cfg.Patience = cmp.Or(cfg.Patience, 5*time.Second)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) // fails on a bad pointer only
	return &Keeper{cfg: cfg, born: now.Nano(), kick: make(chan struct{}, 1), want: map[Key]*wanted{}, since: time.Now(), last: ErrAbsent}
}

// Restore takes over from the agent before this one and returns what the holder has, with files that are the
// caller's; blobs are not among the items but there for Blob. What is restored counts as put: the caller deletes
// what it has no use for. Restore is called once, before anything is put. An error means that there is no holder
// now, and nothing to restore.
func (k *Keeper) Restore(ctx context.Context) ([]Item, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c, err := dial(ctx, k.cfg.Path, true, k.born)
	if err != nil {
		k.disconnected(err)
		return nil, err
	}
	list, err := c.list(ctx)
	if err != nil {
		c.Close()
		k.disconnected(err)
		return nil, err
	}
	var items []Item
	for _, l := range list {
		h, fds, err := c.get(ctx, l.Key)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		own := fds
		if err == nil && !h.Blob {
			own, err = fds.dup()
		}
		if err != nil {
			fds.close()
			for i := range items {
				items[i].Close()
			}
			k.forget()
			c.Close()
			k.disconnected(err)
			return nil, fmt.Errorf("restore %s: %w", l.Key, err)
		}
		k.want[h.Key] = &wanted{held: h, fds: own}
		if !h.Blob {
			items = append(items, Item{Key: h.Key, Meta: h.Meta, Names: h.Names, Files: fds.files(h.Names)})
		}
	}
	k.connected(c)
	return items, nil
}

// Run keeps the connection and puts everything again after each loss, until ctx ends. Once another agent has taken over
// it only watches that there is one. The items stay with the holder.
func (k *Keeper) Run(ctx context.Context) {
	defer func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.client != nil {
			k.client.Close()
			k.client = nil
		}
		k.forget()
	}()
	tick := time.NewTicker(k.cfg.Interval)
	defer tick.Stop()
	for {
		over, vacant := k.look(ctx)
		if over && k.cfg.OnSuperseded != nil {
			k.cfg.OnSuperseded()
			k.cfg.OnSuperseded = nil
		}
		if vacant && k.cfg.OnVacant != nil {
			k.cfg.OnVacant()
			k.cfg.OnVacant = nil
		}
		select {
		case <-tick.C:
		case <-k.kick:
		case <-ctx.Done():
			return
		}
	}
}

// Leave gives up writing for good: an agent that is to end leaves the node to whoever is there or comes.
func (k *Keeper) Leave() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over, k.left = true, true
	if k.client != nil {
		k.client.Close()
		k.client = nil
	}
}

// look pings or reconnects, once. It reports whether another agent has taken over, and whether that one is gone.
func (k *Keeper) look(ctx context.Context) (over, vacant bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	switch {
	case k.left:
		return false, false
	case k.over:
		return true, k.watch(ctx)
	case k.client == nil || k.note(k.client.Ping(ctx)) != nil && !k.over:
		k.reconnect(ctx)
	}
	return k.over, false
}

// watch asks, after another agent has taken over, whether there is still one. The caller holds mu.
func (k *Keeper) watch(ctx context.Context) bool {
	if k.client == nil {
		c, err := dial(ctx, k.cfg.Path, false, k.born)
		if err != nil {
			k.vacant = vacancy{} // who writes is not known without a holder
			return false
		}
		k.client = c
	}
	vacant, generation, err := k.client.Vacant(ctx)
	switch {
	case err != nil: // an older holder does not know
		k.client.Close()
		k.client, k.vacant = nil, vacancy{}
		return false
	case !vacant:
		k.vacant = vacancy{}
		return false
	case k.vacant.since.IsZero() || k.vacant.generation != generation:
		k.vacant = vacancy{generation, time.Now()}
	}
	return time.Since(k.vacant.since) >= k.cfg.Patience
}

// reconnect becomes the writer again. The caller holds mu.
func (k *Keeper) reconnect(ctx context.Context) {
	c, err := dial(ctx, k.cfg.Path, true, k.born)
	if err == nil {
		err = k.refill(ctx, c)
	}
	if errors.Is(err, ErrSuperseded) {
		k.over = true
	}
	if err != nil {
		if c != nil {
			c.Close()
		}
		k.disconnected(err)
		return
	}
	k.connected(c)
}

// refill makes the holder have exactly what is wanted. What is already there by its stamp is left alone. What an agent
// before this one left, and Restore did not get, goes on being held: pods are served on it.
func (k *Keeper) refill(ctx context.Context, c *Client) error {
	there, err := c.list(ctx)
	if err != nil {
		return err
	}
	same := map[Key]bool{}
	for _, h := range there {
		w, ok := k.want[h.Key]
		if !ok && !k.restored {
			h, fds, err := c.get(ctx, h.Key)
			if err != nil {
				return err
			}
			k.want[h.Key] = &wanted{held: h, fds: fds}
			same[h.Key] = true
			continue
		}
		if !ok {
			if err := c.Delete(ctx, h.Key); err != nil {
				return err
			}
			continue
		}
		same[h.Key] = w.Stamp == h.Stamp && w.Stamp != ""
	}
	var full error
	for key, w := range k.want {
		if same[key] {
			continue
		}
		if err := c.put(ctx, w.held, w.fds); errors.Is(err, ErrFull) {
			full = err // hold the others
		} else if err != nil {
			return err
		}
	}
	if full != nil {
		k.cfg.Log.Warn("not everything is held", "err", full)
	}
	return nil
}

// Put has the item held, in place of the one that had its key. The files stay the caller's. The error says that
// it is not held yet; unless it is ErrSuperseded or ErrInvalid, it will be when the holder is back.
func (k *Keeper) Put(ctx context.Context, it Item) error {
	if err := checkItem(it.Key, it.Meta, it.Names, len(it.Files)); err != nil {
		return err
	}
	fds, err := dupFiles(it.Files)
	if err != nil {
		return fmt.Errorf("hold %s: %w", it.Key, err)
	}
	return k.keep(ctx, held{Key: it.Key, Meta: it.Meta, Names: it.Names}, fds)
}

// PutBlob has data held in sealed memory. Data that is held already is not sent again.
func (k *Keeper) PutBlob(ctx context.Context, name string, data []byte) error {
	if old, err := k.Blob(name); err == nil && bytes.Equal(old, data) {
		return nil
	}
	fd, err := newBlob(name, data)
	if err != nil {
		return err
	}
	return k.keep(ctx, blobHeld(name), fdset{fd})
}

func (k *Keeper) keep(ctx context.Context, h held, fds fdset) error {
	h.Stamp = rand.Text()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over {
		fds.close()
		return ErrSuperseded
	}
	if old := k.want[h.Key]; old != nil {
		old.fds.close()
	}
	k.want[h.Key] = &wanted{held: h, fds: fds}
	if k.client == nil {
		return fmt.Errorf("hold %s: %w", h.Key, ErrAbsent)
	}
	if err := k.note(k.client.put(ctx, h, fds)); err != nil {
		return fmt.Errorf("hold %s: %w", h.Key, err)
	}
	return nil
}

// Delete has the item let go of.
func (k *Keeper) Delete(ctx context.Context, key Key) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over {
		return ErrSuperseded
	}
	if old := k.want[key]; old != nil {
		old.fds.close()
		delete(k.want, key)
	}
	if k.client == nil {
		return nil // refill deletes it
	}
	return k.note(k.client.Delete(ctx, key))
}

// DeleteBlob has the blob of that name let go of.
func (k *Keeper) DeleteBlob(ctx context.Context, name string) error {
	return k.Delete(ctx, blobKey(name))
}

// Blob returns the blob of that name as it was last put, by this agent or by the one that Restore took over from.
func (k *Keeper) Blob(name string) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	w := k.want[blobKey(name)]
	if w == nil || len(w.fds) != 1 {
		return nil, fmt.Errorf("blob %s: %w", name, ErrNotFound)
	}
	return readBlob(w.fds[0])
}

// Blobs returns the names of the blobs that begin with prefix, sorted.
func (k *Keeper) Blobs(prefix string) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var names []string
	for key := range k.want {
		if key.Kind == "blob" && len(key.Name) >= len(prefix) && key.Name[:len(prefix)] == prefix {
			names = append(names, key.Name)
		}
	}
	slices.Sort(names)
	return names
}

// State tells how it stands.
func (k *Keeper) State() State {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := State{Connected: k.client != nil && !k.over, Superseded: k.over, Items: len(k.want), Since: k.since, Err: k.last}
	if s.Connected {
		s.Generation = k.client.Generation()
	}
	return s
}

// note draws the conclusions from an answer of the holder and returns it.
func (k *Keeper) note(err error) error {
	switch {
	case err == nil, errors.Is(err, ErrFull), errors.Is(err, ErrInvalid), errors.Is(err, ErrNotFound):
		return err
	case errors.Is(err, ErrSuperseded):
		k.over = true
		k.cfg.Log.Info("another agent has taken over; this one only drains")
		select {
		case k.kick <- struct{}{}:
		default:
		}
	}
	k.client.Close()
	k.client = nil
	k.disconnected(err)
	return err
}

func (k *Keeper) connected(c *Client) {
	k.client, k.restored, k.last, k.since = c, true, nil, time.Now()
	k.cfg.Log.Info("the holder has the listeners", "generation", c.Generation(), "items", len(k.want))
}

// disconnected logs the first of a series.
func (k *Keeper) disconnected(err error) {
	if k.last == nil || k.last == ErrAbsent {
		k.since = time.Now()
		if !k.over {
			k.cfg.Log.Warn("no holder: if this agent is killed now, new connections are refused until it is back", "socket", k.cfg.Path, "err", err)
		}
	}
	k.last = err
}

// forget closes this process's descriptors of what is held.
func (k *Keeper) forget() {
	for key, w := range k.want {
		w.fds.close()
		delete(k.want, key)
	}
}

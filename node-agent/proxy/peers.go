package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// A tunnel lasts as long as its peer can prove who it is, not as long as it could when the tunnel was made. What
// a peer proved last counts for all its tunnels: whoever presents a newer certificate from the same address under
// the same identity keeps those that are open, so that a connection outlives any number of certificates. For that
// the client's side makes a new tunnel beside the old one when its own certificate was renewed, and in time before
// the server's ends.
//
// A tunnel ends, with all it carries, when the newest proof of its peer has expired, when its root is not trusted
// any more, when it was revoked, or when its trust domain was put out of the mesh.

// party is somebody at an address.
type party struct {
	id   mesh.Identity
	addr netip.Addr
}

// tunnel is an open tunnel connection of either direction.
type tunnel struct {
	dir   Direction
	own   mesh.Identity // whose roots the peer is checked against
	party party
	key   hbone.Key // outbound: under which the pool has it
	tls   *tls.Conn
	conns atomic.Int64 // outbound: connections on it

	// Inbound, guarded by peerTable.mu: retire has the client bring new connections by another tunnel. It is nil once
	// that was done.
	retire   func()
	retireAt time.Time
}

// peer is what a party proved last, and its tunnels.
type peer struct {
	chain   []*x509.Certificate
	until   time.Time       // the first of the chain's ends
	under   *identity.Trust // by which the chain was found good last
	tunnels map[*tunnel]struct{}
}

// peerTable holds the tunnels that are open, by who is at the other end.
type peerTable struct {
	mu       sync.Mutex
	peers    map[party]*peer
	outbound map[net.Conn]*tunnel
	renew    map[hbone.Key]time.Time // when the peer of an outbound tunnel is asked to prove itself again
	tunnels  map[hbone.Key]int       // outbound

	early    chan struct{} // something is due before watchPeers meant to look
	distrust chan struct{} // what is trusted has changed
}

func newPeerTable() *peerTable {
	return &peerTable{peers: map[party]*peer{}, outbound: map[net.Conn]*tunnel{}, renew: map[hbone.Key]time.Time{}, tunnels: map[hbone.Key]int{},
		early: make(chan struct{}, 1), distrust: make(chan struct{}, 1)}
}

func (t *peerTable) wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// renewAfter is when, of what is left of a peer's certificate, the peer is asked for a newer one: it has one at
// about half, see identity.Manager.
const renewAfter = 0.75

// retireAfter is when, of what is left of a client's certificate, its tunnel takes no new connections any more. A
// client that then makes another proves itself; Envoy and ztunnel do so for no other reason.
const retireAfter = 0.9

// add enters a tunnel whose handshake has just been made.
func (t *peerTable) add(tn *tunnel, cs tls.ConnectionState, nc net.Conn, by *identity.Trust) {
	until := cs.PeerCertificates[0].NotAfter
	for _, c := range cs.PeerCertificates[1:] {
		if c.NotAfter.Before(until) {
			until = c.NotAfter
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[tn.party]
	if p == nil {
		p = &peer{tunnels: map[*tunnel]struct{}{}}
		t.peers[tn.party] = p
	}
	if p.chain == nil || until.After(p.until) {
		p.chain, p.until, p.under = cs.PeerCertificates, until, by
	}
	p.tunnels[tn] = struct{}{}
	tn.retireAt = time.Now().Add(time.Duration(float64(time.Until(until)) * retireAfter))
	if tn.dir == Outbound {
		t.outbound[nc] = tn
		t.tunnels[tn.key]++
		t.renew[tn.key] = time.Now().Add(max(time.Duration(float64(time.Until(p.until))*renewAfter), time.Second))
	}
	t.wake(t.early)
}

func (t *peerTable) remove(tn *tunnel, nc net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.outbound[nc] == tn {
		delete(t.outbound, nc)
		if t.tunnels[tn.key]--; t.tunnels[tn.key] == 0 {
			delete(t.tunnels, tn.key)
			delete(t.renew, tn.key)
		}
	}
	if p := t.peers[tn.party]; p != nil {
		delete(p.tunnels, tn)
		if len(p.tunnels) == 0 {
			delete(t.peers, tn.party)
		}
	}
}

// ended removes an outbound tunnel that the pool had.
func (t *peerTable) ended(nc net.Conn) {
	t.mu.Lock()
	tn := t.outbound[nc]
	t.mu.Unlock()
	if tn != nil {
		t.remove(tn, nc)
	}
}

// carrier is the tunnel that a stream of the pool is on, nil if it has ended.
func (t *peerTable) carrier(st *hbone.Stream) *tunnel {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.outbound[st.Transport()]
}

// next is when something is due, at the latest in a minute: the clock may be set.
func (t *peerTable) next(now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	first := now.Add(time.Minute)
	for _, p := range t.peers {
		if p.until.Before(first) {
			first = p.until
		}
		for tn := range p.tunnels {
			if tn.retire != nil && tn.retireAt.Before(first) {
				first = tn.retireAt
			}
		}
	}
	for _, at := range t.renew {
		if at.Before(first) {
			first = at
		}
	}
	return max(first.Sub(now), 0)
}

// retire has the clients make new tunnels whose certificates are about to end.
func (t *peerTable) retire(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range t.peers {
		for tn := range p.tunnels {
			if tn.retire != nil && !now.Before(tn.retireAt) {
				tn.retire()
				tn.retire = nil
			}
		}
	}
}

// expired are the tunnels whose peers have nothing valid to show.
func (t *peerTable) expired(now time.Time) map[*tunnel]error {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := map[*tunnel]error{}
	for _, p := range t.peers {
		if now.Before(p.until) {
			continue
		}
		for tn := range p.tunnels {
			out[tn] = fmt.Errorf("the certificate of %s ended at %s and no newer one came", tn.party.id, p.until.UTC().Format(time.RFC3339))
		}
	}
	return out
}

// distrusted are the tunnels whose peers what is trusted now does not let in. trust returns what an identity of
// this node trusts, nil if that is not known. What a refused peer has proved is forgotten: the next proof counts.
func (t *peerTable) distrusted(now time.Time, trust func(mesh.Identity) *identity.Trust, domains []string) map[*tunnel]error {
	type question struct {
		leaf  *x509.Certificate
		trust *identity.Trust
	}
	type tunnels struct {
		of    *peer
		chain []*x509.Certificate
		good  bool // under this very trust already
		list  []*tunnel
	}
	// Chains are verified without the lock: that takes a while.
	ask := map[question]*tunnels{}
	out := map[*tunnel]error{}
	trusts := map[mesh.Identity]*identity.Trust{}
	t.mu.Lock()
	for _, p := range t.peers {
		for tn := range p.tunnels {
			if p.chain == nil {
				out[tn] = fmt.Errorf("%s was refused and has not proved anything since", tn.party.id)
				continue
			}
			if _, known := trusts[tn.own]; !known {
				trusts[tn.own] = trust(tn.own)
			}
			q := question{p.chain[0], trusts[tn.own]}
			if ask[q] == nil {
				good := p.under != nil && q.trust != nil && (p.under == q.trust || p.under.Equal(q.trust))
				ask[q] = &tunnels{of: p, chain: p.chain, good: good}
			}
			ask[q].list = append(ask[q].list, tn)
		}
	}
	t.mu.Unlock()
	found := map[*peer]question{}
	for q, of := range ask {
		var err error
		if q.trust != nil && !of.good {
			if err = q.trust.Check(of.chain, now); err == nil {
				found[of.of] = q
			}
		}
		for _, tn := range of.list {
			switch {
			case err != nil:
				out[tn] = fmt.Errorf("%s is not trusted any more: %w", tn.party.id, err)
			case tn.dir == Inbound && !slices.Contains(domains, tn.party.id.TrustDomain):
				out[tn] = fmt.Errorf("%s is not trusted any more: its trust domain is none of %q", tn.party.id, domains)
			}
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for p, q := range found {
		if p.chain != nil && p.chain[0] == q.leaf {
			p.under = q.trust
		}
	}
	for tn := range out {
		if p := t.peers[tn.party]; p != nil && p.chain != nil && ask[question{p.chain[0], trusts[tn.own]}] != nil && tn.dir == Outbound {
			p.chain = nil
		}
	}
	return out
}

// proved reports whether the tunnel's peer has something to show.
func (t *peerTable) proved(tn *tunnel) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[tn.party]
	return p != nil && p.chain != nil
}

// due takes the keys whose peers have to prove themselves again now.
func (t *peerTable) due(now time.Time) []hbone.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	var keys []hbone.Key
	for k, at := range t.renew {
		if !now.Before(at) {
			keys = append(keys, k)
			delete(t.renew, k)
		}
	}
	return keys
}

// busy reports whether a tunnel under the key carries anything.
func (t *peerTable) busy(k hbone.Key) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tn := range t.outbound {
		if tn.key == k && tn.conns.Load() > 0 {
			return true
		}
	}
	return false
}

func (t *peerTable) renewAt(k hbone.Key, at time.Time) {
	t.mu.Lock()
	if t.tunnels[k] > 0 {
		t.renew[k] = at
	}
	t.mu.Unlock()
	t.wake(t.early)
}

// keysOf are the keys of outbound tunnels under an identity.
func (t *peerTable) keysOf(id mesh.Identity) []hbone.Key {
	t.mu.Lock()
	defer t.mu.Unlock()
	seen := map[hbone.Key]bool{}
	var keys []hbone.Key
	for _, tn := range t.outbound {
		if tn.own == id && !seen[tn.key] {
			seen[tn.key] = true
			keys = append(keys, tn.key)
		}
	}
	return keys
}

// len returns how many tunnels are open in either direction.
func (t *peerTable) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, p := range t.peers {
		n += len(p.tunnels)
	}
	return n
}

const (
	renewAgain   = time.Second            // the first pause after a peer did not prove itself; it doubles up to renewAtMost
	renewAtMost  = 30 * time.Second       //
	renewing     = 8                      // handshakes at a time that nobody waits for
	secondChance = 500 * time.Millisecond // to prove itself, for a server whose root was dropped
)

// watchPeers ends the tunnels whose peers cannot prove who they are any more.
func (p *Proxy) watchPeers() {
	timer := time.NewTimer(time.Minute)
	defer timer.Stop()
	slots := make(chan struct{}, renewing)
	for {
		timer.Reset(p.peers.next(time.Now()))
		select {
		case <-p.ctx.Done():
			return
		case <-p.peers.distrust:
			p.recheckPeers()
		case <-p.peers.early:
		case <-timer.C:
		}
		p.peers.retire(time.Now())
		p.endTunnels(p.peers.expired(time.Now()))
		for _, k := range p.peers.due(time.Now()) {
			p.wg.Go(func() {
				select {
				case slots <- struct{}{}:
				case <-p.ctx.Done():
					return
				}
				defer func() { <-slots }()
				p.renewTunnel(k)
			})
		}
	}
}

// renewTunnel makes both ends of a tunnel prove themselves anew, as long as there is something on it.
func (p *Proxy) renewTunnel(k hbone.Key) {
	p.pool.Drain(func(x hbone.Key) bool { return x == k })
	for wait := renewAgain; p.peers.busy(k); wait = min(2*wait, renewAtMost) {
		ctx, cancel := context.WithTimeout(p.ctx, p.cfg.ConnectTimeout+p.cfg.HandshakeTimeout)
		err := p.pool.Warm(ctx, k)
		cancel()
		if err == nil {
			return
		}
		p.log.Debug("a peer has not proved itself again", "peer", k.Addr, "error", err, "retry_in", wait)
		select {
		case <-p.ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
}

// recheckPeers checks what every peer has proved against what is trusted now. A client that fails is cut off at
// once; a server is asked first whether it has a better certificate, which it may have had for long.
func (p *Proxy) recheckPeers() {
	check := func() map[*tunnel]error {
		return p.peers.distrusted(time.Now(), p.trust, p.store.Load().Config().TrustDomains())
	}
	bad := check()
	servers := map[hbone.Key]bool{}
	for tn, err := range bad {
		if tn.dir == Outbound && tn.conns.Load() > 0 {
			servers[tn.key] = true
			continue
		}
		p.endTunnels(map[*tunnel]error{tn: err})
		delete(bad, tn)
	}
	if len(bad) == 0 {
		return
	}
	p.pool.Drain(func(k hbone.Key) bool { return servers[k] })
	ctx, cancel := context.WithTimeout(p.ctx, secondChance)
	defer cancel()
	slots := make(chan struct{}, 4*renewing)
	var wg sync.WaitGroup
	for k := range servers {
		slots <- struct{}{}
		wg.Go(func() { defer func() { <-slots }(); _ = p.pool.Warm(ctx, k) }) // without success there is no proof
	}
	wg.Wait()
	for tn := range bad {
		if p.peers.proved(tn) {
			delete(bad, tn)
		}
	}
	p.endTunnels(bad)
}

// trust is what an identity of this node checks its peers against, nil if it has no certificate now.
func (p *Proxy) trust(id mesh.Identity) *identity.Trust {
	ctx, cancel := context.WithCancel(p.ctx)
	cancel() // nobody waits for a certificate here
	b, err := p.cfg.Certs.Bundle(ctx, id)
	if err != nil {
		return nil
	}
	return b.Trust()
}

// endTunnels resets tunnels with all they carry.
func (p *Proxy) endTunnels(why map[*tunnel]error) {
	if len(why) == 0 {
		return
	}
	var all []ending
	for _, c := range p.conns.list(func(c *conn) bool { return why[c.via.Load()] != nil }) {
		all = append(all, ending{c, PeerUntrusted, why[c.via.Load()].Error()})
	}
	endEach(all)
	for tn, err := range why {
		hbone.ResetTLS(tn.tls)
		p.log.Info("a tunnel was ended", "direction", tn.dir.String(), "peer", tn.party.addr, "error", err)
	}
}

// enter adds a tunnel, whose peer the given bundle has verified. Trust that changed since then counts.
func (p *Proxy) enter(tn *tunnel, tc *tls.Conn, b *identity.Bundle) error {
	p.peers.add(tn, tc.ConnectionState(), tc, b.Trust())
	if now := p.trust(tn.own); now != nil && now != b.Trust() {
		if err := now.Check(tc.ConnectionState().PeerCertificates, time.Now()); err != nil {
			return err
		}
	}
	if d := p.store.Load().Config(); tn.dir == Inbound && d.TrustDomain != "" && !slices.Contains(d.TrustDomains(), tn.party.id.TrustDomain) {
		return errors.New("its trust domain has just been put out of the mesh")
	}
	return nil
}

// TrustChanged says that roots, or what they have revoked, changed for some identity of this node.
func (p *Proxy) TrustChanged() { p.peers.wake(p.peers.distrust) }

// Renewed says that an identity has a new certificate. New connections make tunnels under it at once; for those
// that are open under the old one, the peers are shown the new one.
func (p *Proxy) Renewed(id mesh.Identity) {
	p.pool.Drain(func(k hbone.Key) bool { return k.Src == id })
	for _, k := range p.peers.keysOf(id) {
		p.peers.renewAt(k, time.Now())
	}
	p.TrustChanged() // it may have come with other roots
}

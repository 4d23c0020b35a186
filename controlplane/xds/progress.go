package xds

import (
	"maps"
	"time"
)

// Progress is how far a node has come: an acknowledgement of our agent says that it enforces, not that it has heard.
type Progress struct {
	// Revision is the one of [Cache.Revision] up to which everything that decides about connections holds on the
	// node, but for what it refuses. It stays when the node disconnects: a node goes on with its last state.
	Revision uint64
	// Refused are policies that the node cannot use, by resource name, and why. It keeps their last state.
	Refused map[string]string
	// Trouble is why the node does not come further, as far as it has said.
	Trouble string
	// Connected is when the stream began; zero while there is none.
	Connected time.Time
}

// deciding are the types on which decisions about connections depend.
var deciding = []string{TypeMeshConfig, TypeAuthorization, TypeAudit, TypeAddress}

// progress is what the stream's goroutine knows; false before the client has asked for what decides.
func (c *client) progress() (Progress, bool) {
	p := Progress{}
	for _, kind := range deciding {
		w := c.watches[kind]
		if w == nil && (kind == TypeMeshConfig || kind == TypeAudit) {
			continue // a ztunnel does not know them
		}
		if w == nil || w.settled == 0 {
			return p, false
		}
		if p.Revision == 0 || w.settled < p.Revision {
			p.Revision = w.settled
		}
		if w.trouble != "" {
			p.Trouble = w.trouble
		}
	}
	for _, kind := range []string{TypeAuthorization, TypeAudit} {
		if w := c.watches[kind]; w != nil && len(w.refused) > 0 {
			if p.Refused == nil {
				p.Refused = map[string]string{}
			}
			maps.Copy(p.Refused, w.refused)
		}
	}
	return p, true
}

// Nodes returns how far every node has come that ever was connected to this replica and was not forgotten.
func (s *Server) Nodes() map[string]Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.nodes)
}

// Forget drops what is known about a node that is gone.
func (s *Server) Forget(node string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.nodes[node].Connected.IsZero() {
		delete(s.nodes, node)
	}
}

// noteProgress publishes how far a stream's node has come. Of several streams, as of an agent and its successor,
// the one that came last speaks for the node.
func (s *Server) noteProgress(info *Stream, c *client) {
	if info.Node == "" {
		return
	}
	now, ok := c.progress()
	s.mu.Lock()
	old := s.nodes[info.Node]
	if info.Connected.Before(old.Connected) {
		s.mu.Unlock()
		return
	}
	if !ok { // until it says more, it goes on with what its predecessor left
		now = old
	}
	now.Connected = info.Connected
	changed := old.Revision != now.Revision || old.Trouble != now.Trouble || old.Connected != now.Connected || !maps.Equal(old.Refused, now.Refused)
	s.nodes[info.Node] = now
	s.mu.Unlock()
	if changed && s.cfg.OnProgress != nil {
		s.cfg.OnProgress()
	}
}

// left notes that a stream is gone.
func (s *Server) left(info *Stream) {
	s.mu.Lock()
	p, ok := s.nodes[info.Node]
	mine := ok && p.Connected.Equal(info.Connected)
	if mine {
		p.Connected = time.Time{}
		s.nodes[info.Node] = p
	}
	s.mu.Unlock()
	if mine && s.cfg.OnProgress != nil {
		s.cfg.OnProgress()
	}
}

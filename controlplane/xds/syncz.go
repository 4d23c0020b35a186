package xds

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// Synced is how far one connected client has come, as operators read it.
type Synced struct {
	Proxy     string            `json:"proxy"` // the node, or the waypoint's pod
	Namespace string            `json:"namespace,omitempty"`
	Waypoint  string            `json:"waypoint,omitempty"`
	Type      string            `json:"type"` // node or waypoint
	Connected *time.Time        `json:"connected,omitempty"`
	States    map[string]string `json:"states"` // by the last word of the type's URL
	Trouble   string            `json:"trouble,omitempty"`

	// What istioctl version reads.
	IstioVersion string `json:"istio_version,omitempty"`
	ProxyType    string `json:"proxy_type,omitempty"`
}

// What a client does with a type, in the words that istioctl's users know.
const (
	stateSynced  = "SYNCED"
	stateStale   = "STALE"    // sent, and not acknowledged
	stateNotSent = "NOT SENT" // asked for, and there was nothing to send
	stateRefused = "REFUSED"  // the last response was rejected
)

func (t TypeState) state() string {
	switch {
	case t.Nack != "":
		return stateRefused
	case t.Sent == "":
		return stateNotSent
	case t.Sent != t.Acked:
		return stateStale
	}
	return stateSynced
}

// shortType is the last word of a type's URL.
func shortType(url string) string { return url[strings.LastIndexByte(url, '.')+1:] }

// Synced lists the clients that are connected to this replica.
func (s *Server) Synced() []Synced {
	out := []Synced{}
	for _, st := range s.Streams() {
		row := Synced{Proxy: st.Node, Type: "node", Connected: &st.Connected, States: map[string]string{}, ProxyType: "ztunnel",
			IstioVersion: st.described().version}
		for url, t := range st.Types() {
			row.States[shortType(url)] = t.state()
			if t.Nack != "" {
				row.Trouble = t.Nack
			}
		}
		out = append(out, row)
	}
	if s.cfg.Waypoints != nil {
		out = append(out, s.cfg.Waypoints.synced()...)
	}
	slices.SortFunc(out, func(a, b Synced) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Proxy, b.Proxy))
	})
	return out
}

// stale says of each kind of which there is something, as keys of waypoint.ActiveKey begin, whether a pod's Envoy does not use
// all of it as it was sent.
func (t *told) stale(p *envoyPod) map[string]bool {
	out := map[string]bool{}
	for key, version := range t.versions {
		kind := activeKind(key)
		out[kind] = out[kind] || p.active[key] != version
	}
	return out
}

func activeKind(key string) string {
	kind, _, _ := strings.Cut(key, "/")
	return kind
}

// synced lists the waypoints' pods: of theirs a type is synced when Envoy uses what it was sent.
func (w *Waypoints) synced() []Synced {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []Synced
	for name, t := range w.open {
		short, _, _ := strings.Cut(name.Hostname, ".")
		for p := range t.pods {
			row := Synced{Proxy: p.name, Namespace: name.Namespace, Waypoint: short, Type: "waypoint", States: map[string]string{}, Trouble: t.failed,
				ProxyType: "waypoint", IstioVersion: p.self.version}
			for kind, stale := range t.stale(p) {
				row.States[kind] = stateSynced
				if stale {
					row.States[kind] = stateStale
				}
			}
			for url, why := range p.nack {
				row.States[shortType(url)], row.Trouble = stateRefused, why
			}
			out = append(out, row)
		}
	}
	return out
}

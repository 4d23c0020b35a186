// Package datapath is the kernel side of a node as the agent sees it: it loads the BPF programs of package
// bpf, plumbs pods into them, tells them which addresses are mesh, and reads back what is really in force.
//
//	           pod's network namespace                                     node
//	app ── connect ──▶ connect4/6: mesh? set the mark ┐
//	                                                  ▼
//	       rule (mark) → local route → lo → sk_lookup ──▶ outbound listener ══ tunnel ═══▶ eth0 ─▶ guard ─▶
//	app ◀── lo ── inbound dial (client's ip and port) ◀── agent ◀── HBONE listener ◀─ sk_lookup ◀─ eth0
//	app ◀───────────── ticket (kubelet, the agent's own dial) ──── sk_lookup
//
// It owns everything under its bpffs directory, the rule and route of each enrolled pod's namespace and the
// guard on the node side of its veth; there is one writer, by a lock on that directory. It must not know
// tunnels or Kubernetes: a pod is a UID, a namespace, addresses, and who it is in the mesh.
//
// Policies are internal/mesh's. What this package adds is their form in the kernel: rules.go computes the rows of a
// Snapshot, gates.go writes them, directs.go ends what a new Snapshot does not allow, events.go tells what the kernel
// decided by itself.
//
// Whatever fails, fails closed: a pod that is enrolled has no way around the agent, and what cannot be
// enrolled is refused with a reason and left as it was.
package datapath
